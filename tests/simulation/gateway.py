"""The gateway: it makes a refund for each apply call that it receives. Its books are the truth.

It guarantees one bound: a request that left a node is on the books within ``GRACE - MARGIN`` seconds, or never.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from email.utils import format_datetime
from functools import lru_cache
from typing import Any

import attrs

from lianlian_async import wire
from lianlian_async.signing import SigningKey, signature_source

from .clocks import EPOCH
from .oracle import Oracle
from .plan import GRACE, MARGIN, Plan
from .world import World


@lru_cache(100)
def date(second: int) -> str:
    """Return the ``Date`` header of an answer sent at ``second``."""
    return format_datetime(EPOCH + timedelta(seconds=second), usegmt=True)


WireAnswer = tuple[int, dict[str, str], bytes]
"""HTTP status, headers, body."""

UNCERTAIN = ("1007", "5005", "8117", "9000", "9091", "9902", "9920", "9990", "9999", "4711")


@attrs.define(eq=False)
class Booked:
    """One refund on the books."""

    fields: Mapping[str, str]
    made_at: float
    visible_at: float
    """The time from which the query service knows the refund."""
    oid_refundno: str
    final: str
    """The final ``sta_refund``."""
    final_at: float


@attrs.define(eq=False)
class Gateway:
    """The apply service, the query service, and their books."""

    world: World
    plan: Plan
    key: SigningKey
    oracle: Oracle
    books: dict[str, list[Booked]] = attrs.field(factory=dict)
    refused: set[str] = attrs.field(factory=set)
    """The ``no_refund`` values that are rejected permanently."""
    announce: Callable[[Booked], None] = lambda booked: None
    """Called with each refund that is made."""
    is_down: bool = False
    is_blind: bool = attrs.field(init=False)
    """Whether the query service answers "no such record" to everything."""
    is_calm: bool = False
    """Whether all faults have ended."""

    def __attrs_post_init__(self) -> None:
        self.is_blind = self.plan.blind

    def answer(self, call: str, body: bytes, left_at: float, fault: str | None) -> WireAnswer | None:
        """Handle one request and return the answer; None: there is never an answer."""
        asked = json.loads(body)
        if fault == "status_before":
            return self._status()
        if call == "query":
            return self._query(asked, fault)
        if fault == "code_before":
            return self.signed({"ret_code": self.world.random.choice(UNCERTAIN), "ret_msg": "later"}, fault)
        return self._apply(asked, left_at, fault)

    def _status(self) -> WireAnswer:
        status = self.world.random.choice([500, 502, 503, 429, 302, 404])
        headers = {"retry-after": "3"} if status in (429, 503) else {}
        return status, headers, b"<html>busy</html>"

    # ── apply ────────────────────────────────────────────────────────────────────────────────────

    def _apply(self, asked: dict[str, str], left_at: float, fault: str | None) -> WireAnswer:
        number = asked["no_refund"]
        if number in self.refused:
            return self._refusal(asked, "5003")
        booked = self.books.get(number, [])
        if fault == "may_pass" and not booked:
            return self._refusal(asked, "5006")
        if booked and self.plan.deduplicates == "replay":
            return self.signed(self.record(booked[0]), fault)
        if booked and self.plan.deduplicates == "code":
            code = self.world.random.choice(["1002", "9983", "5007"]) if fault != "in_progress" else "2005"
            return self._refusal(asked, code)
        late = fault in ("late_books", "code_after", "in_progress") and "late_books" in self.plan.faults
        made = self.make(asked, left_at, late=late)
        if fault == "status_after":
            return self._status()
        if fault == "code_after":
            return self.signed({"ret_code": self.world.random.choice(UNCERTAIN), "ret_msg": "later"}, None)
        if fault == "in_progress":
            return self.signed({"ret_code": "2005", "ret_msg": "processing"}, None)
        if fault == "late_books":  # it has no answer yet
            return self.signed({"ret_code": "1007", "ret_msg": "busy"}, None)
        return self.signed(self.record(made), fault)

    def make(self, asked: Mapping[str, str], left_at: float, *, late: bool = False) -> Booked:
        """Make a refund: the money moves."""
        now, dice = self.world.now, self.world.random
        latest = max(now, left_at + GRACE - MARGIN)
        visible_at = now + (latest - now) * dice.random() if late else now
        final_at = now + 3600 * dice.random() if dice.random() < 0.2 else now
        made = Booked(asked, now, visible_at, f"{1_000_000 + len(self.books):016d}", dice.choice("2223"), final_at)
        self.books.setdefault(asked["no_refund"], []).append(made)
        if self.world.trace is not None:
            self.world.log(f"gateway: makes {asked['no_refund']}, on the books at {visible_at:.3f}")
        self.oracle.made(asked["no_refund"], left_at)
        self.announce(made)
        return made

    def _refusal(self, asked: Mapping[str, str], code: str) -> WireAnswer:
        echo = {name: asked[name] for name in ("no_refund", "money_refund", "oid_partner")}
        return self.signed({"ret_code": code, "ret_msg": "refused", **echo}, None)

    def record(self, booked: Booked) -> dict[str, str]:
        """Return the fields of a refund in its current state."""
        age = self.world.now - booked.made_at
        status = booked.final if self.world.now >= booked.final_at else ("0" if age < 60 else "1")
        names = ("oid_partner", "no_refund", "dt_refund", "money_refund")
        told = {name: booked.fields[name] for name in names}
        return {"ret_code": "0000", "ret_msg": "ok", **told, "oid_refundno": booked.oid_refundno, "sta_refund": status}

    # ── query ────────────────────────────────────────────────────────────────────────────────────

    def _query(self, asked: dict[str, str], fault: str | None) -> WireAnswer:
        if fault in ("code_before", "code_after"):
            return self.signed({"ret_code": self.world.random.choice(["9921", "9999", "9902"]), "ret_msg": "no"}, None)
        if fault == "status_after":
            return self._status()
        known = [each for each in self.books.get(asked["no_refund"], ()) if each.visible_at <= self.world.now]
        if not known or self.is_blind:
            return 200, {}, wire.encode({"ret_code": "8901", "ret_msg": "none"})
        return self.signed(self.record(known[0]), fault)

    def signed(self, fields: Mapping[str, str], fault: str | None) -> WireAnswer:
        """Return a signed answer or notification with these fields."""
        told = {**fields, "oid_partner": fields.get("oid_partner", "201103171000000000"), "sign_type": "RSA"}
        if fault == "no_signature":
            return 200, {}, wire.encode(fields)
        source = signature_source(told)
        told["sign"] = self.key.sign(source + b"?" if fault == "bad_signature" else source)
        return 200, {}, wire.encode(told)

    def facts(self) -> dict[str, Any]:
        """Return how many times each ``no_refund`` was made."""
        return {number: len(booked) for number, booked in self.books.items()}
