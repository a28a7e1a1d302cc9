"""Waiting for a final state: a notification or a query ends it, and queries pause between attempts."""

from __future__ import annotations

import itertools
from decimal import Decimal

import anyio
import pytest

from lianlian_async import (
    ConfigurationError,
    NotificationEndpoint,
    QueryRejected,
    RefundConflict,
    RefundNotFinal,
    RefundOutcomeUnknown,
    RefundStatus,
)
from lianlian_async.journal import MemoryJournal, State
from lianlian_async.sandbox import Fault, When
from tests.support.notices import HEADERS, Handler, is_acknowledged, notification
from tests.support.parties import boot_clock, refund_request, sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


def session(gateway, **options):
    return gateway.session(clock=boot_clock, **options)


def endpoint_of(opened, **options):
    return NotificationEndpoint(opened.merchant, Handler(), session=opened, clock=boot_clock, **options)


async def notify_after(seconds, endpoint, **changes):
    await anyio.sleep(seconds)
    assert is_acknowledged(await endpoint.handle(notification(**changes), HEADERS))


# ── asking ───────────────────────────────────────────────────────────────────────────────────────


async def test_without_notifications_the_gateway_is_asked_after_growing_pauses():
    """The first question comes after 2 seconds, each pause is twice as long, and none is longer than 5 minutes."""
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


async def test_a_failed_refund_is_final_too():
    """Failed is an answer like success, not an error."""
    gateway = sandbox(settle_after=60)
    gateway.fail("R-1")
    async with session(gateway) as opened:
        refund = await opened.apply_and_wait(refund_request())
    assert refund.sta_refund is RefundStatus.FAILED


async def test_what_is_final_is_not_asked_about():
    """There is nothing to wait for."""
    gateway = sandbox(settle_after=0)
    async with session(gateway) as opened:
        refund = await opened.apply_refund(refund_request())
        assert await opened.wait_refund(refund) is refund
        assert (await opened.apply_and_wait(refund_request(2))).is_final
    assert gateway.requests == {"apply": 2}
    assert anyio.current_time() == 0


async def test_a_question_that_fails_is_asked_again():
    """Trouble on the way is no reason to stop waiting."""
    gateway = sandbox(settle_after=60)
    async with session(gateway) as opened:
        refund = await opened.apply_refund(refund_request())
        for fault in (Fault.WRONG_SIGNATURE, Fault.HTTP_500, Fault.BROKEN_JSON, Fault.OTHER_REFUND):
            gateway.script(fault, call="query", times=4)
        gateway.script(Fault.BUSY, call="query", ret_code="8901")
        assert (await opened.wait_refund(refund, deadline=3600)).is_final


async def test_a_question_that_is_refused_ends_the_wait():
    """It would be refused again."""
    gateway = sandbox(settle_after=60)
    async with session(gateway) as opened:
        refund = await opened.apply_refund(refund_request())
        gateway.script(Fault.BUSY, call="query", ret_code="3005")
        with pytest.raises(QueryRejected):
            await opened.wait_refund(refund)
    assert gateway.requests["query"] == 1


async def test_at_the_deadline_the_last_word_is_handed_over():
    """The error carries the record as the gateway gave it last."""
    gateway = sandbox(settle_after=100)
    async with session(gateway) as opened:
        refund = await opened.apply_refund(refund_request())
        with pytest.raises(RefundNotFinal) as caught:
            await opened.wait_refund(refund, deadline=70)
    assert anyio.current_time() == pytest.approx(70)
    assert caught.value.refund.sta_refund is RefundStatus.PROCESSING
    assert caught.value.last_error is None
    assert caught.value.__cause__ is None


async def test_at_the_deadline_the_last_trouble_is_told():
    """Where the last query met something, the error says what."""
    gateway = sandbox(settle_after=100)
    async with session(gateway) as opened:
        refund = await opened.apply_refund(refund_request())
        gateway.script(Fault.BUSY, call="query", ret_code="8901", times=100)
        with pytest.raises(RefundNotFinal, match="the last query failed: no record of refund R-1") as caught:
            await opened.wait_refund(refund, deadline=5)
    assert caught.value.refund is refund


@pytest.mark.parametrize("deadline", [0, -1, float("nan")])
async def test_a_deadline_that_is_none_is_refused_before_anything_is_sent(deadline):
    """Both calls say so at once."""
    gateway = sandbox(settle_after=0)
    async with session(gateway) as opened:
        refund = await opened.apply_refund(refund_request())
        with pytest.raises(ConfigurationError, match="deadline"):
            await opened.wait_refund(refund, deadline=deadline)
        with pytest.raises(ConfigurationError, match="deadline"):
            await opened.apply_and_wait(refund_request(2), deadline=deadline)
    assert gateway.requests == {"apply": 1}


async def test_waiting_takes_no_connection_slot():
    """Any number may wait while others are made."""
    gateway = sandbox(settle_after=60)
    async with session(gateway, max_connections=1) as opened, anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(opened.apply_and_wait, refund_request(number))
        await anyio.sleep(1)
        assert len(gateway.refunds) == 20


async def test_a_session_that_is_closed_ends_the_wait():
    """The next question finds out, with the error that every call on a closed session has."""
    gateway = sandbox(settle_after=60)
    async with session(gateway) as opened:
        refund = await opened.apply_refund(refund_request())
    with pytest.raises(RuntimeError, match="closed"):
        await opened.wait_refund(refund)


# ── being told ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [RefundStatus.SUCCESS, RefundStatus.FAILED])
async def test_a_notification_ends_the_wait_at_once(status):
    """Whoever waits hears what was notified, without a further question."""
    gateway = sandbox(settle_after=1000)
    async with session(gateway) as opened, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: notify_after(3, endpoint_of(opened), sta_refund=status))
        refund = await opened.apply_and_wait(refund_request())
        assert anyio.current_time() == pytest.approx(3)
        assert refund.sta_refund is status
    assert gateway.requests["query"] == 1


async def test_all_who_wait_for_a_refund_are_told_and_no_other():
    """Two hear of theirs, a third one goes on waiting for another."""
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


async def test_a_question_under_way_does_not_delay_what_was_told():
    """A gateway that hangs is not waited for when the notification has come."""
    gateway = sandbox(settle_after=1000)
    async with session(gateway) as opened, anyio.create_task_group() as tasks:
        refund = await opened.apply_refund(refund_request())
        gateway.script(Fault.NO_ANSWER, call="query")
        tasks.start_soon(notify_after, 3, endpoint_of(opened))
        assert (await opened.wait_refund(refund)).is_final
        assert anyio.current_time() == pytest.approx(3)


async def test_a_state_that_can_change_is_nothing_to_hear():
    """Only a final state ends the wait."""
    gateway = sandbox(settle_after=10)
    async with session(gateway) as opened, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: notify_after(1, endpoint_of(opened), sta_refund="1"))
        assert (await opened.apply_and_wait(refund_request())).is_final
        assert anyio.current_time() > 10


async def test_a_notification_of_another_amount_is_not_believed():
    """The number alone does not make it the refund that was made."""
    gateway = sandbox(settle_after=10)
    async with session(gateway) as opened, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: notify_after(1, endpoint_of(opened), money_refund="11.00", sta_refund="3"))
        refund = await opened.apply_and_wait(refund_request())
    assert (refund.money_refund, refund.sta_refund) == (Decimal("10.00"), RefundStatus.SUCCESS)


async def test_a_notification_may_come_before_the_answer():
    """What is notified while the apply call is under way is not lost."""
    gateway = sandbox(settle_after=1000, delay=5)
    gateway.script(Fault.DELAY, call="apply")
    async with session(gateway) as opened, anyio.create_task_group() as tasks:
        tasks.start_soon(notify_after, 1, endpoint_of(opened))
        assert (await opened.apply_and_wait(refund_request())).is_final
    assert anyio.current_time() == pytest.approx(5)
    assert gateway.requests == {"apply": 1}


async def test_a_notification_stands_in_for_an_answer_that_never_comes():
    """A refund whose outcome would be unknown is known by its notification."""
    gateway = sandbox(settle_after=1000)
    gateway.faults = {Fault.RESET: 1.0}
    async with session(gateway) as opened, anyio.create_task_group() as tasks:
        tasks.start_soon(notify_after, 1, endpoint_of(opened))
        refund = await opened.apply_and_wait(refund_request())
    assert refund.sta_refund is RefundStatus.SUCCESS


async def test_without_either_the_outcome_is_unknown():
    """Nobody can tell, and that is what is said."""
    gateway = sandbox(settle_after=1000)
    gateway.script(Fault.RESET, when=When.AFTER, times=1000)
    async with session(gateway) as opened:
        with pytest.raises(RefundOutcomeUnknown):
            await opened.apply_and_wait(refund_request())


# ── with a journal ───────────────────────────────────────────────────────────────────────────────


async def test_the_journal_learns_what_was_found():
    """A final state that was asked for is on record, as one that was notified is."""
    gateway = sandbox(settle_after=10)
    async with MemoryJournal() as journal, session(gateway, journal=journal) as opened:
        await opened.apply_and_wait(refund_request())
        assert (await journal.find("R-1")).state is State.DONE


async def test_what_contradicts_the_journal_is_raised():
    """A person has to look at a refund of which the gateway has told two final states."""
    gateway = sandbox(settle_after=10)
    async with MemoryJournal() as journal, session(gateway, journal=journal) as opened:
        refund = await opened.apply_refund(refund_request())
        endpoint = NotificationEndpoint(opened.merchant, Handler(), journal=journal)  # another process's
        assert is_acknowledged(await endpoint.handle(notification(sta_refund="3"), HEADERS))
        with pytest.raises(RefundConflict, match="another sta_refund: ours 2, recorded 3"):
            await opened.wait_refund(refund)
