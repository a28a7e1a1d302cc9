"""What the file system knows about the files of a journal."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from .file_lock import fcntl

_GET_GENERATION: Final = 0x80087601
"""Linux: FS_IOC_GETVERSION, which ext4, XFS and Btrfs have."""


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
