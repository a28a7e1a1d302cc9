"""A sandbox gateway in a process of its own, that hands over its books at the end.

A process, because the gateway's signing and serving must not disturb what is measured in the client's. Its books
come through a pipe: nobody else can ask for them, and the gateway's port serves nothing but LianLian's pages.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from decimal import Decimal
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import attrs

from lianlian_async.sandbox import SandboxGateway

from .server import environment, serving

__all__ = ["Books", "RemoteGateway", "gateway_process", "run_gateway"]


class Books(NamedTuple):
    """What the gateway did, whatever its answers said."""

    times_made: Mapping[str, int]
    """How many times each ``no_refund`` was carried out."""
    money_moved: Mapping[str, Decimal]
    """Yuan that left the merchant under each ``no_refund``."""
    requests: Mapping[str, int]
    """How many requests came in for each call."""


@attrs.frozen
class RemoteGateway:
    """The other process, as seen from here."""

    environment: Mapping[str, str]
    """The variables that lead to it."""
    _pipe: Connection

    def close_books(self) -> Books:
        """Stop it, let everything arrive that is still under way, and hand over its books."""
        self._pipe.send("close")
        books: Books = self._pipe.recv()
        return books


@contextmanager
def gateway_process(options: Mapping[str, Any]) -> Iterator[RemoteGateway]:
    """A gateway made with ``options`` (arguments of ``SandboxGateway``), as long as the block runs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_gateway, args=(theirs, options), name="lianlian-sandbox")
    # Ctrl-C reaches every process of the terminal. This one must live on to hand over its books.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    theirs.close()
    try:
        with ours:
            yield RemoteGateway(ours.recv(), ours)
    finally:
        process.join()
        process.close()


def run_gateway(pipe: Connection, options: Mapping[str, Any]) -> None:
    """What the process does. It ends without a word when the other end of the pipe goes away."""
    with pipe, suppress(EOFError, BrokenPipeError):
        gateway = SandboxGateway(**options)
        with serving(gateway) as url:
            pipe.send(environment(gateway, url))
            pipe.recv()
        gateway.advance(86_400)
        times_made = Counter(record.application.no_refund for record in gateway.refunds)
        money_moved = {no_refund: gateway.money_moved(no_refund) for no_refund in times_made}
        pipe.send(Books(dict(times_made), money_moved, {str(call): count for call, count in gateway.requests.items()}))
