"""Files with secrets: readable by their owner only; an existing file is never overwritten."""

import os
from pathlib import Path

from lianlian_async.errors import ConfigurationError
from lianlian_async.secret import without_locals


def refuse_existing(*paths: Path) -> None:
    """Raise ``ConfigurationError`` if one of ``paths`` exists."""
    for path in paths:
        if path.exists() or path.is_symlink():
            raise ConfigurationError(f"{path}: exists already; remove it or choose another name")


@without_locals
def write_new(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Write a new file; raises ``ConfigurationError`` if it exists or cannot be written."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
