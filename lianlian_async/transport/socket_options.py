"""Socket options that keep the kernel from sending a request after its sender has given it up."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import Any, Final

from lianlian_async.retry import LONGEST_ATTEMPT

__all__ = ["close_normally", "reset_when_closed"]

_LINGER: Final = struct.Struct("hh" if os.name == "nt" else "ii")
_NO_LINGER: Final = (socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.pack(0, 0))
_UNDER_WAY: Final = (
    (socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.pack(1, 0)),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), int(1000 * LONGEST_ATTEMPT))
        for name in ("TCP_USER_TIMEOUT",)  # milliseconds that sent bytes may stay unacknowledged
        if hasattr(socket, name)  # Linux only
    ),
)


def reset_when_closed(sock: Any) -> None:
    """Make any close of ``sock`` (also at the process's end) a reset that drops all unsent bytes.

    ``sock`` is a socket, or what asyncio, uvloop and trio show of one. A closed one is left alone.
    """
    with contextlib.suppress(OSError):
        for option in _UNDER_WAY:
            sock.setsockopt(*option)


def close_normally(sock: Any) -> None:
    """Undo :func:`reset_when_closed`: the request under way has been answered."""
    with contextlib.suppress(OSError):
        sock.setsockopt(*_NO_LINGER)
