"""A service that dies right before a line of its journal: ``python -m tests.programs.acting MODE LINE JOURNAL SHOP``.

It is notified of one refund that is on record. Right before the transaction with the given line, which nobody has
waited for yet, it is killed (SIGKILL). Its handler appends the refund's number to the file SHOP.
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

AFTER_THE_HANDLER = ["inbox Finish", "refunds Acted"]
LINES = ["refunds Finish", "inbox Begin", *AFTER_THE_HANDLER]
"""In which journal, and which operation: all that is written about a notified refund, in this order."""


class Dying(SqliteJournal):
    """A journal whose process dies instead of writing ``line``."""

    def __init__(self, path: str, line: str, kind: str = "refunds") -> None:
        super().__init__(path)
        self._line, self._kind = line, kind

    def _beside(self) -> Dying:
        return Dying(f"{self._name}-inbox", self._line, "inbox")

    async def _write(self, batch):
        if self._line in {f"{self._kind} {type(queued.operation).__name__}" for queued in batch}:
            os.kill(os.getpid(), signal.SIGKILL)
        await super()._write(batch)


def read(shop: Path) -> list[str]:
    """Which refunds were handled."""
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
