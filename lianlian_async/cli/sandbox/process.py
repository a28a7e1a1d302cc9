"""A sandbox gateway in another process that returns its books at the end.

In another process the gateway's work does not disturb the client's measurements. The books come through a pipe.
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


class Books(NamedTuple):
    """The gateway's true record of all refunds, independent of its responses."""

    times_made: Mapping[str, int]
    """How many times each ``no_refund`` was made."""
    money_moved: Mapping[str, Decimal]
    """Yuan that the merchant paid for each ``no_refund``."""
    requests: Mapping[str, int]
    """Number of requests by gateway call: ``apply`` and ``query``."""


@attrs.frozen
class RemoteGateway:
    """The client side of a gateway in another process."""

    environment: Mapping[str, str]
    """The LIANLIAN_ variables that configure a merchant for this gateway."""
    _pipe: Connection

    def close_books(self) -> Books:
        """Stop the gateway, let it carry out delayed requests, and return its books."""
        self._pipe.send("close")
        books: Books = self._pipe.recv()
        return books


@contextmanager
def gateway_process(options: Mapping[str, Any]) -> Iterator[RemoteGateway]:
    """Run ``SandboxGateway(**options)`` in another process while the block runs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_gateway, args=(theirs, options), name="lianlian-sandbox")
    # Ctrl-C reaches every process of the terminal, but the gateway must still return its books.
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
    """Serve a gateway in this process until the other end of ``pipe`` asks for its books or closes."""
    with pipe, suppress(EOFError, BrokenPipeError):
        gateway = SandboxGateway(**options)
        with serving(gateway) as url:
            pipe.send(environment(gateway, url))
            pipe.recv()
        gateway.advance(86_400)
        times_made = Counter(record.application.no_refund for record in gateway.refunds)
        money_moved = {no_refund: gateway.money_moved(no_refund) for no_refund in times_made}
        pipe.send(Books(dict(times_made), money_moved, {str(call): count for call, count in gateway.requests.items()}))
