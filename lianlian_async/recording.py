"""Refunds under a journal: intend before the first byte, settle or release after the last, ask about what is open.

With a journal ``apply_refund`` may be called again at any time, after any crash: what is settled is answered
from the record, what is unsettled is asked about first, and what is new is sent.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from typing import Final, NamedTuple, cast

import anyio
import attrs

from .errors import (
    JournalError,
    LianLianError,
    RefundConflict,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundRejected,
)
from .flow import checked, drain
from .journal import Ending, Entry, Intent, Journal, Standing, State
from .models import Refund, RefundQuery, RefundRequest
from .outcome import Outcome
from .protocol import rejection
from .settlement import matching
from .signing import signature_source

__all__ = ["Recording", "Resumed", "answer", "digest", "ending", "learn", "resume", "take"]

logger = logging.getLogger("lianlian_async")

_NO_CONTENT: Final = ("sign_type", "notify_url")
_FIRST_LOOK: Final = 0.05
_LONGEST_LOOK: Final = 1.0


def digest(fields: Mapping[str, str]) -> str:
    """SHA-256 of what may never change under one number: the request without where its notification goes."""
    content = {name: text for name, text in fields.items() if name not in _NO_CONTENT}
    return hashlib.sha256(signature_source(content)).hexdigest()


def ending(refund: Refund) -> Ending:
    """What the journal keeps of a refund."""
    return Ending(state=State.DONE if refund.is_final else State.ACCEPTED, record=refund.to_dict())


def _rejected(error: RefundRejected) -> Ending:
    verified = "yes" if error.verified else "no"
    record = {"ret_code": error.ret_code, "ret_msg": error.ret_msg, "verified": verified}
    return Ending(state=State.REJECTED, record=record)


def answer(entry: Entry) -> Refund:
    """What a settled entry tells: the recorded refund, or the recorded ``RefundRejected``, raised again."""
    if entry.ending is None:
        raise LookupError(f"refund {entry.no_refund} is not settled")
    record = entry.ending.record
    if entry.ending.state is State.REJECTED:
        raise rejection(
            RefundRejected,
            record["ret_code"],
            record["ret_msg"],
            verified=record["verified"] == "yes",
            no_refund=entry.no_refund,
        )
    return Refund.from_dict(record, asked_dt_refund=RefundRequest.from_record(entry.fields).dt_refund)


async def take(
    journal: Journal, intent: Callable[[datetime], Intent], now: Callable[[], datetime], deadline: float
) -> tuple[Standing, Entry]:
    """``journal.intend``, again and again while the refund is HELD, up to ``deadline`` (event loop's clock).

    ``intent`` is what to write at a moment of the wall clock, which is ``now``.
    """
    seconds = _FIRST_LOOK
    while True:
        at = now()
        standing, entry = await journal.intend(intent(at), at)
        if standing is not Standing.HELD or anyio.current_time() + seconds > deadline:
            return standing, entry
        await anyio.sleep(seconds)
        seconds = min(2 * seconds, _LONGEST_LOOK)


async def learn(journal: Journal, refund: Refund) -> Refund:
    """Settle the entry of a refund of which the gateway told unasked; ``refund``, with its ``dt_refund`` if known.

    A refund that has no entry is returned as it is. Raises ``RefundConflict`` for one that is not what was applied
    for, and for a final state that is not the one on record.
    """
    number = str(refund.no_refund)
    entry = await journal.find(number)
    if entry is None:
        return refund
    request = RefundRequest.from_record(entry.fields)
    matching(request, refund)
    recorded = cast("Ending", (await journal.settle(number, ending(refund))).ending)  # what is settled has one
    status = recorded.record.get("sta_refund")
    if recorded.state is State.REJECTED or (refund.is_final and status != refund.sta_refund):
        theirs = f"rejected {recorded.record['ret_code']}" if recorded.state is State.REJECTED else str(status)
        raise RefundConflict(number, field="sta_refund", ours=str(refund.sta_refund), theirs=theirs)
    return attrs.evolve(refund, asked_dt_refund=request.dt_refund)


@attrs.frozen(kw_only=True)
class Recording:
    """One refund's page in the journal; ``now`` is the wall clock."""

    journal: Journal
    request: RefundRequest
    fields: Mapping[str, str]
    """The wire fields that are signed."""
    now: Callable[[], datetime]
    digest: str = attrs.field(init=False)

    @digest.default
    def _digest(self) -> str:
        return digest(self.fields)

    async def look(self) -> Refund | None:
        """The answer, if the refund is settled: found without signing anything. Raises as :func:`answer`."""
        entry = await self.journal.find(self.request.no_refund)
        if entry is None or entry.ending is None or entry.digest != self.digest:
            return None
        return answer(entry)

    async def claim(self, body: bytes, hold: float, deadline: float) -> tuple[Standing, Entry]:
        """Write the intent and take hold of the refund for ``hold`` seconds.

        Waits up to ``deadline`` (event loop's clock) for whoever holds it now. Never HELD: raises
        ``RefundOutcomeUnknown`` instead, and ``RefundConflict`` for other content.
        """
        fields = self.request.to_dict()

        def intent(now: datetime) -> Intent:
            return Intent(
                no_refund=self.request.no_refund,
                digest=self.digest,
                fields=fields,
                body=body,
                held_until=now + timedelta(seconds=hold),
            )

        standing, entry = await take(self.journal, intent, self.now, deadline)
        if standing is Standing.HELD:
            raise self._held(entry)
        return standing, entry

    def _held(self, entry: Entry) -> RefundOutcomeUnknown:
        held_until = entry.sent_at or self.now()
        return RefundOutcomeUnknown(
            request=self.request,
            question=self.request.query(),
            oid_partner=self.fields["oid_partner"],
            body=entry.body,
            attempts=0,
            questions=0,
            sent_at=held_until,
            ask_again_at=held_until,
            last_error="another call or worker is at this refund",
        )

    async def keep(self, entry: Entry, settle: Callable[[], Awaitable[Refund]]) -> Refund:
        """Run ``settle`` for the claimed ``entry`` and write down how it ended, even under cancellation."""
        try:
            refund = await settle()
        except RefundRejected as error:
            if error.is_configuration:  # ours to mend, and then to be sent
                await self._release(entry, None)
            else:
                await self._settle(_rejected(error))
            raise
        except RefundNotSent:
            await self._release(entry, None)
            raise
        except RefundOutcomeUnknown as error:
            await self._release(entry, error.sent_at)
            raise
        except BaseException:  # cancelled, or a bug: an attempt may be under way; or a conflict, for a person to solve
            await self._release(entry, self.now())
            raise
        await self._settle(ending(refund))
        return refund

    async def _settle(self, how: Ending) -> None:
        with anyio.CancelScope(shield=True):
            await self.journal.settle(self.request.no_refund, how)

    async def _release(self, entry: Entry, sent_at: datetime | None) -> None:
        with anyio.CancelScope(shield=True):
            await self.journal.release(entry, sent_at)


class Resumed(NamedTuple):
    """What :meth:`RefundSession.resume` did."""

    settled: int
    """Refunds whose end is known now."""
    still_open: int
    """Refunds that have to be asked about again later."""


async def resume(
    journal: Journal,
    *,
    settle: Callable[[RefundRequest], Awaitable[Outcome]],
    query: Callable[[RefundQuery], Awaitable[Refund]],
    workers: int,
    on_final: Callable[[Refund], Awaitable[bool]] | None,
) -> Resumed:
    """Find out about every refund that ``journal`` holds as unsettled, or as accepted but not final.

    What was certainly never sent is left alone: only who asks for it again has it sent. ``on_final`` hears of each one
    that is found final; an accepted one stays open until it has said yes.
    """
    run = _Resumption(journal=journal, settle=settle, query=query, on_final=on_final)
    await drain(journal.pending(), run.pursue, workers=checked(workers), intake=anyio.CancelScope())
    return Resumed(run.settled, run.still_open)


@attrs.define(kw_only=True)
class _Resumption:
    """One call of :func:`resume`."""

    journal: Journal
    settle: Callable[[RefundRequest], Awaitable[Outcome]]
    query: Callable[[RefundQuery], Awaitable[Refund]]
    on_final: Callable[[Refund], Awaitable[bool]] | None
    settled: int = 0
    still_open: int = 0

    async def pursue(self, entry: Entry) -> None:
        """Find out about one refund."""
        if entry.ending is None and entry.sent_at is None:
            return  # certainly never sent: whoever was told so may have refunded by other means
        request = RefundRequest.from_record(entry.fields)
        if await (self._is_settled(request) if entry.ending is None else self._is_final(request)):
            self.settled += 1
        else:
            self.still_open += 1

    async def _is_settled(self, request: RefundRequest) -> bool:
        outcome = await self.settle(request)
        if isinstance(outcome.error, JournalError):
            raise outcome.error
        if outcome.refund is not None:
            await self._is_heard(request, outcome.refund)
        return outcome.refund is not None or isinstance(outcome.error, RefundRejected)

    async def _is_final(self, request: RefundRequest) -> bool:
        try:
            refund = matching(request, await self.query(request.query()))
            if not await self._is_heard(request, refund):
                return False
            refund = await learn(self.journal, refund)
        except JournalError:
            raise
        except LianLianError as error:
            logger.info("refund %s is accepted, its final state is not known: %s", request.no_refund, error)
            return False
        return refund.is_final

    async def _is_heard(self, request: RefundRequest, refund: Refund) -> bool:
        if self.on_final is None or not refund.is_final:
            return True
        complete = attrs.evolve(  # an answer need not repeat what was asked for, as a notification does
            refund,
            no_refund=request.no_refund,
            money_refund=request.money_refund,
            asked_dt_refund=request.dt_refund,
        )
        try:
            return await self.on_final(complete)
        except RefundConflict as conflict:
            logger.error("refund %s is final, but another end was told before: %s", request.no_refund, conflict)  # noqa: TRY400 - no traceback: it is not about the program
            return False
