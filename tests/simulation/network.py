"""The network as an httpx transport: delay, loss, duplication, half-open connections, answers to the wrong request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import attrs
import httpcore
import httpx

from .gateway import Gateway, WireAnswer, date
from .oracle import Oracle
from .plan import GATEWAY, GRACE, MARGIN, NETWORK, TWICE_DELIVERED, Plan
from .world import World

_NETWORK = frozenset(NETWORK)
_GATEWAY = frozenset(GATEWAY)
_AGAIN = "again"


class FromBelowError(BaseException):
    """An exception of a kind that the package does not expect from its transport."""


@attrs.define(eq=False)
class Network:
    """The network between all nodes and the gateway."""

    world: World
    plan: Plan
    gateway: Gateway
    oracle: Oracle
    last_answers: list[WireAnswer] = attrs.field(factory=list)

    def fault(self) -> str | None:
        """Draw the fault of the next exchange."""
        dice, plan = self.world.random, self.plan
        if self.gateway.is_calm or not plan.faults or dice.random() >= plan.trouble:
            return None
        return dice.choice(plan.faults)

    def carry(self, call: str, body: bytes, fault: str | None, hear: Callable[[WireAnswer | Exception], None]) -> None:
        """Deliver a request that left a node to the gateway, and its answer to the node."""
        dice, world, left_at = self.world.random, self.world, self.world.now
        if fault == "request_lost":
            if dice.random() < 0.5:
                world.after(5 * dice.random(), lambda: hear(httpx.ReadError("connection reset")))
            return
        delay = 0.01 + 0.05 * dice.random()
        if fault == "request_late" or (fault == "killed" and dice.random() < 0.7):
            delay = (GRACE - MARGIN) * dice.random() ** 2
        world.after(delay, lambda: self._deliver(call, body, left_at, fault, hear))
        if fault == TWICE_DELIVERED:
            again = delay + (GRACE - MARGIN - delay) * dice.random() ** 2
            world.after(again, lambda: self._deliver(call, body, left_at, _AGAIN, lambda _: None))
        if fault == "reset":
            world.after(2 * delay * dice.random(), lambda: hear(httpx.ReadError("connection reset")))

    def _deliver(
        self,
        call: str,
        body: bytes,
        left_at: float,
        fault: str | None,
        hear: Callable[[WireAnswer | Exception], None],
    ) -> None:
        dice, world, gateway = self.world.random, self.world, self.gateway
        if gateway.is_down:
            world.after(0.01, lambda: hear(httpx.ReadError("connection reset")))
            return
        if call == "apply" and fault != _AGAIN:  # the network duplicates the request, not the node
            self.oracle.arrived(body)
        answer = gateway.answer(call, body, left_at, fault if fault in _GATEWAY else None)
        if answer is None or fault == "answer_lost":
            return
        status, headers, content = answer
        if self.plan.dated:
            headers = {**headers, "date": date(int(world.now))}
        answer = status, headers, content
        if fault == "other_answer":
            others = [other for other in self.last_answers if _number(other[2]) != _number(body)]
            answer = dice.choice(others or [answer])
        elif fault == "garbage":
            answer = (
                status,
                headers,
                dice.choice([b"", content[:-9], b"{}", b"[1]", b'{"ret_code": 1}', b"\xff" + content]),
            )
        elif _number(content):  # an answer without a no_refund would fit every query
            self.last_answers = [*self.last_answers[-4:], answer]
        delay = 0.01 + 0.05 * dice.random() if fault != "answer_late" else 3600 * 4 * dice.random() ** 3
        told = answer
        if world.trace is not None:
            world.log(f"network: {call} {body[:90]!r} is answered {answer[0]} {answer[2][:60]!r} in {delay:.3f} s")
        world.after(delay, lambda: hear(told))


class NodeTransport(httpx.AsyncBaseTransport):
    """One node's transport, with the trace events of httpcore."""

    def __init__(
        self,
        network: Network,
        check_record: Callable[[bytes], None],
        *,
        stop: Callable[[float, bool], None],
        kill: Callable[[float], None],
    ) -> None:
        self._network = network
        self._check_record = check_record
        self._stop = stop
        self._kill = kill
        self.out = 0
        """The number of requests in flight."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.out += 1
        try:
            return await self._handle(request)
        finally:
            self.out -= 1

    async def _handle(self, request: httpx.Request) -> httpx.Response:
        network = self._network
        fault, dice = network.fault(), network.world.random
        await asyncio.sleep(0.02 * dice.random())
        if fault == "refused" or network.gateway.is_down:
            raise httpx.ConnectError("refused")
        if fault == "connect_hangs":
            await asyncio.sleep(request.extensions["timeout"]["connect"])
            raise httpx.ConnectTimeout("")
        if fault == "stopped":  # the worst moment: the connection is open, and nothing has been sent
            seconds = dice.choice([1.0, 60.0, 950.0, 2000.0, 7200.0])
            stands_still = dice.random() < 0.7
            network.world.after(0.0, lambda: self._stop(seconds, stands_still))
            await asyncio.sleep(0.001)
        head = httpcore.Request(request.method, str(request.url))
        await request.extensions["trace"]("http11.send_request_headers.started", {"request": head})
        body = b"".join([chunk async for chunk in request.stream])  # type: ignore[union-attr]
        call = "apply" if request.url.path == "/apply" else "query"
        if network.world.trace is not None:
            network.world.log(f"network: {call} {body[:90]!r} leaves, meets {fault}")
        if call == "apply":
            self._check_record(body)
        if fault == "write_fails" and dice.random() < 0.5:
            raise httpx.WriteError("broken pipe")
        heard = asyncio.get_running_loop().create_future()

        def hear(answer: WireAnswer | Exception) -> None:
            if not heard.done():
                heard.set_result(answer)

        network.carry(call, body, fault, hear)
        if fault == "write_fails":
            raise httpx.WriteError("broken pipe")
        if fault == "killed":
            pause = dice.choice([0.0, 5.0, 950.0])
            network.world.after(0.1 * dice.random(), lambda: self._kill(pause))
        if fault in ("cancelled_below", "base_exception_below"):
            await asyncio.sleep(0.2 * dice.random())
            raise asyncio.CancelledError if fault == "cancelled_below" else FromBelowError
        answer = await heard
        if isinstance(answer, Exception):
            raise answer
        status, headers, content = answer
        return httpx.Response(status, headers=headers, content=content)


def _number(body: bytes) -> bytes:
    """Return the ``no_refund`` in a message, empty if there is none."""
    return body.partition(b'"no_refund":"')[2].partition(b'"')[0]
