"""The verdict on each delivered notification, and its HTTP response."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import attrs

from lianlian_async import wire


class Verdict(StrEnum):
    """The result of one delivery. LianLian repeats a delivery, at most 30 times, until it is acknowledged."""

    ACTED = "acted"
    """Acknowledged: the handler returned."""
    KEPT = "kept"
    """Acknowledged: recorded in the inbox."""
    DUPLICATE = "duplicate"
    """Acknowledged: the handler has already returned for it, or it is already in the inbox."""
    NOT_FINAL = "not final"
    """Acknowledged: the refund's state can still change."""
    MALFORMED = "malformed"
    INCOMPLETE = "incomplete"
    """Signed by LianLian, but a required field is missing, and no query supplied it."""
    TOO_BIG = "too big"
    TOO_SLOW = "too slow"
    """The body did not arrive in time."""
    UNVERIFIED = "unverified"
    """Not signed by LianLian."""
    FOREIGN = "foreign"
    """For another merchant."""
    CONTRADICTORY = "contradictory"
    """Signed by LianLian, but it contradicts the request, the recorded state or a query: check the refund by hand."""
    NOT_ADMITTED = "not admitted"
    """From an address that is not on the allow-list."""
    BUSY = "busy"
    """Another task or process may still be running the handler for this refund."""
    FAILED = "failed"
    """Any other failure: of the handler (also by timeout), the confirmation or the journal, for example."""


@attrs.frozen
class Ack:
    """The HTTP response to a notification."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def _response(status: int, text: str, ret_code: str = "9999", **headers: str) -> Ack:
    headers = {"content-type": "application/json;charset=utf-8", **headers}
    return Ack(status, headers, wire.encode({"ret_code": ret_code, "ret_msg": text}))


_ACKNOWLEDGED: Final = (Verdict.ACTED, Verdict.KEPT, Verdict.DUPLICATE, Verdict.NOT_FINAL)
_STATUS: Final = {
    Verdict.MALFORMED: 400,
    Verdict.INCOMPLETE: 503,
    Verdict.TOO_BIG: 413,
    Verdict.TOO_SLOW: 408,
    Verdict.UNVERIFIED: 403,
    Verdict.FOREIGN: 403,
    Verdict.CONTRADICTORY: 409,
    Verdict.NOT_ADMITTED: 403,
    Verdict.BUSY: 503,
    Verdict.FAILED: 500,
}
ACKS: Final[Mapping[Verdict, Ack]] = {
    **dict.fromkeys(_ACKNOWLEDGED, _response(200, "ok", "0000")),
    **{verdict: _response(status, verdict) for verdict, status in _STATUS.items()},
}
NOT_HERE: Final = _response(404, "not found")
ONLY_POST: Final = _response(405, "method not allowed", allow="POST")
