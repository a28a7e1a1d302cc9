"""Helpers that several test modules and test programs share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
"""The checkout. Programs run in it, so that ``python -m`` finds them."""


def program(name: str) -> list[str]:
    """Return the command that runs ``tests/programs/NAME.py`` in a new process, to be started in ``ROOT``."""
    return [sys.executable, "-m", f"tests.programs.{name}"]
