"""A batch through ``refund_many`` at the gateway process: with a ``SqliteJournal`` (option ``journal``) or without."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from pathlib import Path

from benchmarks import workload
from lianlian_async import RefundSession, refund_many
from lianlian_async.journal import SqliteJournal

from . import frame


async def program(job: frame.Job) -> dict[str, float]:
    file = Path(job.keys, f"batch-{os.getpid()}.db")
    async with AsyncExitStack() as stack:
        journal = await stack.enter_async_context(SqliteJournal(file)) if job.option == "journal" else None
        merchant = workload.merchant(job.keys, job.url)
        session = await stack.enter_async_context(
            RefundSession(merchant, max_connections=job.in_flight, journal=journal)
        )
        for numbers in (range(job.warm_up), range(job.warm_up, job.warm_up + job.refunds)):
            began = frame.clocks()
            async for outcome in refund_many(session, map(workload.refund_request, numbers)):
                if outcome.refund is None:
                    raise RuntimeError(outcome)
        result = frame.timed(job.refunds, began)
    for each in file.parent.glob(file.name + "*"):
        each.unlink()
    return result


if __name__ == "__main__":
    frame.main(program)
