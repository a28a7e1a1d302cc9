"""Handling of SIGINT and SIGTERM."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Handle SIGTERM like SIGINT while the block runs, so that an event loop shuts down cleanly.

    A shell script starts background commands with SIGINT ignored, so this also sets the handler of SIGINT.
    """
    sigint = signal.signal(signal.SIGINT, signal.default_int_handler)
    sigterm = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, sigterm)
        signal.signal(signal.SIGINT, sigint)


@contextmanager
def one_interruption() -> Iterator[None]:
    """Ignore every SIGINT after the first while the block runs in an event loop.

    asyncio raises KeyboardInterrupt for the second SIGINT in the code that runs then, which breaks a clean shutdown.
    """
    before: Any = signal.getsignal(signal.SIGINT)

    def once(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        before(number, frame)

    signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
