"""Journals: which refunds were begun, and how each ended. ``postgres`` is imported by who uses it."""

from .base import Entry, Intent, Journal, JournalError, Outcome, Standing, State

__all__ = ["Entry", "Intent", "Journal", "JournalError", "Outcome", "Standing", "State"]
