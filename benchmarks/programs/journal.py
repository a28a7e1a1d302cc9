"""``SqliteJournal`` on this machine's disk, with entries of real size.

Option ``verbs``: begin and finish, nothing else. Option ``fill``: the same, but the last thousand stay unresolved, in a
file that is kept. Option ``reopen``: the time from opening that file to the first query of ``resume``.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import anyio
import httpx

from benchmarks import workload
from lianlian_async import RefundSession
from lianlian_async.clock import system_clock
from lianlian_async.journal import Ending, Intent, SqliteJournal, State

from . import frame, stamps

UNRESOLVED = 1000


async def program(job: frame.Job) -> dict[str, float]:
    if job.option == "reopen":
        return await _reopen(job)
    file = Path(job.keys, "filled.db" if job.option == "fill" else f"verbs-{os.getpid()}.db")
    resolved = job.refunds - (UNRESOLVED if job.option == "fill" else 0)
    signature = "A" * 344

    async with SqliteJournal(file) as journal:

        async def refund(number: int) -> None:
            fields = {**workload.request_fields(number), "sign": signature}
            intent = Intent(
                no_refund=f"R-{number}",
                fields={
                    name: text for name, text in fields.items() if name not in ("oid_partner", "sign_type", "sign")
                },
                body=str(fields).encode(),
                lease=60.0,
                grace=900.0,
            )
            _, entry = await journal.begin(intent, system_clock())
            if number < resolved:
                record = {**workload.answer_fields(f"R-{number}"), "sta_refund": "2", "sign": signature}
                await journal.finish(entry, Ending(state=State.DONE, record=record))

        result = await frame.measured(job, refund)
    size = sum(each.stat().st_size for each in file.parent.glob(file.name + "*"))
    if job.option != "fill":
        for each in file.parent.glob(file.name + "*"):
            each.unlink()
    return result | {"bytes": size / (job.warm_up + job.refunds)}


class _FirstQuestion(httpx.AsyncBaseTransport):
    def __init__(self) -> None:
        self.asked = anyio.Event()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.set()
        await anyio.sleep_forever()
        raise AssertionError


async def _reopen(job: frame.Job) -> dict[str, float]:
    logging.disable()  # the refunds that are cancelled at the end log warnings
    merchant, transport = stamps.merchant(), _FirstQuestion()
    began = time.perf_counter()
    async with (
        SqliteJournal(Path(job.keys, "filled.db")) as journal,
        RefundSession(merchant, transport=transport, journal=journal) as session,
        anyio.create_task_group() as group,
    ):
        group.start_soon(session.resume)
        await transport.asked.wait()
        seconds = time.perf_counter() - began
        group.cancel_scope.cancel()
    return {"seconds": seconds, "peak_mib": frame.peak_mib()}


if __name__ == "__main__":
    frame.main(program)
