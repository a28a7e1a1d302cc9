"""End processes during their work: ``python -m tests.programs.process_ends JOURNALS WAY…``.

One task has an open journal (in the folder or in the database JOURNALS), a batch whose gateway never answers, and an
inbox whose handler does not return. When all of these are working, the process prints ``at work`` and ends in the
given way. Each of these processes is forked, so that only one process imports the package. At the end, the exit code
and the text on stderr of each are printed as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import sys
import tempfile
import time
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

from lianlian_async import refund_many
from lianlian_async.journal import Journal, SqliteJournal
from lianlian_async.journal.postgres import PostgresJournal
from lianlian_async.sandbox import Fault, When
from tests.support import keypairs, notices
from tests.support.interruptions import Abort
from tests.support.parties import refund_request, sandbox

REFUNDS = 4  # a batch sends this number before the first verified answer


class Work:
    """The task with the open journal, batch and inbox; its handler and middleware raise ``error``."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
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
            journal = await stack.enter_async_context(self._journal)
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
            outcomes = await stack.enter_async_context(aclosing(refund_many(session, requests)))
            async for outcome in outcomes:
                print(outcome.request.no_refund, type(outcome.error).__name__, flush=True)

    async def _around(self, exchange, forward):
        """Raise ``error`` in the attempt of R-1 when ``in_middleware`` is set."""
        self._one_more()
        if exchange.asked["no_refund"] != "R-1":
            return await forward(exchange)
        await self.in_middleware.wait()
        raise self.error


def make_journal(journals: str, way: str) -> Journal:
    """Return the journal of the process that ends in this way."""
    if Path(journals).is_dir():
        return SqliteJournal(Path(journals, f"{way}.sqlite"))
    return PostgresJournal(journals, schema=way)


async def main(journals: str, way: str) -> None:
    work = Work(make_journal(journals, way))
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


def fork(ways: list[str]) -> str | None:
    """Fork a process for each way, one after the other; return its way in a new process, and None in this one."""
    for owner in ("merchant", "gateway"):
        keypairs.pair(owner)  # generated once for all of them
    ends = {}
    for way in ways:
        reader, writer = os.pipe()
        with tempfile.TemporaryFile("w+") as stderr:
            process = os.fork()
            if not process:
                os.dup2(writer, 1)
                os.dup2(stderr.fileno(), 2)
                return way
            os.close(writer)
            with os.fdopen(reader) as stdout:
                _end(process, way, stdout.readline())
                _, status = os.waitpid(process, 0)
            stderr.seek(0)
            ends[way] = os.waitstatus_to_exitcode(status), stderr.read()
    print(json.dumps(ends))
    return None


def _end(process: int, way: str, line: str) -> None:
    """Send the signals of this way to a process that is at work."""
    if line == "at work\n" and way.startswith("SIG"):
        os.kill(process, getattr(signal, way.removesuffix(" twice")))
        if way.endswith("twice"):
            time.sleep(0.0005)  # the event loop has received the first signal and is shutting down
            os.kill(process, signal.SIGINT)
            # The second one may interrupt asyncio's own shutdown. Then idle threads of anyio, or a task that is not
            # cancelled again, keep the process alive, and a third one ends it.
            ended = os.pidfd_open(process)
            select.select([ended], [], [], 10)
            os.close(ended)
            os.kill(process, signal.SIGINT)  # no effect if the process has ended


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if (chosen := fork(sys.argv[2:])) is not None:
        asyncio.run(main(sys.argv[1], chosen))
        print("it has ended", file=sys.stderr)
