"""Journals: which refunds were begun, and how each ended. ``postgres`` is imported by who uses it."""

from .base import Ending, Entry, Intent, Journal, JournalError, Standing, State
from .memory import MemoryJournal
from .sqlite import SqliteJournal, SqliteReader

__all__ = [
    "Ending",
    "Entry",
    "Intent",
    "Journal",
    "JournalError",
    "MemoryJournal",
    "SqliteJournal",
    "SqliteReader",
    "Standing",
    "State",
]
