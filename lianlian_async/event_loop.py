"""Event loop facts for which anyio has no common word: which loop runs, and who asked for a cancellation."""

from __future__ import annotations

import math
from typing import Any

import anyio
import anyio.lowlevel

__all__ = ["asyncio_loop", "is_cancelled", "is_failure"]


def asyncio_loop() -> Any | None:
    """The running event loop if it is asyncio's (or of its kind), None on trio."""
    loop: Any = anyio.lowlevel.current_token().native_token
    return loop if hasattr(loop, "create_task") else None  # not isinstance: the import would cost trio programs dear


def is_cancelled() -> bool:
    """Return whether this task was asked to end: by a cancelled scope around it, or by asyncio's ``Task.cancel``."""
    if anyio.current_effective_deadline() == -math.inf:
        return True
    if asyncio_loop() is None:
        return False
    from asyncio import current_task

    task = current_task()
    return task is not None and task.cancelling() > 0


def is_failure(error: BaseException) -> bool:
    """Return whether ``error`` is a failure: any ``Exception``, or a cancellation that nobody asked this task for."""
    return isinstance(error, Exception) or (isinstance(error, anyio.get_cancelled_exc_class()) and not is_cancelled())
