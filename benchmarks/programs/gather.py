"""Thousands of calls in one ``asyncio.gather``.

Option ``session``: this library's ``apply_refund`` on one session with its default settings. Options ``pool`` and
``stock``: nothing but POSTs through one ``AsyncClient``, on this library's transport or on httpx's own pool.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

import httpx

from benchmarks import workload
from lianlian_async import RefundSession
from lianlian_async.transport import PoolTransport

from . import frame

CONNECTIONS = 20


async def program(job: frame.Job) -> dict[str, float]:
    async with AsyncExitStack() as stack:
        refund = await _refund(job, stack)
        ends: list[float] = []

        async def call(number: int) -> None:
            await refund(number)
            ends.append(time.perf_counter())

        began = frame.clocks()
        await asyncio.gather(*(call(number) for number in range(job.refunds)))
        result = frame.timed(job.refunds, began)
    share = job.refunds // 5
    return result | {"first": (ends[share] - ends[0]) / share, "last": (ends[-1] - ends[-1 - share]) / share}


async def _refund(job: frame.Job, stack: AsyncExitStack) -> frame.Refund:
    if job.option == "session":
        session = await stack.enter_async_context(RefundSession(workload.merchant(job.keys, job.url)))

        async def apply(number: int) -> None:
            await session.apply_refund(workload.refund_request(number))

        return apply
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    transport = PoolTransport(CONNECTIONS) if job.option == "pool" else None
    client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, limits=limits, timeout=None))

    async def post(number: int) -> None:
        body = b'{"no_refund":"R-%d"}' % (10 + number)  # one whose signature the server does not ask for
        response = await client.post(job.url, content=body, headers=workload.HEADERS)
        response.raise_for_status()

    return post


if __name__ == "__main__":
    frame.main(program)
