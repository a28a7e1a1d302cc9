"""Ask for what a notification leaves out: LianLian's pages call no_refund, money_refund and sta_refund optional."""

from __future__ import annotations

from typing import Final

import attrs

from lianlian_async import errors
from lianlian_async.errors import LianLianError, RefundConflict
from lianlian_async.identity import check_identity
from lianlian_async.journal import Journal
from lianlian_async.models import Refund, RefundRequest
from lianlian_async.session import RefundSession

__all__ = ["IncompleteNotification", "check_state", "complete"]

_NEEDED: Final = ("no_refund", "money_refund", "sta_refund")
# All that query_refund raises where it gets no record.
_UNUSABLE: Final = (errors.AnswerMismatch, errors.MalformedMessage, errors.SignatureInvalid)
_NO_RECORD: Final = (errors.GatewayUnavailable, errors.InvalidRequest, errors.QueryRejected, errors.RefundNotFound)


class IncompleteNotification(LianLianError):
    """A notification leaves out what acting on it needs, and it could not be asked for. Never leaves the endpoint."""


async def complete(told: Refund, session: RefundSession | None, journal: Journal | None, seconds: float) -> Refund:
    """Return ``told``, or the gateway's record of the refund where ``told`` lacks a field.

    The query needs ``session`` and a ``dt_refund``, from the notification or ``journal``; it takes up to ``seconds``.
    Raises :class:`IncompleteNotification`, ``RefundConflict`` where the record contradicts the notification, and
    ``JournalError``.
    """
    missing = [name for name in _NEEDED if getattr(told, name) is None]
    if not missing:
        return told
    what = f"no {' and no '.join(missing)}"
    if session is None:
        raise IncompleteNotification(f"{what}; give the NotificationEndpoint a session, and it asks the gateway")
    entry = None if journal is None or told.no_refund is None else await journal.find(told.no_refund)
    if entry is not None:
        request = RefundRequest.from_record(entry.fields)
        told = attrs.evolve(told, asked_dt_refund=request.dt_refund, asked_trader_refund=request.trader_refund)
    try:
        found = await session.query_refund(told.query(), deadline=seconds)
        check_identity(told.raw, found.raw)
    except (*_NO_RECORD, *_UNUSABLE) as error:
        raise IncompleteNotification(f"{what}; asking the gateway failed: {error}") from error
    for name in _NEEDED:
        if getattr(found, name) is None:
            raise IncompleteNotification(f"{what}, and the gateway's record has no {name}")
    check_state(told, found)
    if told.sta_refund is None and not found.is_final:
        raise IncompleteNotification(f"{what}, and the gateway's record is not final yet")
    return found


def check_state(told: Refund, found: Refund) -> None:
    """Raise ``RefundConflict`` if a notification told another state than the gateway's record has."""
    if told.sta_refund not in (None, found.sta_refund):
        ours, theirs = str(told.sta_refund), str(found.sta_refund)
        raise RefundConflict(str(found.no_refund), field="sta_refund", ours=ours, theirs=theirs)
