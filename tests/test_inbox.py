"""The inbox in virtual time: backoff, limits, entries of dead workers, and closing."""

from __future__ import annotations

import logging
from itertools import pairwise

import anyio
import attrs
import pytest

from lianlian_async import NotificationEndpoint, RefundStatus
from lianlian_async.journal import MemoryJournal, SqliteJournal
from lianlian_async.sandbox import Fault
from tests.support import journals
from tests.support.interruptions import Abort, stray_cancellation
from tests.support.notices import HEADERS, deliver, fails, inbox, is_acknowledged, notification, until
from tests.support.parties import boot_clock, refund_request, sandbox

pytestmark = pytest.mark.anyio

virtual = pytest.mark.virtual_time


@virtual
async def test_a_handler_that_fails_is_called_again_after_growing_pauses(journal):
    """The backoff is 1, 2, 4 … seconds, at most 5 minutes, until the handler returns; each failure is logged."""
    times = []

    async def on_refund(_refund):
        times.append(anyio.current_time())
        if len(times) < 12:
            await fails()

    async with inbox(journal, on_refund, clock=boot_clock) as endpoint:
        await deliver(endpoint, 1)
        await until(lambda: endpoint.counts["acted"], look_every=1)
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300], abs=0.1)
    assert endpoint.counts == {"kept": 1, "failed": 11, "acted": 1}


@virtual
async def test_a_failing_refund_holds_up_no_other(journal, handler):
    """Other refunds are acted on during its backoff, and while handlers hang in all workers but one."""

    async def on_refund(refund):
        if refund.no_refund == "R-1":
            await fails()
        if refund.no_refund == "R-2":
            await anyio.sleep(3)
        await handler(refund)

    async with inbox(journal, on_refund, clock=boot_clock, concurrency=2) as endpoint:
        await deliver(endpoint, 1, 2)
        await anyio.sleep(0.5)
        await deliver(endpoint, 3, 4)
        await anyio.sleep(0.1)
        assert handler.numbers == ["R-3", "R-4"]
        await anyio.sleep(3)
        assert handler.numbers == ["R-3", "R-4", "R-2"]


@virtual
async def test_handler_has_a_time_limit(journal, handler, caplog):
    """After handler_seconds it is cancelled and called again later."""
    handler.then = [anyio.sleep_forever]
    async with inbox(journal, handler, handler_seconds=60.0, clock=boot_clock) as endpoint:
        await deliver(endpoint, 1)
        await until(lambda: handler.done, look_every=1)
        assert anyio.current_time() == pytest.approx(61, abs=1.5)
    assert "TimeoutError" in caplog.text


@virtual
async def test_concurrency_bounds_the_running_handlers(journal):
    """At most ``concurrency`` handlers run at the same time."""
    running, most = 0, 0

    async def on_refund(_refund):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(1)
        running -= 1

    async with inbox(journal, on_refund, clock=boot_clock, concurrency=3) as endpoint:
        await deliver(endpoint, *range(10))
        await until(lambda: endpoint.counts["acted"] == 10, look_every=1)
    assert most == 3


@virtual
async def test_closing_lets_the_running_handlers_end(journal, handler):
    """Running handlers finish; other entries stay in the inbox."""
    handler.then = [lambda: anyio.sleep(3)]
    async with inbox(journal, handler, clock=boot_clock, concurrency=1) as endpoint:
        await deliver(endpoint, 1, 2)
        await until(lambda: handler.begun, look_every=1)
    assert handler.numbers == ["R-1"]
    assert [entry.no_refund async for entry in (await journal.inbox()).pending()] == ["R-2"]


@virtual
async def test_closing_that_is_cancelled_cancels_the_handlers(journal, handler):
    """If closing is cancelled, running handlers are cancelled; the next process acts on their refunds."""
    handler.then = [anyio.sleep_forever]
    with anyio.move_on_after(5) as scope:
        async with inbox(journal, handler, clock=boot_clock, handler_seconds=60.0) as endpoint:
            await deliver(endpoint, 1)
            await until(lambda: handler.begun, look_every=1)
    assert scope.cancelled_caught
    assert anyio.current_time() == 5
    async with inbox(journal, handler, clock=boot_clock) as endpoint:
        await until(lambda: handler.done, look_every=1)
    assert handler.numbers == ["R-1"]


@virtual
async def test_the_lease_of_a_dead_worker_is_taken_over(journal, handler):
    """When the lease ends, another worker acts on the refund without a new delivery."""
    async with inbox(journal, fails, clock=boot_clock) as failing:
        await deliver(failing, 1, 2)
        await until(lambda: failing.counts["failed"] == 2, look_every=1)
    book = await journal.inbox()
    for left in [entry async for entry in book.pending()]:
        intent = journals.intent(left.no_refund, fields=left.fields, lease=60)
        await book.begin(intent, boot_clock())
    async with inbox(journal, handler, clock=boot_clock) as endpoint:
        await anyio.sleep(50)
        assert not handler.begun
        # One of the two was not dead: it ends what it has begun.
        await book.finish(await book.find("R-2"), journals.MADE)
        await anyio.sleep(40)
        assert endpoint.counts == {"acted": 1}
    assert handler.numbers == ["R-1"]


@virtual
async def test_an_inbox_that_cannot_be_read_is_read_again(handler, caplog, tmp_path):
    """After a failure of the journal, the worker reads it again."""
    async with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        async with inbox(journal, fails, clock=boot_clock) as failing:
            await deliver(failing, 1)
            await until(lambda: failing.counts["failed"], look_every=1)
        moved = (tmp_path / "journal.sqlite-inbox").rename(tmp_path / "elsewhere")
        async with inbox(journal, handler, clock=boot_clock) as endpoint:
            await anyio.sleep(60)
            assert not handler.begun
            assert "this attempt to handle it failed" in caplog.text
            moved.rename(tmp_path / "journal.sqlite-inbox")
            await until(lambda: endpoint.counts["acted"], look_every=1)
    assert handler.numbers == ["R-1"]


@virtual
async def test_closing_the_journal_before_the_endpoint_is_an_error(handler, caplog, tmp_path):
    """Closing in the wrong order is logged, and the endpoint ends all the same."""
    async with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        endpoint = await inbox(journal, handler, clock=boot_clock).__aenter__()
        await anyio.sleep(1)
    await anyio.sleep(60)
    await endpoint.__aexit__(None, None, None)
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2


@virtual
async def test_with_confirm_the_handler_waits_for_the_gateway(journal, handler):
    """With an inbox, too, the handler is called only if the gateway reports the same state."""
    gateway = sandbox(settle_after=60)
    async with gateway.session(clock=boot_clock, journal=journal) as session:
        await session.apply_refund(refund_request())
        async with NotificationEndpoint(
            session.merchant, handler, journal=journal, session=session, confirm=True, inbox=True, clock=boot_clock
        ) as endpoint:
            assert is_acknowledged(await endpoint.handle(notification(dt_refund=None, oid_refundno=None), HEADERS))
            await anyio.sleep(50)
            assert not handler.begun
            await until(lambda: handler.done, look_every=1)
    assert endpoint.counts["acted"] == 1


@virtual
async def test_a_notification_in_the_inbox_ends_the_wait_for_its_refund(journal, handler):
    """``wait_refund`` returns when the notification is recorded; until then it would query only after 2 seconds."""
    gateway = sandbox(settle_after=0)
    gateway.script(Fault.NO_ANSWER, call="query", times=100)
    async with gateway.session(clock=boot_clock, journal=journal) as session:
        refund = attrs.evolve(await session.apply_refund(refund_request()), sta_refund=RefundStatus.PROCESSING)
        async with (
            NotificationEndpoint(
                session.merchant, handler, journal=journal, session=session, inbox=True, clock=boot_clock
            ) as endpoint,
            anyio.create_task_group() as tasks,
        ):
            waited = []

            async def wait():
                waited.append(await session.wait_refund(refund, deadline=100))

            tasks.start_soon(wait)
            await anyio.sleep(1)
            assert is_acknowledged(await endpoint.handle(gateway.notification(gateway.refunds[0]), HEADERS))
            await anyio.wait_all_tasks_blocked()
            assert [final.sta_refund for final in waited] == [RefundStatus.SUCCESS]
            tasks.cancel_scope.cancel()


# ── opening and closing ──────────────────────────────────────────────────────────────────────────


async def test_a_closed_inbox_accepts_nothing(handler, caplog):
    """Without a worker no notification is acknowledged: the log says to use `async with`."""
    async with MemoryJournal() as journal:
        endpoint = inbox(journal, handler)
        assert (await endpoint.handle(notification(), HEADERS)).status == 500
        assert "use the NotificationEndpoint in `async with`" in caplog.text
        async with endpoint:
            await deliver(endpoint, 1)
            with pytest.raises(RuntimeError, match="already open"):
                await endpoint.__aenter__()
        assert (await endpoint.handle(notification(), HEADERS)).status == 500
    assert len(handler.begun) <= 1


# ── what must not end it without a word ──────────────────────────────────────────────────────────


@virtual
async def test_a_handler_that_is_cancelled_from_within_is_called_again(journal, handler, caplog):
    """A cancellation that nobody requested is treated as a failure: the handler is called again."""
    handler.then = [stray_cancellation]
    async with inbox(journal, handler) as endpoint:
        await deliver(endpoint, *range(1, 14))
        await until(lambda: len(handler.done) == 13, look_every=1)
        assert endpoint.counts == {"kept": 13, "failed": 1, "acted": 13}
    assert "will be called again" in caplog.text


@virtual
async def test_after_its_worker_has_ended_no_notification_is_acknowledged(journal, handler, caplog):
    """A BaseException of a handler ends the worker; the other entries are acted on after the next opening."""

    async def aborts():
        raise Abort("the end")

    handler.then = [aborts]
    async with inbox(journal, handler) as endpoint:
        await deliver(endpoint, 1)
        await until(lambda: "the inbox's worker has failed" in caplog.text, look_every=1)
        assert not is_acknowledged(await endpoint.handle(notification(2), HEADERS))
    assert "Abort: the end" in caplog.text
    assert "the inbox's worker has ended: open the NotificationEndpoint again" in caplog.text
    async with inbox(journal, handler) as endpoint:
        await until(lambda: handler.numbers == ["R-1"], look_every=1)
        await deliver(endpoint, 2)
        await until(lambda: handler.numbers == ["R-1", "R-2"], look_every=1)
