"""Notifications in memory: each verified and acted on, or only verified.

A file beside the keys holds the signed bodies. Option ``endpoint``: `NotificationEndpoint.handle` without a journal.
Option ``by_hand``: verify and answer, without a handler. Option ``busy``: the
endpoint again, with notifications that arrive at a steady rate while refunds are in flight in the same process; every
acknowledgement is timed from when its notification was due.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path

from benchmarks import workload
from lianlian_async import NotificationEndpoint, Refund, RefundSession

from . import frame

FILE = "notifications.jsonl"
PER_SECOND = 300
"""Notifications that arrive in each second, while refunds are in flight."""
HEADERS = {"content-type": "text/json;charset=utf-8"}

Response = tuple[int, dict[str, str], bytes]


async def program(job: frame.Job) -> dict[str, float]:
    bodies = _bodies(job)
    if job.option == "by_hand":
        handle = _by_hand(Path(job.keys, "gateway.pub.pem"))

        async def receive(number: int) -> None:
            status, _, _ = await handle(bodies[number], HEADERS)
            if status != 200:
                raise RuntimeError(status)

        return await frame.measured(job, receive)
    acted: list[str | None] = []

    async def on_refund(refund: Refund) -> None:
        acted.append(refund.no_refund)

    async with NotificationEndpoint(workload.merchant(job.keys, job.url), on_refund) as endpoint:

        async def notify(number: int) -> None:
            ack = await endpoint.handle(bodies[number], HEADERS)
            if ack.status != 200:
                raise RuntimeError(ack)

        result = await (_while_refunding if job.option == "busy" else frame.measured)(job, notify)
    if len(set(acted)) != len(acted) or len(acted) != len(bodies):
        raise RuntimeError(f"{len(bodies)} notifications were acted on {len(acted)} times")
    return result


def _bodies(job: frame.Job) -> list[bytes]:
    return Path(job.keys, FILE).read_bytes().splitlines()[: job.warm_up + job.refunds]


def _by_hand(key: Path) -> Callable[[bytes, dict[str, str]], Awaitable[Response]]:
    verify = _openssl(key) if os.environ.get("LIANLIAN_SIGNING_BACKEND") == "openssl" else _pycryptodome(key)

    async def handle(body: bytes, headers: dict[str, str]) -> Response:
        fields = json.loads(body)
        answer_headers = {"content-type": "application/json;charset=utf-8"}
        if not verify(workload.source(fields), fields["sign"]):
            return 403, answer_headers, b""
        return 200, answer_headers, json.dumps({"ret_code": "0000", "ret_msg": "ok"}).encode()

    return handle


def _openssl(key: Path) -> Callable[[bytes, str], bool]:
    from benchmarks import openssl

    return openssl.verifier(key)


def _pycryptodome(key: Path) -> Callable[[bytes, str], bool]:
    import base64

    from Crypto.Hash import MD5
    from Crypto.PublicKey import RSA
    from Crypto.Signature import pkcs1_15

    public = RSA.import_key(key.read_bytes())

    def verify(source: bytes, signature: str) -> bool:
        try:
            pkcs1_15.new(public).verify(MD5.new(source), base64.b64decode(signature))
        except ValueError:
            return False
        return True

    return verify


async def _while_refunding(job: frame.Job, notify: Callable[[int], Awaitable[None]]) -> dict[str, float]:
    """Notify ``job.refunds`` times, while ``job.in_flight`` refunds are in flight."""
    numbers, made = count(), 0
    late: list[float] = []
    all_answered = asyncio.Event()

    async def deliver(number: int, due: float) -> None:
        await notify(number)
        late.append(1000 * (time.perf_counter() - due))
        if len(late) == job.refunds:
            all_answered.set()

    async def keep_refunding(session: RefundSession) -> None:
        nonlocal made
        while True:
            await session.apply_refund(workload.refund_request(next(numbers)))
            made += 1

    merchant = workload.merchant(job.keys, job.url)
    logging.disable()  # the refunds that are cancelled at the end log warnings
    async with RefundSession(merchant, max_connections=job.in_flight) as session, asyncio.TaskGroup() as tasks:
        refunding = [tasks.create_task(keep_refunding(session)) for _ in range(job.in_flight)]
        await asyncio.sleep(1.0)  # connections are open by then
        made, began = 0, frame.clocks()
        for number in range(job.refunds):
            due = began[0] + number / PER_SECOND
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.create_task(deliver(number, due))
        await all_answered.wait()
        result = frame.timed(job.refunds, began)
        for task in refunding:
            task.cancel()
    late.sort()
    return result | {
        "p50": late[len(late) // 2],
        "p99": late[int(0.99 * len(late))],
        "longest": late[-1],
        "refunds_rate": made / result["seconds"],
    }


if __name__ == "__main__":
    frame.main(program)
