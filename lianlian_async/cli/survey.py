"""What the journals know about a batch before it is sent: how many of its refunds are new, resolved and open there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack

import anyio
import attrs

from lianlian_async.journal import Entry, Journal, SqliteReader
from lianlian_async.journal.base import Owner
from lianlian_async.worker_pool import run_workers

from .checked import Checked
from .places import is_dsn, make_reader

__all__ = ["Survey", "survey"]

_AT_ONCE = 500


@attrs.define
class Survey:
    """How the refunds of a batch stand in its journal, and in an older one that lies beside the file."""

    place: str
    older: str | None
    """``FILE.journal``, as earlier releases made it; None if there is none."""
    journal_id: str | None = None
    """None: the journal is not made yet."""
    total: int = 0
    resolved: int = 0
    open: int = 0
    in_older: int = 0
    """How many of the resolved and open ones stand only in ``older``."""

    @property
    def new(self) -> int:
        """How many were never sent, as far as the journals know."""
        return self.total - self.resolved - self.open

    @property
    def name(self) -> str:
        """The journal's place, without a password."""
        return "in PostgreSQL" if is_dsn(self.place) else self.place

    def counts(self) -> dict[str, int]:
        """For tables and JSON."""
        return {"new": self.new, "resolved": self.resolved, "open": self.open}

    def notes(self, *, query_first: bool) -> list[str]:
        """For people, before they agree."""
        counts = f"{self.new:,} of these refunds are new, {self.resolved:,} resolved, {self.open:,} open"
        told = [f"journal {self.name}: {counts}"]
        if self.in_older:
            told.append(f"{self.in_older:,} of them stand in {self.older} only, and are carried on there")
        if self.journal_id is None and not query_first:
            told.append(
                "this journal is new, so all count as never sent; if some may have been sent before, say "
                "--query-first: each is asked about before it is sent"
            )
        return told


async def survey(checked: Checked, owner: Owner, place: str, older: str | None) -> Survey:
    """Look up all refunds, in bounded memory; marks in ``checked`` those that stand only in ``older``.

    An older journal of another merchant or endpoint than ``owner`` says nothing about these refunds.
    """
    found = Survey(place, None, total=checked.count)
    async with AsyncExitStack() as stack:
        journals = list[SqliteReader | Journal]()
        if is_dsn(place) or await anyio.Path(place).exists():
            journals.append(await stack.enter_async_context(make_reader(place)))
            found.journal_id = journals[0].id
        if older is not None:
            reader = await stack.enter_async_context(SqliteReader(older))
            if reader.owner in (None, owner):
                journals.append(reader)
                found.older = older
        async for numbers in checked.numbers():
            rest = set(numbers)
            for journal in journals:
                begun = [entry for entry in await _find(journal, sorted(rest)) if entry.ending or entry.sent_at]
                found.resolved += sum(entry.ending is not None for entry in begun)
                found.open += sum(entry.ending is None for entry in begun)
                rest.difference_update(entry.no_refund for entry in begun)
                if found.older is not None and journal is journals[-1]:
                    found.in_older += len(begun)
                    await checked.mark_older(entry.no_refund for entry in begun)
    return found


async def _find(journal: SqliteReader | Journal, numbers: Sequence[str]) -> list[Entry]:
    if isinstance(journal, SqliteReader):
        return await journal.find_all(numbers)
    entries = list[Entry]()

    async def find(number: str) -> None:
        if (entry := await journal.find(number)) is not None:
            entries.append(entry)

    await run_workers(numbers, find, workers=_AT_ONCE, intake=anyio.CancelScope())  # in a few queries
    return entries
