"""A service that is killed before a journal write: ``python -m tests.programs.acting MODE LINE JOURNAL SHOP``.

The service receives a notification of one refund in its journal. It kills itself (SIGKILL) right before the
transaction that writes the given line. Its handler appends the refund's number to the file SHOP.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import anyio

from lianlian_async import NotificationEndpoint, Refund
from lianlian_async.journal import SqliteJournal
from tests.support import notices

MODES = ["inline", "inbox"]

AFTER_THE_HANDLER = ["inbox finish", "refunds acted"]
LINES = ["refunds finish", "inbox Begin", *AFTER_THE_HANDLER]
"""All writes for a notified refund in this order: the journal (refunds or inbox) and the operation."""


class Dying(SqliteJournal):
    """A journal that kills its process instead of writing ``line``."""

    def __init__(self, path: str, line: str, kind: str = "refunds") -> None:
        super().__init__(path)
        self._line, self._kind = line, kind

    def _new_inbox(self) -> Dying:
        return Dying(f"{self._name}-inbox", self._line, "inbox")

    async def _write(self, batch):
        changes = [queued.operation.apply for queued in batch]
        if self._line in {f"{self._kind} {getattr(change, 'func', type(change)).__name__}" for change in changes}:
            os.kill(os.getpid(), signal.SIGKILL)
        await super()._write(batch)


def read(shop: Path) -> list[str]:
    """Return the numbers of the refunds that were handled."""
    return shop.read_text().split() if shop.exists() else []


async def main(mode: str, line: str, path: str, shop: str) -> None:
    async def on_refund(refund: Refund) -> None:
        async with await anyio.open_file(shop, "a") as file:
            await file.write(f"{refund.no_refund}\n")

    async with SqliteJournal(path) as journal:
        await notices.begin(journal)
    journal = Dying(path, line)
    merchant = notices.trusting()
    async with NotificationEndpoint(merchant, on_refund, journal=journal, inbox=mode == "inbox") as endpoint:
        await notices.deliver(endpoint, 1)
        await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
