"""``lianlian journal``: show, export and resume a journal in a file and in PostgreSQL."""

import signal
import sys
from decimal import Decimal

import anyio
import anyio.to_thread
import pytest

from lianlian_async import Merchant, NotificationEndpoint, RefundRequest, RefundSession
from lianlian_async.cli.sandbox.server import environment
from lianlian_async.journal import SqliteJournal
from lianlian_async.sandbox import Fault, SandboxGateway
from tests.support.batches import PASSWORD, read_csv, read_lines, refund, url_of, write_csv
from tests.support.command import end, interruption, leave_unknown, run, start, until


@pytest.fixture
def gateway():
    """A sandbox in which a refund is final after a day."""
    return SandboxGateway(default_order=Decimal("1000.00"), settle_after=86_400.0)


@pytest.fixture
def file(tmp_path):
    """A file of five refunds; the last one is too large."""
    rows = [refund(number) for number in range(4)]
    return write_csv(tmp_path / "refunds.csv", [*rows, refund(4, money_refund="1000.01")])


@pytest.fixture(autouse=True)
def journal(file, monkeypatch):
    """The journal of all commands."""
    monkeypatch.setenv("LIANLIAN_JOURNAL", str(file.with_name("journal.sqlite")))
    return file.with_name("journal.sqlite")


@pytest.fixture
def left_open(env, gateway, file, journal):
    """A journal: R-0 may have been made, three refunds were made but are not final, and one was rejected."""
    leave_unknown(Merchant.from_env(env), journal, gateway, 0)
    write_csv(file, [refund(1), refund(2), refund(3), refund(4, money_refund="1000.01")])
    assert run("batch", file, "--yes", env=env).exit_code == 3
    return journal


# ── which journal ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", [("show",), ("export", "--out", "all.jsonl"), ("resume",)])
def test_the_argument_names_the_journal(env, left_open, tmp_path, monkeypatch, command):
    """``lianlian journal show PLACE`` takes precedence over the environment and --journal."""
    monkeypatch.chdir(tmp_path)
    other = env | {"LIANLIAN_JOURNAL": str(tmp_path / "missing.sqlite")}
    assert run("journal", *command, env=other).exit_code == 2
    assert run("journal", *command, left_open, env=other).exit_code == 0
    assert run("journal", *command, left_open, "--journal", tmp_path / "missing.sqlite", env=other).exit_code == 0
    keywords = run("journal", *command, "host=db password=s3cret", env=other)
    assert (keywords.exit_code, "s3cret" in keywords.stderr) == (2, False)


# ── show ─────────────────────────────────────────────────────────────────────────────────────────


def test_show_counts_states_and_lists_unknown_refunds(left_open):
    """The output has counts for each state, and the unknown refunds with the time when a query can resolve them."""
    people, machine = (run("journal", "show", "--journal", left_open, *more) for more in ((), ("--json",)))
    assert people.exit_code == machine.exit_code == 0
    assert "│ unresolved │ 1 " in people.stdout
    assert "│ accepted   │ 3 " in people.stdout
    assert "1 may have been made" in people.stdout
    assert "│ R-0       │ 10.00 │ 20" in people.stdout
    assert machine.json["states"] == {
        "unresolved": 1,
        "accepted": 3,
        "final": 0,
        "done": 0,
        "rejected": 1,
        "conflict": 0,
    }
    (unknown,) = machine.json["oldest_unknown"]
    assert unknown["no_refund"] == "R-0"
    assert unknown["sent_at"] < unknown["ask_again_at"]
    assert (machine.json["unknown"], machine.json["not_sent"], machine.json["queue"]) == (1, 0, {})


def test_a_wal_without_its_journal_is_not_called_a_missing_journal(left_open):
    """After a crash, somebody moved the file alone: a new journal would not know its refunds."""
    left_open.rename(f"{left_open}-wal")
    shown = run("journal", "show", "--journal", left_open)
    assert (shown.exit_code, "the file is missing or empty, but" in shown.stderr) == (1, True)
    below = run("journal", "show", "--journal", f"{left_open}-wal/journal")
    assert (below.exit_code, "no such journal" in below.stderr) == (2, True)


def test_show_lists_the_oldest_unknown_refunds(env, gateway, journal):
    """The twenty oldest unknown refunds are listed, with their total number."""
    leave_unknown(Merchant.from_env(env), journal, gateway, *range(22))
    shown = run("journal", "show", "--journal", journal)
    assert "22 may have been made; the oldest 20" in shown.stdout
    assert shown.stdout.count("│ R-") == 20


def test_show_counts_refunds_that_were_not_sent(gateway, file, journal):
    """After refused connections nothing is unknown: the refunds count as not sent."""
    assert run("batch", file, "--yes", env=environment(gateway, "http://127.0.0.1:9")).exit_code == 1
    shown = run("journal", "show", "--journal", journal)
    assert "│ certainly not made │ 5 " in shown.stdout
    assert "may have been made" not in shown.stdout


@pytest.mark.parametrize(
    ("more", "terminal", "look"),
    [
        ((), {}, "│ accepted   │ 3 "),
        (("--json",), {}, '{"journal": '),
        ((), {"FORCE_COLOR": "1", "TERM": "xterm"}, "│ accepted   │ 3 "),
        ((), {"FORCE_COLOR": "1", "TERM": "dumb"}, "│ accepted   │ 3 "),
    ],
)
def test_watch_shows_the_journal_until_ctrl_c(left_open, more, terminal, look):
    """On a terminal it redraws the tables, else it prints them each time; Ctrl-C is its normal end."""
    with interruption(loops=2):
        ended = run("journal", "show", "--journal", left_open, "--watch", *more, env=terminal)
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout.count(look) >= 2
    assert ("\x1b[?25h" in ended.stdout) is (terminal.get("TERM") == "xterm")  # the cursor is visible again


def test_watch_redraws_on_a_terminal(left_open):
    """On a terminal it redraws a table; with NO_COLOR it prints one, without escape bytes."""
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    with interruption(loops=1):
        drawn = run("journal", "show", "--journal", left_open, "--watch", env=terminal).stdout
    with interruption(loops=1):
        plain = run("journal", "show", "--journal", left_open, "--watch", env=terminal | {"NO_COLOR": "1"}).stdout
    assert "\x1b[?25l" in drawn
    assert "\x1b" not in plain
    assert "│ accepted   │ 3 " in plain


def test_closed_pipe_ends_watch(left_open):
    """``lianlian journal show --watch | head -1`` ends; so does SIGTERM."""
    with start("journal", "show", "--journal", left_open, "--watch") as process:
        assert process.stdout.readline().startswith("journal ")
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (0, "")
    with start("journal", "show", "--journal", left_open, "--watch") as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert (process.wait(60), process.stderr.read()) == (0, "")


def test_a_journal_can_be_shown_while_it_is_in_use(env, gateway, file, journal):
    """``show`` and ``export`` read the journal while a batch holds it."""
    gateway.script(Fault.NO_ANSWER, skip=2)
    process = start("batch", file, "--yes", "--concurrency", "1", env=env)
    until(lambda: gateway.requests["apply"] == 3)
    shown = run("journal", "show", "--journal", journal, "--json")
    exported = run("journal", "export", "--journal", journal, "--out", file.with_name("all.jsonl"), "--json")
    process.kill()
    end(process, env)
    assert shown.json["states"] == {"unresolved": 1, "accepted": 2, "final": 0, "done": 0, "rejected": 0, "conflict": 0}
    assert exported.json == {"refunds": 3, "out": str(file.with_name("all.jsonl"))}


@pytest.mark.parametrize("command", [("show",), ("export", "--out", "x"), ("resume",)])
def test_missing_journal_is_not_created(tmp_path, command):
    """A missing file is a usage error."""
    ended = run("journal", *command, "--journal", tmp_path / "journal")
    assert ended.exit_code == 2
    assert "no such journal" in ended.stderr
    assert not (tmp_path / "journal").exists()


def test_other_file_is_not_a_journal(file):
    """A file that is not a journal is refused and not changed."""
    before = file.read_bytes()
    ended = run("journal", "show", "--journal", file)
    assert ended.exit_code == 1
    assert "the file is not a journal" in ended.stderr
    assert file.read_bytes() == before


# ── export ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["all.csv", "all.jsonl"])
def test_a_journal_is_exported(left_open, tmp_path, name):
    """The exported file has all refunds with their fields and results."""
    out = tmp_path / name
    ended = run("journal", "export", "--journal", left_open, "--out", out)
    assert (ended.exit_code, ended.stdout) == (0, f"5 refunds written to {out}\n")
    lines = {line["no_refund"]: line for line in (read_csv if name == "all.csv" else read_lines)(out)}
    assert sorted(lines) == [f"R-{number}" for number in range(5)]
    assert [lines[f"R-{number}"]["state"] for number in (0, 1, 4)] == ["unresolved", "accepted", "rejected"]
    assert (lines["R-0"]["ret_code"] or None, lines["R-4"]["ret_code"]) == (None, "5003")
    assert (lines["R-1"]["money_refund"], lines["R-1"]["no_order"], lines["R-1"]["sta_refund"]) == ("10.00", "O-1", "0")
    assert lines["R-0"]["sent_at"].startswith("20")


def test_export_does_not_overwrite_the_journal(left_open):
    """--out must not be the journal itself."""
    assert run("journal", "export", "--journal", left_open, "--out", left_open).exit_code == 2
    assert run("journal", "show", "--journal", left_open).exit_code == 0


# ── resume ───────────────────────────────────────────────────────────────────────────────────────


def test_resume_queries_open_refunds(env, gateway, left_open):
    """``resume`` resolves the unknown refund and finds the final states; nothing is sent again."""
    first = run("journal", "resume", "--journal", left_open, "--json", env=env)
    assert first.exit_code == 0
    assert first.json["states"] == {"unresolved": 0, "accepted": 4, "final": 0, "done": 0, "rejected": 1, "conflict": 0}
    assert (first.json["resolved"], first.json["still_open"]) == (1, 3)
    gateway.advance(86_400)
    people = run("journal", "resume", "--journal", left_open, env=env)
    assert "│ resolved   │ 4 │\n│ still open │ 0 │\n" in people.stdout
    assert gateway.requests["apply"] == 5


def test_resume_with_unknown_refunds_exits_4(env, gateway, left_open):
    """The exit code is 4 while a refund is unknown."""
    gateway.script(Fault.HTTP_500, call="query", times=1000)
    ended = run("journal", "resume", "--journal", left_open, "--deadline", "0.5", env=env)
    assert ended.exit_code == 4
    assert "1 may have been made" in ended.stdout
    assert "unknown outcomes" in ended.stdout


def test_an_interrupted_resume_exits_130(gateway, left_open):
    """Ctrl-C ends the command with 130."""
    with interruption():
        ended = run("journal", "resume", "--journal", left_open, env=environment(gateway, "http://127.0.0.1:9"))
    assert (ended.exit_code, ended.stderr) == (130, "interrupted\n")


# ── PostgreSQL ───────────────────────────────────────────────────────────────────────────────────


def test_a_shared_journal_is_shown_and_resumed(env, gateway, file, database):
    """A journal in PostgreSQL works like a file; its DSN comes from LIANLIAN_JOURNAL or has no password."""
    private = env | {"LIANLIAN_JOURNAL": url_of(database), "PGPASSWORD": PASSWORD}
    place = url_of(database, password=None)
    assert run("batch", file, "--yes", "--journal", place, env=private).exit_code == 3
    shown = run("journal", "show", "--json", env=private)
    assert shown.json["states"] == {"unresolved": 0, "accepted": 4, "final": 0, "done": 0, "rejected": 1, "conflict": 0}
    assert shown.json["journal"] == "in PostgreSQL"
    assert PASSWORD not in shown.stdout + shown.stderr
    gateway.advance(86_400)
    resumed = run("journal", "resume", "--journal", place, env=private)
    assert "│ done       │ 4 " in resumed.stdout
    out = file.with_name("all.csv")
    assert run("journal", "export", "--out", out, env=private).exit_code == 0
    assert len(read_csv(out)) == 5


def test_a_batch_uses_the_database_of_the_environment(env, file, database):
    """`batch` and `journal show` use the same journal in PostgreSQL."""
    dsn = env | {"LIANLIAN_JOURNAL": url_of(database)}
    assert run("batch", file, "--yes", env=dsn).exit_code == 3
    assert run("journal", "show", "--json", env=dsn).json["states"]["accepted"] == 4


def test_a_dsn_that_is_no_url_is_refused(env, file):
    """The keyword form of libpq in LIANLIAN_JOURNAL is no file name. It is not shown: it may contain a password."""
    ended = run("batch", file, "--yes", env=env | {"LIANLIAN_JOURNAL": "host=db password=s3cret"})
    assert ended.exit_code == 2
    assert "must be a path or postgresql://…" in ended.stderr
    assert "s3cret" not in ended.stderr


@pytest.mark.parametrize("url", ["postgresql://me:s3cret@/x?host=/nowhere", "postgresql://me@/x?password=s3cret"])
def test_password_on_the_command_line_is_refused(url):
    """A URL with a password is refused as an argument, without repeating it; from the environment it is used."""
    refused, argument = run("journal", "show", "--journal", url), run("journal", "show", url)
    assert refused.exit_code == argument.exit_code == 2
    used = run("journal", "show", env={"LIANLIAN_JOURNAL": url})
    assert used.exit_code == 1
    assert used.stderr.startswith("journal error: ")
    assert "s3cret" not in refused.stderr + argument.stderr + used.stderr


@pytest.mark.parametrize("command", [("journal", "show"), ("batch", "--queue", "--yes")])
def test_a_missing_extra_is_named(env, file, monkeypatch, command):
    """Without psycopg the error says what to install, in one line."""
    for name in [name for name in sys.modules if name.startswith(("psycopg", "lianlian_async.journal.postgres"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    arguments = (*command, file) if command[0] == "batch" else command
    ended = run(*arguments, env=env | {"LIANLIAN_JOURNAL": "postgresql:///x"})
    assert ended.exit_code == 2
    assert ended.stderr == "configuration error: PostgreSQL needs psycopg: pip install 'lianlian-async[postgres]'\n"


# ── together with a service ──────────────────────────────────────────────────────────────────────


async def serve(journal, shop, work):
    """Run ``work`` in a service whose handler writes into ``shop``."""

    async def on_refund(refund):
        shop[refund.no_refund].append(refund.sta_refund)

    merchant = Merchant.from_env()
    async with (
        SqliteJournal(journal) as opened,
        RefundSession(merchant, journal=opened) as session,
        NotificationEndpoint(merchant, on_refund, journal=opened, session=session) as endpoint,
    ):
        await work(session, endpoint)


def test_service_acts_on_refunds_that_an_operator_resumed(env, gateway, tmp_path, monkeypatch):
    """The entry is final, not done; the service calls on_refund for it after its start."""
    path, shop = tmp_path / "service.journal", {f"R-{number}": [] for number in range(4)}
    for name, text in env.items():
        monkeypatch.setenv(name, text)
    gateway.fail("R-1")

    async def apply(session, _):
        for number in range(4):
            await session.apply_refund(RefundRequest.from_dict(refund(number)))

    async def sweep(_, endpoint):
        await endpoint.sweep()

    anyio.run(serve, path, shop, apply)
    gateway.advance(86_400)
    resumed = run("journal", "resume", "--journal", path, "--json", env=env)
    assert (resumed.json["resolved"], resumed.json["states"]["final"]) == (4, 4)
    assert run("journal", "resume", "--journal", path, "--json", env=env).json["resolved"] == 0
    assert set(map(tuple, shop.values())) == {()}
    for _ in range(2):
        anyio.run(serve, path, shop, sweep)
    assert shop == {"R-0": ["2"], "R-1": ["3"], "R-2": ["2"], "R-3": ["2"]}
    assert run("journal", "show", "--journal", path, "--json").json["states"]["done"] == 4


def test_command_reads_the_journal_of_a_service(env, gateway, tmp_path):
    """The command shows refunds that a program has begun with SqliteJournal."""
    path = tmp_path / "service.journal"

    async def service():
        async with SqliteJournal(path) as journal, RefundSession(Merchant.from_env(env), journal=journal) as session:
            await session.apply_refund(RefundRequest.from_dict(refund(1)))

    anyio.run(service)
    assert run("journal", "show", "--journal", path, "--json").json["states"]["accepted"] == 1
