"""The evidence of one refund (``resolution.Case``): when it was sent last, and what "no such record" then proves."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import attrs
import pytest

from lianlian_async import LianLianError, RefundRejected, RetryPolicy
from lianlian_async.clock import Moment
from lianlian_async.exchange import Finding, Reply
from lianlian_async.outcome import Traffic, unknown_reason
from lianlian_async.resolution import Case
from tests.support.exchanges import exchange
from tests.support.parties import refund_request

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
NOW = Moment(NOON, 10_000.0, "this boot", NOON)


def case(now=NOW, *, grace=900.0, **evidence):
    """Return a case whose clock shows ``now``."""
    policy = RetryPolicy(not_found_grace=grace, maximum=8.0)
    apply = exchange(asked={"oid_partner": "201103171000000000"}, policy=policy)
    settings = {"request": refund_request(), "apply": apply, "clock": lambda: now}
    return Case(**settings, make_query=None, before_resend=None, canary=None, **evidence)


def refused(ret_code="1002"):
    return RefundRejected(ret_code, "", verified=True, no_refund="R-1")


def ago(seconds, **changed):
    return attrs.evolve(NOW.after(-seconds), **changed)


# ── "no such record" ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("sent_at", "earlier", "is_believed"),
    [
        (None, None, True),  # nothing was sent
        (ago(900), None, True),
        (ago(899.9), None, False),
        (ago(900), ago(900), True),
        (ago(900), ago(899.9), False),  # the later one counts
        (ago(899.9), ago(900), False),
        (ago(2000), ago(950, timeline="other boot"), True),
        (ago(2000), ago(910, timeline="other boot"), False),  # the gateway's clock is exact to 15 seconds
        (ago(2000, timeline="other boot", gateway=None), None, False),  # no clock measures the time since then
    ],
)
def test_no_such_record_is_believed_after_the_grace(sent_at, earlier, is_believed):
    """The grace counts from the last moment at which this call, or an earlier one, may have sent the refund."""
    opened = case(sent_at=sent_at)
    opened.take_over(earlier, None)
    assert opened.not_found_is_believed(NOW) is is_believed


def test_a_time_that_no_clock_measures_starts_at_the_query():
    """The first query of this boot starts the grace."""
    opened = case(sent_at=ago(5000, timeline="other boot", gateway=None))
    assert not opened.not_found_is_believed(NOW)
    assert opened.sent_at == NOW
    assert not opened.not_found_is_believed(NOW.after(899.9))
    assert opened.not_found_is_believed(NOW.after(900))


def test_the_gateways_time_of_a_query_comes_from_the_clock_after_its_answer():
    """The time that was known at the query may come from an earlier, wrong ``Date`` header."""
    sent_at = ago(500, timeline="other boot", wall=NOON - timedelta(days=1))
    wrong = attrs.evolve(NOW, gateway=NOON + timedelta(days=1))
    assert not case(sent_at=sent_at).not_found_is_believed(wrong)


# ── an earlier call ──────────────────────────────────────────────────────────────────────────────


def test_a_call_that_sent_nothing_takes_over_the_evidence_of_an_earlier_one():
    opened, last = case(), refused()
    opened.take_over(ago(100), last)
    assert (opened.sent_at, opened.refused) == (ago(100), last)


@pytest.mark.parametrize(
    ("ours", "theirs", "still_refused"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_a_refund_counts_as_refused_only_if_all_calls_were_refused(ours, theirs, still_refused):
    """If one attempt of either call may have succeeded, a record without its whole identity is a proof."""
    opened = case(sent_at=ago(200), refused=refused() if ours else None)
    last = refused("9983")
    opened.take_over(ago(100), last if theirs else None)
    assert opened.refused is (last if still_refused else None)


def test_the_later_of_two_sends_counts():
    """Two earlier calls may both have sent the refund, maybe on other machines."""
    for first, second in ((ago(100), ago(50)), (ago(50), ago(100))):
        opened = case(sent_at=ago(5000))
        opened.take_over(first, None)
        opened.take_over(second, None)
        assert opened.unknown().moment == ago(50)


@pytest.mark.parametrize(("other", "sent_at"), [(100, ago(100, timeline="other boot", gateway=None)), (50, NOW)])
def test_two_sends_that_no_clock_compares_count_as_sent_now(other, sent_at):
    """But the same send counts once, as when a call resolves the outcome that its journal has, too."""
    opened = case(sent_at=ago(100, timeline="other boot", gateway=None))
    opened.take_over(ago(other, timeline="other boot", gateway=None), None)
    assert opened.sent_at == sent_at


# ── an unknown outcome ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("sent_at", "settings", "seconds"),
    [
        (ago(100), {}, 800),
        (ago(100), {"retry_after": 801.0}, 800),
        (ago(5000), {"retry_after": 60.0}, 60),
        (ago(5000), {"retry_after": 1e9}, 60),  # a longer Retry-After counts as a minute
        (ago(895), {}, 8),  # RetryPolicy.maximum
        (ago(5000), {}, 8),
        (ago(5000, timeline="other boot", gateway=None), {}, 900),
        (ago(100), {"grace": 91 * 86_400.0}, 90 * 86_400),
        (None, {}, 900),
    ],
)
def test_the_caller_is_told_when_to_query_again(sent_at, settings, seconds):
    """When the grace is over; not before a short Retry-After, and within LianLian's limit for queries."""
    unknown = case(sent_at=sent_at, **settings).unknown()
    assert unknown.ask_again_at == NOON + timedelta(seconds=seconds)
    assert unknown.moment == (sent_at or NOW)


def test_a_caller_that_leaves_is_told_how_long_the_others_may_send():
    """Then no earlier evidence counts: the other callers may send the refund after this moment."""
    unknown = case(sent_at=ago(100), refused=refused()).unknown(30.0)
    assert (unknown.moment, unknown.refused) == (NOW.after(30), None)
    assert unknown.ask_again_at == NOON + timedelta(seconds=930)


def test_an_unknown_outcome_has_what_the_next_call_needs():
    """The request, its signed body, the last refusal, and the number of requests so far."""
    last = refused()
    unknown = case(sent_at=ago(100), refused=last, traffic=Traffic(attempts=2, queries=5)).unknown()
    assert (unknown.request, unknown.body, unknown.refused) == (refund_request(), b"{}", last)
    assert (unknown.oid_partner, unknown.attempts, unknown.queries) == ("201103171000000000", 2, 5)


def test_an_unknown_outcome_names_both_errors_and_the_last_exchange():
    """The query's exchange comes first; without one the apply call's exchange is given."""
    apply_error, query_error = LianLianError("apply failed"), LianLianError("query failed")
    opened = case(apply_error=apply_error)
    assert opened.unknown().last_error == "apply failed"
    assert opened.unknown().__cause__ is apply_error
    assert case().unknown().last_error == "no answer yet"
    opened.query_error = query_error
    apply_error.last_exchange = "the exchange of the apply call"
    assert opened.unknown().last_error == "apply failed; then query failed"
    assert opened.unknown().__cause__ is query_error
    assert opened.unknown().last_exchange == "the exchange of the apply call"
    assert opened.unknown().reason == unknown_reason(apply_error, query_error)
    query_error.last_exchange = "the exchange of the query"
    assert opened.unknown().last_exchange == "the exchange of the query"
    opened.query_error = LianLianError("apply failed")
    assert opened.unknown().last_error == "apply failed"  # equal texts are given once


# ── the answer to an apply call ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("before", "finding", "error", "is_refused"),
    [
        ({}, Finding.EXISTS, refused(), True),
        ({"sent_at": ago(50), "refused": refused()}, Finding.EXISTS, refused(), True),
        ({"sent_at": ago(50)}, Finding.EXISTS, refused(), False),  # the attempt before it may have succeeded
        ({}, Finding.UNCERTAIN, LianLianError("reset"), False),
        ({"sent_at": ago(50), "refused": refused()}, Finding.UNCERTAIN, LianLianError("reset"), False),
    ],
)
def test_a_refund_is_refused_if_every_attempt_was(before, finding, error, is_refused):
    opened = case(**before)
    opened.take_in(Reply(finding=finding, error=error))
    assert opened.sent_at == NOW
    assert opened.refused is (error if is_refused else None)
    assert opened.rejection is None


def test_a_rejection_is_kept_until_the_query():
    """It changes nothing else, because the rejected attempt made nothing."""
    opened, error = case(sent_at=ago(50)), refused("5007")
    opened.take_in(Reply(finding=Finding.REJECTED, error=error))
    assert (opened.rejection, opened.sent_at, opened.refused) == (error, ago(50), None)
