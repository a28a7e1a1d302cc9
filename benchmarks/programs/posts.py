"""Bare POSTs through one ``AsyncClient``: the cost of a transport, without refunds.

Options: ``pool``, this library's transport; ``fast``, the one with the extra ``fast``; ``stock``, httpx's own pool;
``aiohttp``, httpx-aiohttp's. With `` uncollected`` behind it, Python's garbage collector is off.
"""

from __future__ import annotations

import gc

import httpx

from benchmarks import workload

from . import frame


def client(option: str, connections: int) -> httpx.AsyncClient:
    """Return a client without timeouts, because calls on httpx's own pool would exceed the default ones."""
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(transport=_transport(option, connections), limits=limits, timeout=None)


def _transport(option: str, connections: int) -> httpx.AsyncBaseTransport | None:
    if option == "pool":
        from lianlian_async.transport import PoolTransport

        return PoolTransport(connections)
    if option == "fast":
        from lianlian_async.transport.aiohttp import AiohttpTransport as FastTransport

        return FastTransport(connections)
    if option == "aiohttp":
        from httpx_aiohttp import AiohttpTransport

        return AiohttpTransport(limits=httpx.Limits(max_connections=connections))
    return None


def poster(http: httpx.AsyncClient, url: str) -> frame.Refund:
    """Return a coroutine function that POSTs a body of a request's size."""
    padding = b"x" * 600

    async def post(number: int) -> None:
        # The server verifies no signature of this number.
        body = b'{"no_refund":"R-%d","sign":"%s"}' % (10 + number, padding)
        response = await http.post(url, content=body, headers=workload.HEADERS)
        if response.status_code != 200:
            raise RuntimeError(response)

    return post


async def program(job: frame.Job) -> dict[str, float]:
    option, _, uncollected = job.option.partition(" ")
    if uncollected:
        gc.disable()
    async with client(option, job.in_flight) as http:
        return await frame.measured(job, poster(http, job.url))


if __name__ == "__main__":
    frame.main(program)
