"""Disturb refunds on real sockets, cut at every byte: ``python -m tests.programs.proxy``.

A proxy on a socket stands between a session and the sandbox, which carries out every request. Each refund meets one
disturbance, in its apply call or in a query: the connection is reset, closed, half-closed or stalled after any byte of
the request or of the answer, or the answer arrives in another form (chunked, byte by byte, another refund's answer …).
The request of a client that gave up arrives 860 seconds later or never; refunds run in virtual time. An unknown refund
is asked about again until it is known. Every outcome must agree with the gateway's ledger, and every refund must have
been made once in the end.

Notifications to an endpoint under uvicorn and under aiohttp's server meet the same disturbances and are delivered again
until they are acknowledged. Each must be handled once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import ssl
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import anyio
import attrs
import httpx
import pytest

from lianlian_async import (
    Merchant,
    NotificationEndpoint,
    Outcome,
    Refund,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundRejected,
    RefundSession,
    RetryPolicy,
)
from lianlian_async.cli.sandbox.server import serving
from lianlian_async.sandbox import Repeated, SandboxGateway
from lianlian_async.sandbox.notifier import CONTENT_TYPE, is_acknowledged, post
from lianlian_async.testing.virtual_time import VirtualTime
from lianlian_async.transport import HttpSender
from tests.support import keypairs
from tests.support.bad_network import (
    FAIR,
    LOST_ANSWER,
    Cut,
    Disturbance,
    Form,
    Proxy,
    dressed,
    proxies,
    to_app,
    to_port,
)
from tests.support.certificates import self_signed
from tests.support.notices import notification
from tests.support.parties import OID_PARTNER, boot_clock, refund_request, sandbox

CLIENTS = ("httpx", "httpx on trio", "aiohttp", "httpx client", "httpx2 client")
"""The HTTP stacks of the session; the last two are a caller's own client."""
SERVERS = ("uvicorn server", "aiohttp server")
"""The servers of the notification endpoint."""

POLICY = RetryPolicy(initial=4.0, maximum=16.0, multiplier=4.0)
"""Few queries per call, and the default grace."""
LATE = 860.0
"""Seconds after the first call until a held request arrives: within the grace, with the 30 seconds of the call."""
PAUSES = (100.0, LATE - 100.0, 200.0, 1000.0, 1000.0)
"""Seconds before the next call for an unknown refund."""
PATIENCE = 0.4
"""Real seconds that the sender of a notification waits."""

CUT_FORMS = (Form.PLAIN, Form.CHUNKED, Form.UNTIL_CLOSED)
"""The forms of an answer that are cut at every byte."""


@attrs.frozen
class Scene:
    """One refund and its disturbance."""

    call: str
    disturbance: Disturbance
    arrives_late: bool
    """Whether a held request arrives 890 seconds later; else never."""

    def __str__(self) -> str:
        return f"{self.call}: {self.disturbance}" + (", arrives late" if self.arrives_late else "")


@attrs.frozen
class Report:
    """The result of all scenes on one HTTP stack or one server."""

    stack: str
    tls: bool
    scenes: dict[str, int]
    """The number of scenes by call."""
    outcomes: dict[str, int]
    """The first outcome of each scene."""
    made_once: int
    problems: dict[str, str]
    """Violations by scene; must be empty."""
    seconds: float


def disturbances(request: int, answer: bytes) -> Iterator[Disturbance]:
    """Yield every disturbance of an exchange with ``request`` bytes and this answer."""
    yield from map(Disturbance, Form)
    for cut in Cut:
        for at in range(request + 1):
            yield Disturbance(cut=cut, side="request", at=at)
        for form in CUT_FORMS:
            for at in range(len(dressed(form, answer, answer)) + 1):
                yield Disturbance(form, cut, "answer", at)


def scenes(call: str, proxy: Proxy, most: int | None, dice: random.Random) -> list[Scene]:
    """Return ``most`` scenes for ``call``, or all; ``proxy`` has carried a fair exchange of this call."""
    every = list(disturbances(len(proxy.request), proxy.answer))
    plain = len(Form)
    chosen = every if most is None else every[:plain] + dice.sample(every[plain:], max(0, most - plain))
    dice.shuffle(chosen)
    return [Scene(call, each, number % 2 == 0) for number, each in enumerate(chosen)]


# ── refunds ──────────────────────────────────────────────────────────────────────────────────────


@attrs.define(kw_only=True)
class Refunds:
    """Plays scenes with one session, its proxy and its gateway, one after the other."""

    gateway: SandboxGateway
    proxy: Proxy
    outcomes: Counter[str] = attrs.field(factory=Counter)
    problems: dict[str, str] = attrs.field(factory=dict)
    made_once: int = 0
    played: int = 0

    async def play(self, session: RefundSession, scene: Scene) -> None:
        """Make one refund until its outcome is known, and compare every outcome with the ledger."""
        self.played += 1
        request = refund_request(f"{self.played:06}")
        self.proxy.plan.clear()
        self.proxy.held.clear()
        self.proxy.plan.extend([scene.disturbance] if scene.call == "apply" else [LOST_ANSWER, scene.disturbance])
        outcome = await session.outcome_of(request)
        self.outcomes["made" if outcome.error is None else type(outcome.error).__name__] += 1
        for number, pause in enumerate(PAUSES):
            self._compare(scene, outcome)
            is_unknown = isinstance(outcome.error, RefundOutcomeUnknown)
            if not is_unknown and not self.proxy.held:
                break
            await anyio.sleep(pause)
            if number == 1:
                await self._deliver(scene)
            if is_unknown:
                outcome = await session.outcome_of(request, earlier=outcome.error)
        self._compare(scene, outcome)
        if isinstance(outcome.error, RefundNotSent):  # it is safe to send it again
            outcome = await session.outcome_of(request)
        made = self.gateway.times_made(request.no_refund)
        if outcome.refund is None or made != 1:
            self._problem(scene, f"ended as {outcome.error!r}, made {made} times")
        else:
            self.made_once += 1

    async def _deliver(self, scene: Scene) -> None:
        """Forward the requests whose clients gave up, if they are to arrive."""
        if scene.arrives_late:
            for request in self.proxy.held:
                await self.proxy.forward(request)
        self.proxy.held.clear()

    def _compare(self, scene: Scene, outcome: Outcome) -> None:
        """Record a problem if the outcome contradicts the ledger."""
        made = self.gateway.times_made(outcome.request.no_refund)
        if made > 1 or (outcome.refund is not None and made != 1):
            self._problem(scene, f"{outcome.refund or outcome.error!r}, made {made} times")
        elif made and isinstance(outcome.error, RefundNotSent | RefundRejected):
            self._problem(scene, f"{outcome.error!r}, but made")

    def _problem(self, scene: Scene, text: str) -> None:
        self.problems.setdefault(f"{scene} (R-{self.played:06})", text)


def _http(stack: str, certificate: Path) -> dict[str, Any]:
    """Return the options of a session on this HTTP stack."""
    library = stack.partition(" ")[0]
    if not stack.endswith("client"):
        return {"http_backend": library}
    context = ssl.create_default_context(cafile=certificate)
    return {"client": importlib.import_module(library).AsyncClient(verify=context)}


async def refunds(stack: str, *, tls: bool, most: int | None, seed: int) -> Report:
    """Play the scenes of apply and query calls; with ``most``, so many of each call."""
    began, dice = time.monotonic(), random.Random(seed)
    counts: Counter[str] = Counter()
    gateway = sandbox(repeated=Repeated.AGAIN, default_order=Decimal("100000000.00"))
    async with contextlib.AsyncExitStack() as resources:
        context, file = self_signed(Path(resources.enter_context(tempfile.TemporaryDirectory())))
        resources.enter_context(mock.patch.dict(os.environ, SSL_CERT_FILE=str(file)))
        runner = Refunds(gateway=gateway, proxy=Proxy(to_app(gateway), context if tls else None))
        await resources.enter_async_context(proxies(runner.proxy))
        options = _http(stack, file)
        if "client" in options:
            await resources.enter_async_context(options["client"])
        session = RefundSession(gateway.merchant(runner.proxy.url), retry=POLICY, clock=boot_clock, **options)
        await resources.enter_async_context(session)
        for call in ("apply", "query"):
            await runner.play(session, Scene(call, FAIR, arrives_late=False))
            chosen = scenes(call, runner.proxy, most, dice)
            counts[call] = len(chosen)
            for scene in chosen:
                await runner.play(session, scene)
    return Report(
        stack=stack,
        tls=tls,
        scenes=dict(counts),
        outcomes=dict(runner.outcomes),
        made_once=runner.made_once,
        problems=runner.problems,
        seconds=round(time.monotonic() - began, 1),
    )


# ── notifications ────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def shop(server: str, endpoint: NotificationEndpoint, *, keepalive: float = 60.0) -> AsyncIterator[int]:
    """Serve ``endpoint``, and yield its port. aiohttp's server closes connections that are idle for ``keepalive``."""
    if server == "uvicorn server":
        with serving(endpoint) as url:  # an ASGI application
            yield httpx.URL(url).port
        return
    from aiohttp import web

    from lianlian_async.contrib.aiohttp import notifications

    app = web.Application()
    app.router.add_post("/", notifications(endpoint))
    runner = web.AppRunner(app, keepalive_timeout=keepalive)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield runner.addresses[0][1]
    await runner.cleanup()


async def notices(server: str, *, most: int | None, seed: int, lanes: int = 16) -> Report:
    """Play the scenes of notifications on one server."""
    began, dice = time.monotonic(), random.Random(seed)
    handled: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    problems: dict[str, str] = {}

    async def on_refund(refund: Refund) -> None:
        handled[str(refund.no_refund)] += 1

    merchant = Merchant(
        oid_partner=OID_PARTNER,
        private_key=keypairs.pair("merchant").private,
        gateway_public_keys=[keypairs.pair("gateway").public],
    )

    async def play(number: int, scene: Scene, proxy: Proxy, sender: HttpSender) -> None:
        proxy.plan.clear()
        proxy.plan.append(scene.disturbance)
        name = f"R-{number:06}"
        for delivery in range(6):
            acknowledged = is_acknowledged(await post(sender, f"{proxy.url}/", notification(f"{number:06}"), PATIENCE))
            if delivery == 0:
                outcomes["acknowledged" if acknowledged else "not acknowledged"] += 1
            if acknowledged:
                break
            await anyio.sleep(0.02)
        if not acknowledged or handled[name] != 1:
            problems[f"{scene} ({name})"] = f"acknowledged: {acknowledged}, handled {handled[name]} times"

    async with shop(server, NotificationEndpoint(merchant, on_refund)) as port:
        played = [Proxy(to_port(port)) for _ in range(lanes)]
        async with proxies(*played), contextlib.AsyncExitStack() as stack:
            senders = []
            for _ in played:
                sender = await HttpSender.open(None, None, 1, CONTENT_TYPE, backend="httpx")
                stack.push_async_callback(sender.aclose)
                senders.append(sender)
            await play(0, Scene("notification", FAIR, arrives_late=False), played[0], senders[0])
            chosen = list(enumerate(scenes("notification", played[0], most, dice), start=1))
            count = len(chosen)

            async def work(proxy: Proxy, sender: HttpSender) -> None:
                while chosen:
                    await play(*chosen.pop(), proxy, sender)

            async with anyio.create_task_group() as tasks:
                for proxy, sender in zip(played, senders, strict=True):
                    tasks.start_soon(work, proxy, sender)
    return Report(
        stack=server,
        tls=False,
        scenes={"notification": count},
        outcomes=dict(outcomes),
        made_once=sum(times == 1 for times in handled.values()),
        problems=problems,
        seconds=round(time.monotonic() - began, 1),
    )


# ── all of it ────────────────────────────────────────────────────────────────────────────────────


def run(stack: str, *, tls: bool = False, most: int | None = None, seed: int = 0) -> Report:
    """Play the scenes of one client or server; ``most``: number of scenes of each call, None: all."""
    if stack in SERVERS:
        return anyio.run(lambda: notices(stack, most=most, seed=seed))
    with pytest.MonkeyPatch.context() as patch:
        play = partial(refunds, stack, tls=tls, most=most, seed=seed)
        return VirtualTime(patch).run(play, backend="trio" if stack == "httpx on trio" else "asyncio")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", choices=CLIENTS + SERVERS, action="append", help="run only this one (repeatable)")
    parser.add_argument("--scenes", type=int, help="number of scenes of each call, at random; default: all")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    problems = 0
    for stack in options.stack or CLIENTS + SERVERS:
        for tls in (False,) if stack in SERVERS else (False, True):
            report = run(stack, tls=tls, most=options.scenes, seed=options.seed)
            print(json.dumps({"seed": options.seed, **attrs.asdict(report)}, indent=2), flush=True)
            problems += len(report.problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
