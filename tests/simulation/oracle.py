"""The invariants, checked at every event at the gateway, at the journal and at a caller; and once more at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import attrs

from lianlian_async import errors
from lianlian_async.journal import Entry, State
from lianlian_async.models import Refund, RefundRequest

if TYPE_CHECKING:
    from .gateway import Gateway

_LATER = {
    State.UNRESOLVED: frozenset(State),
    State.ACCEPTED: frozenset({State.ACCEPTED, State.FINAL, State.DONE}),
    State.FINAL: frozenset({State.FINAL, State.DONE}),
    State.DONE: frozenset({State.DONE}),
    State.REJECTED: frozenset({State.REJECTED}),
    State.CONFLICT: frozenset({State.CONFLICT}),
}


class ViolationError(BaseException):
    """An invariant does not hold."""


@attrs.define(eq=False)
class Oracle:
    """What was promised, by whom, about which refund."""

    stop: Callable[[], None]
    """Ends the run."""
    log: Callable[[str], None]
    time: Callable[[], float]
    gateway: Gateway = attrs.field(init=False)
    violations: list[str] = attrs.field(factory=list)
    told: dict[str, str] = attrs.field(factory=dict)
    """How each refund ended, as a caller was told: ``made``, ``rejected`` or ``conflict``."""
    final: dict[str, str] = attrs.field(factory=dict)
    """The last ``sta_refund`` of those that are final."""
    foreign: set[str] = attrs.field(factory=set)
    """Numbers that other refunds have at the gateway."""
    beyond_bounds: set[str] = attrs.field(factory=set)
    """Refunds that may be made twice: a bound that the documentation states was passed."""
    lost_endings: set[str] = attrs.field(factory=set)
    """Refunds that a failover has made open again."""
    is_blind: bool = False
    """Whether the query service knows nothing: only where the journal knows a made refund, this can be noticed."""
    canary_since: float = math.inf
    """When the journal first knew a made refund, or the query service every refund."""

    def violate(self, what: str) -> None:
        """Note that an invariant does not hold, and end the run."""
        self.violations.append(what)
        self.log(f"VIOLATION: {what}")
        self.stop()

    # ── at the gateway ───────────────────────────────────────────────────────────────────────────

    def arrived(self, body: bytes) -> None:
        """An apply call has reached the gateway."""
        number = json.loads(body)["no_refund"]
        if self.told.get(number) == "rejected" and number not in self.gateway.refused:
            self.violate(f"{number} was sent after it was told as rejected")

    def made(self, number: str, left_at: float) -> None:
        """The gateway has made a refund, for a request that left a node at ``left_at``."""
        times = len(self.gateway.books[number])
        is_excused = number in self.beyond_bounds or (self.is_blind and left_at < self.canary_since + 60)
        if times > 1 and not is_excused:
            self.violate(f"{number} was made {times} times")
        if self.told.get(number) in ("rejected", "conflict"):
            self.violate(f"{number} was made after it was told as {self.told[number]}")

    # ── at the journal ───────────────────────────────────────────────────────────────────────────

    def recorded(self, before: Entry | None, after: Entry) -> None:
        """The journal has written an entry down."""
        number = after.no_refund
        if after.state.is_made:
            self.canary_since = min(self.canary_since, self.time())
        if before is None:
            return
        if after.state not in _LATER[before.state]:
            self.violate(f"{number} went from {before.state} to {after.state}")
        if (
            before.state is after.state
            and before.ending
            and after.ending
            and before.ending.record != after.ending.record
        ):
            self.violate(f"{number}: the record of its ending changed")
        if before.sent_at is not None and after.digest != before.digest:
            self.violate(f"{number}: its content changed on record")

    def leaves(self, body: bytes, entry: Entry | None) -> None:
        """An apply call leaves a node that has a journal; ``entry`` is what is on record."""
        number = json.loads(body)["no_refund"]
        if entry is None or entry.ending is not None or entry.sent_at is None:
            self.violate(
                f"{number} was sent, but on record it is {entry and entry.state}, sent at {entry and entry.sent_at}"
            )
        elif entry.body != body:
            self.violate(f"{number} was sent with other bytes than those on record")

    # ── at a caller ──────────────────────────────────────────────────────────────────────────────

    def tell(self, request: RefundRequest, refund: Refund | None, error: BaseException | None) -> str:
        """A caller was told something; whether it is ``made``, ``rejected``, ``conflict`` or still ``open``."""
        number = request.no_refund
        booked = self.gateway.books.get(number, [])
        self.log(f"told {number}: {refund and refund.sta_refund} {type(error).__name__ if error else ''}")
        if refund is not None:
            ours = [each for each in booked if _is(each.fields, request)]
            if not ours:
                self.violate(f"{number} was told as made, and no such refund is on the books")
            is_one = len(booked) == 1  # where a bound was passed, each has a state of its own
            if (
                refund.is_final
                and is_one
                and self.final.setdefault(number, str(refund.sta_refund)) != refund.sta_refund
            ):
                self.violate(f"{number}: its final state changed to {refund.sta_refund}")
            return self._end(number, "made")
        if isinstance(error, errors.RefundConflict):
            if number not in self.foreign:
                self.violate(f"{number} was told as a conflict: {error}")
            return self._end(number, "conflict")
        if isinstance(error, errors.RefundRejected):
            if error.may_pass or error.is_configuration:
                return "open"
            if [each for each in booked if _is(each.fields, request)]:
                self.violate(f"{number} was told as rejected, and it is on the books")
            return self._end(number, "rejected")
        if not isinstance(error, (errors.RefundOutcomeUnknown, errors.RefundNotSent, errors.JournalError)):
            self.violate(f"{number} ended in {error!r}")
        return "open"

    def _end(self, number: str, how: str) -> str:
        is_told_again = how == "conflict" and number in self.lost_endings  # either: this refund was not made
        if self.told.setdefault(number, how) != how and not is_told_again:
            self.violate(f"{number} was told as {how} after it was told as {self.told[number]}")
        return how

    # ── at the end ───────────────────────────────────────────────────────────────────────────────

    def check_books(self, requests: Mapping[str, RefundRequest], *, forgiven: set[str]) -> None:
        """Everything is over: all that was asked for is known, and as the books say."""
        for number, request in requests.items():
            made = [each for each in self.gateway.books.get(number, ()) if _is(each.fields, request)]
            told = self.told.get(number)
            if told is None and number not in forgiven:
                self.violate(f"{number} was never known")
            elif told is not None and (told == "made") != bool(made):
                self.violate(f"{number} was told as {told}, the books have it {len(made)} times")

    def check_journal(self, entries: Mapping[str, Entry]) -> None:
        """Everything is over: whatever was told is on record, unless a failover lost that."""
        for number, how in self.told.items():
            entry = entries.get(number)
            if number not in self.lost_endings and (entry is None or entry.ending is None):
                self.violate(f"{number} was told as {how}, and its ending is not on record")


@lru_cache(1000)
def _fields(request: RefundRequest) -> Mapping[str, str]:
    return request.to_dict()


def _is(booked: Mapping[str, str], request: RefundRequest) -> bool:
    asked = _fields(request)
    return all(booked[name] == asked[name] for name in ("no_refund", "dt_refund", "money_refund"))
