"""The sweep calls the handler once for refunds without a notification, and for refunds whose handler call failed."""

from __future__ import annotations

import contextlib

import anyio
import httpx
import pytest

from lianlian_async import ConfigurationError, NotificationEndpoint, RefundSession, wire
from lianlian_async.journal import MemoryJournal, State
from lianlian_async.recovery import Resumed
from lianlian_async.sandbox import Fault, When
from tests.support.interruptions import Abort
from tests.support.notices import HEADERS, fails, is_acknowledged, notification, until
from tests.support.parties import as_json, boot_clock, made, refund_request, sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


@contextlib.asynccontextmanager
async def shop(gateway, journal, handler, **options):
    """A session and an endpoint that share a journal."""
    async with gateway.session(clock=boot_clock, journal=journal) as session:
        settings = {"journal": journal, "session": session, "clock": boot_clock, **options}
        async with NotificationEndpoint(session.merchant, handler, **settings) as endpoint:
            yield session, endpoint


async def states(journal, *numbers):
    return [(await journal.find(f"R-{number}")).state for number in numbers]


@pytest.mark.parametrize("with_inbox", [False, True], ids=["inline", "inbox"])
async def test_a_refund_without_notification_is_acted_on_once(journal, handler, with_inbox):
    """A sweep calls the handler when the refund is final; later sweeps and a late notification do not."""
    gateway = sandbox(settle_after=60)
    async with shop(gateway, journal, handler, inbox=with_inbox) as (session, endpoint):
        await session.apply_refund(refund_request())
        assert await endpoint.sweep() == Resumed(resolved=0, still_open=1)
        assert not handler.begun
        await anyio.sleep(100)
        assert await endpoint.sweep(concurrency=1) == Resumed(resolved=1, still_open=0)
        await until(lambda: endpoint.counts["acted"], look_every=1)
        assert await endpoint.sweep() == Resumed(resolved=0, still_open=0)
        assert is_acknowledged(await endpoint.handle(notification(), HEADERS))
    assert handler.numbers == ["R-1"]
    assert handler.done[0].is_final
    assert await states(journal, 1) == [State.DONE]
    assert endpoint.counts["duplicate"] == 1


async def test_an_unknown_refund_that_is_final_by_now_is_acted_on(journal, handler):
    """The sweep queries a refund whose answer was lost, finds it final, and calls the handler."""
    gateway = sandbox(settle_after=60)
    gateway.script(Fault.NO_ANSWER, when=When.AFTER)
    async with shop(gateway, journal, handler) as (session, endpoint):
        with anyio.move_on_after(5):
            await session.apply_refund(refund_request())
        await anyio.sleep(100)
        assert await endpoint.sweep() == Resumed(resolved=1, still_open=0)
    assert handler.numbers == ["R-1"]
    assert gateway.times_made("R-1") == 1


async def test_the_next_sweep_repeats_a_failed_handler(journal, handler, caplog):
    """Each sweep repeats a failed handler call; until the handler returns, the refund stays FINAL in the journal."""
    gateway = sandbox(settle_after=60)
    handler.then = [fails, fails]
    async with shop(gateway, journal, handler) as (session, endpoint):
        await session.apply_refund(refund_request())
        await anyio.sleep(100)
        assert await endpoint.sweep() == Resumed(resolved=1, still_open=0)
        for _ in range(2):
            assert await states(journal, 1) == [State.FINAL]
            await endpoint.sweep()
        await endpoint.sweep()
    assert endpoint.counts == {"failed": 2, "acted": 1}
    assert handler.numbers == ["R-1"]
    assert await states(journal, 1) == [State.DONE]
    assert "it will be called again" in caplog.text


async def test_a_sweep_acts_on_notifications_that_failed(journal, handler):
    """After LianLian's last delivery to a failing handler, the sweep calls the handler again."""
    gateway = sandbox()
    handler.then = [fails] * 31
    async with shop(gateway, journal, handler) as (session, endpoint):
        await session.apply_refund(refund_request())
        for _ in range(30):
            assert not is_acknowledged(await endpoint.handle(notification(), HEADERS))
            await anyio.sleep(120)
        await endpoint.sweep()
        assert not handler.done
        await endpoint.sweep()
        await endpoint.sweep()
    assert handler.numbers == ["R-1"]
    assert endpoint.counts == {"failed": 31, "acted": 1}


async def test_a_sweep_skips_refunds_with_a_running_handler(journal, handler):
    """A sweep does not call the handler while a delivery of the same refund is being acted on."""
    handler.then = [lambda: anyio.sleep(3)]
    async with shop(sandbox(), journal, handler) as (_, endpoint), anyio.create_task_group() as tasks:
        tasks.start_soon(endpoint.handle, notification(), HEADERS)
        await until(lambda: handler.begun)
        await endpoint.sweep()
        assert not handler.done
    assert handler.numbers == ["R-1"]
    assert len(handler.begun) == 1


async def test_a_final_state_that_contradicts_the_notified_one_is_not_acted_on(journal, handler, caplog):
    """A refund that was notified as failed, but is recorded as successful, is not acted on again; it stays FINAL."""
    gateway = sandbox(settle_after=60)
    async with shop(gateway, journal, handler) as (session, endpoint):
        too_early = notification(sta_refund="3", settle_date=None)
        assert is_acknowledged(await endpoint.handle(too_early, HEADERS))
        await session.apply_refund(refund_request())
        await anyio.sleep(100)
        await endpoint.sweep()
    assert [refund.sta_refund for refund in handler.done] == ["3"]
    assert await states(journal, 1) == [State.FINAL]
    assert "refund R-1 is final, but the handler cannot be called: " in caplog.text


async def test_an_inbox_that_cannot_be_acted_on_does_not_end_the_sweep(journal, handler, caplog):
    """An inbox entry that contradicts the journal is logged, and the other entries are acted on."""
    gateway = sandbox()
    handler.then = [fails, fails]
    async with shop(gateway, journal, handler) as (session, endpoint):
        await endpoint.handle(notification(1, money_refund="9.99"), HEADERS)
        await endpoint.handle(notification(2), HEADERS)
        for number in (1, 2):
            await session.apply_refund(refund_request(number))
        await endpoint.sweep()
    assert handler.numbers == ["R-2"]
    assert "this attempt to handle it failed" in caplog.text


class Brief(httpx.AsyncBaseTransport):
    """A gateway whose records contain only the refund's number and its state."""

    def __init__(self):
        self.state = "0"

    async def handle_async_request(self, request):
        asked = wire.decode(await request.aread())
        record = {"sta_refund": self.state, "dt_refund": None}
        if request.url.path == "/refundquery.htm":
            record["money_refund"] = None
        return httpx.Response(200, content=as_json(made(asked, **record)))


async def test_the_request_supplies_what_the_answer_leaves_out(journal, handler):
    """An answer without an amount is acted on; the later notification with the amount is a duplicate."""
    gateway, books = sandbox(), Brief()
    async with (
        RefundSession(gateway.merchant(), transport=books, journal=journal, clock=boot_clock) as session,
        NotificationEndpoint(session.merchant, handler, journal=journal, session=session, clock=boot_clock) as endpoint,
    ):
        request = refund_request()
        await session.apply_refund(request)
        books.state = "2"
        assert await endpoint.sweep() == Resumed(resolved=1, still_open=0)
        assert is_acknowledged(await endpoint.handle(notification(), HEADERS))
    assert [refund.money_refund for refund in handler.done] == [request.money_refund]
    assert handler.done[0].query().dt_refund == request.dt_refund
    assert endpoint.counts == {"acted": 1, "duplicate": 1}


@pytest.mark.parametrize("missing", ["journal", "session"])
async def test_a_sweep_needs_a_journal_and_a_session(handler, missing):
    """Without a journal or without a session, a sweep raises ConfigurationError."""
    async with sandbox().session(clock=boot_clock) as session:
        settings = {"journal": MemoryJournal(), "session": session}
        del settings[missing]
        endpoint = NotificationEndpoint(session.merchant, handler, **settings)
        with pytest.raises(ConfigurationError, match="sweep requires a session with the endpoint's journal"):
            await endpoint.sweep()


async def test_a_sweep_refuses_a_session_with_another_journal(journal, handler):
    """Such a session would resolve other refunds than those of the endpoint's journal."""
    merchant = sandbox().merchant()
    for other in (None, MemoryJournal()):
        session = RefundSession(merchant, journal=other)
        endpoint = NotificationEndpoint(merchant, handler, journal=journal, session=session)
        with pytest.raises(ConfigurationError, match="requires a session with the endpoint's journal"):
            await endpoint.sweep()


async def test_an_endpoint_refuses_a_session_of_another_merchant(handler):
    """Its notifications would end the waits of the other merchant's calls."""
    theirs = RefundSession(sandbox().merchant(oid_partner="201304121000001004"))
    with pytest.raises(ConfigurationError, match="session: must belong to the endpoint's merchant"):
        NotificationEndpoint(sandbox().merchant(), handler, session=theirs)


async def test_the_sweep_of_an_inbox_needs_the_inboxs_worker(journal, handler):
    """Outside ``async with`` nobody would call the handler, so the sweep raises."""
    async with sandbox().session(clock=boot_clock, journal=journal) as session:
        endpoint = NotificationEndpoint(session.merchant, handler, journal=journal, session=session, inbox=True)
        with pytest.raises(RuntimeError, match="the inbox is not open: use the NotificationEndpoint in `async with`"):
            await endpoint.sweep()
        async with endpoint:
            assert await endpoint.sweep() == Resumed(resolved=0, still_open=0)


async def test_a_sweep_says_that_the_inboxs_worker_has_ended(journal, handler):
    """It resolves the open refunds, then raises: until the next opening, nobody calls the handler."""
    gateway = sandbox(settle_after=60)

    async def aborts():
        raise Abort("the end")

    handler.then = [aborts]
    async with shop(gateway, journal, handler, inbox=True) as (session, endpoint):
        await session.apply_refund(refund_request(1))
        await anyio.sleep(100)
        assert is_acknowledged(await endpoint.handle(notification(2), HEADERS))
        await until(lambda: handler.begun, look_every=1)
        with pytest.raises(RuntimeError, match="open the NotificationEndpoint again"):
            await endpoint.sweep()
        assert await states(journal, 1) == [State.FINAL]


async def test_an_incomplete_notification_waits_for_no_connection(handler):
    """If no connection is free within ``handler_seconds``, it is not acknowledged."""
    gateway = sandbox(delay=100)
    gateway.script(Fault.DELAY, call="apply", no_refund="R-2")
    settings = {"clock": boot_clock, "max_connections": 1, "deadline": 150}
    async with gateway.session(**settings) as session, anyio.create_task_group() as tasks:
        await session.apply_refund(refund_request(1))
        endpoint = NotificationEndpoint(session.merchant, handler, session=session, handler_seconds=2, clock=boot_clock)
        tasks.start_soon(session.apply_refund, refund_request(2))
        await anyio.sleep(1)
        answer = await endpoint.handle(notification(1, sta_refund=None, oid_refundno=None), HEADERS)
        assert (answer.status, anyio.current_time()) == (503, pytest.approx(3, abs=0.1))
        tasks.cancel_scope.cancel()
