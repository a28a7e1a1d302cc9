"""This library: ``apply_refund`` on one session that allows as many connections as refunds are in flight."""

from __future__ import annotations

from benchmarks import workload
from lianlian_async import RefundSession

from . import frame


async def program(job: frame.Job) -> dict[str, float]:
    async with RefundSession(workload.merchant(job.keys, job.url), max_connections=job.in_flight) as session:

        async def refund(number: int) -> None:
            await session.apply_refund(workload.refund_request(number))

        return await frame.measured(job, refund)


if __name__ == "__main__":
    frame.main(program)
