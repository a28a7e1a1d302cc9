"""Handling of SIGINT, SIGTERM and SIGHUP."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Handle SIGTERM like SIGINT while the block runs, so that an event loop shuts down cleanly.

    SIGHUP, which the end of a terminal sends, is handled too, unless it is ignored (``nohup``). A shell script starts
    background commands with SIGINT ignored, so this also sets the handler of SIGINT.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    handlers: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: interrupt}
    hangup = getattr(signal, "SIGHUP", None)  # missing on Windows
    if hangup is not None and signal.getsignal(hangup) is signal.SIG_DFL:
        handlers[hangup] = interrupt
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in reversed(before.items()):
            signal.signal(number, handler)


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
