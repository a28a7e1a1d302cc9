"""How much resident memory many refunds take, at a gateway without a network.

Option ``gather``: one ``asyncio.gather`` over all calls. Option ``refund_many``: a generator of requests goes in, and
outcomes are counted as they come. Growth is counted from the moment that ``warm_up`` refunds are done.
"""

from __future__ import annotations

import asyncio

from benchmarks import workload
from lianlian_async import RefundSession, refund_many

from . import frame, stamps


async def program(job: frame.Job) -> dict[str, float]:
    made = 0
    base, began = frame.resident_mib(), frame.clocks()
    numbers = range(job.warm_up + job.refunds)
    transport = stamps.NoOpTransport()
    async with RefundSession(stamps.merchant(), transport=transport, max_connections=job.in_flight) as session:
        if job.option == "gather":
            for part in (numbers[: job.warm_up], numbers[job.warm_up :]):
                base, began = frame.resident_mib(), frame.clocks()
                refunds = await asyncio.gather(*(session.apply_refund(workload.refund_request(n)) for n in part))
                made += len(refunds)
        else:
            async for outcome in refund_many(session, (workload.refund_request(number) for number in numbers)):
                made += outcome.refund is not None
                if made == job.warm_up:
                    base, began = frame.resident_mib(), frame.clocks()
        grown = {"grown_mib": frame.resident_mib() - base, "most_mib": frame.peak_mib() - base}
        if made != len(numbers):
            raise RuntimeError(f"{made} refunds made of {len(numbers)}")
        return frame.timed(job.refunds, began) | grown


if __name__ == "__main__":
    frame.main(program)
