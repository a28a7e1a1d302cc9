"""Query the fields that a notification omits; ``no_refund``, ``money_refund`` and ``sta_refund`` are optional in it."""

from __future__ import annotations

from typing import Final, cast

from lianlian_async import errors
from lianlian_async.errors import LianLianError, RefundConflict
from lianlian_async.identity import check_identity
from lianlian_async.journal import Journal
from lianlian_async.models import Refund, RefundRecord
from lianlian_async.session import RefundSession

__all__ = ["IncompleteNotification", "check_state", "complete"]

_NEEDED: Final = ("no_refund", "money_refund", "sta_refund")
# query_refund raises these if it cannot return a record.
_UNUSABLE: Final = (errors.AnswerMismatch, errors.MalformedMessage, errors.SignatureInvalid)
_NO_RECORD: Final = (errors.GatewayUnavailable, errors.InvalidRequest, errors.QueryRejected, errors.RefundNotFound)


class IncompleteNotification(LianLianError):
    """A notification lacks a required field, and a query did not supply it. Handled inside the endpoint."""


async def complete(
    told: RefundRecord, session: RefundSession | None, journal: Journal | None, seconds: float
) -> Refund:
    """Return ``told``, or the gateway's record of the refund if ``told`` lacks a field.

    The query requires ``session``, and a ``dt_refund`` from the notification or ``journal``; its deadline is
    ``seconds``.
    Raises :class:`IncompleteNotification`, ``RefundConflict`` if the record contradicts the notification, and
    ``JournalError``.
    """
    missing = [name for name in _NEEDED if getattr(told, name) is None]
    if not missing:
        return cast("Refund", told)
    what = f"no {' and no '.join(missing)}"
    if session is None:
        raise IncompleteNotification(f"{what}; pass session=… to the NotificationEndpoint so that it can query it")
    entry = None if journal is None or told.no_refund is None else await journal.find(told.no_refund)
    if entry is not None:
        told = told.completed(entry.fields)
    try:
        found = await session.query_refund(told.query(), deadline=seconds)
        check_identity(told.raw, found.raw)
    except (*_NO_RECORD, *_UNUSABLE) as error:
        raise IncompleteNotification(f"{what}; the query failed: {error}") from error
    for name in _NEEDED:
        if getattr(found, name) is None:
            raise IncompleteNotification(f"{what}, and the gateway's record has no {name}")
    check_state(told, found)
    if told.sta_refund is None and not found.is_final:
        raise IncompleteNotification(f"{what}, and the gateway's record is not final yet")
    return cast("Refund", found)  # it has every field of _NEEDED


def check_state(told: RefundRecord, found: RefundRecord) -> None:
    """Raise ``RefundConflict`` if the states of a notification and of the gateway's record differ."""
    if told.sta_refund not in (None, found.sta_refund):
        ours, theirs = str(told.sta_refund), str(found.sta_refund)
        raise RefundConflict(str(found.no_refund), field="sta_refund", ours=ours, theirs=theirs)
