"""The SQLite journal: its file, its lock, forks, damage and full disks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import attrs
import pytest

from lianlian_async.clock import Moment
from lianlian_async.errors import JournalError
from lianlian_async.journal import SqliteJournal, SqliteReader, Standing, State, files, sqlite_schema
from lianlian_async.journal.sqlite_file import JournalFile, restore
from tests.support import ROOT
from tests.support.journals import MADE, held, intent, now

pytestmark = pytest.mark.anyio

EARLIER = datetime(2026, 1, 5, 8, tzinfo=UTC)

_PROGRAM = """
import sys, os, signal, anyio
sys.path.insert(0, {root!r})
from tests.support.journals import MADE, held, intent, now
from lianlian_async.journal import SqliteJournal

async def main():
    async with SqliteJournal({path!r}) as journal:
        for number in range(3):
            await journal.begin(intent(f"R-{{number}}"), now())
        await journal.finish(held("R-1"), MADE)
        {then}

anyio.run(main)
"""
_STAY = "print('open', flush=True); await anyio.sleep(3600)"
_DIE = "os.kill(os.getpid(), signal.SIGKILL)"
_CHECKPOINT = "journal._file._longest_log = 0; await journal.begin(intent('R-3'), now()); "
_DIE_IN_CHECKPOINT = """
        updates = []
        def trace(statement):
            updates.extend([statement] * statement.startswith("UPDATE journal SET inode"))
            if len(updates) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        journal._file._connection.set_trace_callback(trace)
"""
_FULL_DISK_IN_CHECKPOINT = """
        import resource
        for numbers in range(4, 500), range(500, 540):
            journal._file._connection.execute("PRAGMA wal_checkpoint")
            async with anyio.create_task_group() as group:
                for number in numbers:
                    group.start_soon(journal.begin, intent(f"R-{number}"), now())
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.stat(journal._name).st_size, limits[1]))
        try:
            journal._file._longest_log = 0
            await journal.begin(intent("R-3"), now())
        except Exception as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.sqlite"


def program(path, then):
    """Another process that begins R-0, R-1 and R-2, finishes R-1, and then does ``then``."""
    return [sys.executable, "-c", _PROGRAM.format(root=str(ROOT), path=str(path), then=then)]


def reading(path):
    """Another process that reads the journal."""
    text = """
import sys, anyio
from lianlian_async.journal import SqliteReader

async def main():
    async with SqliteReader(sys.argv[1]) as reader:
        print(sum((await reader.counts()).values()))

anyio.run(main)
"""
    return [sys.executable, "-c", text, str(path)]


# ── the lock ─────────────────────────────────────────────────────────────────────────────────────


async def test_open_refunds_of_a_killed_process_are_unresolved(path):
    """After SIGKILL, resolved refunds are resolved, and begun ones are UNRESOLVED, even during their lease."""
    assert (await anyio.run_process(program(path, _DIE), check=False)).returncode == -signal.SIGKILL
    async with SqliteJournal(path) as journal:
        at = now()
        standing, entry = await journal.begin(intent("R-0"), at)
        assert (standing, entry.sent_at) == (Standing.UNRESOLVED, at)
        assert (await journal.begin(intent("R-1"), at))[0] is Standing.FINISHED
        assert [entry.no_refund async for entry in journal.pending()] == ["R-0", "R-2"]


async def test_a_second_process_is_refused_until_the_first_ends(path):
    """Opening a journal that another process has open raises; after that process is killed, it opens."""
    async with await anyio.open_process(program(path, _STAY)) as other:
        assert (await other.stdout.receive()).startswith(b"open")
        with pytest.raises(JournalError, match=r"journal\.sqlite: .* has it open; .*PostgresJournal") as caught:
            async with SqliteJournal(path):
                pass
        assert "another file" not in str(caught.value)
        who = rf"process {other.pid} on {re.escape(socket.gethostname())} \(-c\), since (\S+) has it open"
        since = datetime.fromisoformat(re.search(who, str(caught.value))[1])
        assert abs(datetime.now(UTC) - since) < timedelta(minutes=10)
        other.kill()
    async with SqliteJournal(path) as journal:
        assert await journal.find("R-1")


async def test_a_second_journal_of_the_same_process_is_refused(path):
    """The same file cannot be opened twice, also by another name; the first journal keeps working."""
    link = path.with_name("link")
    async with SqliteJournal(path) as journal:
        link.symlink_to(path)
        with pytest.raises(JournalError, match=f"process {os.getpid()} on"):
            async with SqliteJournal(link):
                pass
        with pytest.raises(RuntimeError, match="already open"):
            async with journal:
                pass
        await journal.begin(intent(), now())


async def test_a_forked_child_is_refused_and_does_no_harm(path):
    """In a forked child every method raises; the end of the child does not end the parent's lock."""
    then = """
        child = os.fork()
        if not child:
            for verb in (journal.find("R-0"), journal.counts(), anext(journal.pending())):
                try:
                    verb.send(None)
                except Exception as error:
                    print(type(error).__name__, "forked" in str(error), flush=True)
            journal._file._opened.close()  # the end of the interpreter closes open files like this
            os._exit(0)
        os.waitpid(child, 0)
        for number in range(3, 500):
            await journal.begin(intent(f"R-{number}"), now())
            if number % 100 == 0:
                await journal.finish(held(f"R-{number}"), MADE)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process = await anyio.run_process(program(path, then.strip()), check=False)
    assert process.stdout.decode() == "JournalError True\n" * 3
    async with SqliteJournal(path) as journal:
        assert sum((await journal.counts()).values()) == 500


@pytest.mark.parametrize("suffix", ["-owner", "", "-wal"])
async def test_closing_another_handle_keeps_the_lock(path, suffix):
    """If the same process opens and closes the files, other processes are still refused."""
    async with SqliteJournal(path):
        await anyio.Path(f"{path}{suffix}").read_bytes()
        opened = await anyio.run_process(program(path, "print('open')"), check=False)
    assert opened.returncode == 1
    assert b"has it open" in opened.stderr


async def test_a_reader_does_not_delete_the_wal_of_a_process_that_closed_another_handle(path):
    """Closing any handle of a file ends SQLite's lock on it, so the reader is the last connection for SQLite."""
    async with SqliteJournal(path) as journal:
        await anyio.Path(path).read_bytes()
        await anyio.run_process(reading(path))
        await journal.begin(intent(), now())


def test_a_forked_child_does_not_keep_the_lock_of_its_parent(path):
    """After the parent is killed, the journal can be opened, although the child still runs."""
    then = """
        if not os.fork():
            print(os.getpid(), flush=True)  # only now has it given the lock up
            signal.pause()
        await anyio.sleep(3600)
    """

    async def main():
        async with SqliteJournal(path) as journal:
            assert await journal.find("R-1")

    with subprocess.Popen(program(path, then.strip()), stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        try:
            anyio.run(main)
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["/usr/bin/lianlian", "batch"], "lianlian"),
        (["/lib/python/lianlian_async/__main__.py", "batch"], "lianlian_async"),
        ([""], "python"),
    ],
)
async def test_the_owner_file_names_the_program_and_none_of_its_arguments(path, arguments, name, monkeypatch):
    """The file contains the name while the journal is open, and is empty afterwards."""
    monkeypatch.setattr(sys, "argv", arguments)
    owner = anyio.Path(f"{path}-owner")
    async with SqliteJournal(path):
        assert f"process {os.getpid()} on {socket.gethostname()} ({name}), since 2" in await owner.read_text()
    assert await owner.read_bytes() == b""


async def test_an_owner_without_a_name_is_reported_as_another_process(path):
    """A process that has just taken the lock has not written its name yet."""
    async with SqliteJournal(path):
        await anyio.Path(f"{path}-owner").write_bytes(b"")
        with pytest.raises(JournalError, match="another process has it open"):
            async with SqliteJournal(path):
                pass


def test_without_flock_sqlite_locks_another_file(path, monkeypatch):
    """As on Windows: a second process is refused, and the error names the first, until that closes the journal."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    elsewhere = runpy.run_path(files.__file__)
    lock = elsewhere["file_lock"]
    with lock(path), pytest.raises(elsewhere["FileLocked"], match=f"process {os.getpid()} on"), lock(path):
        pass
    with lock(path):
        pass


async def test_a_child_process_leaves_the_journal_to_its_parent(path, monkeypatch):
    """In another process an open journal raises, and closing it does nothing."""
    async with SqliteJournal(path) as journal:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(os, "getpid", lambda: -1)
            with pytest.raises(JournalError, match="open the journal after the fork"):
                await journal.find("R-1")
            await journal.__aexit__(None, None, None)
        await journal.begin(intent(), now())


async def test_using_a_closed_journal_raises(path):
    """Before and after ``async with`` every method raises ``RuntimeError``, also during ``pending``."""
    journal = SqliteJournal(path)
    with pytest.raises(RuntimeError, match="not open"):
        await journal.find("R-1")
    async with journal:
        for number in range(501):
            await journal.begin(intent(f"R-{number}"), now())
        pending = journal.pending()
        await anext(pending)
    with pytest.raises(RuntimeError, match="not open"):
        await journal.finish(held("R-1"), MADE)
    with pytest.raises(RuntimeError, match="not open"):
        async for _ in pending:
            pass
    assert repr(journal) == f"<SqliteJournal {path}>"


# ── the file ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_lease_ends_by_the_boot_clock(path):
    """Within one boot a step of the wall clock neither ends nor extends a lease."""
    async with SqliteJournal(path) as journal:
        at = now()
        await journal.begin(intent(lease=60), at)
        for step in (-7200, 600, 901, 86_400):
            early = attrs.evolve(at.after(59), wall=at.wall + timedelta(seconds=step))
            assert (await journal.begin(intent(lease=60), early))[0] is Standing.LEASED
        late = attrs.evolve(at.after(61), wall=at.wall - timedelta(hours=2))
        standing, entry = await journal.begin(intent(lease=60), late)
        assert (standing, entry.sent_at) == (Standing.UNRESOLVED, at.after(60))


@pytest.mark.parametrize("gateway", [None, EARLIER])
async def test_after_a_boot_sent_at_is_now_unless_the_gateways_time_is_known(path, gateway):
    """Without the gateway's time no clock can measure the age of the send, so the entry counts it from now."""
    sent_at = Moment(EARLIER, 5.0, "an earlier boot", gateway)
    async with SqliteJournal(path) as journal:
        _, entry = await journal.begin(intent(), sent_at)
        await journal.release(entry, sent_at)
    async with SqliteJournal(path) as journal:
        at = now()
        for _ in range(2):
            standing, entry = await journal.begin(intent(lease=-1), at)
            expected = at if gateway is None else sent_at
            assert (standing, entry.sent_at) == (Standing.UNRESOLVED, expected)


async def begin_new(path, at, grace=900.0):
    """Open the journal and begin a refund that it does not have."""
    async with SqliteJournal(path) as journal:
        standing, entry = await journal.begin(intent(f"R-{at.timeline}-{at.boot}", grace=grace), at)
        return standing, entry.sent_at


async def test_a_restored_journal_measures_the_grace_by_the_boot_clock(path, tmp_path):
    """A refund that it lacks counts as sent at the restore. If no clock measures the time since, it counts from now."""
    restored = Moment(EARLIER, 5.0, "boot 1")
    with contextlib.closing(JournalFile(str(tmp_path / "lost"))) as file:
        file.backup(tmp_path / "backup")
    restore(tmp_path / "backup", path, restored)
    corrected = attrs.evolve(restored, wall=EARLIER + timedelta(days=400))
    assert await begin_new(path, corrected.after(899)) == (Standing.QUERY_FIRST, restored)
    assert await begin_new(path, corrected.after(900)) == (Standing.QUERY_FIRST, None)
    assert await begin_new(path, corrected, grace=None) == (Standing.NEW, None)
    second = Moment(corrected.wall + timedelta(days=1), 7.0, "boot 2")
    assert await begin_new(path, second) == (Standing.QUERY_FIRST, second)
    dated = attrs.evolve(second, gateway=EARLIER)
    assert await begin_new(path, dated.after(890)) == (Standing.QUERY_FIRST, dated)
    third = attrs.evolve(dated, timeline="boot 3")
    assert await begin_new(path, attrs.evolve(third.after(2000), gateway=None)) == (Standing.QUERY_FIRST, dated)
    assert await begin_new(path, third.after(914)) == (Standing.QUERY_FIRST, dated)
    assert await begin_new(path, third.after(915)) == (Standing.QUERY_FIRST, None)
    behind = attrs.evolve(third.after(3000), wall=EARLIER)
    assert await begin_new(path, behind) == (Standing.QUERY_FIRST, behind)
    assert await begin_new(path, behind.after(901)) == (Standing.QUERY_FIRST, None)


async def test_a_backup_can_be_read_but_is_a_journal_only_after_its_restore(path, tmp_path):
    """A backup that was only copied back lacks later refunds, and its id is the journal's: it is refused."""
    async with SqliteJournal(path) as journal:
        await journal.begin(intent("R-1"), now())
        journal_id = journal.id
        with contextlib.closing(JournalFile(str(path), read_only=True)) as file:
            file.backup(tmp_path / "backup")
    copies = [path, tmp_path / "backup of the backup"]
    shutil.copy(tmp_path / "backup", path)
    with contextlib.closing(JournalFile(str(path), read_only=True)) as file:
        file.backup(copies[1])
    for copy in copies:
        with pytest.raises(JournalError, match="this is a backup or another copy of a journal"):
            async with SqliteJournal(copy):
                pass
        async with SqliteReader(copy) as reader:
            assert (await reader.find("R-1")).state is State.UNRESOLVED
            assert reader.id == journal_id
        restored = copy.with_name(f"{copy.name}-restored")
        restore(copy, restored, now())
        async with SqliteJournal(restored) as opened:
            assert opened.id == journal_id
            assert (await opened.begin(intent("R-2"), now()))[0] is Standing.QUERY_FIRST


async def test_a_copy_of_a_journal_is_refused(path, tmp_path):
    """With a copy, each of two processes would send the refunds of the other one. A renamed journal is no copy."""
    async with SqliteJournal(path) as journal:
        await journal.begin(intent("R-1"), now())
    copy = tmp_path / "copy"
    shutil.copy2(path, copy)
    with pytest.raises(JournalError, match=r"this is a backup or another copy of .* use `lianlian journal restore"):
        async with SqliteJournal(copy):
            pass
    path.rename(tmp_path / "renamed")
    async with SqliteJournal(tmp_path / "renamed") as journal:
        assert (await journal.begin(intent("R-2"), now()))[0] is Standing.NEW
    restore(copy, path, now())
    for number in ("R-2", "R-3"):
        async with SqliteJournal(path) as journal:
            assert (await journal.begin(intent(number), now()))[0] is Standing.QUERY_FIRST


async def test_a_copy_with_the_inode_number_of_the_removed_journal_is_refused(path, tmp_path):
    """ext4 gives a new file the number of the file that was just removed."""
    async with SqliteJournal(path) as journal:
        if "." not in journal._file._inode:
            pytest.skip("the file system, such as overlayfs in a container, has no inode generations")
    copy = tmp_path / "copy"
    shutil.copy2(path, copy)
    async with SqliteJournal(path) as journal:
        await journal.begin(intent("R-1"), now())
    path.unlink()
    shutil.copy2(copy, path)
    with pytest.raises(JournalError, match="this is a backup or another copy"):
        async with SqliteJournal(path):
            pass


async def test_a_restored_journal_replaces_no_symlink_and_is_writable(path, tmp_path):
    """The link may name a persistent disk: the journal is created there, and the WAL of the lost one is found there."""
    link, backup = tmp_path / "link", tmp_path / "backup"
    with contextlib.closing(JournalFile(str(path))) as file:
        file.backup(backup)
    path.unlink()
    backup.chmod(0o400)
    link.symlink_to(path)
    log = path.with_name(f"{path.name}-wal")
    log.touch()
    with pytest.raises(JournalError, match=r"move .*/journal\.sqlite-wal away"):
        restore(backup, link, now())
    log.unlink()
    restore(backup, link, now())
    assert (link.readlink(), backup.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (path, 0o400, 0o600)
    async with SqliteJournal(path) as journal:
        assert (await journal.begin(intent(), now()))[0] is Standing.QUERY_FIRST


@pytest.mark.parametrize("then", [_DIE, _CHECKPOINT + _DIE], ids=["before a checkpoint", "after it"])
async def test_a_journal_without_its_wal_is_refused(path, tmp_path, then):
    """After a crash, only the WAL has the latest commits; somebody may delete it, or move the journal without it."""
    await anyio.run_process(program(path, then), check=False)
    log, moved = path.with_name(f"{path.name}-wal"), tmp_path / "moved.sqlite"
    kept = log.read_bytes()
    for remove in (log.unlink, log.touch):  # SQLite leaves an empty WAL if the killed process still runs
        remove()
        with pytest.raises(JournalError, match=r"-wal is missing or empty .* use `lianlian journal restore FILE`"):
            async with SqliteJournal(path):
                pass
    shutil.copy2(path, moved)
    restore(moved, tmp_path / "restored.sqlite", now())
    async with SqliteJournal(tmp_path / "restored.sqlite") as journal:
        assert (await journal.begin(intent("R-9"), now()))[0] is Standing.QUERY_FIRST
    log.write_bytes(kept)
    async with SqliteJournal(path) as journal:
        assert (await journal.begin(intent("R-1"), now()))[0] is Standing.FINISHED


@pytest.mark.parametrize("remove", [Path.unlink, lambda path: os.truncate(path, 0)], ids=["moved", "truncated"])
async def test_a_wal_without_its_journal_is_refused(path, remove):
    """Somebody may move the file without its WAL after a crash; SQLite would delete the WAL for a new or empty file."""
    await anyio.run_process(program(path, _DIE), check=False)
    log = path.with_name(f"{path.name}-wal")
    kept = log.read_bytes()
    remove(path)
    for opened in SqliteJournal(path), SqliteReader(path):
        with pytest.raises(JournalError, match=r"the file is missing or empty, but .*-wal has its latest refunds"):
            async with opened:
                pass
        assert log.read_bytes() == kept


async def test_the_wal_is_written_back_unless_a_reader_needs_it(path, monkeypatch):
    """With a reader, it grows and the journal goes on; afterwards it gets short again."""
    monkeypatch.setattr(sqlite_schema, "CHECKPOINT_PAGES", 20)
    log, longest = path.with_name(f"{path.name}-wal"), 50 * 4096
    async with SqliteJournal(path) as journal:

        async def begin(numbers):
            for number in numbers:
                await journal.begin(intent(f"R-{number}"), now())

        await begin(range(30))
        assert log.stat().st_size < longest
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            assert reader.execute("SELECT count(*) FROM refunds").fetchall() == [(30,)]
            await begin(range(30, 60))
            assert log.stat().st_size > longest
        await begin(range(60, 100))
        assert log.stat().st_size < longest
        assert (await journal.counts())[State.UNRESOLVED] == 100


async def test_another_program_may_complete_the_file_of_a_killed_process(path):
    """Each program that opens the journal and closes it writes the WAL into the file and deletes the WAL."""
    await anyio.run_process(program(path, _DIE), check=False)
    assert _sqlite(path, "SELECT count(*) FROM refunds") == [(3,)]
    assert not path.with_name(f"{path.name}-wal").exists()
    async with SqliteJournal(path) as journal:
        assert (await journal.begin(intent("R-1"), now()))[0] is Standing.FINISHED


async def test_a_process_may_be_killed_during_a_checkpoint(path):
    """The command that shows the journal may be the next one to open it; it leaves the WAL to the next session."""
    await anyio.run_process(program(path, _DIE_IN_CHECKPOINT.strip() + "\n        " + _CHECKPOINT), check=False)
    assert (await anyio.run_process(reading(path))).stdout == b"3\n"
    async with SqliteJournal(path) as journal:
        assert (await journal.begin(intent("R-3"), now()))[0] is Standing.NEW


async def test_the_disk_may_be_full_during_a_checkpoint(path):
    """The call fails; after space was freed and the process has ended, the journal can be opened."""
    process = await anyio.run_process(program(path, _FULL_DISK_IN_CHECKPOINT.strip()))
    assert b"disk I/O error" in process.stdout  # errno EFBIG; ENOSPC on a full disk
    assert not path.with_name(f"{path.name}-wal").exists()
    async with SqliteJournal(path) as journal:
        assert (await journal.begin(intent("R-3"), now()))[0] is Standing.NEW


async def test_a_journal_whose_file_alone_is_mounted_is_refused(path, monkeypatch):
    """A container may mount only the file: the WAL would be in the container, and be lost with it."""
    stat = Path.stat

    def mounted(self, **options):
        device = 2 if self == path else 1
        return os.stat_result([*stat(self, **options)[:2], device, *stat(self, **options)[3:]])

    monkeypatch.setattr(Path, "stat", mounted)
    with pytest.raises(JournalError, match="mount the journal's folder, not only its file"):
        async with SqliteJournal(path):
            pass
    async with SqliteReader(path) as reader:
        assert reader.problem.endswith("mount the journal's folder, not only its file")


async def test_commits_survive_a_power_failure(path):
    """Every commit is synced: with ``synchronous = normal`` the last commits in the WAL could be lost."""
    async with SqliteJournal(path) as journal:
        full = 2
        assert journal._file._connection.execute("PRAGMA synchronous").fetchone() == (full,)


async def test_a_closed_journal_is_one_readable_file(path):
    """A closed journal is one file and an empty owner file; fields and records are plain JSON."""
    async with SqliteJournal(path) as journal:
        await journal.begin(intent(), now())
        await journal.finish(held("R-1"), MADE)
    assert {file.name: file.stat().st_size > 0 for file in path.parent.iterdir()} == {
        "journal.sqlite": True,
        "journal.sqlite-owner": False,
    }
    rows = _sqlite(path, "SELECT no_refund, state, fields, record FROM refunds JOIN endings USING (id)")
    [(no_refund, state, fields, record)] = rows
    assert (no_refund, state) == ("R-1", "done")
    assert (json.loads(fields), json.loads(record)) == (intent().fields, MADE.record)


async def test_a_reopened_journal_tells_recorded_refunds_from_new_ones(path):
    """After opening, every recorded refund is found, and none begins twice."""
    async with SqliteJournal(path) as journal, anyio.create_task_group() as group:
        for number in range(3000):
            group.start_soon(journal.begin, intent(f"R-{number}"), now())
    async with SqliteJournal(path) as journal:
        for number in range(2999, 0, -500):
            assert (await journal.begin(intent(f"R-{number}"), now()))[0] is Standing.UNRESOLVED
            assert await journal.find(f"new-{number}") is None
            assert (await journal.begin(intent(f"new-{number}"), now()))[0] is Standing.NEW
        assert (await journal.counts())[State.UNRESOLVED] == 3006


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: path.write_bytes(b"money " * 1000), "the file is not a journal, and was not changed"),
        (lambda path: _sqlite(path, "CREATE TABLE other (x)"), "this SQLite file is not a journal"),
        (lambda path: path.mkdir(), "its folder must exist and be writable"),
    ],
    ids=["text", "other database", "folder"],
)
async def test_another_file_is_refused_and_not_changed(path, prepare, message):
    """The error names a file that is not a journal, and no byte of the file changes."""
    prepare(path)
    before = path.is_file() and path.read_bytes()
    with pytest.raises(JournalError, match=message) as caught:
        async with SqliteJournal(path):
            pass
    assert str(path) in str(caught.value)
    assert (path.is_file() and path.read_bytes()) == before


async def test_a_missing_folder_is_refused(path):
    """A path in a missing folder raises ``JournalError``."""
    with pytest.raises(JournalError, match="its folder must exist"):
        async with SqliteJournal(path / "journal"):
            pass


async def test_another_version_is_refused_with_advice(path):
    """Another schema version raises an error with that version and a cure."""
    async with SqliteJournal(path):
        pass
    _sqlite(path, "PRAGMA user_version = 1")
    with pytest.raises(JournalError, match="schema version 1, but this release needs 10; resolve its open refunds"):
        async with SqliteJournal(path):
            pass


@pytest.mark.parametrize("damaged", ["refunds", "sqlite_autoindex_refunds_1"])
async def test_reading_a_corrupted_file_raises_with_advice(path, damaged):
    """The first operation that reads the damaged part raises ``JournalError`` with advice."""
    async with SqliteJournal(path) as journal:
        await journal.begin(intent(), now())
    [[page]] = _sqlite(path, f"SELECT rootpage FROM sqlite_master WHERE name = '{damaged}'")
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)
    with pytest.raises(JournalError, match="malformed; restore a backup, keep the damaged file"):
        async with SqliteJournal(path) as journal:
            await journal.begin(intent(), now())


async def test_a_walk_over_a_damaged_file_ends(path):
    """The program that fuzzes journal files found it: four rows with one rowid were read again and again."""
    async with SqliteJournal(path) as journal:
        for number in range(4):
            _, entry = await journal.begin(intent(f"R-{number}"), now())
            await journal.finish(entry, MADE)
    [[page]] = _sqlite(path, "SELECT rootpage FROM sqlite_master WHERE name = 'refunds'")
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096 + 8)  # the array of the leaf's cells
        first = file.read(2)
        file.seek((page - 1) * 4096 + 8)
        file.write(first * 4)

    async def walk(reader):
        seen = 0
        async with contextlib.aclosing(reader.entries()) as entries:
            async for _ in entries:
                seen += 1
                assert seen < 100, "it reads the same row again"

    async with SqliteReader(path) as reader:
        with pytest.raises(JournalError, match="its rows are not in order; restore a backup"):
            await walk(reader)


@pytest.mark.parametrize("suffix", ["", "-wal", "-owner"])
@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
async def test_a_removed_or_replaced_file_is_noticed(path, suffix, replaced):
    """If the file, its WAL or its owner file is removed or replaced, every later operation fails."""
    gone = Path(f"{path}{suffix}")
    async with SqliteJournal(path) as journal:
        await journal.begin(intent("R-1"), now())
        copy = shutil.copy(gone, f"{gone}.copy")
        Path.unlink(gone)
        if replaced:
            shutil.move(copy, gone)
        for verb in (journal.begin(intent("R-2"), now()), journal.finish(held("R-1"), MADE)):
            with pytest.raises(JournalError, match=f"{gone.name} was removed or replaced while it was open"):
                await verb


async def test_a_process_whose_lock_file_was_removed_writes_nothing(path):
    """A second process may have opened the journal since then: the first one must not overwrite its rows."""
    async with SqliteJournal(path) as first:
        path.with_name(f"{path.name}-owner").unlink()
        async with SqliteJournal(path) as second:
            _, entry = await second.begin(intent("R-2"), now())
            await second.finish(entry, MADE)
            with pytest.raises(JournalError, match="-owner was removed or replaced while it was open"):
                await first.begin(intent("R-1"), now())
            assert [entry.no_refund async for entry in second.entries()] == ["R-2"]
            assert (await second.find("R-2")).ending == MADE


async def test_a_full_disk_fails_the_whole_batch(path):
    """All callers get ``JournalError`` and nothing is recorded; the journal continues after space is freed."""
    async with SqliteJournal(path) as journal:
        for number in range(10):
            await journal.begin(intent(f"R-{number}"), now())
        connection = journal._file._connection
        [[pages]] = connection.execute("PRAGMA page_count").fetchall()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        errors = []

        async def fail(number):
            with pytest.raises(JournalError, match="full; free some disk space") as caught:
                await journal.begin(intent(f"late-{number}", body=b"x" * 5000), now())
            errors.append(caught.value)

        async with anyio.create_task_group() as group:
            for number in range(100):
                group.start_soon(fail, number)
        assert len({id(error) for error in errors}) == 100
        assert isinstance(errors[0].__cause__, JournalError)
        assert (await journal.counts())[State.UNRESOLVED] == 10
        assert await journal.find("late-1") is None
        connection.execute("PRAGMA max_page_count = 100000")
        assert (await journal.begin(intent("late-1", body=b"x" * 5000), now()))[0] is Standing.NEW
        assert (await journal.begin(intent("R-1"), now()))[0] is Standing.LEASED


async def test_an_io_error_names_the_file(path, monkeypatch):
    """An error of the operating system becomes ``JournalError`` with the file's name."""
    async with SqliteJournal(path) as journal:
        with monkeypatch.context() as broken:

            def fail(*_):
                raise OSError(errno.EIO, "Input/output error")

            broken.setattr(os.path, "samestat", fail)
            with pytest.raises(JournalError, match=r"journal\.sqlite: .*Input/output error"):
                await journal.begin(intent(), now())


def _sqlite(path, statement):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(statement).fetchall()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE refunds SET state = 'lost' WHERE no_refund = 'R-1'",
        "UPDATE refunds SET sent_at = 'today' WHERE no_refund = 'R-2'",
        "UPDATE refunds SET sent_at = 1 << 62 WHERE no_refund = 'R-2'",
        "UPDATE refunds SET fields = '{' WHERE no_refund = 'R-1'",
        "UPDATE bodies SET evidence = '[]'",
        "PRAGMA writable_schema = on; UPDATE sqlite_master SET sql = CAST(x'ff00fe' AS TEXT) WHERE name = 'refunds'",
        "PRAGMA writable_schema = on; UPDATE sqlite_master SET name = CAST(x'fffe' AS TEXT) WHERE name = 'refunds'",
        "DROP TABLE journal",
        "UPDATE journal SET oid_partner = x'00ff'",
        "DELETE FROM journal",
    ],
)
async def test_a_damaged_journal_is_a_journal_error(path, damage):
    """Any damage raises ``JournalError`` with the file's name, and no other exception."""
    async with SqliteJournal(path) as journal:
        for number in (1, 2):
            await journal.begin(intent(f"R-{number}"), now())
        await journal.finish(await journal.find("R-1"), MADE)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(damage)
        connection.commit()

    async def look():
        async with SqliteJournal(path) as journal:
            for number in (1, 2):
                await journal.find(f"R-{number}")

    with pytest.raises(JournalError, match=r"journal\.sqlite"):
        await look()


async def test_noise_in_the_file_is_a_journal_error_or_harmless(path):
    """Random bytes in the schema's page raise nothing but ``JournalError``."""
    async with SqliteJournal(path) as journal:
        await journal.begin(intent(), now())
    content = path.read_bytes()
    noise = random.Random(1)
    for _ in range(60):
        place = noise.randrange(100, 4096)
        path.write_bytes(content[:place] + noise.randbytes(9) + content[place + 9 :])
        with contextlib.suppress(JournalError):  # anything else fails the test
            async with SqliteJournal(path) as journal:
                await journal.find("R-1")
