"""The layers around one exchange: repetition, time limits, limiters, observers, and the caller's own layers."""

from __future__ import annotations

import math
from decimal import Decimal
from functools import partial

import anyio
import attrs
import httpx
import pytest
from trio.testing import MockClock

from lianlian_async import (
    ConfigurationError,
    GatewayUnavailable,
    RefundNotFound,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundQuery,
    RefundRejected,
    RefundSession,
    RetryBudget,
    RetryPolicy,
)
from lianlian_async.exchange import Call, Exchange, Finding, Reply
from lianlian_async.middleware import Limit, RateLimit, attempt, compose, retry
from lianlian_async.models import Refund
from lianlian_async.retry import Deadline, TokenBucket
from lianlian_async.sandbox import Fault, Repeated, When
from tests.support import exchanges
from tests.support.parties import boot_clock, refund_request, sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

ERROR = GatewayUnavailable("busy", attempts=1, last_error="busy", ret_code=None)
NOT_SENT = Reply(finding=Finding.NOT_SENT, error=RefundNotSent("R-1", attempts=1, last_error="refused"))
UNCERTAIN = Reply(finding=Finding.UNCERTAIN, error=ERROR)
FOUND = Reply(finding=Finding.FOUND, refund=Refund(no_refund="R-1", money_refund=Decimal("1.00")))
EXISTS = Reply(finding=Finding.EXISTS, error=ERROR)
REJECTED = Reply(
    finding=Finding.REJECTED,
    error=RefundRejected("5007", "", verified=True, no_refund="R-1"),
)
NOT_FOUND = Reply(
    finding=Finding.NOT_FOUND,
    error=RefundNotFound(no_refund="R-1", oid_refundno=None, ret_code="8901", ret_msg="", verified=True),
)


def exchange(call=Call.APPLY, *, seconds=30.0, **policy):
    """Return an exchange whose deadline is ``seconds`` from now."""
    until = Deadline(anyio.current_time() + seconds)
    return exchanges.exchange(call, asked={"no_refund": "R-1"}, deadline=until, policy=RetryPolicy(**policy))


class Gateway:
    """The innermost call: returns ``replies`` in order and repeats the last one; each takes ``takes`` seconds."""

    def __init__(self, *replies, takes=0.0):
        self.replies = list(replies)
        self.takes = takes
        self.began = []
        self.seen = []

    async def __call__(self, exchange):
        self.began.append(anyio.current_time())
        self.seen.append(exchange)
        if self.takes:
            await anyio.sleep(self.takes)
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    @property
    def pauses(self):
        return [later - earlier - self.takes for earlier, later in zip(self.began, self.began[1:], strict=False)]


def retrying(gateway):
    return compose([retry], gateway)


# ── repetition ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("call", "reply", "attempts"),
    [
        (Call.APPLY, NOT_SENT, 4),
        (Call.APPLY, UNCERTAIN, 1),
        (Call.APPLY, EXISTS, 1),
        (Call.APPLY, REJECTED, 1),
        (Call.APPLY, FOUND, 1),
        (Call.QUERY, NOT_SENT, 4),
        (Call.QUERY, UNCERTAIN, 4),
        (Call.QUERY, NOT_FOUND, 1),
        (Call.QUERY, REJECTED, 1),
        (Call.QUERY, FOUND, 1),
    ],
    ids=lambda value: value.finding.name if isinstance(value, Reply) else str(value),
)
async def test_only_safe_exchanges_are_repeated(call, reply, attempts):
    """An apply call is repeated only if it certainly was not sent; a query if it got no usable answer."""
    gateway = Gateway(reply)
    last = await retrying(gateway)(exchange(call))
    assert last == attrs.evolve(reply, attempts=attempts)
    assert [seen.attempt for seen in gateway.seen] == list(range(1, attempts + 1))


async def test_maybe_sent_apply_call_is_not_repeated():
    """Once an apply call may have arrived it is not repeated, however often it was not sent before."""
    gateway = Gateway(NOT_SENT, NOT_SENT, UNCERTAIN, FOUND)
    assert await retrying(gateway)(exchange(attempts=9)) == attrs.evolve(UNCERTAIN, attempts=3)


async def test_a_policy_of_one_attempt_repeats_nothing():
    """attempts=1 allows no repetition."""
    gateway = Gateway(NOT_SENT)
    assert (await retrying(gateway)(exchange(attempts=1))).attempts == 1
    assert gateway.began == [0.0]


async def test_pauses_have_full_jitter():
    """Each pause is between 0 and initial × multiplier ** n, and never above the maximum."""
    ceilings, runs = [1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0], []
    for _ in range(100):
        gateway = Gateway(NOT_SENT)
        await retrying(gateway)(exchange(seconds=1e6, attempts=8, initial=1.0, maximum=8.0))
        runs.append(gateway.pauses)
    for ceiling, pauses in zip(ceilings, zip(*runs, strict=True), strict=True):
        assert all(-1e-6 <= pause <= ceiling + 1e-6 for pause in pauses)
        assert min(pauses) < ceiling / 2 < max(pauses)  # fails by chance once in 2 ** 99 runs


async def test_retry_after_is_waited_for():
    """A pause is never shorter than the server's Retry-After."""
    gateway = Gateway(attrs.evolve(UNCERTAIN, retry_after=7.0), FOUND)
    await retrying(gateway)(exchange(Call.QUERY))
    assert gateway.pauses == [pytest.approx(7.0)]


async def test_retry_after_is_honoured_up_to_a_minute():
    """A server cannot make a call wait for longer than a minute."""
    gateway = Gateway(attrs.evolve(UNCERTAIN, retry_after=3600.0), FOUND)
    await retrying(gateway)(exchange(Call.QUERY, seconds=300.0))
    assert gateway.pauses == [pytest.approx(60.0)]


async def test_a_pause_that_outlasts_the_deadline_is_not_begun():
    """If the next attempt would be after the deadline, the call ends at once."""
    gateway = Gateway(attrs.evolve(UNCERTAIN, retry_after=50.0))
    assert (await retrying(gateway)(exchange(Call.QUERY, seconds=30))).attempts == 1
    assert anyio.current_time() == 0.0


async def test_empty_budget_allows_no_repetition():
    """The calls of one session share one budget: when it is empty, each ends after its first attempt."""
    left = TokenBucket(RetryBudget(capacity=5, per_second=0))
    attempts = []
    for _ in range(4):
        reply = await retrying(Gateway(NOT_SENT))(attrs.evolve(exchange(attempts=4), retries_left=left))
        attempts.append(reply.attempts)
    assert attempts == [4, 3, 1, 1]


async def test_budget_refills():
    """The retry budget refills over time."""
    left = TokenBucket(RetryBudget(capacity=2, per_second=0.1))
    for rest, attempts in ((0, 3), (0, 1), (10, 2), (100, 3)):
        await anyio.sleep(rest)
        sent = attrs.evolve(exchange(attempts=4, initial=1e-6, maximum=1e-6), retries_left=left)
        reply = await retrying(Gateway(NOT_SENT))(sent)
        assert reply.attempts == attempts


# ── time ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("left", "share"), [(30.0, 10.0), (20.0, 10.0), (12.0, 6.0), (1.0, 0.5), (0.02, 0.01)])
async def test_attempt_takes_at_most_half_of_the_time_left(left, share):
    """An attempt ends after half of the time left, and after 10 s at most, so that time for a query remains."""
    gateway = Gateway(FOUND, takes=1e9)
    reply = await compose([attempt], gateway)(exchange(seconds=left))
    assert reply.finding is Finding.NOT_SENT  # this gateway never got as far as the wire
    assert anyio.current_time() == pytest.approx(share)
    assert gateway.seen[0].seconds == pytest.approx(share)


@pytest.mark.parametrize("left", [0.019, 0.0, -5.0])
async def test_no_attempt_begins_after_the_deadline(left):
    """With too little time left, nothing is sent."""
    gateway = Gateway(FOUND)
    reply = await compose([attempt], gateway)(exchange(seconds=left))
    assert reply.finding is Finding.NOT_SENT
    assert "deadline" in reply.error.last_error
    assert not gateway.began


async def test_repeating_never_overruns_the_deadline():
    """With a gateway of any speed, the last attempt starts and ends before the deadline."""
    gateway = Gateway(UNCERTAIN, takes=3.0)
    layers = [retry, attempt]
    await compose(layers, gateway)(exchange(Call.QUERY, attempts=1000))
    assert anyio.current_time() <= 30.0
    assert max(gateway.began) < 30.0
    assert len(gateway.began) > 4


async def test_wait_for_the_limiter_does_not_count():
    """The wait for the caller's limiter is added to the deadline."""
    limiter = RateLimit(1 / 100)
    gateway = Gateway(FOUND)
    for number in range(3):
        reply = await compose([Limit(limiter), attempt], gateway)(exchange(seconds=5))
        assert reply.finding is Finding.FOUND
        assert anyio.current_time() == 100.0 * number
        assert gateway.seen[-1].deadline.left(anyio.current_time()) == pytest.approx(5)


async def test_limiter_is_held_only_during_attempts():
    """A semaphore of one lets another call in while the first one pauses."""
    limiter = anyio.Semaphore(1)
    inside = []

    async def gateway(exchange):
        inside.append(limiter.value)
        await anyio.sleep(1)
        return UNCERTAIN

    layers = [retry, Limit(limiter), attempt]
    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            tasks.start_soon(compose(layers, gateway), exchange(Call.QUERY, attempts=3, initial=5, maximum=5))
    assert inside == [0] * 6
    assert limiter.value == 1


class BrokenLimiter:
    """A limiter that raises when it is entered, left or both."""

    def __init__(self, *, entering=None, leaving=None):
        self.entering = entering
        self.leaving = leaving

    async def __aenter__(self):
        if self.entering:
            raise self.entering

    async def __aexit__(self, *exc_info):
        if self.leaving:
            raise self.leaving


async def test_limiter_that_raises_at_its_entry():
    """The call is not sent, the limiter's error is its cause, and from then on the time counts again."""
    cause = OSError("redis is down")
    gateway, sent = Gateway(FOUND), exchange()
    reply = await compose([Limit(BrokenLimiter(entering=cause)), attempt], gateway)(sent)
    left = sent.deadline.left(anyio.current_time())
    assert sent.deadline.left(anyio.current_time() + 1) == left - 1
    assert reply.finding is Finding.NOT_SENT
    assert "redis is down" in reply.error.last_error
    assert reply.error.__cause__ is cause
    assert not gateway.began


@pytest.mark.parametrize("reply", [FOUND, UNCERTAIN, REJECTED], ids=lambda reply: reply.finding.name)
async def test_limiter_that_raises_at_its_exit(reply):
    """The reply of the attempt is returned."""
    layers = [Limit(BrokenLimiter(leaving=OSError("redis is down"))), attempt]
    assert await compose(layers, Gateway(reply))(exchange()) is reply


async def test_limiter_that_suppresses_a_cancellation():
    """There is no reply, so the call may have arrived."""

    class Swallowing(BrokenLimiter):
        async def __aexit__(self, *exc_info):
            return True

    async def cancelled(exchange):
        scope.cancel()
        await anyio.sleep(1)

    reply = None
    with anyio.CancelScope() as scope:
        reply = await compose([Limit(Swallowing())], cancelled)(exchange())
    assert reply.finding is Finding.UNCERTAIN
    assert "the limiter suppressed a cancellation" in str(reply.error)


# ── the caller's own layers ──────────────────────────────────────────────────────────────────────


async def test_the_first_layer_is_the_outermost():
    """Layers run from the first to the last before the exchange, and in reverse after it."""
    path = []

    def layer(name):
        async def call(exchange, call_next):
            path.append(name)
            reply = await call_next(exchange)
            path.append(name.upper())
            return reply

        return call

    assert await compose([layer("a"), layer("b"), layer("c")], Gateway(FOUND))(exchange()) is FOUND
    assert path == list("abcCBA")


async def test_no_layers():
    """Without layers, the core is called directly."""
    gateway = Gateway(FOUND)
    assert compose([], gateway) is gateway


SESSION = {"clock": boot_clock, "retry": RetryPolicy(attempts=3)}


async def applied(gateway, *middleware, **options):
    """Return the result or the error of ``apply_refund`` with these layers."""
    async with gateway.session(middleware=middleware, **SESSION | options) as session:
        return await session.apply_refund(refund_request())


async def test_layer_that_raises_before_the_send():
    """The call ends in RefundNotSent, after as many attempts as the policy allows."""
    gateway = sandbox()
    cause = ValueError("mine")

    async def raising(exchange, call_next):
        raise cause

    with pytest.raises(RefundNotSent, match="a middleware raised ValueError: mine") as caught:
        await applied(gateway, raising)
    assert caught.value.attempts == 3
    assert caught.value.__cause__ is cause
    assert gateway.requests == {}


async def test_layer_that_raises_after_the_send():
    """The refund is queried, and found."""
    gateway = sandbox()

    async def raising(exchange, call_next):
        reply = await call_next(exchange)
        if exchange.call is Call.APPLY:
            raise ValueError("mine")
        return reply

    refund = await applied(gateway, raising)
    assert refund.no_refund == "R-1"
    assert gateway.requests == {"apply": 1, "query": 1}


async def test_layer_whose_task_fails_when_the_attempt_times_out():
    """On trio its task group raises a group of the timeout's cancellation and the failure: the refund is queried."""
    gateway = sandbox()

    async def fail_in_the_end():
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("mine")

    async def hanging(exchange, call_next):
        reply = await call_next(exchange)
        if exchange.call is Call.APPLY:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(fail_in_the_end)
                await anyio.sleep_forever()
        return reply

    assert (await applied(gateway, hanging)).no_refund == "R-1"
    assert gateway.requests == {"apply": 1, "query": 1}


async def test_a_layer_that_always_raises_after_the_send_leaves_the_refund_unknown():
    """If no query succeeds either, the refund is unknown, and was sent once."""
    gateway = sandbox()

    async def raising(exchange, call_next):
        await call_next(exchange)
        raise ValueError("mine")

    with pytest.raises(RefundOutcomeUnknown, match="mine"):
        await applied(gateway, raising)
    assert gateway.requests["apply"] == gateway.times_made("R-1") == 1
    assert gateway.requests["query"] > 3


@pytest.mark.parametrize("nonsense", [None, "FOUND", FOUND.refund, NOT_FOUND], ids=lambda value: type(value).__name__)
async def test_layer_that_returns_no_reply(nonsense):
    """The return value proves nothing; the query finds the refund."""
    gateway = sandbox()

    async def forgetful(exchange, call_next):
        reply = await call_next(exchange)
        return reply if exchange.call is Call.QUERY else nonsense

    assert (await applied(gateway, forgetful)).no_refund == "R-1"
    assert gateway.requests == {"apply": 1, "query": 1}


@pytest.mark.parametrize("lie", [NOT_SENT, REJECTED], ids=lambda reply: reply.finding.name)
async def test_layer_that_denies_a_send_is_not_believed(lie):
    """If a layer reports a sent refund as not sent or rejected, it is not believed; the query finds the refund."""
    gateway = sandbox()

    async def lying(exchange, call_next):
        reply = await call_next(exchange)
        return reply if exchange.call is Call.QUERY else lie

    assert (await applied(gateway, lying)).no_refund == "R-1"
    assert gateway.requests == {"apply": 1, "query": 1}


async def test_layer_that_returns_the_record_of_another_refund():
    """A cache with a wrong key: the record proves nothing, and the query finds the refund."""
    gateway, replies = sandbox(), []

    async def mixing(exchange, call_next):
        replies.append(await call_next(exchange))
        return replies[0] if exchange.call is Call.APPLY else replies[-1]

    async with gateway.session(clock=boot_clock, middleware=[mixing]) as session:
        assert (await session.apply_refund(refund_request(1))).no_refund == "R-1"
        assert (await session.apply_refund(refund_request(2))).no_refund == "R-2"
    assert gateway.times_made("R-2") == 1
    assert gateway.requests == {"apply": 2, "query": 1}


@pytest.mark.parametrize("finding", [Finding.NOT_SENT, Finding.REJECTED, Finding.CONFLICT])
async def test_layer_that_answers_with_the_wrong_error(finding):
    """The finding is not believed; without a send the call ends in RefundNotSent, which quotes the layer's error."""
    gateway = sandbox()

    async def breaking(exchange, call_next):
        return Reply(finding=finding, error=ERROR)

    with pytest.raises(RefundNotSent, match=f"a middleware answered {finding.name} with GatewayUnavailable: busy"):
        await applied(gateway, breaking)
    assert gateway.requests == {}


async def test_layer_must_keep_the_count_of_sends():
    """Otherwise a refund that was sent could be reported as not sent, and be sent again."""
    gateway = sandbox(repeated=Repeated.AGAIN)

    async def rebuilding(exchange, call_next):
        fields = {name: getattr(exchange, name) for name in ("call", "url", "body", "asked", "deadline", "policy")}
        await call_next(Exchange(**fields, seconds=exchange.seconds))
        raise ConnectionError("mine")

    with pytest.raises(RefundNotSent, match="send_count"):
        await applied(gateway, rebuilding)
    assert gateway.requests == {}


async def test_layer_may_answer_without_a_send():
    """A layer that answers for the gateway without sending anything is believed."""
    gateway = sandbox()

    async def refusing(exchange, call_next):
        return REJECTED

    with pytest.raises(RefundRejected):
        await applied(gateway, refusing)
    assert gateway.requests == {}


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("fault", [None, Fault.HTTP_500])
async def test_layer_that_repeats_an_apply_call_makes_no_second_refund(fault, side_by_side):
    """A layer can send an apply call only once, although the gateway would make the refund a second time."""
    gateway = sandbox(repeated=Repeated.AGAIN, default_order=Decimal("1000.00"))
    if fault is not None:
        gateway.script(fault, call="apply", when=When.AFTER)

    replies = []

    async def repeating(exchange, call_next):
        async def send():
            replies.append(await call_next(exchange))

        if side_by_side:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send)
                tasks.start_soon(send)
        else:
            await send()
            await send()
        return replies[-1]

    assert (await applied(gateway, repeating)).no_refund == "R-1"
    assert (gateway.requests["apply"], gateway.times_made("R-1")) == (1, 1)
    refused = [reply for reply in replies if "tried to send it again" in str(reply.error)]
    assert [reply.finding for reply in refused] == [Finding.UNCERTAIN]  # it may have been sent before


class OnlyHttp(httpx.ASGITransport):
    """A transport that refuses other protocols."""

    async def handle_async_request(self, request):
        if request.url.scheme == "ftp":
            raise httpx.UnsupportedProtocol("ftp")
        return await super().handle_async_request(request)


async def test_layer_may_send_again_after_not_sent():
    """A layer that changes the host after a refused connection sends the refund once."""
    gateway = sandbox()

    async def changing(exchange, call_next):
        reply = await call_next(attrs.evolve(exchange, url="ftp://127.0.0.1/"))
        return await call_next(exchange) if reply.finding is Finding.NOT_SENT else reply

    transport = OnlyHttp(app=gateway)
    async with RefundSession(gateway.merchant(), transport=transport, middleware=[changing], **SESSION) as session:
        assert (await session.apply_refund(refund_request())).no_refund == "R-1"
    assert gateway.requests == {"apply": 1}


async def test_layers_see_every_attempt_and_every_query():
    """A caller's layer runs for the apply call and for each query of its resolution."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply")
    gateway.script(Fault.BUSY, call="query", times=2)
    calls = []

    async def watching(exchange, call_next):
        calls.append(exchange.call)
        return await call_next(exchange)

    await applied(gateway, watching)
    assert calls == [Call.APPLY, Call.QUERY, Call.QUERY, Call.QUERY]


async def test_layer_that_raises_during_a_query():
    """query_refund raises GatewayUnavailable, never the layer's own exception."""
    gateway = sandbox()

    async def raising(exchange, call_next):
        await call_next(exchange)
        raise KeyError("mine")

    async with gateway.session(middleware=[raising], **SESSION) as session:
        with pytest.raises(GatewayUnavailable, match="KeyError") as caught:
            await session.query_refund(RefundQuery(no_refund="R-1", dt_refund=boot_clock().wall))
    assert caught.value.attempts == 3


@pytest.mark.parametrize(
    "parts",
    [
        {"finding": Finding.FOUND},
        {"finding": Finding.FOUND, "error": ERROR},
        {"finding": Finding.NOT_SENT},
        {"finding": Finding.UNCERTAIN, "refund": FOUND.refund},
        {"finding": Finding.UNCERTAIN, "refund": FOUND.refund, "error": ERROR},
    ],
    ids=str,
)
async def test_contradictory_reply_is_refused(parts):
    """FOUND has a refund; every other finding has an error and no refund."""
    with pytest.raises(ValueError, match="set refund if the finding is FOUND"):
        Reply(**parts)


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"finding": "UNCERTAIN", "error": ERROR}, "finding must be a Finding"),
        ({"finding": Finding.NOT_SENT, "error": OSError("refused")}, "error a LianLianError"),
        ({"finding": Finding.UNCERTAIN, "error": ERROR, "retry_after": "5"}, "retry_after must be a number"),
    ],
    ids=str,
)
async def test_reply_with_a_part_of_another_type_is_refused(parts, problem):
    """Otherwise, an exception of another type would be raised after the refund was sent."""
    with pytest.raises(ValueError, match=problem):
        Reply(**parts)


# ── rate limit ───────────────────────────────────────────────────────────────────────────────────


async def begun(limiter, count):
    """Return the start times of ``count`` callers that arrive at the same time."""
    times = []

    async def caller():
        async with limiter:
            times.append(anyio.current_time())

    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(caller)
    return times


async def test_rate_limit_spaces_starts_evenly():
    """Exchanges start one interval apart."""
    assert await begun(RateLimit(4), 5) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])


async def test_idle_time_saves_no_starts():
    """After any idle time, the callers after the first one are spaced."""
    limiter = RateLimit(1)
    await anyio.sleep(1000)
    assert await begun(limiter, 3) == pytest.approx([1000, 1001, 1002])


def test_a_rate_limit_delays_another_event_loop_by_one_interval_at_most():
    """A session that is opened again may run on an event loop whose clock shows an earlier time, as trio's may."""
    limiter = RateLimit(1)

    async def first():
        await anyio.sleep(1000)
        return await begun(limiter, 2)

    times = [
        anyio.run(main, backend="trio", backend_options={"clock": MockClock(autojump_threshold=0)})
        for main in (first, partial(begun, limiter, 2))
    ]
    assert times == [pytest.approx([1000, 1001]), pytest.approx([1, 2])]


async def test_a_rate_limit_serves_in_order():
    """Callers start in the order of their arrival."""
    limiter = RateLimit(1)
    order = []

    async def caller(number):
        async with limiter:
            order.append(number)

    async with anyio.create_task_group() as tasks:
        for number in range(6):
            tasks.start_soon(caller, number)
            await anyio.sleep(0.01)
    assert order == list(range(6))


async def test_a_cancelled_waiter_uses_up_no_start():
    """Otherwise callers with timeouts, more than the rate allows, would delay all later callers without limit."""
    limiter = RateLimit(1)
    times = []

    async def impatient():
        with anyio.move_on_after(0.5):
            async with limiter:
                times.append("too early")

    async def patient():
        await anyio.sleep(0.1)
        async with limiter:
            times.append(anyio.current_time())

    async with limiter, anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(impatient)
        tasks.start_soon(patient)
    assert times == pytest.approx([1.0])


@pytest.mark.parametrize("per_second", [0, -1, math.nan, "4", True, 10**400])
async def test_unusable_rate_is_refused(per_second):
    """A rate with which no caller could start is refused."""
    with pytest.raises(ConfigurationError, match="RateLimit"):
        RateLimit(per_second)


async def test_rate_limit_of_a_session():
    """As a session's limiter it spaces apply calls and queries, and no call loses time."""
    gateway = sandbox()
    gateway.script(Fault.BUSY, call="apply", times=2)
    began = []

    async def watching(exchange, call_next):
        began.append(anyio.current_time())
        return await call_next(exchange)

    async with gateway.session(limiter=RateLimit(0.02), middleware=[watching], deadline=5, **SESSION) as session:
        for number in range(3):
            assert (await session.apply_refund(refund_request(number))).no_refund == f"R-{number}"
    assert began == pytest.approx([50.0 * number for number in range(5)])
