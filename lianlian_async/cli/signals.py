"""SIGTERM, which services and containers are stopped with, means here what Ctrl-C means."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["one_interruption", "sigterm_interrupts"]


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """While the block runs, SIGTERM does what SIGINT does: an event loop then ends in good order."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def one_interruption() -> Iterator[None]:
    """While the block runs in an event loop, ignore every SIGINT after the first: the loop is ending in good order.

    asyncio raises the second one wherever it meets the program, and what it breaks there nobody waits for any more.
    """
    first: Any = signal.getsignal(signal.SIGINT)

    def once(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        first(number, frame)

    signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, first)
