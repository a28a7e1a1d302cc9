"""The journal of a batch if none is named, and the receipt beside its file that tells which journal that was.

The default journal belongs to a merchant and an endpoint, not to a file: a copy of a file is the same refunds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Final

import attrs
import click

from lianlian_async.merchant import Merchant

__all__ = ["JOURNAL", "Receipt", "default_place", "make_folder"]

JOURNAL: Final = "LIANLIAN_JOURNAL"

_CONTAINER_FILES: Final = (Path("/.dockerenv"), Path("/run/.containerenv"))
_HOME: Final = "HOME" if os.name == "posix" else "LOCALAPPDATA"
_NAME_IT: Final = f"name the journal by --journal or {JOURNAL}: a file on a disk that lasts, or postgresql://…"
_LOST: Final = (
    "if that journal is lost, say --accept-new-journal --query-first: each refund is asked about before it is sent"
)


def default_place(merchant: Merchant) -> str:
    """Return the path of the merchant's journal for its endpoint; raises a usage error where it would not last."""
    if os.environ.get("KUBERNETES_SERVICE_HOST") or any(path.exists() for path in _CONTAINER_FILES):
        raise click.UsageError(f"this is a container, and its files are lost when it ends: {_NAME_IT}")
    if not Path(os.environ.get(_HOME) or os.devnull).is_dir():
        raise click.UsageError(f"{_HOME} names no folder that could hold a journal: {_NAME_IT}")
    endpoint = hashlib.sha256(merchant.endpoints.apply.encode()).hexdigest()[:8]
    folder = Path(click.get_app_dir("lianlian", roaming=False), "journals")
    return str(folder / f"{merchant.oid_partner}-{endpoint}.sqlite")


def make_folder(place: str) -> None:
    """Make the folder of a default journal, for this user alone; raises a usage error."""
    try:
        Path(place).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"{place}: {error.strerror}; {_NAME_IT}") from None


@attrs.frozen
class Receipt:
    """In which journal a file's refunds stand: a line of JSON in ``FILE.receipt`` for each merchant and endpoint."""

    journal: str
    """The journal's id."""
    place: str
    oid_partner: str
    apply_url: str
    written_at: str = attrs.field(factory=lambda: datetime.now().astimezone().isoformat(timespec="seconds"))

    def check(self, path: Path, *, accept_new: bool) -> list[Receipt]:
        """Return the receipts of other merchants and endpoints, to be kept.

        Raises a usage error if the file was sent with another journal before, unless ``accept_new``.
        """
        try:
            known = [Receipt(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
        except FileNotFoundError:
            return []
        except (OSError, TypeError, ValueError):
            if accept_new:
                return []
            raise click.UsageError(f"{path} cannot be read as a receipt; {_LOST}") from None
        ours = [one for one in known if (one.oid_partner, one.apply_url) == (self.oid_partner, self.apply_url)]
        for other in ours:
            if other.journal != self.journal and not accept_new:
                raise click.UsageError(
                    f"{path}: on {other.written_at} this file was sent with the journal {other.place}. {self.place} is "
                    f"another one, where the same refunds may count as never sent: name the first by --journal; {_LOST}"
                )
        return [one for one in known if one not in ours]

    def write(self, path: Path, others: Iterable[Receipt]) -> None:
        """Replace the file."""
        path.write_text("".join(json.dumps(attrs.asdict(one)) + "\n" for one in (*others, self)), "utf-8")
