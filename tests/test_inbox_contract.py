"""One handler call per refund, on every journal: duplicates, several workers, failures, restarts, inline and inbox."""

from __future__ import annotations

from collections import Counter
from contextlib import AsyncExitStack

import anyio
import pytest

from lianlian_async import NotificationEndpoint, Refund
from lianlian_async.clock import system_clock
from lianlian_async.journal import State
from lianlian_async.recording import learn
from tests.support import journals
from tests.support.notices import (
    HEADERS,
    Handler,
    asked,
    begin,
    deliver,
    fails,
    inbox,
    is_acknowledged,
    notification,
    trusting,
    until,
)
from tests.support.parties import made

pytestmark = pytest.mark.anyio

_EVERYWHERE = [(name, backend) for name in ("memory", "sqlite") for backend in ("asyncio", "trio")]


@pytest.fixture(params=[*_EVERYWHERE, ("postgres", "asyncio")], ids="-".join)
def kind_and_backend(request):
    return request.param


@pytest.fixture
def anyio_backend(kind_and_backend):
    return kind_and_backend[1]


@pytest.fixture
def kind(kind_and_backend, request):
    return journals.kind(kind_and_backend[0], request)


@pytest.fixture
def handler():
    return Handler()


async def test_a_notification_is_acknowledged_before_the_handler_runs(kind, handler):
    """The notification is acknowledged after it is recorded; the handler runs in the background."""
    go = anyio.Event()
    handler.then = [go.wait]
    async with kind.make() as journal, inbox(journal, handler) as endpoint:
        await deliver(endpoint, 1, 1)
        await until(lambda: handler.begun)
        await deliver(endpoint, 1)
        assert not handler.done
        assert endpoint.counts == {"kept": 1, "duplicate": 2}
        go.set()
        await until(lambda: endpoint.counts["acted"])
        await deliver(endpoint, 1)
    assert handler.numbers == ["R-1"]
    assert endpoint.counts == {"kept": 1, "duplicate": 3, "acted": 1}


async def test_what_was_acknowledged_survives_a_restart(kind, handler):
    """If a handler did not return before a crash, the next process calls it again."""
    async with kind.make() as journal, inbox(journal, fails) as endpoint:
        await deliver(endpoint, 1, 2)
        await until(lambda: endpoint.counts["failed"] == 2)
    async with kind.make() as journal:
        assert [entry.no_refund async for entry in (await journal.inbox()).pending()] == ["R-1", "R-2"]
        async with inbox(journal, handler) as endpoint:
            await until(lambda: endpoint.counts["acted"] == 2)
            await deliver(endpoint, 1, 2)
    assert sorted(handler.numbers) == ["R-1", "R-2"]
    assert endpoint.counts == {"acted": 2, "duplicate": 2}


async def test_several_workers_share_an_inbox(kind, handler):
    """Workers that share an inbox call the handler once in total, however many deliveries each of them gets."""
    async with kind.make() as journal, AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(inbox(journal, handler)) for _ in range(3)]
        async with anyio.create_task_group() as tasks:
            for number in range(5):
                for worker in workers:
                    tasks.start_soon(deliver, worker, number)
        await until(lambda: len(handler.done) >= 5)
    assert sorted(handler.numbers) == [f"R-{number}" for number in range(5)]
    counts = sum((worker.counts for worker in workers), start=Counter())
    assert counts == {"kept": 5, "duplicate": 10, "acted": 5}


async def test_inline_delivery_is_acted_on_once_by_all_workers(kind, handler):
    """Without an inbox, too, endpoints that share a journal call the handler once in total."""
    async with kind.make() as journal:
        workers = [NotificationEndpoint(trusting(), handler, journal=journal) for _ in range(2)]
        async with anyio.create_task_group() as tasks:
            for number in range(5):
                for worker in workers:
                    tasks.start_soon(deliver, worker, number, number)
        await deliver(workers[0], *range(5))
    assert sorted(handler.numbers) == [f"R-{number}" for number in range(5)]


async def test_a_handler_that_failed_inline_is_called_again_after_a_restart(kind, handler):
    """A failed handler call is not recorded as done."""
    async with kind.make() as journal:
        assert (await NotificationEndpoint(trusting(), fails, journal=journal).handle(notification(), {})).status == 500
    async with kind.make() as journal:
        await deliver(NotificationEndpoint(trusting(), handler, journal=journal), 1, 1)
    assert handler.numbers == ["R-1"]


async def test_the_refunds_themselves_learn_their_final_state(kind, handler):
    """A notification resolves the refund's journal entry, and the handler gets the dt_refund of the entry."""
    async with kind.make() as journal:
        request = await begin(journal)
        async with inbox(journal, handler) as endpoint:
            assert is_acknowledged(await endpoint.handle(notification(dt_refund=None), HEADERS))
            assert (await journal.find("R-1")).ending.record["sta_refund"] == "2"
            await until(lambda: endpoint.counts["acted"])
        assert (await journal.find("R-1")).state is State.DONE
    assert handler.done[0].query() == request.query()


async def test_inbox_acts_at_its_start_on_refunds_that_are_already_final(kind, handler):
    """A refund that became final without a notification is acted on once, and recorded as done."""
    async with kind.make() as journal, inbox(journal, handler):
        pass
    async with kind.make() as journal:
        await begin(journal)
        await learn(journal, Refund.from_dict(made(asked(), sta_refund="2")), system_clock())
        assert (await journal.find("R-1")).state is State.FINAL
        async with inbox(journal, handler) as endpoint:
            await until(lambda: endpoint.counts["acted"])
            await deliver(endpoint, 1)
        assert (await journal.find("R-1")).state is State.DONE
    assert handler.numbers == ["R-1"]


@pytest.mark.parametrize("changes", [{"sta_refund": "3"}, {"money_refund": "11.00"}])
async def test_contradiction_is_not_recorded(kind, handler, changes):
    """A second, contradicting final state is not recorded, whether the first was acted on or not."""
    async with kind.make() as journal, inbox(journal, handler) as endpoint:
        for _ in range(2):
            await deliver(endpoint, 1)
            assert (await endpoint.handle(notification(**changes), HEADERS)).status == 409
            await until(lambda: handler.done)
    assert handler.numbers == ["R-1"]
    assert endpoint.counts["contradictory"] == 2
