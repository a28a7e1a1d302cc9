"""Waiting for a final state: a notification or a query ends it, and queries pause between attempts."""

from __future__ import annotations

import itertools
from decimal import Decimal

import anyio
import attrs
import pytest

from lianlian_async import (
    ConfigurationError,
    JournalError,
    NotificationEndpoint,
    QueryRejected,
    RefundConflict,
    RefundNotFinal,
    RefundOutcomeUnknown,
    RefundRejected,
    RefundStatus,
    RetryPolicy,
)
from lianlian_async.journal import MemoryJournal, State
from lianlian_async.sandbox import Fault, When
from tests.support.notices import HEADERS, Handler, asked, is_acknowledged, notification
from tests.support.parties import boot_clock, refund_request, sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


def session(gateway, **options):
    return gateway.session(clock=boot_clock, **options)


def endpoint_of(opened, **options):
    return NotificationEndpoint(opened.merchant, Handler(), session=opened, clock=boot_clock, **options)


async def notify_after(seconds, endpoint, **changes):
    await anyio.sleep(seconds)
    changes = {"oid_refundno": None, **changes}  # the sandbox chooses this number
    assert is_acknowledged(await endpoint.handle(notification(**changes), HEADERS))


# ── asking ───────────────────────────────────────────────────────────────────────────────────────


async def test_without_notifications_the_pauses_between_queries_grow():
    """The first query comes after 2 seconds; each pause is twice as long, up to 5 minutes."""
    gateway = sandbox(settle_after=2000)
    asked = []

    async def noting(exchange, call_next):
        asked.append(anyio.current_time())
        return await call_next(exchange)

    async with session(gateway, middleware=[noting]) as opened:
        refund = await opened.wait_refund(await opened.apply_refund(refund_request()))
    assert refund.sta_refund is RefundStatus.SUCCESS
    pauses = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert pauses == pytest.approx([2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300, 300, 300], abs=0.1)


@pytest.mark.parametrize("call", ["wait_refund", "apply_and_wait"])
async def test_the_policy_of_a_wait_is_that_of_its_queries(call):
    """``retry`` overrides the session's policy: one attempt for each query."""
    gateway = sandbox(settle_after=2000)
    async with session(gateway) as opened:
        made = await opened.apply_refund(refund_request())
        gateway.script(Fault.HTTP_500, call="query", times=99)
        wait, about = getattr(opened, call), made if call == "wait_refund" else refund_request(2)
        with pytest.raises(RefundNotFinal):
            await wait(about, deadline=5.0, retry=RetryPolicy(attempts=1))
        assert gateway.requests["query"] == 1
        with pytest.raises(ConfigurationError, match="retry"):
            await wait(about, retry=1)


async def test_a_failed_refund_is_final():
    """``wait_refund`` returns a failed refund; it raises no error."""
    gateway = sandbox(settle_after=60)
    gateway.fail("R-1")
    async with session(gateway) as opened:
        refund = await opened.apply_and_wait(refund_request())
    assert refund.sta_refund is RefundStatus.FAILED


async def test_a_final_refund_is_not_queried():
    """``wait_refund`` returns at once."""
    gateway = sandbox(settle_after=0)
    async with session(gateway) as opened:
        refund = await opened.apply_refund(refund_request())
        assert await opened.wait_refund(refund) is refund
        assert (await opened.apply_and_wait(refund_request(2))).is_final
    assert gateway.requests == {"apply": 2}
    assert anyio.current_time() == 0


async def test_a_failed_query_is_repeated():
    """A connection error does not end the wait."""
    gateway = sandbox(settle_after=60)
    async with session(gateway) as opened:
        refund = await opened.apply_refund(refund_request())
        for fault in (Fault.WRONG_SIGNATURE, Fault.HTTP_500, Fault.BROKEN_JSON, Fault.OTHER_REFUND):
            gateway.script(fault, call="query", times=4)
        gateway.script(Fault.BUSY, call="query", ret_code="8901")
        assert (await opened.wait_refund(refund, deadline=3600)).is_final


async def test_a_record_of_another_amount_ends_the_wait():
    """Each record is compared with the refund that is waited for, also without a journal."""
    async with session(sandbox(settle_after=60)) as opened:
        refund = attrs.evolve(await opened.apply_refund(refund_request()), money_refund=Decimal("9.00"))
        with pytest.raises(RefundConflict, match=r"another money_refund: ours 9\.00"):
            await opened.wait_refund(refund)


async def test_a_rejected_query_ends_the_wait():
    """The gateway would reject the next query, too."""
    gateway = sandbox(settle_after=60)
    async with session(gateway) as opened:
        refund = await opened.apply_refund(refund_request())
        gateway.script(Fault.BUSY, call="query", ret_code="3005")
        with pytest.raises(QueryRejected):
            await opened.wait_refund(refund)
    assert gateway.requests["query"] == 1


async def test_the_error_at_the_deadline_has_the_last_record():
    """``RefundNotFinal`` has the record of the last query."""
    gateway = sandbox(settle_after=100)
    async with session(gateway) as opened:
        refund = await opened.apply_refund(refund_request())
        with pytest.raises(RefundNotFinal) as caught:
            await opened.wait_refund(refund, deadline=70)
    assert anyio.current_time() == pytest.approx(70)
    assert caught.value.refund.sta_refund is RefundStatus.PROCESSING
    assert caught.value.last_error is None
    assert caught.value.__cause__ is None


async def test_the_error_at_the_deadline_names_the_last_error():
    """``RefundNotFinal`` names the error of the last query."""
    gateway = sandbox(settle_after=100)
    async with session(gateway) as opened:
        refund = await opened.apply_refund(refund_request())
        gateway.script(Fault.BUSY, call="query", ret_code="8901", times=100)
        with pytest.raises(RefundNotFinal, match="the last query failed: no record of refund R-1") as caught:
            await opened.wait_refund(refund, deadline=5)
    assert caught.value.refund is refund


@pytest.mark.parametrize("deadline", [0, -1, float("nan")])
async def test_an_invalid_deadline_is_refused_before_anything_is_sent(deadline):
    """Both calls raise at once."""
    gateway = sandbox(settle_after=0)
    async with session(gateway) as opened:
        refund = await opened.apply_refund(refund_request())
        with pytest.raises(ConfigurationError, match="deadline"):
            await opened.wait_refund(refund, deadline=deadline)
        with pytest.raises(ConfigurationError, match="deadline"):
            await opened.apply_and_wait(refund_request(2), deadline=deadline)
    assert gateway.requests == {"apply": 1}


async def test_waiting_takes_no_connection_slot():
    """Any number of calls may wait while other refunds are made."""
    gateway = sandbox(settle_after=60)
    async with session(gateway, max_connections=1) as opened, anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(opened.apply_and_wait, refund_request(number))
        await anyio.sleep(1)
        assert len(gateway.refunds) == 20


async def test_closing_the_session_ends_the_wait():
    """``apply_and_wait`` says that the refund was made. A new wait raises as every call on a closed session."""
    gateway, errors = sandbox(settle_after=60), []

    async def wait():
        with pytest.raises(RefundNotFinal, match="closed") as caught:
            await opened.apply_and_wait(refund_request())
        errors.append(caught.value)

    async with anyio.create_task_group() as tasks, session(gateway) as opened:
        tasks.start_soon(wait)
        await anyio.sleep(1)
    assert errors[0].refund.no_refund == "R-1"
    with pytest.raises(RuntimeError, match="closed"):
        await opened.wait_refund(errors[0].refund)


# ── being told ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [RefundStatus.SUCCESS, RefundStatus.FAILED])
async def test_a_notification_ends_the_wait_at_once(status):
    """The call returns the notified state without a further query."""
    gateway = sandbox(settle_after=1000)
    async with session(gateway) as opened, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: notify_after(3, endpoint_of(opened), sta_refund=status))
        refund = await opened.apply_and_wait(refund_request())
        assert anyio.current_time() == pytest.approx(3)
        assert refund.sta_refund is status
    assert gateway.requests["query"] == 1


async def test_a_notification_ends_all_waits_for_its_refund():
    """Two calls get the state of their refund; a third call keeps waiting for another refund."""
    gateway = sandbox(settle_after=100)
    ended = []

    async def wait(refund):
        ended.append((await opened.wait_refund(refund), anyio.current_time()))

    async with session(gateway) as opened, anyio.create_task_group() as tasks:
        one, other = [await opened.apply_refund(refund_request(number)) for number in (1, 2)]
        for refund in (one, one, other):
            tasks.start_soon(wait, refund)
        tasks.start_soon(notify_after, 1, endpoint_of(opened))
    assert [refund.no_refund for refund, _ in ended] == ["R-1", "R-1", "R-2"]
    assert [at for _, at in ended[:2]] == pytest.approx([1, 1])
    assert ended[2][1] > 100


async def test_a_running_query_does_not_delay_a_notification():
    """A gateway that does not answer is not waited for after the notification."""
    gateway = sandbox(settle_after=1000)
    async with session(gateway) as opened, anyio.create_task_group() as tasks:
        refund = await opened.apply_refund(refund_request())
        gateway.script(Fault.NO_ANSWER, call="query")
        tasks.start_soon(notify_after, 3, endpoint_of(opened))
        assert (await opened.wait_refund(refund)).is_final
        assert anyio.current_time() == pytest.approx(3)


async def test_a_notification_that_is_not_final_does_not_end_the_wait():
    """Only a final state ends the wait."""
    gateway = sandbox(settle_after=10)
    async with session(gateway) as opened, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: notify_after(1, endpoint_of(opened), sta_refund="1"))
        assert (await opened.apply_and_wait(refund_request())).is_final
        assert anyio.current_time() > 10


@pytest.mark.parametrize(
    "other", [{"money_refund": "11.00"}, {"dt_refund": "20250105160000"}, {"oid_refundno": "2025"}], ids="".join
)
async def test_a_notification_of_another_refund_with_our_number_is_ignored(other):
    """An equal number does not prove that it is the same refund."""
    gateway = sandbox(settle_after=10)
    async with session(gateway) as opened, anyio.create_task_group() as tasks:
        refund = await opened.apply_refund(refund_request())
        tasks.start_soon(lambda: notify_after(1, endpoint_of(opened), sta_refund="3", **other))
        assert (await opened.wait_refund(refund)).sta_refund is RefundStatus.SUCCESS


async def test_a_notification_of_another_refund_does_not_replace_a_lost_answer():
    """An older refund has the same number and amount: the outcome of the new refund stays unknown."""
    gateway = sandbox()
    gateway.faults = {Fault.RESET: 1.0}
    async with session(gateway) as opened, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: notify_after(1, endpoint_of(opened), dt_refund="20250105160000"))
        with pytest.raises(RefundOutcomeUnknown):
            await opened.apply_and_wait(refund_request())


async def test_a_notification_may_come_before_the_answer():
    """A notification that arrives during the apply call is not lost."""
    gateway = sandbox(settle_after=1000, delay=5)
    gateway.script(Fault.DELAY, call="apply")
    async with session(gateway) as opened, anyio.create_task_group() as tasks:
        tasks.start_soon(notify_after, 1, endpoint_of(opened))
        assert (await opened.apply_and_wait(refund_request())).is_final
    assert anyio.current_time() == pytest.approx(5)
    assert gateway.requests == {"apply": 1}


async def test_a_notification_replaces_a_lost_answer():
    """A refund whose outcome would be unknown is known by its notification."""
    gateway = sandbox(settle_after=1000)
    gateway.faults = {Fault.RESET: 1.0}
    async with session(gateway) as opened, anyio.create_task_group() as tasks:
        tasks.start_soon(notify_after, 1, endpoint_of(opened))
        refund = await opened.apply_and_wait(refund_request())
    assert refund.sta_refund is RefundStatus.SUCCESS


@pytest.mark.parametrize("dt_refund", [asked()["dt_refund"], None])
async def test_a_notification_with_the_whole_identity_outweighs_a_rejection(dt_refund):
    """A load balancer repeats our request, so that the refund is made and the answer is a rejection, such as 5007."""
    gateway = sandbox(delay=5)
    gateway.script(Fault.DELAY, call="apply")
    async with session(gateway) as opened, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: notify_after(1, endpoint_of(opened), dt_refund=dt_refund, money_refund="99.00"))
        refund = opened.apply_and_wait(refund_request(money_refund="99.00"))
        if dt_refund is not None:
            assert (await refund).sta_refund is RefundStatus.SUCCESS
        else:
            with pytest.raises(RefundRejected):
                await refund


async def test_without_answer_and_notification_the_outcome_is_unknown():
    """``apply_and_wait`` raises ``RefundOutcomeUnknown``."""
    gateway = sandbox(settle_after=1000)
    gateway.script(Fault.RESET, when=When.AFTER, times=1000)
    async with session(gateway) as opened:
        with pytest.raises(RefundOutcomeUnknown):
            await opened.apply_and_wait(refund_request())


# ── with a journal ───────────────────────────────────────────────────────────────────────────────


async def test_a_final_state_from_a_query_is_recorded():
    """The journal records it like a notified state."""
    gateway = sandbox(settle_after=10)
    async with MemoryJournal() as journal, session(gateway, journal=journal) as opened:
        await opened.apply_and_wait(refund_request())
        assert (await journal.find("R-1")).state is State.DONE


async def test_a_journal_that_fails_during_the_wait_says_that_the_refund_was_made():
    """A caller must not take the failure for a refund that was not sent."""
    gateway = sandbox(settle_after=1)

    class Full(MemoryJournal):
        async def find(self, no_refund):
            if gateway.requests["query"]:
                raise JournalError("the disk is full")
            return await super().find(no_refund)

    async with Full() as journal, session(gateway, journal=journal) as opened:
        with pytest.raises(JournalError) as caught:
            await opened.apply_and_wait(refund_request())
    assert caught.value.said.sta_refund is RefundStatus.INITIALIZED


async def test_a_state_that_contradicts_the_journal_is_raised():
    """A person has to decide about a refund with two different final states."""
    gateway = sandbox(settle_after=10)
    async with MemoryJournal() as journal, session(gateway, journal=journal) as opened:
        refund = await opened.apply_refund(refund_request())
        endpoint = NotificationEndpoint(opened.merchant, Handler(), journal=journal)  # another process's
        assert is_acknowledged(await endpoint.handle(notification(sta_refund="3"), HEADERS))
        with pytest.raises(RefundConflict, match="another sta_refund: ours 2, recorded 3"):
            await opened.wait_refund(refund)
