"""Record one refund: the intent before its first byte is sent, then the outcome.

With a journal, ``apply_refund`` may be called again at any time, also after a crash. For a resolved refund, it returns
or raises the recorded outcome. It queries first if an earlier call may have sent the refund; else it sends it.
"""

import logging
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Final, cast

import anyio

from .clock import Clock, Moment
from .errors import JournalError, LianLianError, RefundConflict, RefundNotSent, RefundOutcomeUnknown, RefundRejected
from .events import Leased, Paused
from .identity import check_identity, check_request
from .journal import Ending, Entry, Intent, Journal, Standing, State
from .journal.base import added
from .logs import NOBODY, Listeners
from .models import Record, Refund, RefundRecord, RefundRequest, RefundStatus
from .resolution import Case, doubt, matching

logger = logging.getLogger("lianlian_async")

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0
"""Seconds. While another call or worker has the lease, the pauses before each new ``begin`` double up to this."""


def ending(refund: RefundRecord) -> Ending:
    """Return the ``Ending`` that the journal records for a refund that was made."""
    return Ending(state=State.DONE if refund.is_final else State.ACCEPTED, record=refund.to_dict())


def _refusal_record(error: RefundRejected) -> dict[str, str]:
    verified = "yes" if error.verified else "no"
    return {"ret_code": error.ret_code, "ret_msg": error.ret_msg, "verified": verified}


def refusal(no_refund: str, record: Mapping[str, str]) -> RefundRejected:
    """Return the ``RefundRejected`` that ``record`` describes."""
    verified = record["verified"] == "yes"
    code, text, evidence = record["ret_code"], record["ret_msg"], record.get("evidence")
    return RefundRejected(code, text, verified=verified, no_refund=no_refund, evidence=evidence)


def decision(is_made: bool, evidence: str, who: str, now: Moment) -> Ending:
    """Return a person's decision as the ``Ending`` for :meth:`.journal.Journal.decide`: success, or not made."""
    text = f"decided by hand by {who} at {now.wall.isoformat(sep=' ', timespec='seconds')}: {evidence}"
    if is_made:
        return Ending(state=State.DONE, record={"sta_refund": RefundStatus.SUCCESS, "evidence": text})
    refused = {"ret_code": "decided", "ret_msg": "", "verified": "no"}
    return Ending(state=State.REJECTED, record=refused | {"evidence": text})


def recorded_refund(entry: Entry) -> Refund:
    """Return the refund of a resolved entry, or raise its ``RefundRejected`` or ``RefundConflict``."""
    record = cast("Ending", entry.ending).record
    if entry.state is State.REJECTED:
        raise refusal(entry.no_refund, record)
    if entry.state is State.CONFLICT:
        check_identity(entry.fields, record)  # raises the recorded conflict, unless ``record`` is empty
        raise RefundConflict(entry.no_refund, field="content", ours="its request", theirs="unknown")
    return Refund.from_dict(record, entry.fields)


async def take(
    journal: Journal, intent: Intent, clock: Clock, deadline: float, listeners: Listeners = NOBODY
) -> tuple[Standing, Entry]:
    """Call ``journal.begin`` repeatedly until the refund is not LEASED, or until ``deadline`` (event loop's clock)."""
    seconds, number = _FIRST_PAUSE, intent.no_refund
    while True:
        began = listeners.timer()
        standing, entry = await journal.begin(intent, clock())
        listeners.tell(Leased, no_refund=number, standing=standing, seconds=listeners.timer() - began)
        if standing is not Standing.LEASED or anyio.current_time() + seconds > deadline:
            return standing, entry
        with listeners.span(Paused, no_refund=number, cause="lease", seconds=seconds):
            await anyio.sleep(seconds)
        seconds = min(2 * seconds, _LONGEST_PAUSE)


async def learn(journal: Journal, refund: Record, now: Moment, source: str = "query") -> Record:
    """Record a state that the gateway reported; return ``refund``, completed from the recorded request.

    ``source`` is *query*, *notification* or *statement*: the journal adds this fact if the recorded state changes.
    A refund without an entry is returned unchanged. Raises ``RefundConflict`` if ``refund`` differs from the request
    (recorded if no outcome is) or contradicts the recorded outcome. Raises ``AnswerMismatch`` or ``IncompleteRecord``
    if it is, or may be, the record of another refund; then the journal does not change.
    """
    number = str(refund.no_refund)
    entry = await journal.find(number)
    if entry is None:
        return refund
    history = added(entry.history, now, source, f"sta_refund {refund.sta_refund or '-'}")
    try:
        matching(RefundRequest.from_record(entry.fields), refund)
    except RefundConflict:
        await journal.finish(entry, Ending(state=State.CONFLICT, record=refund.to_dict()), history)
        raise
    may_have_worked = entry.ending is not None or (entry.sent_at is not None and entry.refused is None)
    if (doubted := doubt(refund, may_have_worked=may_have_worked)) is not None:
        raise doubted
    _check_agrees(refund, await journal.finish(entry, ending(refund), history))
    return cast("Record", refund.completed(entry.fields))


def _check_agrees(refund: RefundRecord, stored: Entry) -> None:
    """Raise ``RefundConflict`` if the outcome in ``stored`` contradicts ``refund``, which comes from the gateway."""
    recorded = cast("Ending", stored.ending)  # set by Journal.finish
    if recorded.state is State.CONFLICT:
        recorded_refund(stored)
    status = recorded.record.get("sta_refund")
    if recorded.state is State.REJECTED or (refund.is_final and status != refund.sta_refund):
        theirs = f"rejected {recorded.record['ret_code']}" if recorded.state is State.REJECTED else str(status)
        theirs = recorded.record.get("evidence", theirs)
        raise RefundConflict(stored.no_refund, field="sta_refund", ours=str(refund.sta_refund), theirs=theirs)


async def recorded(journal: Journal, request: RefundRequest) -> Refund | None:
    """Return the recorded refund; None: no outcome is recorded. Raises its error, or a conflict with the request."""
    entry = await journal.find(request.no_refund)
    if entry is None or entry.ending is None:
        return None
    check_request(request.no_refund, request.to_dict(), entry.fields)
    return recorded_refund(entry)


async def keep(journal: Journal, entry: Entry, case: Case, resolve: Callable[[], Awaitable[Refund]]) -> Refund:
    """Run ``resolve`` for ``case``, and record its outcome in the leased ``entry``, even if cancelled."""
    try:
        refund = await resolve()
    except (RefundRejected, RefundNotSent, RefundOutcomeUnknown, RefundConflict) as error:
        with _said(error):
            stored = await _store(journal, entry, case, error) or await journal.find(entry.no_refund)
        if stored is None or isinstance(error, RefundConflict):
            raise
        if stored.ending is None:
            if isinstance(error, RefundNotSent) and stored.sent_at is not None:
                raise case.unknown() from error  # another worker had the lease since, and may have sent it
            raise
        if isinstance(error, RefundRejected) and stored.state is State.REJECTED:
            raise
        return recorded_refund(stored)  # recorded meanwhile, for example by a notification
    except BaseException as error:  # cancellation, a failed journal, or a bug: the refund may have been sent
        said = case.unknown()
        if isinstance(error, JournalError):
            error.said = said
        try:
            with _said(said):
                await _store(journal, entry, case, said)
        except JournalError as problem:
            logger.warning("refund %s may have been made: %s", entry.no_refund, problem)
        raise
    with _said(refund):
        stored = await _store(journal, entry, case, refund)
    _check_agrees(refund, cast("Entry", stored))
    return refund


async def _store(journal: Journal, entry: Entry, case: Case, outcome: Refund | LianLianError) -> Entry | None:
    """Record ``outcome``, even if cancelled. Return the entry as stored, or None if it was released."""
    how = moment = refused = None
    if isinstance(outcome, RefundOutcomeUnknown):
        moment = outcome.moment
        refused = None if outcome.refused is None else _refusal_record(outcome.refused)
    elif isinstance(outcome, RefundConflict):
        how = Ending(state=State.CONFLICT, record=outcome.record or {})
    elif isinstance(outcome, RefundRejected):
        if not (outcome.is_configuration or outcome.may_pass):  # else the same refund may be sent again
            how = Ending(state=State.REJECTED, record=_refusal_record(outcome))
    elif not isinstance(outcome, LianLianError):
        how = ending(outcome)
    with anyio.CancelScope(shield=True):
        if how is not None:
            return await journal.finish(entry, how, case.history)
        await journal.release(entry, moment, refused, case.history)
    return None


@contextmanager
def _said(outcome: Refund | LianLianError) -> Generator[None]:
    """If the block fails, raise a ``JournalError`` whose ``said`` is the refund's ``outcome``."""
    try:
        yield
    except JournalError as error:
        error.said = outcome
        raise
    except Exception as error:  # such as the RuntimeError of a journal that was closed during the call
        failure = JournalError(str(error))
        failure.said = outcome
        raise failure from error
