"""The default journal of a batch, one for each merchant and endpoint, and the receipt beside each file."""

import errno
import io
import json
import os
import re
import shutil
import sys
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

import anyio
import anyio.to_thread
import click
import pytest

from lianlian_async.cli import stores
from lianlian_async.cli.app import lianlian
from lianlian_async.cli.batch import command
from lianlian_async.cli.output import Output
from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.cli.stores import Receipt
from lianlian_async.journal.sqlite_file import JournalFile
from lianlian_async.sandbox import Fault, Repeated, SandboxGateway
from tests.support.batches import read_lines, refund, url_of, write_csv, write_lines
from tests.support.command import end, on_a_terminal, run, start, until

ACCEPT_NEW = ("--accept-new-journal", "--not-found-grace", "0")


@pytest.fixture
def gateway():
    """A sandbox that makes a refund again if it is sent again; every refund is final at once."""
    return SandboxGateway(default_order=Decimal("1000.00"), settle_after=0.0, repeated=Repeated.AGAIN)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and no sign of a container."""
    for name in ("LIANLIAN_JOURNAL", "XDG_CONFIG_HOME", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(stores, "_CONTAINER_FILES", ())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def file(tmp_path):
    """A file of three refunds, alone in its folder."""
    (tmp_path / "work").mkdir()
    return write_csv(tmp_path / "work" / "refunds.csv", [refund(number) for number in range(3)])


def receipt_of(file):
    return Path(f"{file}.receipt")


def journals(home):
    return sorted(path.name for path in home.rglob("*.sqlite"))


# ── one journal for merchant and endpoint ────────────────────────────────────────────────────────


@pytest.mark.usefixtures("home")
def test_a_copied_file_is_made_once(env, gateway, file):
    """A renamed or copied file, or stdin, has the same refunds: nothing is sent again."""
    assert run("batch", file, "--yes", env=env).exit_code == 0
    copy = file.parent.parent / "copy of refunds.csv"
    shutil.copy(file, copy)
    for again in (run("batch", copy, "--yes", env=env), run("batch", "-", "--yes", env=env, stdin=copy.read_text())):
        assert again.exit_code == 0
        assert "0 new, 3 made, 0 open" in again.stderr
    assert gateway.requests == {"apply": 3}


@pytest.mark.usefixtures("home")
def test_spelling_of_the_endpoint_changes_no_journal(env, gateway, file):
    """Equivalent apply URLs have one journal and one receipt; the note about a new journal is also shown with --yes."""
    url = env["LIANLIAN_APPLY_URL"]
    notes = [
        run("batch", file, "--yes", env=env | {"LIANLIAN_APPLY_URL": spelling}).stderr
        for spelling in (url, url.replace("http", "HTTP"), f"{url}?", f"{url}#")
    ]
    assert ["this journal is new" in note for note in notes] == [True, False, False, False]
    assert gateway.requests == {"apply": 3}
    assert len(receipt_of(file).read_text().splitlines()) == 1


def test_each_endpoint_and_merchant_has_a_journal(env, gateway, home, file):
    """Each endpoint has its own journal, in a folder with mode 0700."""
    assert run("batch", file, "--yes", env=env).exit_code == 0
    with serving(gateway) as url:
        assert run("batch", file, "--yes", env=environment(gateway, url)).exit_code == 0
    assert len(journals(home)) == 2
    assert all(name.startswith(gateway.oid_partner) for name in journals(home))
    [folder] = {path.parent for path in home.rglob("*.sqlite")}
    assert (folder.name, folder.stat().st_mode & 0o777) == ("journals", 0o700)
    assert len(receipt_of(file).read_text().splitlines()) == 2
    assert gateway.requests["apply"] == 6


def test_every_command_uses_the_default_journal(env, home, file, tmp_path):
    """Without --journal, each command finds the journal that ``batch`` made, and ``restore`` creates it."""
    assert run("batch", file, "--yes", env=env).exit_code == 0
    assert run("journal", "show", "--json", env=env).json["states"]["done"] == 3
    assert run("journal", "export", "--out", tmp_path / "all.csv", env=env).exit_code == 0
    assert run("journal", "resume", "--json", env=env).json["still_open"] == 0
    assert run("explain", "R-1", env=env).exit_code == 0
    assert run("journal", "backup", tmp_path / "backup", env=env).exit_code == 0
    [journal] = home.rglob("*.sqlite")
    shutil.rmtree(journal.parent)
    missing = run("journal", "show", env=env)
    assert (missing.exit_code, "no such journal" in missing.stderr) == (2, True)
    assert run("journal", "restore", tmp_path / "backup", env=env).exit_code == 0
    assert journal.parent.stat().st_mode & 0o777 == 0o700
    assert run("journal", "show", "--json", env=env).json["states"]["done"] == 3


@pytest.mark.usefixtures("home")
def test_default_journal_needs_a_merchant():
    """The default journal is that of the configured merchant; without one, the error also names --journal."""
    ended = run("journal", "show")
    assert ended.exit_code == 2
    message = " ".join(ended.stderr.split())
    assert "LIANLIAN_OID_PARTNER" in message
    assert "name the journal with --journal or LIANLIAN_JOURNAL" in message


@pytest.mark.parametrize("variable", ["KUBERNETES_SERVICE_HOST", "HOME"])
def test_default_journal_needs_a_persistent_folder(env, gateway, home, file, monkeypatch, variable):
    """In a container or without a home folder the journal must be named; a dry run needs none."""
    monkeypatch.setenv(variable, "/nowhere/at/all")
    ended = run("batch", file, "--yes", env=env)
    assert ended.exit_code == 2
    assert "name the journal with --journal or LIANLIAN_JOURNAL" in " ".join(ended.stderr.split())
    dry = run("batch", file, "--dry-run", "--json", env=env)
    assert (dry.exit_code, dry.json["refunds"]) == (0, 3)
    assert "name the journal" in dry.stderr
    assert not gateway.requests
    assert run("batch", file, "--yes", env=env | {"LIANLIAN_JOURNAL": str(home / "named")}).exit_code == 0


def test_container_is_recognized_by_its_file(env, home, file, monkeypatch):
    """Docker and Podman leave a file in each container."""
    monkeypatch.setattr(stores, "_CONTAINER_FILES", (home,))
    ended = run("batch", file, "--yes", env=env)
    assert ended.exit_code == 2
    assert "a container loses its files" in ended.stderr


def test_unwritable_home_is_a_usage_error(env, gateway, home, file):
    """If the folder cannot be created, nothing is sent."""
    (home / ".config").write_text("a file")
    ended = run("batch", file, "--yes", env=env)
    assert ended.exit_code == 2
    assert "name the journal" in " ".join(ended.stderr.split())
    assert not gateway.requests


# ── the receipt ──────────────────────────────────────────────────────────────────────────────────


def test_receipt_names_the_journal(env, gateway, file, tmp_path):
    """The receipt has the journal's id and place, the merchant, the endpoint and the time."""
    place = str(tmp_path / "first")
    assert run("batch", file, "--yes", "--journal", place, env=env).exit_code == 0
    receipt = json.loads(receipt_of(file).read_text())
    assert receipt["place"] == place
    assert (receipt["oid_partner"], receipt["apply_url"]) == (gateway.oid_partner, env["LIANLIAN_APPLY_URL"])
    assert len(receipt["journal"]) == 32
    assert receipt["sent_until"].startswith("20")
    assert run("batch", file, "--yes", "--journal", place, env=env).exit_code == 0


def test_another_journal_is_refused(env, gateway, file, tmp_path):
    """A run with another journal sends nothing, unless --accept-new-journal is given."""
    run("batch", file, "--yes", "--journal", tmp_path / "first", env=env)
    second = ("batch", file, "--journal", tmp_path / "second")
    for more in (["--yes"], ["--dry-run"]):
        ended = run(*second, *more, env=env)
        assert ended.exit_code == 2
        told = " ".join(ended.stderr.split())
        assert f"this file was sent with the journal {tmp_path / 'first'}" in told
        assert "--accept-new-journal --query-first" in told
    assert gateway.requests == {"apply": 3}
    ended = run(*second, "--yes", *ACCEPT_NEW, "--json", env=env)
    assert (ended.exit_code, ended.json["attempts"], ended.json["queries"]) == (0, 0, 3)
    assert gateway.requests == {"apply": 3, "query": 3}
    assert json.loads(receipt_of(file).read_text())["place"] == str(tmp_path / "second")


def test_a_link_to_a_file_has_its_receipt(env, gateway, file, tmp_path):
    """A file that was sent is refused with another journal, also by the name of a symbolic link."""
    link = tmp_path / "latest.csv"
    link.symlink_to(file)
    for first, second in ((link, file), (file, link)):
        run("batch", first, "--yes", "--journal", tmp_path / "first", env=env)
        assert run("batch", second, "--yes", "--journal", tmp_path / "second", env=env).exit_code == 2
        receipt_of(file).unlink()
    assert gateway.requests == {"apply": 3}


def test_another_https_host_is_refused(env, file, tmp_path):
    """Another host may be the same gateway; the sandbox, another product and another merchant are something else."""
    receipt = {"journal": "1" * 32, "place": "first", "oid_partner": env["LIANLIAN_OID_PARTNER"]}
    receipt |= {"apply_url": "https://old.example/refund.htm", "sent_until": "2026-11-22T10:20:00+08:00"}
    command = ("batch", file, "--dry-run", "--journal", tmp_path / "second")
    elsewhere = env | {"LIANLIAN_APPLY_URL": "https://new.example/refund.htm"}
    write_lines(receipt_of(file), [receipt])
    ended = run(*command, env=elsewhere)
    assert ended.exit_code == 2
    told = " ".join(ended.stderr.split())
    assert "this file was sent to https://old.example/refund.htm: use it, not https://new.example/refund.htm" in told
    assert run(*command, *ACCEPT_NEW, env=elsewhere).exit_code == 0
    assert run(*command, env=env).exit_code == 0
    urls = ("http://127.0.0.1/refund.htm", "https://old.example/exchangerefund.htm")
    for changes in ({"oid_partner": "201304121000001004"}, *({"apply_url": url} for url in urls)):
        write_lines(receipt_of(file), [receipt | changes])
        assert run(*command, env=elsewhere).exit_code == 0


def test_journal_is_checked_again_after_the_confirmation(env, gateway, file, tmp_path, monkeypatch):
    """While a person confirms, another batch sends the same file with another journal: the first one sends nothing."""

    class SlowPerson(io.StringIO):
        def isatty(self):
            return True

        def readline(self, *_):
            assert run("batch", file, "--yes", "--journal", tmp_path / "second", env=env).exit_code == 0
            return "y\n"

    for name, text in env.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(sys, "stdin", SlowPerson())
    with pytest.raises(click.UsageError, match=f"sent with the journal {tmp_path / 'second'}"):
        lianlian.main(["batch", str(file), "--journal", str(tmp_path / "first")], standalone_mode=False)
    assert gateway.requests == {"apply": 3}


@pytest.mark.parametrize("journal", ["second", "first"])
def test_one_of_two_batches_that_start_together_is_refused(file, journal):
    """Two batches find no receipt of a shared file: the second one to write it must check it first."""
    options = {"accept_new_journal": False, "not_found_grace": 900.0}
    first, second = (
        command._receipt_writer(Output(), str(file), Receipt(name, name, "M", "https://a.example/"), options)
        for name in ("first", journal)
    )
    first(60)
    with pytest.raises(click.UsageError, match=r"another batch just wrote .*refunds\.csv\.receipt"):
        second(60)
    assert read_lines(receipt_of(file))[0]["journal"] == "first"
    first(0)


def test_new_journal_is_accepted_after_the_grace(env, gateway, file, tmp_path):
    """LianLian shows a refund late: a new journal must wait after the last run."""
    run("batch", file, "--yes", "--journal", tmp_path / "first", env=env)
    [receipt] = read_lines(receipt_of(file))
    ended_at = datetime.fromisoformat(receipt["sent_until"])
    second = ("batch", file, "--yes", "--accept-new-journal", "--query-first", "--journal", tmp_path / "second")
    early = run(*second, env=env)
    assert early.exit_code == 2
    until = (ended_at + timedelta(minutes=15)).astimezone().isoformat(sep=" ", timespec="seconds")
    assert f"LianLian may show a refund late, so wait until {until}" in " ".join(early.stderr.split())
    assert gateway.requests == {"apply": 3}
    write_lines(receipt_of(file), [receipt | {"sent_until": str(ended_at - timedelta(minutes=15))}])
    assert run(*second, env=env).exit_code == 0
    assert gateway.requests == {"apply": 3, "query": 3}


def test_new_journal_needs_query_first_in_later_runs(env, gateway, file, tmp_path):
    """The first run with the new journal may end early: the rest of the file must be queried, too."""
    run("batch", file, "--yes", "--journal", tmp_path / "first", env=env)
    second = ("batch", file, "--yes", "--journal", tmp_path / "second")
    write_csv(file, [refund(0)])
    assert run(*second, *ACCEPT_NEW, env=env).exit_code == 0
    write_csv(file, [refund(number) for number in range(3)])
    ended = run(*second, env=env)
    assert ended.exit_code == 2
    assert "use --query-first again, and not --queue" in " ".join(ended.stderr.split())
    assert run(*second, "--query-first", env=env).exit_code == 0
    assert gateway.requests == {"apply": 3, "query": 3}


def test_receipt_is_written_again_at_the_end(gateway, file, tmp_path):
    """The receipt has the time of the last run's end, even if the run takes hours."""

    async def remover(scope, receive, send):
        receipt_of(file).unlink(missing_ok=True)
        await gateway(scope, receive, send)

    with serving(remover) as url:
        run("batch", file, "--yes", "--journal", tmp_path / "journal", env=environment(gateway, url))
    assert gateway.requests == {"apply": 3}
    assert len(read_lines(receipt_of(file))) == 1


def test_receipt_is_written_again_during_a_batch(gateway, file, tmp_path, monkeypatch):
    """The receipt of a batch that is killed after hours says until when the batch may have sent refunds."""
    monkeypatch.setattr(command, "_RECEIPT", 0.01)

    async def remover(scope, receive, send):
        receipt_of(file).unlink(missing_ok=True)
        await anyio.to_thread.run_sync(until, receipt_of(file).exists)
        await gateway(scope, receive, send)

    with serving(remover) as url:
        ended = run("batch", file, "--yes", "--journal", tmp_path / "journal", env=environment(gateway, url))
    assert ended.exit_code == 0


@pytest.mark.parametrize("text", ["", "no receipt\n", "{}\n", '{"journal": 1}\n', "[]\n", "\udcff"])
def test_unreadable_receipt_is_refused(env, gateway, file, tmp_path, text):
    """A damaged receipt is refused, also an empty one; --accept-new-journal must wait for the grace."""
    receipt_of(file).write_bytes(text.encode(errors="surrogateescape"))
    command = ("batch", file, "--yes", "--journal", tmp_path / "journal")
    for more, told in (((), "wait 15 minutes after the last run"), (("--accept-new-journal",), "so wait until 20")):
        ended = run(*command, *more, env=env)
        assert ended.exit_code == 2
        words = " ".join(ended.stderr.split())
        assert f"{receipt_of(file)} cannot be read as a receipt of a journal: put " in words
        assert told in words
    assert not gateway.requests
    os.utime(receipt_of(file), (0, 0))
    assert run(*command, "--accept-new-journal", env=env).exit_code == 0
    assert json.loads(receipt_of(file).read_text())["oid_partner"] == gateway.oid_partner


def test_unwritable_receipt_is_noted(env, file, tmp_path):
    """The refunds are made, and a note says that the receipt was not written."""
    receipt_of(file).mkdir()
    ended = run("batch", file, "--yes", *ACCEPT_NEW, "--journal", tmp_path / "journal", env=env)
    assert ended.exit_code == 0
    assert "the receipt was not written" in ended.stderr


def test_receipt_survives_a_full_disk(env, file, tmp_path, monkeypatch):
    """A receipt that cannot be written is noted; the earlier receipt stays complete, and no other file stays."""
    first = ("batch", file, "--yes", "--journal", tmp_path / "first")
    run(*first, env=env)
    before = receipt_of(file).read_text()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(stores.os, "fsync", full)
        ended = run(*first, env=env)
    assert ended.exit_code == 0
    assert f"{receipt_of(file)}: No space left on device; the receipt was not written" in ended.stderr
    assert receipt_of(file).read_text() == before
    assert set(file.parent.iterdir()) == {file, receipt_of(file)}
    assert run("batch", file, "--yes", "--journal", tmp_path / "second", env=env).exit_code == 2


def test_queue_and_file_journal_know_of_each_other(env, gateway, file, tmp_path, database):
    """A file sent with a journal file is refused for a queue, and a queued file for a journal file."""
    queue, journal = ("--queue", "--yes"), ("--yes", "--journal", tmp_path / "journal")
    dsn = env | {"LIANLIAN_JOURNAL": url_of(database)}
    run("batch", file, *journal, env=env)
    queued = write_csv(file.with_name("queued.csv"), [refund(number) for number in range(3, 6)])
    assert run("batch", queued, *queue, env=dsn).exit_code == 0
    assert read_lines(receipt_of(queued))[0]["oid_partner"] is None
    for path, options in ((file, queue), (queued, journal)):
        ended = run("batch", path, *options, env=dsn)
        assert ended.exit_code == 2
        assert "this file was sent with the journal" in " ".join(ended.stderr.split())
    assert run("worker", "--until-empty", "--json", env=dsn).json["states"]["done"] == 3
    assert gateway.requests == {"apply": 6}
    assert run("batch", queued, *queue, env=dsn).exit_code == 0
    assert read_lines(receipt_of(queued))[0]["oid_partner"] == gateway.oid_partner
    assert run("batch", queued, "--yes", env=dsn).exit_code == 0
    assert run("batch", queued, *journal, env=env).exit_code == 2
    write_lines(receipt_of(file), [read_lines(receipt_of(file))[0] | {"sent_until": "2026-11-01"}])
    accepted = run("batch", file, *queue, "--accept-new-journal", env=dsn)  # a worker would not query first
    assert (accepted.exit_code, gateway.requests) == (2, {"apply": 6})
    assert run("batch", file, "--yes", "--accept-new-journal", env=dsn).exit_code == 0
    assert gateway.requests == {"apply": 6, "query": 3}
    assert run("batch", "-", *queue, env=dsn, stdin=file.read_text()).exit_code == 0


# ── what the journal knows ───────────────────────────────────────────────────────────────────────


def test_prompt_counts_refunds_in_the_journal(env, gateway, file, home, monkeypatch, capsys):
    """The prompt recommends --query-first for a new journal, and counts new, made and open refunds."""
    assert on_a_terminal(monkeypatch, "y\n", "batch", file, env=env) == 0
    asked = capsys.readouterr().err
    assert "Send 3 new refunds, 30.00 yuan?" in asked
    assert "this journal is new, so every refund counts as never sent" in asked
    assert "--query-first" in asked
    gateway.script(Fault.NO_ANSWER, call="apply", no_refund="R-3")
    gateway.script(Fault.HTTP_500, call="query", times=1000)
    write_csv(file, [refund(number) for number in range(4)])
    assert run("batch", file, "--yes", "--deadline", "1", env=env).exit_code == 4
    write_csv(file, [refund(number) for number in range(6)])
    dry = run("batch", file, "--dry-run", "--json", env=env)
    assert dry.json["found"] == {"new": 2, "made": 3, "open": 1}
    assert dry.json["journal"] == str(next(home.rglob("*.sqlite")))
    assert dry.stderr == ""
    people = run("batch", file, "--dry-run", env=env)
    assert "│ open                        │ 1 " in people.stdout
    with pytest.raises(click.Abort):
        on_a_terminal(monkeypatch, "n\n", "batch", file, env=env)
    assert "Send 2 new refunds, 20.00 yuan, and resolve 1 unresolved ones?" in capsys.readouterr().err


def test_postgresql_journal_is_counted(env, gateway, file, database):
    """The counts come from PostgreSQL, and the receipt has no DSN."""
    dsn = {"LIANLIAN_JOURNAL": url_of(database)}
    assert run("batch", file, "--yes", env=env | dsn).exit_code == 0
    write_csv(file, [refund(number) for number in range(1, 5)])
    dry = run("batch", file, "--dry-run", "--json", env=env | dsn)
    assert dry.json["found"] == {"new": 2, "made": 2, "open": 0}
    assert "postgresql://" not in receipt_of(file).read_text()
    assert gateway.requests == {"apply": 3}


def test_a_second_batch_waits_for_the_first(env, gateway, file, tmp_path):
    """It shows which process has the journal open and since when, and starts when it ends; --no-wait is an error."""
    gateway.script(Fault.NO_ANSWER, call="apply")
    command = ("batch", file, "--yes", "--journal", tmp_path / "journal", "--not-found-grace", "1", "--wait-unknown")
    first = start(*command, "--concurrency", "1", env=env)
    until(lambda: gateway.requests["apply"])
    refused = run(*command, "--no-wait", env=env)
    assert refused.exit_code == 1
    assert re.search(rf"process {first.pid} on .*, since 20.* has it open", refused.stderr)
    second = start(*command, env=env)
    told = next(line for line in second.stderr if line.startswith("waiting: "))
    assert re.fullmatch(rf"waiting: process {first.pid} on .*, since 20.* has the journal .*journal open\n", told)
    first.kill()
    end(first, env)
    assert end(second, env).exit_code == 0
    assert all(gateway.times_made(f"R-{number}") == 1 for number in range(3))


def test_waiting_batch_says_so_once(env, gateway, file, tmp_path, monkeypatch):
    """A batch tries again and again to open a journal that is in use, and sends when it is free."""
    held, pauses, sleep = JournalFile(str(tmp_path / "journal")), [], anyio.sleep

    async def free_the_journal(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            held.close()
        await sleep(0.0 if len(pauses) <= 2 else seconds)

    monkeypatch.setattr(anyio, "sleep", free_the_journal)
    ended = run("batch", file, "--yes", "--journal", tmp_path / "journal", env=env)
    assert (ended.exit_code, ended.stderr.count("waiting: "), pauses[:2]) == (0, 1, [1.0, 1.0])
    assert gateway.requests == {"apply": 3}
