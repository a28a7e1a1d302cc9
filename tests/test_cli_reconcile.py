"""``lianlian reconcile``: compare statements with a session's journal, and update the journal with --apply."""

from __future__ import annotations

import resource
import shutil

import anyio
import anyio.to_thread
import pytest

from lianlian_async import Merchant, NotificationEndpoint, RefundRequest, RefundSession
from lianlian_async.cli.sandbox.server import serving
from lianlian_async.journal import SqliteJournal, State
from lianlian_async.journal.postgres import PostgresJournal
from lianlian_async.models import RefundRecord
from lianlian_async.sandbox import Fault, When
from lianlian_async.signing import SigningKey
from tests.support.batches import PASSWORD, refund, url_of
from tests.support.command import run, until

NOTHING = {
    "agrees": 0,
    "amount_differs": [],
    "not_in_journal": [],
    "twice_in_statement": [],
    "missing_in_statement": [],
    "unknown_proved": [],
    "outside_period": 0,
    "unreadable": [],
}


ROW = "{no_refund},{partner},20261122 02:00:00,101001,{no_order},20261122,-10,1,5,20261122 02:00:01,0,a,b,退款\n"


@pytest.fixture
def journal(tmp_path):
    """The path of the journal."""
    return tmp_path / "journal.sqlite"


@pytest.fixture
def file(tmp_path, gateway):
    """A statement of the refunds R-0 and R-1."""
    path = tmp_path / f"JYMX_{gateway.oid_partner}_20261122.txt"
    path.write_text(rows(gateway, 0, 1), "utf-8")
    return path


def rows(gateway, *numbers):
    """Return the statement's rows for refunds."""
    return "".join(ROW.format(partner=gateway.oid_partner, **refund(number)) for number in numbers)


def send(env, journal, gateway, *numbers, unknown=None, acting=False):
    """Make refunds; ``unknown``: cancel the calls before or after the gateway carries out the requests."""

    async def apply():
        async with SqliteJournal(journal) as opened, RefundSession(Merchant.from_env(env), journal=opened) as session:
            if acting:
                await opened.begin_acting()
            requests = [RefundRequest.from_dict(refund(number)) for number in numbers]
            async with anyio.create_task_group() as group:
                for request in requests:
                    group.start_soon(session.apply_refund, request)
                if unknown is not None:
                    sent = gateway.requests["apply"] + len(numbers)
                    gateway.script(Fault.NO_ANSWER, when=unknown, times=len(numbers))
                    await anyio.to_thread.run_sync(until, lambda: gateway.requests["apply"] >= sent)
                    group.cancel_scope.cancel()

    anyio.run(apply)


def entries(journal, *numbers):
    """Return the journal's entries."""

    async def find():
        async with SqliteJournal(journal) as opened:
            return [await opened.find(f"R-{number}") for number in numbers]

    return anyio.run(find)


def states(journal, *numbers):
    return [entry.state for entry in entries(journal, *numbers)]


# ── comparing ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
def test_agreeing_refunds_are_counted_and_exit_0(env, journal, gateway, file, encoding):
    """Each file is read in its own encoding. The JYMXSUM file may be an argument, too."""
    send(env, journal, gateway, 0, 1)
    file.write_text(rows(gateway, 0, 1), encoding)
    summary = file.with_name(file.name.replace("JYMX", "JYMXSUM"))
    summary.write_text("2|0|收|2|-20.00|0|\n", "gb18030")
    machine = run("reconcile", summary, file, "--journal", journal, "--json")
    people = run("reconcile", file, "--journal", journal)
    assert (machine.exit_code, people.exit_code) == (0, 0)
    assert machine.json == NOTHING | {"agrees": 2}
    assert people.stderr == ""
    assert "│ agrees               │ 2       │ 20.00 │" in people.stdout


def test_a_copy_of_a_journal_warns(env, journal, gateway, file):
    """The copy lacks refunds that were made after it."""
    send(env, journal, gateway, 0, 1)
    file.write_text(rows(gateway, 0, 1))
    copy = shutil.copy(journal, journal.with_name("copy"))
    ended = run("reconcile", file, "--journal", copy)
    assert ended.exit_code == 0
    assert ended.stderr.startswith(f"warning: {copy}: this is a backup or another copy of a journal")


def test_differences_are_listed_and_exit_3(env, journal, gateway, file):
    send(env, journal, gateway, 0, 5)
    send(env, journal, gateway, 1, unknown=When.AFTER)
    file.write_text(rows(gateway, 0, 1, 2, 3, 3).replace("R-0,", "R-0,x", 1) + rows(gateway, 0))
    machine = run("reconcile", file, "--journal", journal, "--json")
    people = run("reconcile", file, "--journal", journal)
    assert (machine.exit_code, people.exit_code) == (3, 3)
    assert machine.json == NOTHING | {
        "agrees": 1,
        "unknown_proved": ["R-1"],
        "not_in_journal": ["R-2"],
        "twice_in_statement": ["R-3"],
        "outside_period": 1,
        "unreadable": [1],
    }
    assert f"{file.name}, line 1: column 2 (oid_partner): 'x201103171000000000' is not" in machine.stderr
    first, second, third, fourth = (f"{file.name}, line {line}: 10 yuan" for line in (2, 3, 4, 5))
    assert {
        f"unknown proved: R-1 ({first})",
        f"not in journal: R-2 ({second})",
        f"twice in statement: R-3 ({third}; {fourth})",
    } <= set(people.stdout.splitlines())


def test_a_journal_may_be_a_database(database, env, gateway, file):
    """A PostgreSQL journal also has the merchant of its sessions; the DSN comes from the environment."""
    private = env | {"LIANLIAN_JOURNAL": url_of(database), "PGPASSWORD": PASSWORD}
    foreign = file.with_name("JYMX_M2_20261122.txt")
    foreign.write_text("")

    async def apply():
        async with (
            PostgresJournal(database) as opened,
            RefundSession(Merchant.from_env(env), journal=opened) as session,
        ):
            await session.apply_refund(RefundRequest.from_dict(refund(0)))

    anyio.run(apply)
    ended = run("reconcile", file, "--json", env=private)
    assert ended.json == NOTHING | {"agrees": 1, "not_in_journal": ["R-1"]}
    assert run("reconcile", foreign, env=private).exit_code == 2


def test_file_that_is_not_a_statement_is_refused(env, journal, gateway, file):
    send(env, journal, gateway, 0)
    lonely = file.with_name(file.name.replace("JYMX", "JYMXSUM"))
    lonely.write_text("0|0||0||0|")
    binary = file.with_name(f"JYMX_{gateway.oid_partner}_20261101.txt")
    binary.write_bytes(b"\xff\xfe\xff")
    for path, reason in ((lonely, "must be called JYMX_"), (binary, f"{binary.name}: is neither UTF-8 nor GB18030")):
        ended = run("reconcile", path, "--journal", journal)
        assert ended.exit_code == 2
        assert reason in ended.stderr.replace("\n", " ")
    lonely.unlink()
    foreign = file.rename(file.with_name("JYMX_M2_20261122.txt"))
    ended = run("reconcile", foreign, "--journal", journal)
    assert ended.exit_code == 2
    assert f"the journal belongs to merchant {gateway.oid_partner}, not M2" in ended.stderr


def test_full_disk_is_an_error(env, journal, gateway, file):
    """An error of the temporary file, which holds the rows, names the cure."""
    send(env, journal, gateway, 0)
    file.write_text(rows(gateway, *range(30_000)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        ended = run("reconcile", file, "--journal", journal)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended.exit_code == 1
    assert "set SQLITE_TMPDIR to a folder with more space" in ended.stderr


# ── --apply ──────────────────────────────────────────────────────────────────────────────────────


def test_the_gateway_is_asked_first(env, journal, gateway, file):
    """The gateway's signed record is stored in the journal; nothing is sent again."""
    send(env, journal, gateway, 0, unknown=When.AFTER)
    send(env, journal, gateway, 1, 2, unknown=When.AFTER)
    ended = run("reconcile", file, "--journal", journal, "--apply", "--json", env=env)
    assert (ended.exit_code, ended.json["unknown_proved"]) == (3, ["R-0", "R-1"])
    assert states(journal, 0, 1, 2) == [State.DONE, State.DONE, State.UNRESOLVED]
    assert all("sign" in entry.ending.record for entry in entries(journal, 0, 1))
    assert gateway.requests == {"apply": 3, "query": 2}
    assert run("reconcile", file, "--journal", journal, "--apply", env=env).exit_code == 0


def test_a_statement_does_not_overrule_the_gateway(env, journal, gateway, file):
    """A refund that the gateway does not know stays unknown, whatever an unsigned file says."""
    send(env, journal, gateway, 0, unknown=When.BEFORE)
    ended = run("reconcile", file, "--journal", journal, "--apply", env=env)
    assert ended.exit_code == 3
    assert "R-0 is in a statement, but LianLian has no such record" in ended.stderr
    assert states(journal, 0) == [State.UNRESOLVED]


def test_where_the_gateway_cannot_decide_the_statement_is_evidence(env, journal, gateway, file):
    """After three months the statement decides: the refund says so, and ``on_refund`` is called."""
    send(env, journal, gateway, 0, unknown=When.AFTER, acting=True)
    gateway.advance(100 * 86_400.0)
    assert run("reconcile", file, "--journal", journal, "--apply", env=env).exit_code == 3
    assert states(journal, 0) == [State.FINAL]
    heard = []

    async def hear(refund):
        heard.append(refund)

    async def sweep():
        async with (
            SqliteJournal(journal) as opened,
            RefundSession(Merchant.from_env(env), journal=opened) as session,
            NotificationEndpoint(session.merchant, hear, journal=opened, session=session) as endpoint,
        ):
            await endpoint.sweep()
            return await session.apply_refund(RefundRequest.from_dict(refund(0)))

    found = anyio.run(sweep)
    assert [one.evidence for one in (*heard, found)] == [f"{file.name}, line 1"] * 2
    assert found.is_final
    assert states(journal, 0) == [State.DONE]
    assert gateway.requests["apply"] == 1


def test_a_signed_record_needs_no_other_evidence():
    assert RefundRecord.from_dict({"sign": "x", "evidence": "of another kind"}).evidence is None


def test_refund_without_an_answer_stays_unknown(env, journal, gateway, file):
    """A query that is rejected for another reason leaves the refund unknown."""
    send(env, journal, gateway, 0, unknown=When.AFTER)
    key = SigningKey.generate().to_pem()
    ended = run("reconcile", file, "--journal", journal, "--apply", env=env | {"LIANLIAN_PRIVATE_KEY": key})
    assert "1001" in ended.stderr
    assert states(journal, 0) == [State.UNRESOLVED]


def test_another_refund_of_that_number_is_a_conflict(env, journal, gateway, file):
    """If the gateway's record contradicts the statement, the refund is a conflict for a person to decide."""
    send(env, journal, gateway, 0, unknown=When.BEFORE)

    async def beside():
        async with RefundSession(Merchant.from_env(env)) as session:
            await session.apply_refund(RefundRequest.from_dict(refund(0, money_refund="10.01")))

    anyio.run(beside)
    ended = run("reconcile", file, "--journal", journal, "--apply", env=env)
    assert "money_refund" in ended.stderr
    assert states(journal, 0) == [State.CONFLICT]


def test_a_journal_that_fails_ends_the_command(env, journal, gateway, file):
    """If the journal is removed during a query, the command ends with an error."""
    send(env, journal, gateway, 0, unknown=When.AFTER)

    async def remove(scope, receive, reply):
        journal.unlink(missing_ok=True)
        await gateway(scope, receive, reply)

    with serving(remove) as url:
        changed = env | {"LIANLIAN_QUERY_URL": f"{url}/refundquery.htm"}
        ended = run("reconcile", file, "--journal", journal, "--apply", env=changed)
    assert ended.exit_code == 1
    assert "was removed or replaced while it was open" in ended.stderr
