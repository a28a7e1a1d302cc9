"""``on_refund`` is called for each final refund, however the final state became known, and after any crash."""

from __future__ import annotations

import signal
from collections import Counter

import anyio
import pytest

from lianlian_async import NotificationEndpoint, RefundRejected
from lianlian_async.journal import SqliteJournal, State
from lianlian_async.sandbox import Fault, When
from tests.programs import acting
from tests.support import ROOT, program
from tests.support.notices import (
    HEADERS,
    Handler,
    deliver,
    fails,
    inbox,
    is_acknowledged,
    notification,
    trusting,
    until,
)
from tests.support.parties import boot_clock, refund_request, sandbox

pytestmark = pytest.mark.anyio

virtual = pytest.mark.virtual_time
inline_and_inbox = pytest.mark.parametrize("with_inbox", [False, True], ids=["inline", "inbox"])


async def state(journal, number=1):
    return (await journal.find(f"R-{number}")).state


async def by_resume(session):
    await session.apply_refund(refund_request())
    await anyio.sleep(100)
    await session.resume()


async def by_waiting(session):
    await session.apply_and_wait(refund_request())


async def by_asking_again(session):
    with anyio.move_on_after(5):  # its answer is lost
        await session.apply_refund(refund_request())
    await anyio.sleep(100)
    await session.apply_refund(refund_request())


LEARNERS = [by_resume, by_waiting, by_asking_again]


@virtual
@inline_and_inbox
@pytest.mark.parametrize("learn", LEARNERS, ids=lambda learn: learn.__name__)
async def test_a_final_state_learned_without_an_open_endpoint_is_acted_on_later(journal, handler, learn, with_inbox):
    """The next sweep calls the handler; later sweeps and notifications do not."""
    gateway = sandbox(settle_after=60)
    if learn is by_asking_again:
        gateway.script(Fault.NO_ANSWER, when=When.AFTER)
    async with gateway.session(clock=boot_clock, journal=journal) as session:

        def endpoint():
            settings = {"journal": journal, "session": session, "clock": boot_clock, "inbox": with_inbox}
            return NotificationEndpoint(session.merchant, handler, **settings)

        async with endpoint():
            pass
        await learn(session)
        assert await state(journal) is State.FINAL
        async with endpoint() as opened:
            await opened.sweep()
            await until(lambda: opened.counts["acted"], look_every=1)
            assert await state(journal) is State.DONE
            for _ in range(2):
                assert is_acknowledged(await opened.handle(notification(), HEADERS))
                await opened.sweep()
            assert opened.counts == {"acted": 1, "duplicate": 2}
    assert handler.numbers == ["R-1"]
    assert gateway.times_made("R-1") == 1


@virtual
@pytest.mark.parametrize("learn", LEARNERS, ids=lambda learn: learn.__name__)
async def test_without_an_endpoint_no_refund_is_marked_final(journal, learn):
    """Without an endpoint, final refunds are DONE, not FINAL."""
    gateway = sandbox(settle_after=60)
    if learn is by_asking_again:
        gateway.script(Fault.NO_ANSWER, when=When.AFTER)
    async with gateway.session(clock=boot_clock, journal=journal) as session:
        await learn(session)
    assert await state(journal) is State.DONE


@virtual
async def test_refunds_final_before_the_first_endpoint_are_not_acted_on(journal, handler):
    """The handler is called for refunds of the time before the first endpoint only if they are notified."""
    gateway = sandbox(settle_after=0)
    async with gateway.session(clock=boot_clock, journal=journal) as session:
        await session.apply_refund(refund_request())
        settings = {"journal": journal, "session": session, "clock": boot_clock}
        async with NotificationEndpoint(session.merchant, handler, **settings) as endpoint:
            await session.apply_refund(refund_request(2))
            await endpoint.sweep()
            assert handler.numbers == ["R-2"]
            assert is_acknowledged(await endpoint.handle(notification(), HEADERS))
    assert handler.numbers == ["R-2", "R-1"]


@virtual
async def test_a_rejected_refund_is_not_acted_on(journal, handler):
    """A rejected refund was not made, so the handler is not called."""
    async with sandbox().session(clock=boot_clock, journal=journal) as session:
        settings = {"journal": journal, "session": session, "clock": boot_clock}
        async with NotificationEndpoint(session.merchant, handler, **settings) as endpoint:
            with pytest.raises(RefundRejected):
                await session.apply_refund(refund_request(money_refund="99999.00"))
            await endpoint.sweep()
    assert not handler.begun
    assert await state(journal) is State.REJECTED


@virtual
async def test_inbox_acts_at_its_start_on_refunds_that_became_final_before(journal, handler):
    """At its start, an inbox acts on such refunds without a sweep and without a session."""
    handler.then = [fails]
    async with inbox(journal, handler, clock=boot_clock):
        pass
    async with sandbox(settle_after=0).session(clock=boot_clock, journal=journal) as session:
        for number in (1, 2):
            await session.apply_refund(refund_request(number))
    async with inbox(journal, handler, clock=boot_clock) as endpoint:
        await until(lambda: endpoint.counts["acted"] == 2, look_every=1)
    assert sorted(handler.numbers) == ["R-1", "R-2"]
    assert endpoint.counts == {"failed": 1, "acted": 2}
    assert await state(journal) is State.DONE


# ── a process that dies between two lines of the journal ─────────────────────────────────────────


@pytest.mark.parametrize("line", acting.LINES)
@pytest.mark.parametrize("mode", acting.MODES)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_process_that_dies_between_two_writes_loses_no_refund(tmp_path, anyio_backend, mode, line):
    """The next process calls the handler; it is called again only if its return was not recorded."""
    shop, path = tmp_path / "shop", tmp_path / "journal.sqlite"
    command = [*program("acting"), mode, line, path, shop]
    assert (await anyio.run_process(command, cwd=ROOT, check=False, stderr=None)).returncode == -signal.SIGKILL
    assert len(acting.read(shop)) == (line in acting.AFTER_THE_HANDLER)
    handler = Handler()
    async with SqliteJournal(path) as journal, sandbox().session(journal=journal) as session:
        settings = {"journal": journal, "session": session, "inbox": mode == "inbox"}
        async with NotificationEndpoint(trusting(), handler, **settings) as endpoint:
            if line == acting.LINES[0]:  # nothing was acknowledged: LianLian sends again
                await deliver(endpoint, 1)
            await endpoint.sweep()
            await until(lambda: handler.done or (len(acting.read(shop)) and line == acting.LINES[-1]))
            await deliver(endpoint, 1)
            assert await endpoint.sweep()
        assert await state(journal) is State.DONE
    times = Counter(acting.read(shop) + handler.numbers)
    assert times == {"R-1": 2 if line == "inbox finish" else 1}
