"""The obvious program: httpx's ``AsyncClient``, and RSA inline in the coroutine.

Without an option it signs with pycryptodome and has httpx's default limits (100 connections, 20 of them kept alive),
behind a semaphore. Option ``tuned`` has as many connections as refunds in flight, and keeps all of them alive;
``openssl`` signs with cryptography.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path

import httpx

from benchmarks import workload

from . import frame


async def program(job: frame.Job) -> dict[str, float]:
    sign, verify = _keys(job)
    limits, semaphore = httpx.Limits(max_connections=100, max_keepalive_connections=20), asyncio.Semaphore(100)
    if "tuned" in job.option:
        limits = httpx.Limits(max_connections=job.in_flight, max_keepalive_connections=job.in_flight)
        semaphore = asyncio.Semaphore(job.in_flight)
    async with httpx.AsyncClient(limits=limits, timeout=None) as client:

        async def refund(number: int) -> None:
            fields = workload.request_fields(number)
            fields["sign"] = sign(workload.source(fields))
            body = json.dumps(fields)
            async with semaphore:
                response = await client.post(job.url, content=body, headers=workload.HEADERS)
            answer = response.json()
            if answer["ret_code"] != "0000" or not verify(workload.source(answer), answer["sign"]):
                raise RuntimeError(answer)

        return await frame.measured(job, refund)


def _keys(job: frame.Job) -> tuple[Callable[[bytes], str], Callable[[bytes, str], bool]]:
    merchant, gateway = Path(job.keys, "merchant.pem"), Path(job.keys, "gateway.pub.pem")
    if "openssl" in job.option:
        from benchmarks import openssl

        return openssl.signer(merchant), openssl.verifier(gateway)
    from Crypto.Hash import MD5
    from Crypto.PublicKey import RSA
    from Crypto.Signature import pkcs1_15

    private, public = RSA.import_key(merchant.read_bytes()), RSA.import_key(gateway.read_bytes())

    def sign(source: bytes) -> str:
        return base64.b64encode(pkcs1_15.new(private).sign(MD5.new(source))).decode()

    def verify(source: bytes, signature: str) -> bool:
        pkcs1_15.new(public).verify(MD5.new(source), base64.b64decode(signature))
        return True

    return sign, verify


if __name__ == "__main__":
    frame.main(program)
