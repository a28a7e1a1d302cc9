"""End a process during its work: ``python -m tests.programs.process_ends WAY JOURNAL``.

One task has an open journal (a path that ends in .sqlite, or the DSN of a database), a batch whose gateway never
answers, and an inbox whose handler does not return. When all of these are working, the process prints ``at work`` and
ends in the given way.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import AsyncExitStack

from lianlian_async import refund_many
from lianlian_async.journal import Journal, SqliteJournal
from lianlian_async.sandbox import Fault, When
from tests.support import notices
from tests.support.interruptions import Abort
from tests.support.parties import refund_request, sandbox

REFUNDS = 4  # a batch sends this number before the first verified answer


class Work:
    """The task with the open journal, batch and inbox; its handler and middleware raise ``error``."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._at_work = 0
        self.begun = asyncio.Event()
        self.in_handler, self.in_middleware = asyncio.Event(), asyncio.Event()
        self.error: BaseException = Abort("the end")

    def _one_more(self) -> None:
        self._at_work += 1
        if self._at_work == REFUNDS + 1:
            self.begun.set()

    async def _handler(self, _refund) -> None:
        self._one_more()
        await self.in_handler.wait()
        raise self.error

    async def run(self) -> None:
        async with AsyncExitStack() as stack:
            journal = await stack.enter_async_context(make_journal(self._place))
            gateway = sandbox()
            for _ in range(REFUNDS):
                gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
            session = await stack.enter_async_context(
                gateway.session(journal=journal, max_connections=REFUNDS, deadline=1.0, middleware=[self._around])
            )
            endpoint = notices.inbox(journal, self._handler, handler_seconds=1.0)
            await stack.enter_async_context(endpoint)
            await notices.deliver(endpoint, 1000)
            requests = (refund_request(number) for number in range(1, REFUNDS + 1))
            outcomes = await stack.enter_async_context(refund_many(session, requests))
            async for outcome in outcomes:
                print(outcome.request.no_refund, type(outcome.error).__name__, flush=True)

    async def _around(self, exchange, forward):
        """Raise ``error`` in the attempt of R-1 when ``in_middleware`` is set."""
        self._one_more()
        if exchange.asked["no_refund"] != "R-1":
            return await forward(exchange)
        await self.in_middleware.wait()
        raise self.error


def make_journal(place: str) -> Journal:
    if place.endswith(".sqlite"):
        return SqliteJournal(place)
    from lianlian_async.journal.postgres import PostgresJournal

    return PostgresJournal(place)


async def main(way: str, place: str) -> None:
    work = Work(place)
    holder = asyncio.create_task(work.run())
    await asyncio.wait({holder, asyncio.ensure_future(work.begun.wait())}, return_when=asyncio.FIRST_COMPLETED)
    print("at work", flush=True)
    match way:
        case "return":
            return
        case "raise":
            raise LookupError("the end")
        case "exit":
            sys.exit(7)
        case "cancel all":
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        case "stop the loop":
            asyncio.get_running_loop().stop()
            await asyncio.sleep(3600)
        case "SIGINT" | "SIGINT twice" | "SIGTERM":
            await asyncio.sleep(3600)  # the parent process sends the signal
        case "abort in the handler" | "exit in the handler":
            if way.startswith("exit"):
                work.error = SystemExit(7)
            work.in_handler.set()
            await holder
        case "abort in the middleware" | "exit in the middleware":
            if way.startswith("exit"):
                work.error = SystemExit(7)
            work.in_middleware.set()
            await holder


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    asyncio.run(main(*sys.argv[1:]))
    print("it has ended", file=sys.stderr)
