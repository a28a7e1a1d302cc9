"""Resume: resolve the open refunds of a journal."""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import anyio

from .clock import Clock
from .errors import InvalidRequest, JournalError, LianLianError, RefundConflict, RefundRejected
from .journal import Entry, Journal, State
from .models import RefundQuery, RefundRecord, RefundRequest
from .outcome import Outcome
from .recording import learn
from .resolution import matching
from .worker_pool import run_workers

logger = logging.getLogger("lianlian_async")


class Resumed(NamedTuple):
    """The result of :meth:`RefundSession.resume`."""

    resolved: int
    """Refunds whose outcome, or final status, is now known."""
    still_open: int
    """Refunds to resume again later, or to check by hand (conflicts, unreadable entries)."""


async def resume(
    journal: Journal,
    *,
    resolve: Callable[[RefundRequest], Awaitable[Outcome]],
    query: Callable[[RefundQuery], Awaitable[RefundRecord]],
    workers: int,
    clock: Clock,
) -> Resumed:
    """Resolve each UNRESOLVED refund in ``journal`` that may have been sent; query each ACCEPTED one."""
    count = Counter[bool]()

    async def is_resolved(request: RefundRequest) -> bool:
        outcome = await resolve(request)
        if isinstance(outcome.error, JournalError):
            raise outcome.error
        return outcome.refund is not None or isinstance(outcome.error, RefundRejected)

    async def is_final(request: RefundRequest) -> bool:
        try:
            refund = await learn(journal, matching(request, await query(request.query())), clock())
        except JournalError:
            raise
        except LianLianError as error:
            level = logging.WARNING if isinstance(error, RefundConflict) else logging.INFO
            logger.log(level, "refund %s is accepted, but its final state is not known: %s", request.no_refund, error)
            return False
        return refund.is_final

    async def resume_one(entry: Entry) -> None:
        if entry.ending is None and entry.sent_at is None:
            return  # certainly not made: the caller knows it, and may have refunded in another way
        if entry.state is State.FINAL:
            return  # nothing to query; a NotificationEndpoint will call on_refund
        try:
            request = RefundRequest.from_record(entry.fields)
        except InvalidRequest as error:
            logger.error("refund %s: its journal entry cannot be read: %s", entry.no_refund, error)  # noqa: TRY400 - not our bug
            count[False] += 1
        else:
            count[await (is_resolved(request) if entry.ending is None else is_final(request))] += 1

    await run_workers(journal.pending(), resume_one, workers=workers, intake=anyio.CancelScope())
    return Resumed(resolved=count[True], still_open=count[False])
