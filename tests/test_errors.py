"""The tree of errors: classes, messages, attributes, pickling."""

import copy
import pickle
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from lianlian_async import errors
from lianlian_async.clock import Moment
from lianlian_async.codes import CODES
from lianlian_async.errors import (
    AnswerMismatch,
    BatchStopped,
    ConfigurationError,
    GatewayUnavailable,
    InvalidRequest,
    JournalError,
    LianLianError,
    MalformedMessage,
    Problem,
    QueryRejected,
    RefundConflict,
    RefundNotFinal,
    RefundNotFound,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundRejected,
    SignatureInvalid,
)
from lianlian_async.models import Refund, RefundRequest, RefundStatus

NOW = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
REQUEST = RefundRequest(no_refund="R-1", dt_refund=NOW, money_refund=Decimal("200.01"), no_order="O-1")
REGISTER = "register this machine's outgoing address at LianLian"
EXAMPLES = [
    LianLianError("something"),
    ConfigurationError("private key: is empty"),
    InvalidRequest([Problem("no_refund", "must not be empty", "''"), Problem("money_refund", "must be digits", "'x'")]),
    RefundNotSent("R-1", attempts=3, last_error="connection refused"),
    RefundRejected("1008", "IP不允许", verified=False, no_refund="R-1"),
    QueryRejected("3010", "无权限", verified=False, no_refund=None),
    RefundNotFound(no_refund=None, oid_refundno="2013051613121201", ret_code="8901", ret_msg="没有记录", verified=True),
    RefundOutcomeUnknown(
        request=REQUEST,
        oid_partner="201103171000000000",
        apply_url="https://gateway.example/apply",
        body=b"{}",
        attempts=1,
        queries=4,
        moment=Moment(NOW, 7.5, "this boot"),
        ask_again_at=NOW + timedelta(minutes=15),
        last_error="timeout",
    ),
    GatewayUnavailable("no answer", attempts=4, last_error="timeout", ret_code=None),
    RefundConflict("R-1", field="money_refund", ours="1.00", theirs="2.00"),
    SignatureInvalid("no valid signature"),
    AnswerMismatch("no_refund", asked="R-1", answered=None),
    MalformedMessage("not JSON"),
    JournalError("refunds.db: held by another process"),
    BatchStopped(RefundRejected("1008", "IP不允许", verified=False, no_refund="R-1")),
    RefundNotFinal(
        Refund(no_refund="R-1", money_refund=Decimal("1.00"), sta_refund=RefundStatus.PROCESSING), last_error=None
    ),
]


def kind(error):
    return type(error).__name__


def told(error):
    """Return all attributes of an error, inner errors included, as comparable values."""
    if not isinstance(error, Exception):
        return error
    return type(error), str(error), error.args, {name: told(value) for name, value in vars(error).items()}


def test_every_error_of_the_module_is_tested_here():
    """The examples hold one error of each public class."""
    classes = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, LianLianError)}
    assert {type(error) for error in EXAMPLES} == {each for each in classes if not each.__name__.startswith("_")}


@pytest.mark.parametrize("error", EXAMPLES, ids=kind)
def test_one_clause_catches_every_error(error):
    """``except LianLianError`` catches it; ``except ValueError`` only errors in the caller's own values."""
    assert isinstance(error, LianLianError)
    assert isinstance(error, ValueError) == isinstance(error, ConfigurationError | InvalidRequest)
    assert not isinstance(error, OSError | RuntimeError)


@pytest.mark.parametrize("duplicate", [*(lambda error, p=p: pickle.loads(pickle.dumps(error, p)) for p in range(6))])
@pytest.mark.parametrize("error", EXAMPLES, ids=kind)
def test_every_error_survives_pickling(error, duplicate):
    """Class, message and every attribute arrive in another process, notes included."""
    error = copy.copy(error)
    error.add_note("row 17")
    twin = duplicate(error)
    assert told(twin) == told(error)
    assert twin.__notes__ == ["row 17"]


@pytest.mark.parametrize("error", EXAMPLES, ids=kind)
def test_every_error_is_copied(error):
    """Shallow and deep copies are equal to the original."""
    for twin in (copy.copy(error), copy.deepcopy(error)):
        assert told(twin) == told(error)


def test_a_copy_is_independent():
    """A note on a copy does not appear on the original."""
    original = ConfigurationError("x")
    twin = copy.deepcopy(original)
    twin.add_note("only here")
    assert not hasattr(original, "__notes__")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EXAMPLES[2], "no_refund: must not be empty (got ''); money_refund: must be digits (got 'x')"),
        (EXAMPLES[3], "refund R-1 was not sent: connection refused (attempts: 3); it is safe to send it again"),
        (
            EXAMPLES[4],
            f"refund rejected R-1: 1008 IP不允许 (our IP address is not allowed); {REGISTER}",
        ),
        (
            EXAMPLES[5],
            "query rejected: 3010 无权限 (merchant lacks the permission); ask LianLian to enable refunds",
        ),
        (EXAMPLES[6], "no record of refund 2013051613121201: 8901 没有记录"),
        (
            EXAMPLES[7],
            (
                "refund R-1 may have been made: timeout (attempts: 1, queries: 4); "
                "ask again at 2026-01-02T03:19:05+00:00"
            ),
        ),
        (EXAMPLES[8], "no answer"),
        (
            EXAMPLES[9],
            "refund R-1 exists with another money_refund: ours 1.00, recorded 2.00; "  # noqa: ISC004
            "do not refund again before a person has decided",
        ),
        (EXAMPLES[11], "message for another request: no_refund is None, not 'R-1'"),
        (EXAMPLES[15], "refund R-1 is not final yet: sta_refund is 1"),
        (
            RefundNotFinal(EXAMPLES[15].refund, last_error="no answer"),
            "refund R-1 is not final yet: sta_refund is 1; the last query failed: no answer",
        ),
        (
            EXAMPLES[14],
            f"batch stopped: refund rejected R-1: 1008 IP不允许 (our IP address is not allowed); {REGISTER}",
        ),
    ],
    ids=lambda value: kind(value) if isinstance(value, Exception) else "",
)
def test_messages(error, message):
    """Each message names the refund, the cause, and what to do."""
    assert str(error) == message


def test_rejection_carries_code_text_meaning_and_advice():
    """Code and text come from the gateway, meaning and advice from the table of codes."""
    error = EXAMPLES[4]
    assert (error.ret_code, error.ret_msg, error.no_refund) == ("1008", "IP不允许", "R-1")
    assert (error.meaning, error.advice) == ("our IP address is not allowed", REGISTER)
    assert error.is_configuration
    assert not error.verified


@pytest.mark.parametrize("code", CODES)
def test_rejection_of_a_query_gives_no_advice_about_the_refund(code):
    """It proves nothing about the refund, so nobody may send a new one because of it."""
    error = QueryRejected(code, "", verified=True, no_refund="R-1")
    is_about_the_refund = re.search("new no_refund|send the same refund|will not make", error.advice)
    assert (is_about_the_refund, str(error).endswith(error.advice)) == (None, True)


def test_unknown_outcome_carries_all_that_a_later_query_needs():
    """It holds the request, its query, the signed bytes, and both moments."""
    error = EXAMPLES[7]
    assert error.request == REQUEST
    assert error.query() == REQUEST.query()
    assert (error.no_refund, error.dt_refund) == (REQUEST.no_refund, REQUEST.dt_refund)
    assert (error.oid_partner, error.body, error.attempts, error.queries) == ("201103171000000000", b"{}", 1, 4)
    assert error.ask_again_at - error.sent_at == timedelta(minutes=15)


def test_the_other_attributes():
    """Each fact in a message is also an attribute, so programs need not parse messages."""
    not_sent, absent, busy, conflict, mismatch = (EXAMPLES[at] for at in (3, 6, 8, 9, 11))
    assert (not_sent.no_refund, not_sent.attempts, not_sent.last_error) == ("R-1", 3, "connection refused")
    assert (absent.no_refund, absent.oid_refundno, absent.ret_code) == (None, "2013051613121201", "8901")
    assert (absent.ret_msg, absent.verified) == ("没有记录", True)
    assert (busy.attempts, busy.last_error, busy.ret_code) == (4, "timeout", None)
    assert (conflict.no_refund, conflict.field, conflict.ours, conflict.theirs) == (
        "R-1",
        "money_refund",
        "1.00",
        "2.00",
    )
    assert (mismatch.field, mismatch.asked, mismatch.answered) == ("no_refund", "R-1", None)


def test_problems_are_kept_in_order():
    """All broken rules are kept in order, from any iterable."""
    problems = [Problem("a", "rule", "1"), Problem("b", "rule", "2")]
    assert InvalidRequest(iter(problems)).problems == tuple(problems)
    assert [problem.field for problem in InvalidRequest(problems).problems] == ["a", "b"]


def test_message_holds_one_line_of_ret_msg():
    """A message holds at most the documented 100 characters of ret_msg, in one line; the attribute holds all."""
    words = "坏\n\x1b[2J" + "x" * 1000
    error = RefundRejected("1004", words, verified=False, no_refund="R-1")
    assert error.ret_msg == words
    assert "坏??[2Jxxx" in str(error)
    assert str(error).count("x") <= 100
