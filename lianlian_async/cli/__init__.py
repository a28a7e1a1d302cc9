"""The command ``lianlian``. This module runs without the extra ``cli``, so that it can name a missing package."""

import sys
from io import TextIOWrapper
from typing import Final

__all__ = ["main"]

AS_JSON: Final = "lianlian_async.json"
"""Key in ``click.Context.meta``: whether the command line contains ``--json``."""

_EXTRA: Final = ("click", "rich", "uvicorn")


def main() -> None:
    """Run the command and exit with its code; 2 if a package of the extra ``cli`` is missing."""
    for stream in (sys.stdout, sys.stderr):
        # A character missing in the terminal's encoding must not raise an error after a refund was made.
        if isinstance(stream, TextIOWrapper):  # a stream is None if its descriptor is closed
            stream.reconfigure(errors="backslashreplace")
    try:
        from .app import lianlian

        lianlian(prog_name="lianlian")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        print(f"lianlian needs {package}: pip install 'lianlian-async[cli]'", file=sys.stderr)
        sys.exit(2)
