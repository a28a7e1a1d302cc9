"""The JSON form of ``RefundOutcomeUnknown``, so that an unknown refund can be stored outside Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final

from . import wire
from .clock import Moment
from .errors import InvalidRequest, MalformedMessage, Problem, RefundOutcomeUnknown, RefundRejected
from .models import RefundRequest

_VERSION: Final = 1


def to_dict(unknown: RefundOutcomeUnknown) -> dict[str, Any]:
    """Return ``unknown`` in its JSON form."""
    moment, refused = unknown.moment, unknown.refused
    return {
        "version": _VERSION,
        "request": unknown.request.to_dict(),
        "oid_partner": unknown.oid_partner,
        "body": unknown.body.decode(),
        "attempts": unknown.attempts,
        "queries": unknown.queries,
        "moment": {name: _json(getattr(moment, name)) for name in _MOMENT},
        "ask_again_at": _json(unknown.ask_again_at),
        "last_error": unknown.last_error,
        "refused": None if refused is None else {name: getattr(refused, name) for name in _REFUSED},
        "reason": unknown.reason,
    }


def from_dict(data: Mapping[str, Any]) -> RefundOutcomeUnknown:
    """Return the error in ``data``. Raises ``InvalidRequest`` with every wrong, missing or unknown field."""
    version = data.get("version") if isinstance(data, Mapping) else None
    if version != _VERSION:
        raise InvalidRequest([Problem("version", f"must be {_VERSION}", repr(version))])
    fields = _read(data, _UNKNOWN)
    del fields["version"]
    unknown = RefundOutcomeUnknown(**fields)
    if unknown.body and not _signs(unknown.body, unknown.request.to_dict() | {"oid_partner": unknown.oid_partner}):
        raise InvalidRequest([Problem("body", "must be the signed form of the request", "another message")])
    return unknown


def _signs(body: bytes, fields: Mapping[str, str]) -> bool:
    try:
        return fields.items() <= wire.decode(body).items()
    except MalformedMessage:
        return False


def _json(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else value


def _read(data: Any, parsers: Mapping[str, Callable[[Any], object]], where: str = "") -> dict[str, Any]:
    """Parse an object with exactly the keys of ``parsers``."""
    if not isinstance(data, Mapping):
        raise InvalidRequest([Problem(where.rstrip("."), "must be an object", type(data).__name__)])
    problems = [Problem(f"{where}{name}", "is not a known field", "it") for name in data if name not in parsers]
    values = dict[str, Any]()
    for name, parse in parsers.items():
        try:
            values[name] = parse(data[name])
        except KeyError:
            problems.append(Problem(f"{where}{name}", "is required", "nothing"))
        except InvalidRequest as error:
            problems += error.problems
        except (AttributeError, TypeError, ValueError) as error:
            problems.append(Problem(f"{where}{name}", str(error), type(data[name]).__name__))
    if problems:
        raise InvalidRequest(problems)
    return values


def _a(kind: type) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(f"must be of type {kind.__name__}")
        return value

    return parse


def _time(value: str) -> datetime:
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError("must have a UTC offset")
    return moment


def _or_none(parse: Callable[[Any], object]) -> Callable[[Any], object]:
    return lambda value: None if value is None else parse(value)


_MOMENT: Final[dict[str, Callable[[Any], object]]] = {
    "wall": _time,
    "boot": lambda value: float(_a(int if type(value) is int else float)(value)),
    "timeline": _a(str),
    "gateway": _or_none(_time),
}
_REFUSED: Final = {"ret_code": _a(str), "ret_msg": _a(str), "verified": _a(bool), "no_refund": _a(str)}
_UNKNOWN: Final[dict[str, Callable[[Any], object]]] = {
    "version": _a(int),
    "request": RefundRequest.from_record,
    "oid_partner": _a(str),
    "body": lambda value: _a(str)(value).encode(),
    "attempts": _a(int),
    "queries": _a(int),
    "moment": lambda value: Moment(**_read(value, _MOMENT, "moment.")),
    "ask_again_at": _time,
    "last_error": _a(str),
    "refused": _or_none(lambda value: RefundRejected(**_read(value, _REFUSED, "refused."))),
    "reason": _a(str),
}
