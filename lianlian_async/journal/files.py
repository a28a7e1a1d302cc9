"""What a journal needs from the file system: a lock, synced folders, and the identity of a file.

The lock lets only one process write a journal file; the lock file names that process. It is a ``flock``, because POSIX
record locks (which SQLite uses) end when the process closes any handle to the file. On Windows it is SQLite's exclusive
lock on another file.
"""

import os
import socket
import sqlite3
import sys
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime
from importlib import import_module
from io import FileIO
from pathlib import Path
from types import ModuleType
from typing import Final

_LONGEST_HOLDER: Final = 500
_GET_GENERATION: Final = 0x80087601
"""Linux: FS_IOC_GETVERSION, which ext4, XFS and Btrfs have."""
_OPEN: Final = set[FileIO]()

try:
    fcntl: ModuleType | None = import_module("fcntl")
    # A forked child shares the lock and would keep it after its parent ends, so close the file in the child.
    os.register_at_fork(after_in_child=lambda: list(map(FileIO.close, _OPEN)))
except ImportError:
    fcntl = None


class FileLocked(Exception):
    """The lock is taken, perhaps by this process. The message names the process and the time when it took the lock."""


@contextmanager
def file_lock(path: Path) -> Generator[None]:
    """Hold the lock on the file ``path``, until the end of the process at the latest.

    The file is created if it is missing, and names this process while the lock is held. Raises ``FileLocked``, or
    ``OSError`` if the file cannot be opened. In a forked child, the end of the block leaves the lock to the parent.
    """
    with ExitStack() as opened:
        file = opened.enter_context(FileIO(str(path), "a+"))
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                _lock_with_sqlite(path, opened)
        except (BlockingIOError, sqlite3.OperationalError):
            raise FileLocked(_holder(path)) from None
        file.truncate(0)
        file.write(_this_process().encode())
        _OPEN.add(file)
        try:
            yield
        finally:
            _OPEN.discard(file)
            with suppress(ValueError):  # closed in a forked child
                file.truncate(0)


def _lock_with_sqlite(path: Path, opened: ExitStack) -> None:
    connection = sqlite3.connect(f"{path}-lock", timeout=0.0, isolation_level=None, check_same_thread=False)
    opened.enter_context(closing(connection))
    connection.execute("PRAGMA journal_mode = memory")
    connection.execute("BEGIN EXCLUSIVE")


def _this_process() -> str:
    program = Path(sys.argv[0])
    # ``python -m`` runs a package's __main__.py: use the package's name. No arguments: they may contain secrets.
    name = program.parent.name if program.name == "__main__.py" else program.name
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} ({name or 'python'}), since {now}"


def _holder(path: Path) -> str:
    holder = path.read_bytes()[:_LONGEST_HOLDER].decode(errors="replace")
    return " ".join(holder.split()) or "another process"


def sync_folders(*folders: Path) -> None:
    """Sync ``folders``: a power failure then undoes no rename or new file in them. Windows cannot open a folder."""
    for folder in folders if os.name == "posix" else ():
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def has_content(path: Path) -> bool:
    """Return whether the file exists and is not empty."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return path.stat().st_size > 0
    return False


def identity_of(path: Path) -> str:
    """Return the inode number of a file, which is created if it is missing, and the inode's generation if it has one.

    A new file often gets the number of a removed one, with another generation. Call it before SQLite opens the file:
    closing any descriptor of a file ends the process's locks on it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)  # SQLite's mode, too
    try:
        identity = str(os.fstat(descriptor).st_ino)
        with suppress(AttributeError, OSError):  # no fcntl (Windows), or no generation
            identity += f".{fcntl.ioctl(descriptor, _GET_GENERATION, bytes(8)).hex()}"  # type: ignore[union-attr]
    finally:
        os.close(descriptor)
    return identity


def may_be_same(one: str, other: str) -> bool:
    """Compare two identities; one of them may lack the generation."""
    return one in (other, other.partition(".")[0]) or other == one.partition(".")[0]
