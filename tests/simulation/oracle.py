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
    """An invariant was violated."""


@attrs.define(eq=False)
class Oracle:
    """The outcomes that callers got, and the checks of all events against the gateway's books."""

    stop: Callable[[], None]
    """Ends the run."""
    log: Callable[[str], None]
    time: Callable[[], float]
    gateway: Gateway = attrs.field(init=False)
    violations: list[str] = attrs.field(factory=list)
    told: dict[str, str] = attrs.field(factory=dict)
    """The outcome of each refund that a caller was told: ``made``, ``rejected`` or ``conflict``."""
    final: dict[str, str] = attrs.field(factory=dict)
    """The ``sta_refund`` of each refund that is final."""
    foreign: set[str] = attrs.field(factory=set)
    """``no_refund`` values that belong to other refunds at the gateway."""
    beyond_bounds: set[str] = attrs.field(factory=set)
    """Refunds that may be made twice, or called rejected, because a documented bound was exceeded."""
    lost_endings: set[str] = attrs.field(factory=set)
    """Refunds whose recorded outcome a failover lost."""
    left: set[str] = attrs.field(factory=set)
    """Refunds for which a node with a journal sent an apply request."""
    ended_before_send: set[str] = attrs.field(factory=set)
    """Refunds whose outcome another party recorded after a call took the lease and before it sent anything.

    The call may send within 0.1 seconds: until then, it does not read its entry again.
    """
    is_blind: bool = False
    """Whether the query service knows nothing. The package notices it only if the journal knows a made refund."""
    canary_since: float = math.inf
    """The time since which the package can rely on "no such record"."""

    def violate(self, what: str) -> None:
        """Record a violated invariant, and end the run."""
        self.violations.append(what)
        self.log(f"VIOLATION: {what}")
        self.stop()

    # ── at the gateway ───────────────────────────────────────────────────────────────────────────

    def arrived(self, body: bytes) -> None:
        """Check an apply call that reached the gateway."""
        number = json.loads(body)["no_refund"]
        if self.told.get(number) == "rejected" and number not in self.gateway.refused:
            self.violate(f"{number} was sent after a caller was told: rejected")

    def made(self, number: str, left_at: float) -> None:
        """Check a refund that the gateway made for a request that left a node at ``left_at``."""
        times = len(self.gateway.books[number])
        if times > 1 and not self._is_beyond_bounds(number, left_at):
            self.violate(f"{number} was made {times} times")
        if self.told.get(number) in ("rejected", "conflict"):
            self.violate(f"{number} was made after a caller was told: {self.told[number]}")

    def _is_beyond_bounds(self, number: str, since: float) -> bool:
        """Whether a wrong outcome is excused: the query service knew nothing, and the package could not notice it."""
        if self.is_blind and since < self.canary_since + 60:
            self.beyond_bounds.add(number)
        return number in self.beyond_bounds

    # ── at the journal ───────────────────────────────────────────────────────────────────────────

    def recorded(self, before: Entry | None, after: Entry) -> None:
        """Check an entry that the journal committed."""
        number = after.no_refund
        if after.state.is_made:
            self.canary_since = min(self.canary_since, self.time())
        if after.ending is None and after.sent_at is None:
            self.left.discard(number)  # proved: nothing was sent
        was_leased = before is None or before.holder is not None  # one commit may begin the call and record the outcome
        if was_leased and after.ending is not None and number not in self.left:
            self.ended_before_send.add(number)
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
            self.violate(f"{number}: its recorded outcome changed")
        if before.sent_at is not None and _content(after) != _content(before):
            self.violate(f"{number}: its recorded content changed")

    def leaves(self, body: bytes, entry: Entry | None) -> None:
        """Check an apply call that leaves a node with a journal; ``entry`` is the committed entry."""
        number = json.loads(body)["no_refund"]
        self.left.add(number)
        if number in self.ended_before_send:
            self.ended_before_send.discard(number)
        elif entry is None or entry.ending is not None or entry.sent_at is None:
            self.violate(
                f"{number} was sent; but its entry is {entry and entry.state}, sent at {entry and entry.sent_at}"
            )
        elif entry.body != body:
            self.violate(f"{number}: the bytes sent differ from the recorded bytes")

    # ── at a caller ──────────────────────────────────────────────────────────────────────────────

    def tell(self, request: RefundRequest, refund: Refund | None, error: BaseException | None) -> str:
        """Check the outcome that a caller got; return ``made``, ``rejected``, ``conflict`` or ``open``."""
        number = request.no_refund
        booked = self.gateway.books.get(number, [])
        self.log(f"told {number}: {refund and refund.sta_refund} {type(error).__name__ if error else ''}")
        if refund is not None:
            ours = [each for each in booked if _is(each.fields, request)]
            if not ours:
                self.violate(f"{number}: a caller was told: made; but the books have no such refund")
            is_one = len(booked) == 1  # beyond a bound there may be two refunds with different states
            if (
                refund.is_final
                and is_one
                and self.final.setdefault(number, str(refund.sta_refund)) != refund.sta_refund
            ):
                self.violate(f"{number}: its final state changed to {refund.sta_refund}")
            return self._end(number, "made")
        if isinstance(error, errors.RefundConflict):
            if number not in self.foreign:
                self.violate(f"{number}: a caller was told: conflict; but no other refund has this number: {error}")
            return self._end(number, "conflict")
        if isinstance(error, errors.RefundRejected):
            if error.may_pass or error.is_configuration:
                return "open"
            is_made = any(_is(each.fields, request) for each in booked)
            if is_made and not self._is_beyond_bounds(number, self.time()):
                self.violate(f"{number}: a caller was told: rejected; but the refund is on the books")
            return self._end(number, "rejected")
        if not isinstance(error, (errors.RefundOutcomeUnknown, errors.RefundNotSent, errors.JournalError)):
            self.violate(f"{number} ended in {error!r}")
        return "open"

    def _end(self, number: str, how: str) -> str:
        is_told_again = how == "conflict" and number in self.lost_endings  # in both cases the refund was not made
        if self.told.setdefault(number, how) != how and not is_told_again:
            self.violate(f"{number}: a caller was told: {how}; but another was told: {self.told[number]}")
        return how

    # ── at the end ───────────────────────────────────────────────────────────────────────────────

    def check_books(self, requests: Mapping[str, RefundRequest], *, forgiven: set[str]) -> None:
        """Check at the end of the run that all requested refunds are known, and agree with the books."""
        for number, request in requests.items():
            made = [each for each in self.gateway.books.get(number, ()) if _is(each.fields, request)]
            told = self.told.get(number)
            if told is None and number not in forgiven:
                self.violate(f"{number}: no caller was told an outcome")
            elif told is not None and (told == "made") != bool(made) and number not in self.beyond_bounds:
                self.violate(f"{number}: a caller was told: {told}; the books have it {len(made)} times")

    def check_journal(self, entries: Mapping[str, Entry]) -> None:
        """Check at the end that the journal has every outcome that a caller got, unless a failover lost it."""
        for number, how in self.told.items():
            entry = entries.get(number)
            if number not in self.lost_endings and (entry is None or entry.ending is None):
                self.violate(f"{number}: a caller was told: {how}; but the journal has no outcome")


@lru_cache(1000)
def _fields(request: RefundRequest) -> Mapping[str, str]:
    return request.to_dict()


def _is(booked: Mapping[str, str], request: RefundRequest) -> bool:
    asked = _fields(request)
    return all(booked[name] == asked[name] for name in ("no_refund", "dt_refund", "money_refund"))


def _content(entry: Entry) -> dict[str, str]:
    return {name: text for name, text in entry.fields.items() if name != "notify_url"}
