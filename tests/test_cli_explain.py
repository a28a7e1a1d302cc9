"""``lianlian explain``, and ``lianlian journal decide``, ``backup`` and ``restore``."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from decimal import Decimal

import anyio
import pytest

from lianlian_async import (
    Merchant,
    NotificationEndpoint,
    Refund,
    RefundConflict,
    RefundRejected,
    RefundRequest,
    RefundSession,
)
from lianlian_async.clock import system_clock
from lianlian_async.journal import Ending, Intent, SqliteJournal, State
from lianlian_async.journal.operations import Begin, Operation
from lianlian_async.journal.postgres import PostgresJournal
from lianlian_async.journal.sqlite_file import JournalFile
from lianlian_async.recording import learn, recorded_refund
from lianlian_async.sandbox import Fault, SandboxGateway
from tests.support.batches import PASSWORD, refund, url_of, write_csv
from tests.support.command import end, leave_unknown, run, start, until
from tests.support.journals import intent, now

GBK = "退款".encode("gbk").decode("utf-8", "surrogateescape")
"""An argument from a terminal that sends GBK, not UTF-8."""


@pytest.fixture
def gateway():
    """A sandbox in which a refund is final after a day."""
    return SandboxGateway(default_order=Decimal("1000.00"), settle_after=86_400.0)


@pytest.fixture
def merchant(env):
    return Merchant.from_env(env)


@pytest.fixture(autouse=True)
def journal(tmp_path, monkeypatch):
    """The journal of all commands."""
    monkeypatch.setenv("LIANLIAN_JOURNAL", str(tmp_path / "journal.sqlite"))
    return tmp_path / "journal.sqlite"


def in_journal(call, place):
    """Return the result of ``call`` with the open journal."""

    async def use():
        async with SqliteJournal(place) as opened:
            return await call(opened)

    return anyio.run(use)


def begin(place, *endings, age_days=0, sent=True):
    """Begin R-1, which was sent as long ago, and record the endings."""
    at = system_clock()
    fields = refund(1) | {"dt_refund": f"{at.wall - timedelta(days=age_days):%Y%m%d%H%M%S}"}

    async def call(opened):
        wanted = Intent(no_refund="R-1", fields=fields, body=b"{}", lease=30.0, grace=900.0)
        _, entry = await opened.begin(wanted, at)
        await opened.release(entry, at if sent else None)
        for ending in endings:
            await opened.finish(entry, ending)

    in_journal(call, place)


# ── explain ──────────────────────────────────────────────────────────────────────────────────────


def test_explain_shows_each_step_of_an_unknown_refund(merchant, gateway, env, journal, monkeypatch):
    """The steps with their results, what is known, and when a query decides; times have the offset of the zone."""
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    leave_unknown(merchant, journal, gateway, 1)
    gateway.script(Fault.BUSY, ret_code="9999", times=100)
    assert run("journal", "resume", "--deadline", "1", env=env).exit_code == 4
    people, machine = run("explain", "R-1"), run("explain", "R-1", "--json")
    monkeypatch.delenv("TZ")
    time.tzset()
    assert people.exit_code == machine.exit_code == 4
    assert [(fact["what"], fact["result"]) for fact in machine.json["history"]] == [
        ("begun", ""),
        ("apply", "interrupted"),
        ("lease", ""),
        ("query", "9999"),
    ]
    assert machine.json["ask_again_at"].endswith("+08:00")
    assert "9999 system error" in people.stdout
    assert "refund R-1: unknown" in people.stdout
    assert f"sends it again only if LianLian has no record of it after {machine.json['ask_again_at']}" in people.stdout
    assert machine.json["history"][0]["at"] in people.stdout
    assert "sign" not in machine.stdout


def test_explain_shows_a_refund_that_a_call_may_be_sending(journal, merchant, gateway, env):
    """While another process holds the lease, the end of the lease is shown."""
    gateway.script(Fault.NO_ANSWER)
    file = write_csv(journal.with_name("refunds.csv"), [refund(1)])
    process = start("batch", file, "--yes", env=env)
    until(lambda: gateway.requests["apply"] == 1)
    ended = run("explain", "R-1")
    process.kill()
    end(process, env)
    assert ended.exit_code == 4
    assert "; a call may send it until 20" in ended.stdout


def test_explain_shows_an_accepted_and_a_rejected_refund(journal, env):
    """The exit code is that of the outcome; a code is shown with its meaning."""
    file = write_csv(journal.with_name("refunds.csv"), [refund(1), refund(2, money_refund="1000.01")])
    assert run("batch", file, "--yes", env=env).exit_code == 3
    made, rejected = run("explain", "R-1"), run("explain", "R-2")
    assert (made.exit_code, rejected.exit_code) == (0, 3)
    assert made.stdout.endswith("made; final state unknown\n")
    assert "│ apply │ sta_refund 0 │" in made.stdout
    assert "5003 refund amount does not fit the original" in " ".join(rejected.stdout.replace("│", " ").split())
    assert "refund rejected R-2: 5003" in rejected.stdout


def test_explain_shows_notification_and_handler(journal, merchant):
    """A final refund: how it became final, and that ``on_refund`` has returned, or has not yet."""
    final = {
        "no_refund": "R-1",
        "money_refund": "10.00",
        "ret_code": "0000",
        "sta_refund": "2",
        "settle_date": "20261127",
    }
    begin(journal, Ending(state=State.ACCEPTED, record={"ret_code": "0000", "sta_refund": "0"}))

    async def notify(opened):
        await opened.begin_acting()
        await learn(opened, Refund.from_dict(final), system_clock(), "notification")

    in_journal(notify, journal)
    waiting = run("explain", "R-1")
    in_journal(lambda opened: opened.acted("R-1", now()), journal)
    done = run("explain", "R-1")
    assert waiting.exit_code == done.exit_code == 0
    assert waiting.stdout.endswith("final: made; on_refund has not returned\n")
    assert done.stdout.endswith("final: made\n")
    for text in ("│ notification       │ sta_refund 2 │", "│ on_refund returned │", "│ settle_date  │ 20261127"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("ending", "code", "text"),
    [
        (Ending(state=State.DONE, record={"sta_refund": "3"}), 3, "final: failed"),
        (Ending(state=State.CONFLICT, record={"money_refund": "9.00"}), 1, "a person has decided"),
        (Ending(state=State.DONE, record={"sta_refund": "2", "evidence": "JYMX.txt, line 2"}), 0, "JYMX.txt, line 2"),
    ],
    ids=["failed", "conflict", "statement"],
)
def test_explain_exits_as_the_outcome(journal, ending, code, text):
    """A failed refund, a conflict, and one that a statement has proved."""
    begin(journal, ending)
    ended = run("explain", "R-1")
    assert ended.exit_code == code
    assert text in ended.stdout


def test_explain_names_a_refund_that_was_not_sent(journal):
    """Nothing arrived: the same request can be sent."""
    begin(journal, sent=False)
    ended = run("explain", "R-1")
    assert (ended.exit_code, "certainly not made" in ended.stdout) == (1, True)


def test_explain_of_a_bounded_history_says_so(journal):
    """With the maximum number of facts, the table says that some may be missing."""
    begin(journal)

    async def again(opened):
        for _ in range(4):
            _, entry = await opened.begin(wanted, now())
            await opened.release(entry, now(), history=f"{entry.history}{int(time.time())} 2 query 8901\n")

    fields = in_journal(lambda opened: opened.find("R-1"), journal).fields
    wanted = Intent(no_refund="R-1", fields=fields, body=b"{}", lease=-1.0, grace=900.0)
    in_journal(again, journal)
    ended = run("explain", "R-1")
    assert "history: only the first 3 and the latest 6 events are kept" in ended.stdout
    assert "8901 no such record (2 times)" in ended.stdout


def test_explain_shows_china_standard_time_and_repeated_events(journal):
    """dt_refund is shown as `lianlian query` shows it, and an event without a result has only its count."""
    begin(journal)

    async def again(opened):
        for _ in range(2):
            _, entry = await opened.begin(wanted, now())
            await opened.release(entry, now())

    fields = in_journal(lambda opened: opened.find("R-1"), journal).fields
    wanted = Intent(no_refund="R-1", fields=fields, body=b"{}", lease=-1.0, grace=900.0)
    in_journal(again, journal)
    ended = run("explain", "R-1")
    cells = [[cell.strip() for cell in line.split("│")] for line in ended.stdout.splitlines()]
    assert ["", "dt_refund", str(RefundRequest.from_record(fields).dt_refund), ""] in cells
    assert "│ lease taken │ (2 times) " in ended.stdout


def test_explain_of_an_unknown_number_is_an_error(journal):
    """The journal has no such refund, or does not exist."""
    begin(journal)
    missing = run("explain", "R-9", "--json")
    assert missing.exit_code == 1
    assert missing.json["error"]["message"] == f"refund R-9 is not in the journal {journal}"
    assert run("explain", "R-1", "--journal", journal.with_name("other")).exit_code == 2


def test_reading_a_journal_that_lacks_refunds_warns(journal, tmp_path):
    """A copy may say "certainly not made" about a refund that was made later."""
    begin(journal, sent=False)
    copy = shutil.copy(journal, tmp_path / "copy")
    for command in (("show",), ("export", "--out", tmp_path / "out.csv")):
        shown = run("journal", *command, "--journal", copy)
        assert shown.exit_code == 0
        assert shown.stderr.startswith(f"warning: {copy}: this is a backup or another copy of a journal")
    for number in "R-1", "R-2":
        explained = run("explain", number, "--journal", copy)
        assert explained.exit_code == 1
        assert explained.stderr.startswith(f"warning: {copy}: this is a backup or another copy of a journal")
    assert run("explain", "R-1").stderr == ""


@pytest.mark.parametrize("command", [("explain", GBK), ("journal", "decide", GBK, "made", "--evidence", "mail")])
def test_a_number_that_is_not_utf_8_is_refused(journal, command):
    """The journal is in order: no error may say that it is damaged."""
    begin(journal)
    ended = run(*command)
    assert ended.exit_code == 2
    assert "no_refund: must not contain NUL or a lone surrogate" in ended.stderr


def test_explain_and_decide_in_postgres(database, env):
    """The same in a database; its password is not shown."""
    place = url_of(database)

    async def leave():
        async with PostgresJournal(database) as opened:
            wanted = Intent(no_refund="R-1", fields=refund(1), body=b"{}", lease=-1.0, grace=900.0)
            await opened.begin(wanted, now())

    anyio.run(leave)
    dsn = {"LIANLIAN_JOURNAL": place, "PASSWORD": PASSWORD}
    assert "refund R-1: unknown" in run("explain", "R-1", env=dsn).stdout
    assert run("explain", "R-2", env=dsn).stderr == "error: refund R-2 is not in the journal in PostgreSQL\n"
    assert run("journal", "decide", "R-1", "made", "--evidence", "mail", env=dsn).exit_code == 0
    assert run("explain", "R-1", "--json", env=dsn).json["state"] == "done"


# ── decide ───────────────────────────────────────────────────────────────────────────────────────


def test_after_three_months_a_person_decides(journal, merchant):
    """``explain`` names the command; the decision is shown with user, time and evidence, and stays final."""
    begin(journal, age_days=91)
    ended = run("explain", "R-1")
    assert ended.exit_code == 4
    assert "lianlian journal decide R-1 made|not-made --evidence TEXT" in ended.stdout
    decided = run("journal", "decide", "R-1", "not-made", "--evidence", "bank statement of November", "--json")
    assert decided.exit_code == 0
    user = pwd.getpwuid(os.getuid()).pw_name
    evidence = decided.json["record"]["evidence"]
    assert evidence.startswith(f"decided by hand by {os.environ.get('LOGNAME', os.environ.get('USER', user))} at 20")
    assert evidence.endswith(": bank statement of November")
    ended = run("explain", "R-1")
    assert ended.exit_code == 3
    assert f"refund R-1 was not made: {evidence}; to refund the order, use another no_refund" in ended.stdout
    again = run("journal", "decide", "R-1", "made", "--evidence", "x")
    assert (again.exit_code, "nothing was changed" in again.stderr) == (1, True)


def test_a_refund_decided_as_not_made_is_never_sent(env, gateway, merchant, journal):
    """A batch, a call and ``resume`` send nothing; the error has the evidence. A contradiction is a conflict."""
    leave_unknown(merchant, journal, gateway, 1)
    assert run("journal", "decide", "R-1", "not-made", "--evidence", "support's mail").exit_code == 0
    applied = gateway.requests["apply"]
    file = write_csv(journal.with_name("refunds.csv"), [refund(1)])
    assert run("batch", file, "--yes", env=env).exit_code == 3
    assert run("journal", "resume", env=env).exit_code == 0

    async def call():
        async with SqliteJournal(journal) as opened, RefundSession(merchant, journal=opened) as session:
            with pytest.raises(RefundRejected, match=r"was not made: decided by hand by .*support's mail") as caught:
                await session.apply_refund(RefundRequest.from_dict(refund(1)))
            found = await session.query_refund(RefundRequest.from_dict(refund(1)).query())
            with pytest.raises(RefundConflict, match="recorded decided by hand"):
                await learn(opened, found, system_clock())
            return caught.value

    error = anyio.run(call)
    assert (error.ret_code, error.meaning) == ("decided", "not made")
    assert error.evidence.endswith("support's mail")
    assert gateway.requests["apply"] == applied


def test_on_refund_hears_of_a_refund_decided_as_made(env, gateway, merchant, journal):
    """The sweep calls the handler once, also with ``confirm``; ``Refund.evidence`` has the decision."""
    leave_unknown(merchant, journal, gateway, 1)
    heard = []

    async def on_refund(told):
        heard.append(told)

    async def sweep():
        async with SqliteJournal(journal) as opened, RefundSession(merchant, journal=opened) as session:
            endpoint = NotificationEndpoint(merchant, on_refund, journal=opened, session=session, confirm=True)
            async with endpoint:
                await endpoint.sweep()
                await endpoint.sweep()
            return await opened.find("R-1"), await opened.canaries()

    in_journal(lambda opened: opened.begin_acting(), journal)
    assert run("journal", "decide", "R-1", "made", "--evidence", "the customer has it").exit_code == 0
    entry, canary = anyio.run(sweep)
    [told] = heard
    assert not gateway.requests["query"]
    assert (told.no_refund, told.money_refund, told.is_final) == ("R-1", Decimal("10.00"), True)
    assert told.evidence.endswith(": the customer has it")
    assert entry.state is State.DONE
    assert recorded_refund(entry).evidence == told.evidence
    assert canary == []


def test_a_conflict_can_be_decided(journal):
    """The gateway's record of the other refund stays in the entry."""
    begin(journal, Ending(state=State.CONFLICT, record={"money_refund": "9.00", "sign": "s"}))
    decided = run("journal", "decide", "R-1", "made", "--evidence", "both were made", "--json")
    assert json.loads(decided.json["record"]["recorded"]) == {"money_refund": "9.00", "sign": "s"}


def test_decide_is_refused_while_a_process_has_the_journal(journal, env, gateway):
    """A running batch may be sending the refund."""
    gateway.script(Fault.NO_ANSWER)
    file = write_csv(journal.with_name("refunds.csv"), [refund(1)])
    process = start("batch", file, "--yes", env=env)
    until(lambda: gateway.requests["apply"] == 1)
    refused = run("journal", "decide", "R-1", "not-made", "--evidence", "x")
    process.kill()
    end(process, env)
    assert refused.exit_code == 1
    assert "wait until that process has ended" in refused.stderr


@pytest.mark.parametrize("evidence", ["", " ", "two\nlines", "x" * 201])
def test_evidence_is_one_line(journal, evidence):
    """Evidence of another form is refused."""
    begin(journal)
    refused = run("journal", "decide", "R-1", "made", "--evidence", evidence)
    assert refused.exit_code == 2
    assert "must be one line of 1 to 200 characters" in refused.stderr


def test_a_user_whose_name_is_not_utf_8_can_decide(journal, monkeypatch):
    """The environment may be in another encoding than Python expects."""
    begin(journal)
    monkeypatch.setenv("LOGNAME", GBK)
    decided = run("journal", "decide", "R-1", "made", "--evidence", "x", "--json")
    assert r"decided by hand by \udccd˿\udcee at" in decided.json["record"]["evidence"]


def test_a_user_without_a_name_is_a_number(journal, monkeypatch):
    """In a container the user may have no name."""
    begin(journal)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54_321)
    decided = run("journal", "decide", "R-1", "made", "--evidence", "x", "--json")
    assert "decided by hand by user 54321 at" in decided.json["record"]["evidence"]


def test_a_user_without_name_and_number_can_decide(journal, monkeypatch):
    """Windows has no ``pwd`` and no ``getuid``, and its USERNAME may be missing."""
    begin(journal)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "pwd", None)
    monkeypatch.delattr(os, "getuid")
    decided = run("journal", "decide", "R-1", "made", "--evidence", "x", "--json")
    assert "decided by hand by user without a name at" in decided.json["record"]["evidence"]


def test_a_decision_survives_a_killed_process(journal):
    """The process is killed right after ``decide`` has returned."""
    begin(journal)
    script = (
        "import anyio, os, signal, sys; from lianlian_async.journal import SqliteJournal\n"
        "from lianlian_async.clock import system_clock; from lianlian_async.recording import decision\n"
        "async def main():\n"
        "    async with SqliteJournal(sys.argv[1]) as journal:\n"
        "        now = system_clock()\n"
        "        await journal.decide('R-1', decision(True, 'x', 'me', now), now)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "anyio.run(main)\n"
    )
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", script, str(journal)) == -signal.SIGKILL
    assert in_journal(lambda opened: opened.find("R-1"), journal).state is State.DONE


# ── backup and restore ───────────────────────────────────────────────────────────────────────────


def test_a_journal_is_backed_up_while_it_is_in_use(journal, env, gateway):
    """The backup has every refund that was recorded when it began, and can be shown."""
    gateway.script(Fault.NO_ANSWER, skip=2)
    file = write_csv(journal.with_name("refunds.csv"), [refund(number) for number in range(4)])
    process = start("batch", file, "--yes", "--concurrency", "1", env=env)
    until(lambda: gateway.requests["apply"] == 3)
    target = journal.with_name("journal.backup")
    ended = run("journal", "backup", target)
    again = run("journal", "backup", target)
    lost = run("journal", "backup", target / "more")
    process.kill()
    end(process, env)
    assert (ended.exit_code, ended.stdout) == (0, f"journal {journal} copied to {target}\n")
    assert (again.exit_code, "exists already" in again.stderr) == (2, True)
    assert (lost.exit_code, "its folder does not exist" in lost.stderr) == (2, True)
    shown = run("journal", "show", "--journal", target, "--json").json
    assert (shown["states"]["accepted"], shown["states"]["unresolved"]) == (2, 1)
    assert {path.name for path in target.parent.iterdir() if path.name.startswith("journal.backup")} == {target.name}


def test_a_killed_backup_leaves_no_incomplete_file(journal):
    """Either the backup is complete, or it does not exist."""
    with closing(JournalFile(str(journal))) as file:
        file.write([Operation(f"R-{number}", Begin(intent(f"R-{number}"), now())) for number in range(20_000)])
    target = journal.with_name("journal.backup")
    process = start("journal", "backup", target)
    until(lambda: process.poll() is not None or list(target.parent.glob("journal.backup*")))
    process.kill()
    process.communicate()
    if target.exists():
        assert run("journal", "show", "--journal", target, "--json").json["states"]["unresolved"] == 20_000
    else:
        assert run("journal", "backup", target).exit_code == 0


def test_a_restored_journal_queries_first(journal, env, gateway, merchant):
    """Refunds that were begun after the backup are found by a query and not sent twice."""
    leave_unknown(merchant, journal, gateway, 0)
    backup = journal.with_name("journal.backup")
    assert run("journal", "backup", backup).exit_code == 0
    file = write_csv(journal.with_name("refunds.csv"), [refund(1), refund(2)])
    assert run("batch", file, "--yes", env=env).exit_code == 0
    refused = run("journal", "restore", backup)
    assert (refused.exit_code, "exists: stop its process" in refused.stderr) == (1, True)
    journal.rename(journal.with_name("damaged"))
    ended = run("journal", "restore", backup)
    assert (ended.exit_code, ended.stdout) == (0, f"journal {journal} is restored; run `lianlian journal resume`\n")
    assert sorted(path.name for path in journal.parent.iterdir() if "restored" in path.name) == []
    applied = gateway.requests["apply"]
    assert run("batch", file, "--yes", env=env).exit_code == 0
    assert gateway.requests["apply"] == applied
    assert len(gateway.refunds) == 3
    history = run("explain", "R-1", "--json").json["history"]
    assert [fact["what"] for fact in history] == ["begun", "query"]


def test_a_backup_that_is_only_copied_back_sends_nothing(journal, env, gateway):
    """It lacks the refunds that were made after it: every command but ``restore`` and those that read refuses it."""
    file = write_csv(journal.with_name("refunds.csv"), [refund(1), refund(2)])
    assert run("batch", write_csv(file.with_name("first.csv"), [refund(0)]), "--yes", env=env).exit_code == 0
    backup = journal.with_name("journal.backup")
    assert run("journal", "backup", backup).exit_code == 0
    assert run("batch", file, "--yes", env=env).exit_code == 0
    shutil.copy(backup, journal)
    applied = gateway.requests["apply"]
    decide = ("decide", "R-1", "made", "--evidence", "statement of 1 January")
    for command in (["batch", file, "--yes"], ["journal", "resume"], ["journal", *decide]):
        refused = run(*command, env=env)
        assert (refused.exit_code, "use `lianlian journal restore FILE`" in refused.stderr) == (1, True)
    assert run("journal", "show", "--json").json["states"]["accepted"] == 1
    journal.unlink()
    assert run("journal", "restore", backup).exit_code == 0
    assert run("batch", file, "--yes", env=env).exit_code == 0
    assert gateway.requests["apply"] == applied


def test_an_unresolved_refund_of_a_backup_may_have_been_sent_later(journal):
    """After a restore the grace of unresolved refunds begins again."""
    begin(journal, sent=False)
    backup = journal.with_name("journal.backup")
    assert run("journal", "backup", backup).exit_code == 0
    journal.unlink()
    before = system_clock()
    assert run("journal", "restore", backup).exit_code == 0

    unresolved = in_journal(lambda opened: opened.find("R-1"), journal)
    assert unresolved.sent_at.boot >= before.boot
    assert unresolved.sent_at.timeline == before.timeline


def test_restore_refuses_other_files(journal, tmp_path):
    """A file that is no journal, or a damaged one, is not restored; nothing is left behind."""
    other = tmp_path / "other.backup"
    other.write_text("no journal", "utf-8")
    ended = run("journal", "restore", other)
    assert (ended.exit_code, "not a journal" in ended.stderr) == (1, True)
    begin(journal)
    content = bytearray(journal.read_bytes())
    content[4096 * 2 : 4096 * 2 + 512] = os.urandom(512)
    other.write_bytes(content)
    journal.unlink()
    ended = run("journal", "restore", other)
    assert ended.exit_code == 1
    assert "restore a backup" in ended.stderr
    assert not journal.exists()
    other.write_bytes(b"")
    ended = run("journal", "restore", other)
    assert (ended.exit_code, "is empty" in ended.stderr, journal.exists()) == (1, True, False)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("name", ["journal.sqlite", "journal.backup"])
def test_restore_refuses_a_wal(name, journal, tmp_path):
    """A killed process leaves a WAL; SQLite would replay it into the restored file, or the backup lacks its commits."""
    begin(journal)
    backup = tmp_path / "journal.backup"
    assert run("journal", "backup", backup).exit_code == 0
    journal.unlink()
    (tmp_path / f"{name}-wal").touch()
    ended = run("journal", "restore", backup)
    assert (ended.exit_code, "away; keep both" in ended.stderr, "lacks the commits in" in ended.stderr) == (
        1,
        name == "journal.sqlite",
        name == "journal.backup",
    )
    assert not journal.exists()


def test_restore_names_a_missing_folder_and_a_process(journal, tmp_path):
    """The folder must exist, and no process may have the journal open."""
    begin(journal)
    backup = tmp_path / "journal.backup"
    assert run("journal", "backup", backup).exit_code == 0
    ended = run("journal", "restore", backup, "--journal", tmp_path / "no" / "journal")
    assert ended.exit_code == 1
    assert f"No such file or directory: '{tmp_path}/no/journal-owner'; its folder must exist" in ended.stderr

    async def restore(opened):
        return run_in_thread("journal", "restore", backup)

    ended = in_journal(restore, journal)
    assert (ended.exit_code, "has it open" in ended.stderr) == (1, True)


def run_in_thread(*arguments):
    """Run a command while an event loop runs in this thread."""
    with ThreadPoolExecutor() as pool:
        return pool.submit(run, *arguments).result()


def test_postgres_is_backed_up_with_its_own_tools(journal):
    """For a database, both commands name PostgreSQL's own tools."""
    dsn = {"LIANLIAN_JOURNAL": "postgresql://nowhere"}
    journal.touch()
    for command in ("backup", "restore"):
        refused = run("journal", command, journal if command == "restore" else journal.with_name("x"), env=dsn)
        assert (refused.exit_code, "pg_dump, and stop all workers before pg_restore" in refused.stderr) == (2, True)
