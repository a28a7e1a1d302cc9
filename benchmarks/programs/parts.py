"""The floor: the cost of a refund's parts alone, one after the other, with nothing between them.

A signature and a verification by OpenSSL, the codecs (both source strings, JSON out and in), and a POST by raw
aiohttp with as many in flight as the programs have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import aiohttp

from benchmarks import openssl, workload

from . import frame


async def program(job: frame.Job) -> dict[str, float]:
    sign = openssl.signer(Path(job.keys, "merchant.pem"))
    own_verify = openssl.verifier(Path(job.keys, "merchant.pub.pem"))
    fields = workload.request_fields(0)
    source = workload.source(fields)
    signature = sign(source)
    body = json.dumps({**fields, "sign": signature}).encode()
    answer = json.dumps({**workload.answer_fields("R-0"), "sign": signature}).encode()

    def codecs() -> None:
        json.dumps({**fields, "sign": workload.source(fields) and signature}).encode()
        workload.source(json.loads(answer))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=job.in_flight)) as session:

        async def post(_: int) -> None:
            async with session.post(job.url, data=body, headers=workload.HEADERS) as response:
                await response.read()

        posted = await frame.measured(job, post)
    parts = {
        "sign_ms": _cpu_ms(job.refunds, lambda: sign(source)),
        "verify_ms": _cpu_ms(job.refunds, lambda: own_verify(source, signature)),
        "codecs_ms": _cpu_ms(job.refunds, codecs),
        "post_ms": posted["cpu_ms"],
    }
    whole = sum(parts.values())
    # Nothing but CPU time is left in the floor: its rate is what one processor could do.
    return parts | {"refunds": job.refunds, "cpu_ms": whole, "rate": 1000 / whole, "share": 1.0}


def _cpu_ms(count: int, part: Callable[[], object]) -> float:
    began = frame.clocks()
    for _ in range(count):
        part()
    return frame.timed(count, began)["cpu_ms"]


if __name__ == "__main__":
    frame.main(program)
