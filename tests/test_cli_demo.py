"""``lianlian demo``: refunds at a faulty gateway, and the audit of its ledger."""

import re
import signal
from collections import Counter

import pytest

from lianlian_async.cli.exit_codes import FAILED, INTERRUPTED, MADE, NOT_SENT, REJECTED, UNKNOWN
from lianlian_async.cli.sandbox.demo import audit
from tests.support.command import end, interruption, run, start

DEMO = ("demo", "--refunds", "30", "--bits", "1024")


def test_no_refund_is_made_twice_and_every_outcome_is_true():
    """The gateway's ledger confirms every outcome of thirty refunds with faults."""
    ended = run(*DEMO, "--seed", "3", "--json")
    assert ended.exit_code == 0
    report = ended.json
    assert report["outcome"] == "the gateway's ledger confirms the outcomes"
    assert report["made_twice"] == 0
    assert sum(report["outcomes"].values()) == report["refunds"] == 30
    assert report["outcomes"]["rejected"] + report["outcomes"]["unknown"] >= 1
    assert report["attempts"] >= 30
    assert report["seconds"] > 0
    assert report["worst_stall_ms"] > 0


def test_without_a_terminal_there_is_no_progress():
    """Without faults all valid refunds are made; the tables are on stdout, and stderr is empty."""
    ended = run(*DEMO, "--faults", "0")
    assert ended.exit_code == 0
    assert "│ made     │ 29 " in ended.stdout
    assert "│ rejected │ 1 " in ended.stdout
    assert ended.stdout.endswith("the gateway's ledger confirms the outcomes\n")
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
    assert ended.json["outcome"] == "the gateway's ledger confirms the outcomes"
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
    """Without a refund, nothing contradicts the ledger."""
    with interruption():
        ended = run(*DEMO, "--json")
    check_interrupted(ended)
    assert (ended.json["attempts"], ended.json["outcomes"]["made"]) == (0, 0)


# ── the audit ────────────────────────────────────────────────────────────────────────────────────


def audited(outcome, times):
    """Return the audit of one refund that the gateway made ``times`` times."""
    return audit(["R-1"], {} if outcome is None else {"R-1": outcome}, Counter({"R-1": times}))


@pytest.mark.parametrize(
    ("outcome", "times"),
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
def test_matching_ledger_is_no_disagreement(outcome, times):
    """Made means once, unknown and interrupted at most once, and every other outcome never."""
    assert audited(outcome, times)[1] == []


@pytest.mark.parametrize(
    ("outcome", "times"),
    [(MADE, 0), (MADE, 2), (REJECTED, 1), (NOT_SENT, 1), (UNKNOWN, 2), (INTERRUPTED, 2), (FAILED, 1), (None, 1)],
)
def test_contradicting_ledger_is_a_disagreement(outcome, times):
    """A refund that is lost, made twice, or made despite its outcome is listed."""
    assert audited(outcome, times)[1] == ["R-1"]


def test_audit_counts_outcomes():
    """The four usual outcomes are always counted, others if they occur."""
    rows, _ = audited(UNKNOWN, 1)
    assert rows == [("made", 0, 0), ("rejected", 0, 0), ("not sent", 0, 0), ("unknown", 1, 1)]
    assert audited(INTERRUPTED, 0)[0][-1] == ("interrupted", 1, 0)
