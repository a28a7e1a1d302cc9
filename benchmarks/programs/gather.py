"""Thousands of calls in one ``asyncio.gather``, on 20 connections.

Option ``session``: this library's ``apply_refund`` on one session with its default settings. Options ``pool``,
``stock`` and ``aiohttp``: bare POSTs, see :mod:`benchmarks.programs.posts`.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

from benchmarks import workload
from lianlian_async import RefundSession

from . import frame, posts

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
    if job.option != "session":
        return posts.poster(await stack.enter_async_context(posts.client(job.option, CONNECTIONS)), job.url)
    session = await stack.enter_async_context(RefundSession(workload.merchant(job.keys, job.url)))

    async def apply(number: int) -> None:
        await session.apply_refund(workload.refund_request(number))

    return apply


if __name__ == "__main__":
    frame.main(program)
