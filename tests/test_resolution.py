"""The resolution of a refund: the decision table, and each of its rows on the sandbox gateway."""

from __future__ import annotations

import asyncio
import logging
import pickle
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import anyio
import httpx
import pytest

from lianlian_async import (
    AnswerMismatch,
    ConfigurationError,
    GatewayUnavailable,
    QueryRejected,
    RefundConflict,
    RefundNotFound,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundRejected,
    RefundSession,
    RetryBudget,
    RetryPolicy,
    wire,
)
from lianlian_async.clock import Moment, system_clock
from lianlian_async.exchange import Call, Finding
from lianlian_async.journal import MemoryJournal, SqliteJournal
from lianlian_async.resolution import NEXT_STEP, Case, Step
from lianlian_async.sandbox import Fault, Repeated, When
from tests.support import keypairs
from tests.support.exchanges import exchange
from tests.support.parties import EPOCH, as_json, boot_clock, made, refund_request, sandbox, wall_clock

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

TRUSTING = RetryPolicy(not_found_grace=0.0)
"""For gateways that are known to deduplicate."""


class Road(httpx.AsyncBaseTransport):
    """A transport to the sandbox that records requests, and refuses the apply calls numbered in ``closed``."""

    def __init__(self, gateway, *, closed=()):
        self.inner = httpx.ASGITransport(app=gateway)
        self.closed = closed
        self.applied = []
        self.times = []

    async def handle_async_request(self, request):
        if request.url.path != "/refundquery.htm":
            self.times.append(anyio.current_time())
            if len(self.times) in self.closed:
                raise httpx.ConnectError("road closed")
            self.applied.append(await request.aread())
        return await self.inner.handle_async_request(request)


def session_over(gateway, *, closed=(), **options):
    """A session with the sandbox, and the transport between them."""
    road = Road(gateway, closed=closed)
    return RefundSession(gateway.merchant(), transport=road, clock=boot_clock, **options), road


async def apply(gateway, request=None, **options):
    """Return the result or the exception of one apply call."""
    session, _ = session_over(gateway, **options)
    async with session:
        return await session.apply_refund(request or refund_request())


async def left_unknown(gateway, request=None, **options):
    """Return the error of an apply call whose outcome is unknown."""
    with pytest.raises(RefundOutcomeUnknown) as caught:
        await apply(gateway, request, **options)
    return caught.value


# ── the table ────────────────────────────────────────────────────────────────────────────────────


def test_the_decision_table():
    """The step for each finding, and for whether an earlier attempt may have arrived."""
    returned, certain, ask = Step.RETURN, Step.RAISE, Step.QUERY
    assert {
        # finding: (step if no earlier attempt may have arrived, step if one may have)
        Finding.NOT_SENT: (certain, ask),
        Finding.FOUND: (returned, returned),
        Finding.REJECTED: (certain, ask),
        Finding.CONFLICT: (certain, certain),
        Finding.EXISTS: (ask, ask),
        Finding.UNCERTAIN: (ask, ask),
    } == NEXT_STEP


# ── each row: no earlier attempt may have arrived ────────────────────────────────────────────────


async def test_not_sent_is_sent_again():
    """A request that was certainly not sent is repeated until the refund is made."""
    gateway = sandbox()
    refund = await apply(gateway, closed=(1, 2, 3))
    assert refund.no_refund == "R-1"
    assert gateway.requests == {"apply": 1}


async def test_if_no_attempt_is_sent_the_error_is_refund_not_sent():
    """The refund is safe to send again."""
    gateway = sandbox()
    with pytest.raises(RefundNotSent, match="road closed") as caught:
        await apply(gateway, closed=range(1, 99))
    assert caught.value.attempts == 4
    assert gateway.requests == {}


async def test_a_signed_success_is_returned():
    """One request, one record, no query."""
    gateway = sandbox()
    refund = await apply(gateway)
    assert (refund.no_refund, refund.money_refund) == ("R-1", Decimal("10.00"))
    assert gateway.requests == {"apply": 1}


@pytest.mark.parametrize("signs", [True, False], ids=["signed", "unsigned"])
async def test_a_first_rejection_is_believed(signs):
    """A rejection of the first attempt is final, signed or not."""
    gateway = sandbox(default_order=None, sign_errors=signs)
    with pytest.raises(RefundRejected) as caught:
        await apply(gateway)
    assert caught.value.ret_code == "5002"
    assert caught.value.verified is signs
    assert gateway.requests == {"apply": 1}


async def test_a_rejection_after_attempts_that_were_not_sent_is_believed():
    """Attempts that certainly never arrived do not make a rejection uncertain."""
    gateway = sandbox(default_order=None)
    with pytest.raises(RefundRejected):
        await apply(gateway, closed=(1, 2))
    assert gateway.requests == {"apply": 1}


async def test_a_duplicate_returns_the_existing_record():
    """A second call for the same refund finds the record of the first, and makes no refund."""
    gateway = sandbox(repeated=Repeated.REJECT)
    first = await apply(gateway)
    second = await apply(gateway)
    assert second.oid_refundno == first.oid_refundno
    assert gateway.requests == {"apply": 2, "query": 1}
    assert gateway.money_moved("R-1") == 10


@pytest.mark.parametrize("ret_code", ["1003", "2005", "2008", "4002", "9983"])
async def test_in_progress_returns_the_existing_record(ret_code):
    """Codes that mean "already here" lead to a query, which finds the record."""
    gateway = sandbox()
    gateway.script(Fault.BUSY, call="apply", ret_code=ret_code)
    refund = await apply(gateway)
    assert refund.no_refund == "R-1"
    assert gateway.requests == {"apply": 1, "query": 1}


@pytest.mark.parametrize("fault", sorted(set(Fault) - {Fault.DELAY, Fault.LATE}, key=lambda fault: fault.name))
async def test_an_uncertain_answer_leads_to_a_query(fault):
    """The refund was made, but its answer is unusable: it is sent once, and found by a query."""
    gateway = sandbox()
    gateway.script(fault, call="apply")
    refund = await apply(gateway)
    assert refund.no_refund == "R-1"
    assert gateway.requests == {"apply": 1, "query": 1}
    assert gateway.times_made("R-1") == 1


@pytest.mark.parametrize("ret_code", ["9999", "8006", "9920", "8901", "7777"])
async def test_a_code_that_proves_nothing_leads_to_a_query(ret_code):
    """Busy, unclear and unknown codes prove nothing: a query finds the record."""
    gateway = sandbox()
    gateway.script(Fault.BUSY, call="apply", ret_code=ret_code)
    assert (await apply(gateway)).no_refund == "R-1"
    assert gateway.requests == {"apply": 1, "query": 1}


# ── each row: an earlier attempt may have arrived ────────────────────────────────────────────────


async def test_not_sent_after_maybe_sent_leads_to_a_query():
    """A refused connection does not change that an earlier attempt may have arrived."""
    gateway = sandbox()
    gateway.script(Fault.LATE, call="apply", delay=11)  # carried out after the first queries found no record
    patient = RetryPolicy(not_found_grace=0.0, attempts=50, maximum=0.5)
    session, road = session_over(gateway, closed=range(2, 99), retry=patient)
    async with session:
        refund = await session.apply_refund(refund_request())
    assert refund.no_refund == "R-1"
    assert len(road.applied) == 1
    assert len(road.times) > 2
    assert gateway.times_made("R-1") == 1


async def test_a_success_after_maybe_sent_is_returned():
    """The resend after a believed "no such record" returns the refund."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    session, road = session_over(gateway, retry=TRUSTING)
    async with session:
        refund = await session.apply_refund(refund_request())
    assert refund.no_refund == "R-1"
    assert gateway.times_made("R-1") == 1
    assert len(road.applied) == 2
    assert road.applied[0] == road.applied[1]


@pytest.mark.parametrize("repeated", [Repeated.AGAIN, Repeated.REJECT, Repeated.REPLAY])
async def test_a_rejection_after_maybe_sent_may_mean_that_the_first_attempt_succeeded(repeated):
    """The first attempt arrived late and used up the order or the number: a query finds the record."""
    gateway = sandbox(repeated=repeated)
    gateway.script(Fault.LATE, call="apply", delay=11)
    gateway.script(Fault.DELAY, call="apply", delay=2, when=When.BEFORE)
    session, road = session_over(gateway, retry=TRUSTING)
    async with session:
        refund = await session.apply_refund(refund_request())
    assert refund.no_refund == "R-1"
    assert len(road.applied) == 2
    assert gateway.times_made("R-1") == 1
    # 5007 and 1002 lead to one more query; a replay is the refund's own answer.
    assert gateway.requests["query"] == (1 if repeated is Repeated.REPLAY else 2)


async def test_a_rejection_after_maybe_sent_is_believed_after_no_such_record():
    """The rejection is raised as soon as "no such record" is believed."""
    gateway = sandbox(default_order=None)
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    with pytest.raises(RefundRejected) as caught:
        await apply(gateway, retry=TRUSTING)
    assert caught.value.ret_code == "5002"
    assert gateway.requests == {"apply": 2, "query": 2}


async def test_uncertain_after_maybe_sent_leads_to_a_query():
    """A second uncertain answer leads to a query like the first."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    gateway.script(Fault.HTTP_500, call="apply", when=When.AFTER)
    assert (await apply(gateway, retry=TRUSTING)).no_refund == "R-1"
    assert gateway.requests == {"apply": 2, "query": 2}


async def test_the_policys_attempts_limit_the_sends():
    """If "no such record" is believed each time, the policy's attempts end the sends, and the outcome is unknown."""
    gateway = sandbox()
    gateway.script(Fault.HTTP_500, call="apply", when=When.BEFORE, times=99)
    unknown = await left_unknown(gateway, retry=RetryPolicy(attempts=3, not_found_grace=0.0))
    assert unknown.attempts == gateway.requests["apply"] == 3
    assert unknown.queries == gateway.requests["query"] == 3


# ── unknown, and when to ask again ───────────────────────────────────────────────────────────────


async def test_no_such_record_is_not_believed_within_the_grace():
    """By default it proves nothing for 15 minutes: nothing is sent again, and the outcome is unknown."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    unknown = await left_unknown(gateway)
    assert anyio.current_time() <= 30
    assert gateway.requests["apply"] == unknown.attempts == 1
    assert gateway.requests["query"] == unknown.queries > 3
    assert unknown.sent_at == EPOCH + timedelta(seconds=10)
    assert unknown.ask_again_at == EPOCH + timedelta(seconds=910)
    assert unknown.no_refund == "R-1"
    assert unknown.oid_partner == gateway.oid_partner
    assert unknown.query() == refund_request().query()
    assert unknown.request == refund_request()
    assert "no answer within 10.0 s" in unknown.last_error
    assert "8901" in unknown.last_error
    assert isinstance(unknown.__cause__, RefundNotFound)


@pytest.mark.parametrize("ret_code", ["1002", "1003", "2005", "2008", "4002", "9983"])
async def test_a_duplicate_without_a_record_is_unknown(ret_code):
    """After "already here" and "no such record", nothing is sent again within the grace."""
    gateway = sandbox()
    gateway.script(Fault.BUSY, call="apply", when=When.BEFORE, ret_code=ret_code)
    unknown = await left_unknown(gateway)
    assert gateway.requests["apply"] == unknown.attempts == 1
    assert unknown.sent_at == EPOCH
    assert unknown.ask_again_at == EPOCH + timedelta(seconds=900)


async def test_the_grace_is_compared_with_the_time_of_the_query():
    """A "no such record" queried within the grace proves nothing, however late its answer arrives."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    unknown = await left_unknown(gateway)
    await anyio.sleep((unknown.ask_again_at - wall_clock()).total_seconds() - 2)
    gateway.requests.clear()
    gateway.script(Fault.DELAY, call="query", delay=5)
    session, _ = session_over(gateway)
    async with session:
        assert (await session.resolve(unknown)).no_refund == "R-1"
    assert gateway.requests == {"query": 2, "apply": 1}
    assert gateway.times_made("R-1") == 1


async def test_a_gateway_that_answers_no_query_leaves_the_outcome_unknown():
    """Without a usable answer until the deadline, the refund is unknown although it was made."""
    gateway = sandbox()
    gateway.script(Fault.RESET, call="apply")
    gateway.script(Fault.NO_ANSWER, call="query", times=99)
    unknown = await left_unknown(gateway)
    assert gateway.times_made("R-1") == 1
    assert unknown.attempts == 1
    assert unknown.queries == gateway.requests["query"]
    assert isinstance(unknown.__cause__, GatewayUnavailable)


async def test_a_rejected_query_leaves_the_outcome_unknown_at_once():
    """A rejected query says nothing about the refund, and repeating it would not help."""
    gateway = sandbox()
    gateway.script(Fault.RESET, call="apply")
    gateway.script(Fault.BUSY, call="query", ret_code="3010", times=99)
    unknown = await left_unknown(gateway)
    assert unknown.queries == 1
    assert isinstance(unknown.__cause__, QueryRejected)


async def test_the_first_query_respects_retry_after():
    """After a 429 the first query waits as long as Retry-After says."""
    gateway = sandbox()
    gateway.script(Fault.TOO_MANY, call="apply", delay=12)
    refund = await apply(gateway)
    assert refund.no_refund == "R-1"
    assert anyio.current_time() >= 12


async def test_a_retry_after_beyond_the_deadline_sends_no_query():
    """The outcome is unknown at once. A Retry-After of more than a minute does not change ``ask_again_at``."""
    gateway = sandbox()
    gateway.script(Fault.TOO_MANY, call="apply", delay=2000)
    unknown = await left_unknown(gateway)
    assert anyio.current_time() == 0
    assert unknown.queries == gateway.requests["query"] == 0
    assert unknown.ask_again_at == EPOCH + timedelta(seconds=900)


async def test_an_empty_retry_budget_ends_the_queries():
    """Without budget, a record that does not exist yet is queried once."""
    gateway = sandbox()
    gateway.script(Fault.HTTP_500, call="apply", when=When.BEFORE)
    policy = RetryPolicy(budget=RetryBudget(capacity=1, per_second=0))
    unknown = await left_unknown(gateway, retry=policy)
    assert unknown.queries == 2


@pytest.mark.parametrize("delay", [0, 1e9])
async def test_ask_again_at_is_always_a_valid_time(delay):
    """Even with the longest grace, or a Retry-After of decades."""
    gateway = sandbox()
    gateway.script(Fault.TOO_MANY, call="apply", delay=delay)
    gateway.script(Fault.NO_ANSWER, call="query", times=99)
    unknown = await left_unknown(gateway, retry=RetryPolicy(not_found_grace=1e9))
    assert timedelta(days=89) < unknown.ask_again_at - EPOCH < timedelta(days=91)


async def test_the_longest_grace_never_sends_again():
    """With a grace of decades "no such record" is never believed, and nothing is sent twice."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    policy = RetryPolicy(not_found_grace=1e9)
    unknown = await left_unknown(gateway, retry=policy)
    await anyio.sleep(80 * 86_400)
    session, road = session_over(gateway, retry=policy)
    async with session:
        with pytest.raises(RefundOutcomeUnknown):
            await session.resolve(unknown)
    assert not road.times


# ── resolve ──────────────────────────────────────────────────────────────────────────────────────


async def test_resolve_within_the_grace_queries_and_sends_nothing():
    """The refund is queried, and stays unknown with the same ``ask_again_at``."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    session, road = session_over(gateway)
    async with session:
        with pytest.raises(RefundOutcomeUnknown) as first:
            await session.apply_refund(refund_request())
        with pytest.raises(RefundOutcomeUnknown) as second:
            await session.resolve(first.value)
    assert len(road.times) == 1
    assert second.value.sent_at == first.value.sent_at
    assert second.value.ask_again_at == first.value.ask_again_at
    assert second.value.body == first.value.body
    assert second.value.queries > 3


@pytest.mark.parametrize("is_near", [False, True], ids=["grace ends later", "grace ends within the call"])
async def test_a_refund_sent_more_than_a_minute_ago_is_queried_again_only_if_the_grace_ends_in_time(is_near):
    """Otherwise one "no such record" ends the call, so a thousand open refunds are queried in seconds."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    session, _ = session_over(gateway)
    async with session:
        with pytest.raises(RefundOutcomeUnknown) as caught:
            await session.apply_refund(refund_request())
        grace = (caught.value.ask_again_at - wall_clock()).total_seconds()
        await anyio.sleep(grace - (20 if is_near else 40))
        before = anyio.current_time()
        outcome = await session.outcome_of(refund_request(), earlier=caught.value)
    assert (outcome.refund is not None) is is_near
    assert outcome.attempts == gateway.times_made("R-1") == is_near
    if not is_near:
        assert outcome.queries == 1
        assert anyio.current_time() == before
        assert outcome.error.ask_again_at == caught.value.ask_again_at


async def test_resolve_finds_a_refund_that_was_made_in_the_meantime():
    """A record that appeared later resolves the refund without a send."""
    gateway = sandbox()
    gateway.script(Fault.LATE, call="apply", delay=40)
    session, road = session_over(gateway)
    async with session:
        with pytest.raises(RefundOutcomeUnknown) as caught:
            await session.apply_refund(refund_request())
        await anyio.sleep(30)
        refund = await session.resolve(caught.value)
    assert refund.no_refund == "R-1"
    assert len(road.applied) == gateway.times_made("R-1") == 1


async def test_resolve_after_the_grace_sends_the_same_request_again():
    """At ``ask_again_at`` "no such record" is believed: the same request is sent again, and the refund is made once."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    session, road = session_over(gateway)
    async with session:
        with pytest.raises(RefundOutcomeUnknown) as caught:
            await session.apply_refund(refund_request())
        await anyio.sleep((caught.value.ask_again_at - wall_clock()).total_seconds())
        refund = await session.resolve(caught.value)
    assert refund.no_refund == "R-1"
    assert road.applied == [caught.value.body] * 2
    assert gateway.times_made("R-1") == 1


@pytest.mark.parametrize("has_journal", [False, True], ids=["no journal", "journal"])
async def test_a_request_is_signed_again_before_it_is_sent_again(has_journal):
    """The merchant's key may have changed since the first send: the fields stay the same, the signature is new."""
    gateway, changed = sandbox(), sandbox(merchant_key=keypairs.pair("stranger").private)
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    journal = MemoryJournal() if has_journal else None
    unknown = await left_unknown(gateway, journal=journal)
    await anyio.sleep(1000)
    session, road = session_over(changed, journal=journal)
    async with session:
        assert (await session.resolve(unknown)).no_refund == "R-1"
    before, sent = wire.decode(unknown.body), wire.decode(road.applied[0])
    assert before.pop("sign") != sent.pop("sign")
    assert before == sent
    assert changed.times_made("R-1") == 1


async def test_a_pickled_unknown_is_resolved_in_another_session():
    """In another process and session, an unknown refund is resolved with the same request."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    handed_over = pickle.dumps(await left_unknown(gateway))
    await anyio.sleep(900)
    unknown = pickle.loads(handed_over)
    session, road = session_over(gateway)
    async with session:
        assert (await session.resolve(unknown)).no_refund == "R-1"
    assert road.applied == [unknown.body]
    assert gateway.times_made("R-1") == 1


async def test_after_three_months_an_unknown_refund_stays_unknown():
    """The gateway rejects queries for an old refund; nothing is sent again."""
    gateway = sandbox()
    gateway.script(Fault.RESET, call="apply")
    gateway.script(Fault.RESET, call="query", times=2)
    unknown = await left_unknown(gateway, retry=RetryPolicy(budget=RetryBudget(capacity=1, per_second=0)))
    await anyio.sleep(100 * 86_400)
    session, road = session_over(gateway)
    async with session:
        with pytest.raises(RefundOutcomeUnknown, match="3005"):
            await session.resolve(unknown)
    assert not road.times


async def test_a_refund_of_another_merchant_is_not_resolved():
    """The session raises before any query."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    unknown = await left_unknown(gateway)
    gateway.requests.clear()
    async with RefundSession(gateway.merchant(oid_partner="201304121000001004"), transport=Road(gateway)) as session:
        with pytest.raises(ConfigurationError, match="201304121000001004"):
            await session.resolve(unknown)
    assert not gateway.requests


async def test_the_unknown_outcome_of_another_refund_is_a_conflict():
    """A request with the unknown outcome of another refund sends nothing: it would send that refund unqueried."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    unknown = await left_unknown(gateway)
    await anyio.sleep(900)
    requests = gateway.requests.copy()
    session, _ = session_over(gateway)
    async with session:
        for request in (refund_request(2), refund_request(money_refund="9.99")):
            assert isinstance((await session.outcome_of(request, earlier=unknown)).error, RefundConflict)
        assert gateway.requests == requests
        assert (await session.outcome_of(refund_request(notify_url="https://b.example"), earlier=unknown)).refund
    assert (gateway.times_made("R-1"), gateway.times_made("R-2")) == (1, 0)


async def test_resolve_raises_a_rejection():
    """The resend after the grace is rejected: the error is raised once "no such record" is believed again."""
    gateway = sandbox(default_order=None)
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    unknown = await left_unknown(gateway)
    await anyio.sleep(900)
    session, _ = session_over(gateway)
    async with session:
        with pytest.raises(RefundRejected):
            await session.resolve(unknown)


# ── conflict ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("repeated", [Repeated.REJECT, Repeated.REPLAY])
async def test_the_same_number_for_another_amount_is_a_conflict(repeated):
    """The error has both amounts; nothing more is sent."""
    gateway = sandbox(repeated=repeated)
    await apply(gateway)
    with pytest.raises(RefundConflict) as caught:
        await apply(gateway, refund_request(money_refund=Decimal("9.00")))
    assert (caught.value.field, caught.value.ours, caught.value.theirs) == ("money_refund", "9.00", "10.00")
    assert gateway.times_made("R-1") == 1
    assert gateway.requests == {"apply": 2, "query": 1} if repeated is Repeated.REJECT else {"apply": 2}


class Books(httpx.AsyncBaseTransport):
    """A gateway that answers apply calls with "busy", and all queries with one given record."""

    def __init__(self, **record):
        self.record = record

    async def handle_async_request(self, request):
        fields = wire.decode(await request.aread())
        if request.url.path != "/refundquery.htm":
            return httpx.Response(503)
        return httpx.Response(200, content=as_json(made(fields, **self.record)))


@pytest.mark.parametrize(
    ("field", "ours", "theirs"),
    [
        ("dt_refund", "20260105160000", "20260105160001"),
        ("money_refund", "10.00", "10.01"),
    ],
)
async def test_a_record_that_contradicts_the_request_is_a_conflict(field, ours, theirs):
    """A record under our number with another time or amount is another refund."""
    gateway = sandbox()
    async with RefundSession(gateway.merchant(), transport=Books(**{field: theirs}), clock=boot_clock) as session:
        with pytest.raises(RefundConflict) as caught:
            await session.apply_refund(refund_request())
    assert (caught.value.field, caught.value.ours, caught.value.theirs) == (field, ours, theirs)


async def test_a_record_with_an_unreadable_amount_proves_nothing():
    """It proves neither this refund nor another one."""
    gateway = sandbox()
    async with RefundSession(gateway.merchant(), transport=Books(money_refund="?"), clock=boot_clock) as session:
        with pytest.raises(RefundOutcomeUnknown, match="money_refund is '\\?'"):
            await session.apply_refund(refund_request())


@pytest.mark.parametrize("field", ["dt_refund", "money_refund"])
@pytest.mark.parametrize("text", [None, ""])
async def test_a_record_without_time_or_amount_is_no_conflict(field, text):
    """The query page makes both optional: such a record still counts as our refund."""
    gateway = sandbox()
    async with RefundSession(gateway.merchant(), transport=Books(**{field: text}), clock=boot_clock) as session:
        refund = await session.apply_refund(refund_request())
    assert refund.no_refund == "R-1"
    assert refund.query() == refund_request().query()


async def test_a_record_of_another_number_proves_nothing():
    """A gateway that always answers about another refund leaves ours unknown."""
    gateway = sandbox()
    async with RefundSession(gateway.merchant(), transport=Books(no_refund="R-2"), clock=boot_clock) as session:
        with pytest.raises(RefundOutcomeUnknown) as caught:
            await session.apply_refund(refund_request())
    assert isinstance(caught.value.__cause__, AnswerMismatch)


# ── cancellation and the log ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)  # trio creates its own cancellations only
@pytest.mark.parametrize("call", [Call.APPLY, Call.QUERY])
async def test_a_cancellation_that_a_lower_layer_raises_leaves_the_outcome_unknown(call):
    """Nobody cancelled this call; the unknown outcome names what interrupted it."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)

    async def break_off(exchange, call_next):
        if exchange.call is call:
            raise asyncio.CancelledError
        return await call_next(exchange)

    with pytest.raises(RefundOutcomeUnknown, match="interrupted by CancelledError") as caught:
        await apply(gateway, middleware=[break_off])
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)


async def test_an_error_of_the_program_after_the_send_leaves_the_outcome_unknown():
    """A caller's own journal raises an error that is not a JournalError: the cause of the unknown outcome."""

    class Broken(MemoryJournal):
        async def canaries(self):
            raise KeyError("mine")

    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    with pytest.raises(RefundOutcomeUnknown, match="interrupted by KeyError") as caught:
        await apply(gateway, journal=Broken(), retry=TRUSTING)
    assert isinstance(caught.value.__cause__, KeyError)


async def test_the_pauses_between_the_queries_grow():
    """Each answer "no such record" doubles the longest pause, up to the policy's maximum."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    retry = RetryPolicy(initial=1.0, maximum=64.0, multiplier=2.0, budget=RetryBudget(capacity=1e6))
    with pytest.raises(RefundOutcomeUnknown):
        await apply(gateway, deadline=800.0, retry=retry)
    assert gateway.requests["query"] < 100  # with pauses of at most one second, there would be about 1600


async def test_the_queries_of_a_call_are_numbered():
    """A middleware sees 1, 2, 3 … as the number of each query."""
    gateway, numbers = sandbox(), []
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)

    async def note(exchange, call_next):
        if exchange.call is Call.QUERY:
            numbers.append(exchange.attempt)
        return await call_next(exchange)

    await left_unknown(gateway, middleware=[note])
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 2


async def test_cancellation_propagates_at_once_and_is_logged(caplog):
    """A cancelled call sends and queries nothing more; the log names the refund to query."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", times=9)
    gateway.script(Fault.NO_ANSWER, call="query", times=9)
    session, _ = session_over(gateway)
    with caplog.at_level(logging.WARNING, "lianlian_async"):
        async with session:
            with anyio.move_on_after(3) as scope:
                await session.apply_refund(refund_request())
    assert scope.cancelled_caught
    assert anyio.current_time() == 3
    assert gateway.requests == {"apply": 1}
    (record,) = caplog.records
    assert "R-1" in record.getMessage()
    assert "may have been made" in record.getMessage()


@pytest.mark.parametrize("wrong", [-7200, 0, 7200], ids=["slow", "right", "fast"])
@pytest.mark.parametrize("dated", [True, False], ids=["Date", "no Date"])
async def test_processes_on_new_boots_resolve_within_a_day(wrong, dated, tmp_path):
    """A process runs one minute in ten, each time on a new boot, whose wall clock is wrong in another way.

    The refund is sent again after the grace has passed by both clocks; without ``Date`` headers it stays unknown.
    """
    gateway = sandbox(repeated=Repeated.AGAIN)
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    road = Road(gateway)
    if not dated:
        road = Undated(gateway)
    for boot in range(20):
        began = anyio.current_time()

        def clock(began=began, boot=boot):
            seconds = anyio.current_time()
            return Moment(wall_clock() + timedelta(seconds=wrong * boot), seconds - began, f"boot {boot}")

        async with (
            SqliteJournal(tmp_path / "journal.sqlite") as journal,
            RefundSession(gateway.merchant(), transport=road, clock=clock, journal=journal) as session,
        ):
            outcome = await session.outcome_of(refund_request())
        if outcome.refund is not None:
            break
        assert gateway.times_made("R-1") == 0
        await anyio.sleep(570)
    sent_again_at = anyio.current_time()
    assert (outcome.refund is not None) is (dated and wrong >= 0)
    if outcome.refund is not None:
        assert 900 <= sent_again_at < 86_400
        assert gateway.times_made("R-1") == 1
        assert len(set(road.applied)) == 1


class Undated(Road):
    """A gateway behind a proxy that removes the ``Date`` header."""

    async def handle_async_request(self, request):
        response = await super().handle_async_request(request)
        del response.headers["date"]
        return response


# ── leases ───────────────────────────────────────────────────────────────────────────────────────


class SlowProof(MemoryJournal):
    """A journal whose ``canaries`` takes longer than any lease."""

    async def canaries(self):
        await anyio.sleep(86_400)
        return await super().canaries()


async def test_after_the_lease_no_such_record_proves_nothing():
    """Another worker may have sent the refund during the check of the query service: unknown, and nothing is sent."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    session, _ = session_over(gateway, retry=TRUSTING, journal=SlowProof())
    async with session:
        with pytest.raises(RefundOutcomeUnknown, match="lease has ended"):
            await session.apply_refund(refund_request())
    assert gateway.requests["apply"] == 1


@pytest.mark.parametrize("lease_holds", [True, False])
def test_a_rejection_that_is_read_after_the_lease_proves_nothing(lease_holds):
    """Another worker may have sent the same refund since, so it is queried."""
    now = system_clock()
    apply = exchange(lease_holds=lambda: lease_holds)
    case = Case(request=None, apply=apply, make_query=None, clock=lambda: now, before_resend=None, canary=None)
    assert case.next_step(Finding.REJECTED) is (Step.RAISE if lease_holds else Step.QUERY)
    assert case.sent_at is (None if lease_holds else now)


def test_the_grace_ends_at_the_time_of_the_query_by_the_gateways_clock():
    """Time between the answer and its evaluation, such as a suspension, does not count."""
    noon = datetime(2026, 1, 2, 12, tzinfo=UTC)
    sent_at = Moment(noon, 50.0, "earlier boot", noon)
    asked_at = Moment(noon + timedelta(days=1), 100.0, "this boot")  # a wall clock that was set
    judged_at = Moment(noon + timedelta(days=1), 7300.0, "this boot", noon + timedelta(seconds=7230))
    case = Case(
        request=None,
        apply=exchange(policy=RetryPolicy(not_found_grace=900.0)),
        make_query=None,
        clock=lambda: judged_at,
        sent_at=sent_at,
        before_resend=None,
        canary=None,
    )
    assert not case.not_found_is_believed(asked_at)
    assert case.not_found_is_believed(judged_at)
