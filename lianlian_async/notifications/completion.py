"""Query the fields that a notification omits: ``no_refund``, ``money_refund`` and ``sta_refund`` are optional in it."""

from typing import Final, cast

import anyio

from lianlian_async import errors
from lianlian_async.identity import check_identity
from lianlian_async.journal import Journal
from lianlian_async.models import Refund, RefundRecord
from lianlian_async.resolution import IncompleteRecord
from lianlian_async.session import RefundSession

_NEEDED: Final = ("no_refund", "money_refund", "sta_refund")


async def complete(
    notified: RefundRecord, session: RefundSession | None, journal: Journal | None, seconds: float
) -> Refund:
    """Return ``notified``, the notification's record; if a needed field is missing, query the gateway's record instead.

    The query requires ``session``, and a ``dt_refund`` from the notification or from ``journal``. It ends after
    ``seconds``, even if it is still waiting for a connection. Raises :class:`IncompleteRecord` if a needed field stays
    unknown, ``RefundConflict`` if the two records contradict each other, and ``JournalError`` if the journal fails.
    """
    missing = [name for name in _NEEDED if getattr(notified, name) is None]
    if not missing:
        return cast("Refund", notified)
    what = f"no {' and no '.join(missing)}"
    if session is None:
        raise IncompleteRecord(f"{what}; pass session=… to the NotificationEndpoint so that it can query the refund")
    entry = None if journal is None or notified.no_refund is None else await journal.find(notified.no_refund)
    if entry is not None:
        notified = notified.completed(entry.fields)
    try:
        with anyio.fail_after(seconds):
            found = await session.query_refund(notified.query(), deadline=seconds)
        check_same(notified, found)
    except (errors.JournalError, errors.RefundConflict):
        raise
    except (errors.LianLianError, TimeoutError) as error:
        raise IncompleteRecord(f"{what}; the query failed: {error or 'no connection was free'}") from error
    for name in _NEEDED:
        if getattr(found, name) is None:
            raise IncompleteRecord(f"{what}, and the gateway's record has no {name}")
    if notified.sta_refund is None and not found.is_final:
        raise IncompleteRecord(f"{what}, and the gateway's record is not final yet")
    return cast("Refund", found)  # it has every field of _NEEDED


def check_same(notified: RefundRecord, found: RefundRecord) -> None:
    """Compare a notification with the gateway's record.

    Raises as :func:`.identity.check_identity`, and ``RefundConflict`` if they have different states.
    """
    check_identity(notified.identity(), found.raw)
    if notified.sta_refund not in (None, found.sta_refund):
        ours, theirs = str(notified.sta_refund), str(found.sta_refund)
        raise errors.RefundConflict(str(found.no_refund), field="sta_refund", ours=ours, theirs=theirs)
