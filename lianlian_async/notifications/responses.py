"""What can become of a delivery of a notification, and the HTTP response that each gets."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import attrs

from lianlian_async import wire

__all__ = ["ACKS", "NOT_HERE", "ONLY_POST", "Ack", "Verdict"]


class Verdict(StrEnum):
    """What became of one delivery; only what says so is acknowledged, LianLian sends all else again."""

    ACTED = "acted"
    """Acknowledged: the handler returned."""
    KEPT = "kept"
    """Acknowledged: it is in the inbox."""
    DUPLICATE = "duplicate"
    """Acknowledged: it was acted on, or is in the inbox, already."""
    NOT_FINAL = "not final"
    """Acknowledged: the refund's state can still change, there is nothing to act on."""
    MALFORMED = "malformed"
    INCOMPLETE = "incomplete"
    """Signed by LianLian, but without a field that acting on it needs, and that could not be asked for."""
    TOO_BIG = "too big"
    TOO_SLOW = "too slow"
    """The body did not arrive in time."""
    UNVERIFIED = "unverified"
    """Not signed by LianLian."""
    FOREIGN = "foreign"
    """Another merchant's."""
    CONTRADICTORY = "contradictory"
    """Signed by LianLian, but not what was applied for, or not the final state that is on record: look at it."""
    NOT_ADMITTED = "not admitted"
    """From an address that is not on the allow-list."""
    BUSY = "busy"
    """Another delivery of it has been with the handler for too long."""
    FAILED = "failed"
    """The handler failed or took too long, the gateway did not confirm, or the journal could not be written."""


@attrs.frozen
class Ack:
    """The HTTP response to a notification."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def _response(status: int, text: str, ret_code: str = "9999", **headers: str) -> Ack:
    headers = {"content-type": "application/json;charset=utf-8", **headers}
    return Ack(status, headers, wire.encode({"ret_code": ret_code, "ret_msg": text}))


_ACKNOWLEDGED: Final = _response(200, "ok", "0000")
ACKS: Final[Mapping[Verdict, Ack]] = {
    Verdict.ACTED: _ACKNOWLEDGED,
    Verdict.KEPT: _ACKNOWLEDGED,
    Verdict.DUPLICATE: _ACKNOWLEDGED,
    Verdict.NOT_FINAL: _ACKNOWLEDGED,
    Verdict.MALFORMED: _response(400, Verdict.MALFORMED),
    Verdict.INCOMPLETE: _response(503, Verdict.INCOMPLETE),
    Verdict.TOO_BIG: _response(413, Verdict.TOO_BIG),
    Verdict.TOO_SLOW: _response(408, Verdict.TOO_SLOW),
    Verdict.UNVERIFIED: _response(403, Verdict.UNVERIFIED),
    Verdict.FOREIGN: _response(403, Verdict.FOREIGN),
    Verdict.CONTRADICTORY: _response(409, Verdict.CONTRADICTORY),
    Verdict.NOT_ADMITTED: _response(403, Verdict.NOT_ADMITTED),
    Verdict.BUSY: _response(503, Verdict.BUSY),
    Verdict.FAILED: _response(500, Verdict.FAILED),
}
NOT_HERE: Final = _response(404, "not found")
ONLY_POST: Final = _response(405, "method not allowed", allow="POST")
