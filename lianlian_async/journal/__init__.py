"""Journals, which record every refund and its outcome.

SQLite and psycopg are slow to import, so importing this package imports neither. ``SqliteJournal`` and ``SqliteReader``
are imported at their first use; import ``PostgresJournal`` from ``journal.postgres``.
"""

from typing import TYPE_CHECKING, Any

from .base import Ending, Entry, Intent, JournalError, Owner, Standing, State
from .interface import Journal
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
