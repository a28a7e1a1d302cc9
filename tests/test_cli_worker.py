"""``lianlian batch --queue`` and ``lianlian worker``: from one process to a fleet, on a real PostgreSQL."""

import os
import re
import signal
import socket
import sys
from functools import partial

import anyio
import psycopg
import pytest

from lianlian_async import RefundRequest
from lianlian_async.cli.batch.results import Totals
from lianlian_async.cli.output import Output
from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.cli.stores import open_queue
from lianlian_async.cli.worker import Progress
from lianlian_async.contrib.procrastinate import RefundQueue
from lianlian_async.errors import JournalError
from lianlian_async.journal.postgres import PostgresJournal
from lianlian_async.sandbox import Fault, When
from tests.support.batches import PASSWORD, refund, url_of, write_csv
from tests.support.command import end, interruption, run, start, until


@pytest.fixture
def env(gateway, database):
    """The environment of the gateway and of the test's database."""
    with serving(gateway) as url:
        yield environment(gateway, url) | {"LIANLIAN_JOURNAL": url_of(database), "PASSWORD": PASSWORD}


@pytest.fixture
def producer(env):
    """An environment with the database, but without a merchant."""
    return {name: env[name] for name in ("LIANLIAN_JOURNAL", "PASSWORD")}


@pytest.fixture
def file(tmp_path):
    return refunds(tmp_path / "refunds.csv", 30)


def refunds(path, count):
    return write_csv(path, [refund(number) for number in range(count)])


def queued(env):
    """Return the counts of the queue."""
    return run("journal", "show", "--json", env=env).json["queue"]


def test_a_batch_is_put_into_the_queue(producer, file):
    """Enqueuing needs no merchant and sends nothing; the queue counts refunds, however often they were added."""
    first = run("batch", file, "--queue", "--yes", "--json", env=producer)
    assert first.exit_code == 0
    assert (first.json["outcome"], first.json["refunds"], first.json["added"]) == ("in the queue", 30, 30)
    assert "no terminal to ask for confirmation" in run("batch", file, "--queue", env=producer).stderr
    again = run("batch", file, "--yes", "--queue", env=producer)
    assert "│ added                       │ 30 " in again.stdout
    assert queued(producer) == {"waiting": 60, "later": 0, "at_work": 0, "failed": 0, "workers": 0}
    assert not file.with_name("refunds.csv.journal").exists()


def test_queue_option_takes_a_dsn_without_password(producer, file, database):
    """The URL is on the command line, and the password in PGPASSWORD."""
    url = url_of(database, password=None)
    ended = run("batch", file, "--queue", url, "--yes", "--json", env={"PGPASSWORD": PASSWORD})
    assert ended.json["added"] == 30


def test_queued_refunds_are_checked_first(producer, file):
    """An invalid line is found before anything is enqueued; oid_partner is not compared without a merchant."""
    write_csv(file, [refund(1), refund(2, money_refund="0")])
    assert run("batch", file, "--queue", "--yes", env=producer).exit_code == 2
    write_csv(file, [refund(1) | {"oid_partner": "201103171000000000"}])
    assert "column 'oid_partner' is not a refund field" in run("batch", file, "--queue", "--yes", env=producer).stderr
    assert "queue" not in producer
    assert queued(producer) == {}


def test_a_worker_empties_the_queue(env, gateway, file):
    """--until-empty makes the waiting refunds, shows the journal, and ends."""
    write_csv(file, [*(refund(number) for number in range(29)), refund(29, money_refund="1000.01")])
    run("batch", file, "--queue", "--yes", env=env)
    ended = run("worker", "--until-empty", env=env)
    assert ended.exit_code == 0
    assert "│ done       │ 29 " in ended.stdout
    assert "│ waiting │ 0 " in ended.stdout
    assert ended.stderr.startswith("working with 20 connections as merchant 201103171000000000\n")
    assert "refund rejected R-29: 5003" in ended.stderr
    assert len(gateway.refunds) == 29


def test_two_workers_share_a_queue_and_end_at_sigterm(env, gateway, tmp_path):
    """Two processes make each refund once; SIGINT and SIGTERM end them cleanly, with exit code 0."""
    file = refunds(tmp_path / "refunds.csv", 100)
    workers = [start("worker", "--concurrency", "5", "--json", env=env) for _ in range(2)]
    try:
        until(lambda: queued(env).get("workers") == 2)  # a signal during the start ends a worker with another exit code
        run("batch", file, "--queue", "--yes", env=env)
        until(lambda: len(gateway.refunds) == 100 and not any(map(queued(env).get, ("waiting", "at_work"))))
        for process, number in zip(workers, (signal.SIGINT, signal.SIGTERM), strict=True):
            process.send_signal(number)
        ended = [end(process, env) for process in workers]
    finally:
        for process in workers:
            process.kill()
    assert [one.exit_code for one in ended] == [0, 0]
    assert ended[0].json["states"] == {
        "unresolved": 0,
        "accepted": 0,
        "final": 0,
        "done": 100,
        "rejected": 0,
        "conflict": 0,
    }
    assert [gateway.times_made(f"R-{number}") for number in range(100)] == [1] * 100


def test_worker_finishes_refunds_in_flight(env, gateway, file):
    """A worker that gets SIGTERM waits for the responses to its requests."""
    refunds(file, 1)
    gateway.script(Fault.DELAY, delay=1.0)
    run("batch", file, "--queue", "--yes", env=env)
    process = start("worker", "--json", env=env)
    until(lambda: gateway.requests["apply"])
    process.send_signal(signal.SIGINT)
    ended = end(process, env)
    assert ended.exit_code == 0
    assert (ended.json["states"]["done"], ended.json["queue"]["waiting"]) == (1, 0)


def test_show_reports_rate_time_left_and_workers(env, gateway, tmp_path):
    """While a worker runs, the journal shows how fast, until when, and since when the oldest refund waits."""
    gateway.script(Fault.DELAY, delay=0.1, times=1000)
    run("batch", refunds(tmp_path / "refunds.csv", 1000), "--queue", "--yes", env=env)
    assert run("journal", "show", "--json", env=env).json["eta_seconds"] is None
    process, shown = start("worker", "--concurrency", "4", env=env), {}
    try:
        until(lambda: shown.update(run("journal", "show", "--json", env=env).json) or shown["refunds_per_second"])
        people = run("journal", "show", env=env).stdout
        process.send_signal(signal.SIGTERM)
        end(process, env)
    finally:
        process.kill()
    assert shown["eta_seconds"] == sum(map(shown["queue"].get, ("waiting", "at_work"))) / shown["refunds_per_second"]
    assert shown["oldest_waiting_seconds"] > 0
    [worker] = shown["workers"]
    assert (worker["slices"], worker["heartbeat_seconds"] < 60) == (1, True)
    assert re.search(r"finished per second │ +[1-9].*\n.*time left +│ 0:.*\n.*oldest waits for +│ 0:", people)
    assert "since last heartbeat" in people


def test_sigterm_puts_back_what_was_not_begun(env, gateway, tmp_path):
    """The worker finishes the refunds in flight; the rest of its slice waits for other workers."""
    gateway.script(Fault.DELAY, delay=0.5, times=1000)
    run("batch", refunds(tmp_path / "refunds.csv", 150), "--queue", "--yes", env=env)
    process = start("worker", "--concurrency", "3", "--json", env=env)
    try:
        until(lambda: gateway.requests["apply"])
        process.send_signal(signal.SIGTERM)
        ended = end(process, env)
    finally:
        process.kill()
    made = len(gateway.refunds)
    assert (ended.exit_code, ended.json["states"]["done"], ended.json["states"]["unresolved"]) == (0, made, 0)
    assert 0 < made < 150
    assert ended.json["queue"] == {"waiting": 150 - made, "later": 0, "at_work": 0, "failed": 0, "workers": 0}
    run("worker", "--until-empty", "--concurrency", "150", env=env)
    assert [gateway.times_made(f"R-{number}") for number in range(150)] == [1] * 150


def test_worker_prints_a_line_at_each_interval(env, gateway, file):
    """Without a terminal a line shows the made and the remaining refunds, at the start and at each interval."""
    run("batch", file, "--queue", "--yes", env=env)
    process = start("worker", "--interval", "0.1", env=env)
    try:
        until(lambda: process.stderr.readline() == "0 of 30  0/s  ETA -  0 made  0 rejected  0 unknown  30 to do\n")
        until(lambda: process.stderr.readline().endswith("  30 made  0 rejected  0 unknown  0 to do\n"))
        process.send_signal(signal.SIGTERM)
        assert end(process, env).exit_code == 0
    finally:
        process.kill()


def test_worker_shows_a_bar_on_a_terminal(env, file):
    """The bar is removed at the end; the notes stay."""
    run("batch", file, "--queue", "--yes", env=env)
    ended = run("worker", "--until-empty", env=env | {"FORCE_COLOR": "1", "TERM": "xterm"})
    assert ended.exit_code == 0
    assert "━━━" in ended.stderr
    assert " of 30 " in ended.stderr
    assert "30 made" in ended.stderr
    assert ended.stderr.rpartition("\x1b[?25h")[2].replace("\x1b[1A", "").replace("\x1b[2K", "").strip() == ""


def test_health_file_is_created_and_keeps_its_content(env, file, tmp_path):
    """A health file that cannot be created ends the worker."""
    content, path = file.read_bytes(), tmp_path / "health"
    for good in (file, path):
        assert run("worker", "--until-empty", "--health-file", good, env=env).exit_code == 0
    assert (file.read_bytes(), path.exists()) == (content, True)
    ended = run("worker", "--health-file", path / "x", env=env)
    assert (ended.exit_code, f"Not a directory: '{path}/x'" in ended.stderr) == (1, True)


def test_health_file_does_not_exist_before_the_queue_is_open(env, tmp_path):
    """A worker that still waits for its database is not healthy."""
    path = tmp_path / "health"
    with socket.create_server(("127.0.0.1", 0)) as server:  # it never answers
        dsn = f"postgresql://127.0.0.1:{server.getsockname()[1]}/shop"
        process = start("worker", "--health-file", path, env=env | {"LIANLIAN_JOURNAL": dsn})
        try:
            with server.accept()[0]:
                assert not path.exists()
        finally:
            process.kill()
            process.communicate()


def test_health_file_is_touched_while_refunds_end_or_none_is_in_flight(gateway, database, tmp_path, capsys):
    """It is not touched while refunds hang, nor while the database does not answer; that is noted."""
    path, reports = tmp_path / "health", []
    begun, answered = anyio.Event(), anyio.Event()

    async def hold(exchange, call_next):
        begun.set()
        await answered.wait()
        return await call_next(exchange)

    async def reported():
        count = len(reports)
        while len(reports) < count + 2:  # noqa: ASYNC110 - no event tells
            await anyio.sleep(0.01)

    async def touched():
        os.utime(path, (0, 0))
        while not path.stat().st_mtime:  # noqa: ASYNC110 - no event tells
            await anyio.sleep(0.01)

    async def work():
        with anyio.fail_after(60):
            async with (
                PostgresJournal(database) as journal,
                RefundQueue(database) as queue,
                gateway.session(journal=journal, middleware=[hold]) as session,
                anyio.create_task_group() as group,
            ):
                progress = Progress(Output(), lambda *total: reports.extend(total), Totals(0), path, 0.05)
                group.start_soon(partial(queue.work, session, on_outcome=progress.add))
                group.start_soon(progress.report, queue)
                await touched()
                await queue.enqueue([RefundRequest.from_dict(refund(1))])
                await begun.wait()
                await reported()
                os.utime(path, (0, 0))
                await reported()
                assert path.stat().st_mtime == 0
                answered.set()
                await touched()
                await queue.app.connector.execute_query_async("ALTER TABLE procrastinate_workers RENAME TO hidden")
                while "no progress report: queue: relation" not in capsys.readouterr().err:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
                os.utime(path, (0, 0))
                await queue.app.connector.execute_query_async("ALTER TABLE hidden RENAME TO procrastinate_workers")
                await touched()
                group.cancel_scope.cancel()

    path.touch()
    anyio.run(work)
    assert len(gateway.refunds) == 1


def test_unknown_refund_stays_in_the_queue(env, gateway, file):
    """An unknown refund waits until a query can resolve it; the journal shows it."""
    refunds(file, 1)
    gateway.script(Fault.NO_ANSWER)
    gateway.script(Fault.HTTP_500, call="query", times=1000)
    run("batch", file, "--queue", "--yes", env=env)
    ended = run("worker", "--until-empty", "--deadline", "2", "--json", env=env)
    assert (ended.json["queue"]["later"], ended.json["unknown"]) == (1, 1)
    assert list(ended.json["reasons"].values()) == [1]
    assert ended.json["queued_again"] == {f"unknown: {reason}": 1 for reason in ended.json["reasons"]}
    assert f"│ unknown: {next(iter(ended.json['reasons']))} " in run("journal", "show", env=env).stdout


def test_a_wrong_gateway_key_ends_the_worker(env, gateway, file, stranger_keys):
    """The error names the key, and the exit code is 5."""
    run("batch", file, "--queue", "--yes", env=env)
    wrong = env | {"LIANLIAN_GATEWAY_PUBLIC_KEYS": stranger_keys.public.to_base64()}
    ended = run("worker", "--until-empty", "--deadline", "1", env=wrong)
    assert (ended.exit_code, gateway.requests["apply"]) == (5, 4)
    assert "LIANLIAN_GATEWAY_PUBLIC_KEYS" in ended.stderr


def test_rejected_configuration_ends_the_worker(env, gateway, file):
    """A rejection that applies to every refund ends the worker with 3, and the refunds stay in the queue."""
    gateway.script(Fault.BUSY, ret_code="3001", when=When.BEFORE, times=1000)
    run("batch", file, "--queue", "--yes", env=env)
    ended = run("worker", "--until-empty", "--concurrency", "1", env=env)
    assert ended.exit_code == 3
    assert "batch stopped: " in ended.stderr
    assert sum(queued(env)[name] for name in ("waiting", "later", "at_work")) == 30


def test_rejected_refund_is_shown_once(env, file):
    """A permanent rejection is one line of the worker, and the refund is not queued again."""
    write_csv(file, [refund(1, money_refund="1000.01")])
    run("batch", file, "--queue", "--yes", env=env)
    ended = run("worker", "--until-empty", env=env)
    assert (ended.exit_code, ended.stderr.count("refund rejected R-1: 5003")) == (0, 1)
    assert sum(queued(env).values()) == 0


def test_permanent_failure_is_shown_in_one_line(env, file):
    """A number with other content is a permanent failure, shown without a traceback."""
    for money in ("1.00", "2.00"):
        write_csv(file, [refund(1, money_refund=money)])
        run("batch", file, "--queue", "--yes", env=env)
        ended = run("worker", "--until-empty", env=env)
    assert "│ failed  │ 1 " in ended.stdout
    cause = "refund R-1 exists with another money_refund: ours 2.00, recorded 1.00"
    assert cause in ended.stderr
    assert "│ R-1 " in ended.stdout
    [failure] = run("journal", "show", "--json", env=env).json["failures"]
    assert failure["no_refund"] == "R-1"
    assert failure["cause"].startswith(cause)


def test_worker_interrupted_at_its_start_exits_130(env):
    """Ctrl-C before the work has begun ends the command with 130."""
    with interruption():
        ended = run("worker", env=env)
    assert (ended.exit_code, ended.stderr.splitlines()[-1]) == (130, "interrupted")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ((), "must be a postgresql:// URL, here or in LIANLIAN_JOURNAL"),
        (("a/path",), "must be a postgresql:// URL, here or in LIANLIAN_JOURNAL, not 'a/path'"),
        ((f"postgresql://me:{PASSWORD}@db/",), "other processes can read a password on the command line"),
    ],
)
def test_a_worker_needs_a_database(env, arguments, hint):
    """A missing or invalid URL is a usage error."""
    ended = run("worker", *arguments, env={**env, "LIANLIAN_JOURNAL": ""})
    assert ended.exit_code == 2
    assert hint in " ".join(ended.stderr.split())


def test_unreachable_database_exits_1(env):
    """An unreachable server is named without its password."""
    ended = run("worker", env=env | {"LIANLIAN_JOURNAL": f"postgresql://me:{PASSWORD}@/x?host=/nowhere"})
    assert ended.exit_code == 1
    assert "journal error: journal lianlian in x at /nowhere: " in ended.stderr


def test_a_missing_extra_is_named(producer, file, monkeypatch):
    """Without procrastinate the error says what to install, in one line."""
    for name in [name for name in sys.modules if name.startswith(("procrastinate", "lianlian_async.contrib.proc"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "procrastinate", None)
    ended = run("batch", file, "--queue", "--yes", env=producer)
    assert ended.exit_code == 2
    assert "PostgreSQL needs procrastinate: pip install 'lianlian-async[postgres]'" in ended.stderr


def test_lost_database_is_an_error(producer):
    """An error of the queue's database becomes a ``JournalError``."""
    dsn = producer["LIANLIAN_JOURNAL"]

    async def lose():
        async with open_queue(dsn) as queue:
            async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
                await connection.execute("DROP TABLE procrastinate_jobs CASCADE")
            await queue.enqueue([])
            await queue.counts()

    with pytest.raises(JournalError, match=r'queue: relation "procrastinate_jobs" does not exist'):
        anyio.run(lose)
