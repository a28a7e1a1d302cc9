"""``lianlian demo``: refunds at a faulty gateway, and the audit of its books."""

import multiprocessing
import re
import signal
import threading
from decimal import Decimal

import pytest

from lianlian_async import RefundRequest
from lianlian_async.cli.exit_codes import FAILED, INTERRUPTED, MADE, NOT_SENT, REJECTED, UNKNOWN
from lianlian_async.cli.sandbox.audit import Audit, Count
from lianlian_async.cli.sandbox.process import Books, RemoteGateway, gateway_process, run_gateway
from tests.support.command import end, interruption, run, start

DEMO = ("demo", "--refunds", "30", "--bits", "1024")


def test_no_refund_is_made_twice_and_every_outcome_is_true():
    """The gateway's books confirm every outcome of thirty refunds with faults."""
    ended = run(*DEMO, "--seed", "3", "--json")
    assert ended.exit_code == 0
    report = ended.json
    assert report["outcome"] == "the books agree"
    assert report["made_twice"] == 0
    assert sum(report["outcomes"].values()) == report["refunds"] == 30
    assert report["outcomes"]["rejected"] + report["outcomes"]["unknown"] >= 1
    assert report["attempts"] >= 30
    assert report["seconds"] > 0


def test_without_a_terminal_there_is_no_progress():
    """Without faults all valid refunds are made; the tables are on stdout, and stderr is empty."""
    ended = run(*DEMO, "--faults", "0")
    assert ended.exit_code == 0
    assert "│ made     │ 29 " in ended.stdout
    assert "│ rejected │ 1 " in ended.stdout
    assert ended.stdout.endswith("the books agree\n")
    assert ended.stderr == ""


def test_a_terminal_shows_progress_on_stderr():
    """On a terminal the progress is on stderr, and stdout has only the result."""
    ended = run(*DEMO, "--faults", "0", "--json", env={"FORCE_COLOR": "1"})
    assert "refunds" in ended.stderr
    assert ended.json["refunds"] == 30


def check_interrupted(ended):
    """Check the audit of an interrupted demo."""
    assert ended.exit_code == 130
    assert ended.stderr.endswith("interrupted\n")
    assert ended.json["outcome"] == "the books agree"
    assert ended.json["made_twice"] == 0


def test_interrupted_demo_shows_its_audit():
    """Ctrl-C shows the audit of the refunds so far, and exits with 130."""
    process = start(*DEMO, "--refunds", "20000", "--concurrency", "2", "--json", env={"FORCE_COLOR": "1"})
    seen = ""
    while not re.search(r"[1-9][0-9,]* of 20,000", seen):  # the progress bar: it is under way
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    check_interrupted(end(process))


def test_demo_interrupted_at_its_start_shows_its_audit():
    """Without a refund the books agree, too."""
    with interruption():
        ended = run(*DEMO, "--json")
    check_interrupted(ended)
    assert (ended.json["attempts"], ended.json["outcomes"]["made"]) == (0, 0)


# ── the gateway's process ────────────────────────────────────────────────────────────────────────


def test_gateway_process_returns_its_books():
    """Refunds, money and requests come through the pipe after the server has stopped."""
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=run_gateway, args=(theirs, {"default_order": Decimal("9.00")}))
    thread.start()
    with ours:
        environment = ours.recv()
        refund = ("--dt-refund", "20130515094018", "--money-refund", "1.00", "--no-order", "O-1")
        assert run("apply", "--no-refund", "R-1", *refund, env=environment).exit_code == 0
        assert run("apply", "--no-refund", "R-2", *refund, "--money-refund", "9.01", env=environment).exit_code == 3
        assert RemoteGateway(environment, ours).close_books() == Books(
            times_made={"R-1": 1}, money_moved={"R-1": Decimal("1.00")}, requests={"apply": 2}
        )
    thread.join()


def test_gateway_process_ends_when_the_pipe_is_closed():
    """A closed pipe ends the gateway without a traceback."""
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    run_gateway(theirs, {})
    assert theirs.closed


def test_gateway_process_ends_with_its_block():
    """The process ends with its block, even if nobody read the books."""
    before = multiprocessing.active_children()
    with gateway_process({}) as gateway:
        assert gateway.environment["LIANLIAN_APPLY_URL"].startswith("http://127.0.0.1:")
        assert len(multiprocessing.active_children()) == len(before) + 1
    assert multiprocessing.active_children() == before


# ── the audit ────────────────────────────────────────────────────────────────────────────────────


def audit(ending, times, moved=None):
    """Return the audit of one refund of 2.50 yuan, which was made ``times`` times."""
    request = RefundRequest(no_refund="R-1", dt_refund="20130515094018", money_refund=Decimal("2.50"), no_order="O-1")
    moved = times * request.money_refund if moved is None else moved
    books = Books({"R-1": times}, {"R-1": moved}, {}) if times else Books({}, {}, {})
    return Audit([request], {} if ending is None else {"R-1": ending}, books)


@pytest.mark.parametrize(
    ("ending", "times"),
    [
        (MADE, 1),
        (REJECTED, 0),
        (NOT_SENT, 0),
        (UNKNOWN, 0),
        (UNKNOWN, 1),
        (INTERRUPTED, 0),
        (INTERRUPTED, 1),
        (None, 0),
    ],
)
def test_matching_books_are_no_disagreement(ending, times):
    """Made means once, unknown and interrupted at most once, and every other outcome never."""
    assert audit(ending, times).disagreements() == []


@pytest.mark.parametrize(
    ("ending", "times"),
    [(MADE, 0), (MADE, 2), (REJECTED, 1), (NOT_SENT, 1), (UNKNOWN, 2), (INTERRUPTED, 2), (FAILED, 1), (None, 1)],
)
def test_contradicting_books_are_a_disagreement(ending, times):
    """A refund that is lost, made twice, or made despite its outcome is listed."""
    assert audit(ending, times).disagreements() == ["R-1"]


def test_other_amount_is_a_disagreement():
    """The amount in the books must be the requested one."""
    assert audit(MADE, 1, Decimal("2.49")).disagreements() == ["R-1"]


def test_the_audit_counts_what_was_made_twice():
    """Refunds that were made more than once are counted."""
    assert [audit(MADE, times).made_twice() for times in (0, 1, 2, 3)] == [0, 0, 1, 1]


def test_audit_counts_outcomes_and_lists_unknown_refunds():
    """The four usual outcomes are always counted, others if they occur."""
    assert audit(UNKNOWN, 1).counts() == [
        Count("made", 0, 0),
        Count("rejected", 0, 0),
        Count("not sent", 0, 0),
        Count("unknown", 1, 1),
    ]
    assert audit(UNKNOWN, 1).unknown() == {"R-1": 1}
    assert audit(INTERRUPTED, 0).counts()[-1] == Count("interrupted", 1, 0)
    assert audit(INTERRUPTED, 0).unknown() == {}
