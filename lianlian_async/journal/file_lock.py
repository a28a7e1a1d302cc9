"""The lock that makes one process the owner of a journal file, and the line that tells others which process that is.

The lock is ``flock`` where there is one: the POSIX record locks, which SQLite uses, are dropped as soon as the process
closes any other handle to the file. Elsewhere, on Windows, it is SQLite's own exclusive lock on a file beside.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import sys
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime
from importlib import import_module
from io import FileIO
from pathlib import Path
from types import ModuleType
from typing import Final

__all__ = ["FileLock", "FileLocked"]

_LONGEST_HOLDER: Final = 500
_OPEN: Final = set[FileIO]()

try:
    fcntl: ModuleType | None = import_module("fcntl")
    # A forked child shares the lock, and would keep it after its parent has ended.
    os.register_at_fork(after_in_child=lambda: list(map(FileIO.close, _OPEN)))
except ImportError:
    fcntl = None


class FileLocked(Exception):
    """Another owner has the lock; the text says who and since when."""


class FileLock:
    """The lock on ``path``, which is made if it is not there; held until :meth:`close` or the end of the process.

    Raises ``FileLocked``, or ``OSError`` if the file cannot be had. While it is held, the file tells who holds it.
    """

    def __init__(self, path: Path) -> None:
        with ExitStack() as opened:
            self._file = opened.enter_context(FileIO(path, "a+"))
            try:
                if fcntl is not None:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                else:
                    _lock_beside(path, opened)
            except (BlockingIOError, sqlite3.OperationalError):
                raise FileLocked(_holder(path)) from None
            self._file.truncate(0)
            self._file.write(_this_process().encode())
            _OPEN.add(self._file)
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Let go of it. In a forked child, which does not have it, nothing happens."""
        with suppress(ValueError):  # closed already
            self._file.truncate(0)
        _OPEN.discard(self._file)
        self._opened.close()


def _lock_beside(path: Path, opened: ExitStack) -> None:
    connection = sqlite3.connect(f"{path}-lock", timeout=0.0, isolation_level=None, check_same_thread=False)
    opened.enter_context(closing(connection))
    connection.execute("PRAGMA journal_mode = memory")
    connection.execute("BEGIN EXCLUSIVE")


def _this_process() -> str:
    program = Path(sys.argv[0])
    # What ``python -m`` runs is a file of that name in the package; arguments may hold what is not for others.
    name = program.parent.name if program.name == "__main__.py" else program.name
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} ({name or 'python'}), since {now}"


def _holder(path: Path) -> str:
    told = path.read_bytes()[:_LONGEST_HOLDER].decode(errors="replace")
    return " ".join(told.split()) or "another process"
