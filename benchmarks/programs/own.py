"""The cost of this library's own code for one refund, without RSA, network and event loop; and a yardstick.

Option ``own``: validate (the request from Python values), seal (fields, source string, JSON), read (strict JSON,
source string, match, model), and resolve (the decision table). Option ``yardstick``: one 1024-bit signature by OpenSSL
and one ``AsyncClient.post`` on a ``MockTransport``.
"""

from __future__ import annotations

from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from benchmarks import workload

from . import frame

_BATCH = 100


def program(job: frame.Job) -> Any:
    return _own(job) if job.option == "own" else _yardstick(job)


def _own(job: frame.Job) -> dict[str, float]:
    from lianlian_async import RefundRequest, RetryPolicy, wire
    from lianlian_async.clock import system_clock
    from lianlian_async.exchange import Call, Exchange, HttpResponse, Reply, SendCount
    from lianlian_async.protocol import Protocol
    from lianlian_async.resolution import Case, resolve
    from lianlian_async.retry import Deadline

    from . import stamps

    merchant = stamps.merchant()
    keys = merchant.load_keys()
    protocol = Protocol(merchant, keys)
    headers = {"content-type": "application/json;charset=utf-8"}
    policy = RetryPolicy()
    paid = datetime(2024, 1, 1, 19, 4, 5, tzinfo=UTC)
    until = Deadline(30.0)

    async def make_query() -> Exchange:
        raise RuntimeError("no query is expected")

    async def before_resend(history: str) -> bytes:
        raise RuntimeError("no resend is expected")

    async def canary() -> bool:
        raise RuntimeError("no canary is expected")

    async def decide(request: Any, apply: Exchange, reply: Reply) -> None:
        async def send(_: Exchange) -> Reply:
            return reply

        case = Case(
            request=request,
            apply=apply,
            make_query=make_query,
            clock=system_clock,
            before_resend=before_resend,
            canary=canary,
        )
        await resolve(case, send)

    # Small batches, so that the clock costs little and the garbage collector works as it would in a service.
    spent = dict.fromkeys(("validate_ms", "seal_ms", "read_ms", "resolve_ms"), 0.0)
    for start in range(0, job.refunds, _BATCH):
        numbers = range(start, start + _BATCH)
        moments = [paid + timedelta(seconds=number) for number in numbers]
        answers = [
            HttpResponse(200, headers, stamps.answer(f"R-{number}", dt_refund=wire.format_timestamp(moment)))
            for number, moment in zip(numbers, moments, strict=True)
        ]
        laps = [frame.clocks()]
        requests = [
            RefundRequest(
                no_refund=f"R-{number}",
                dt_refund=moment,
                money_refund=Decimal(workload.MONEY_REFUND),
                no_order=f"O-{number}",
                dt_order=paid,
            )
            for number, moment in zip(numbers, moments, strict=True)
        ]
        laps.append(frame.clocks())
        fields = [protocol.apply_fields(request) for request in requests]
        bodies = [protocol.seal(each) for each in fields]
        laps.append(frame.clocks())
        applies = [
            Exchange(
                call=Call.APPLY, url="", body=body, asked=asked, deadline=until, policy=policy, send_count=SendCount()
            )
            for body, asked in zip(bodies, fields, strict=True)
        ]
        replies = [protocol.read(apply, received) for apply, received in zip(applies, answers, strict=True)]
        laps.append(frame.clocks())
        for request, apply, reply in zip(requests, applies, replies, strict=True):
            _step(decide(request, apply, reply))
        laps.append(frame.clocks())
        for name, began, ended in zip(spent, laps, laps[1:], strict=False):
            spent[name] += frame.figures(_BATCH, began, ended)["cpu_ms"] * _BATCH / job.refunds
    return spent | {"refunds": job.refunds, "cpu_ms": sum(spent.values())}


def _step(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise RuntimeError("it waits for something")


async def _yardstick(job: frame.Job) -> dict[str, float]:
    import httpx

    from benchmarks import openssl

    sign = openssl.signer(Path(job.keys, "merchant.pem"))
    source = workload.source(workload.request_fields(0))
    body = b"x" * 600

    async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(200, content=body))) as client:
        began = frame.clocks()
        for _ in range(job.refunds):
            sign(source)
        signed = frame.timed(job.refunds, began)["cpu_ms"]
        began = frame.clocks()
        for _ in range(job.refunds):
            await client.post("http://127.0.0.1/apply", content=body, headers=workload.HEADERS)
        posted = frame.timed(job.refunds, began)["cpu_ms"]
    return {"refunds": job.refunds, "cpu_ms": signed + posted, "sign_ms": signed, "post_ms": posted}


if __name__ == "__main__":
    frame.main(program)
