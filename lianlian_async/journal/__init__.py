"""Journals: durable records of every refund and its outcome.

Both imports are slow: SQLite is imported at its first use, and you import ``journal.postgres`` yourself if you need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Ending, Entry, Intent, Journal, JournalError, Owner, Standing, State
from .memory import MemoryJournal, OpenRefunds

if TYPE_CHECKING:
    from .sqlite import SqliteJournal, SqliteReader

__all__ = [
    "Ending",
    "Entry",
    "Intent",
    "Journal",
    "JournalError",
    "MemoryJournal",
    "OpenRefunds",
    "Owner",
    "SqliteJournal",
    "SqliteReader",
    "Standing",
    "State",
]


def __getattr__(name: str) -> Any:
    if name not in ("SqliteJournal", "SqliteReader"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import sqlite

    return getattr(sqlite, name)
