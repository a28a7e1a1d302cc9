"""Raw aiohttp with RSA by cryptography inline in the coroutine.

Option ``unchecked`` does not verify the answers: the least that works.
"""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp

from benchmarks import openssl, workload

from . import frame


async def program(job: frame.Job) -> dict[str, float]:
    sign = openssl.signer(Path(job.keys, "merchant.pem"))
    verify = openssl.verifier(Path(job.keys, "gateway.pub.pem"))
    is_checked = job.option != "unchecked"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=job.in_flight)) as session:

        async def refund(number: int) -> None:
            fields = workload.request_fields(number)
            fields["sign"] = sign(workload.source(fields))
            async with session.post(job.url, data=json.dumps(fields), headers=workload.HEADERS) as response:
                answer = await response.json()
            if answer["ret_code"] != "0000":
                raise RuntimeError(answer)
            if is_checked and not verify(workload.source(answer), answer["sign"]):
                raise RuntimeError(answer)

        return await frame.measured(job, refund)


if __name__ == "__main__":
    frame.main(program)
