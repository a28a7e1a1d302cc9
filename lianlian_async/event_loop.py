"""Which event loop this is, for the few places where anyio has no common word for both."""

from __future__ import annotations

from typing import Any

import anyio.lowlevel

__all__ = ["asyncio_loop"]


def asyncio_loop() -> Any | None:
    """The running event loop if it is asyncio's (or of its kind), None on trio."""
    loop: Any = anyio.lowlevel.current_token().native_token
    return loop if hasattr(loop, "create_task") else None  # not isinstance: the import would cost trio programs dear
