"""The JSON form of ``RefundOutcomeUnknown``, so that an unknown refund can be stored outside Python."""

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, Final

from . import wire
from .clock import Moment
from .errors import InvalidRequest, MalformedMessage, Problem, RefundOutcomeUnknown, RefundRejected, printable
from .models import RefundRequest, check_storable
from .settings import LONGEST, is_number

_VERSION: Final = 1
_UNKNOWN: Final = {
    **dict.fromkeys(("oid_partner", "apply_url", "body", "last_error", "reason"), str),
    **dict.fromkeys(("version", "attempts", "queries"), int),
    "request": RefundRequest,
    "moment": Moment,
    "ask_again_at": datetime,
    "refused": RefundRejected,
}
_PARTS: Final[dict[type, dict[str, type]]] = {
    Moment: {"wall": datetime, "boot": float, "timeline": str, "gateway": datetime},
    RefundRejected: {"ret_code": str, "ret_msg": str, "verified": bool, "no_refund": str},
}
_ANY_TEXT: Final = ("last_error", "reason")
"""Fields with any text, such as that of a transport's exception: a journal does not store them."""
_MAY_BE_NONE: Final = ("moment.gateway", "refused")


def to_dict(unknown: RefundOutcomeUnknown) -> dict[str, Any]:
    """Return ``unknown`` in its JSON form."""
    return {"version": _VERSION} | {name: _json(getattr(unknown, name)) for name in _UNKNOWN if name != "version"}


def _json(value: Any) -> Any:
    match value:
        case datetime():
            return value.isoformat()
        case bytes():
            return value.decode()
        case RefundRequest():
            return value.to_dict()
        case Moment() | RefundRejected():
            return {name: _json(getattr(value, name)) for name in _PARTS[type(value)]}
    return value


def from_dict(data: Mapping[str, Any]) -> RefundOutcomeUnknown:
    """Return the error in ``data``. Raises ``InvalidRequest`` for the first wrong, missing or unknown field."""
    version = data.get("version") if isinstance(data, Mapping) else None
    if version != _VERSION:
        raise InvalidRequest([Problem("version", f"must be {_VERSION}", repr(version))])
    fields = _read(data, _UNKNOWN)
    del fields["version"]
    fields["body"] = fields["body"].encode()
    unknown = RefundOutcomeUnknown(**fields)
    if unknown.body and not _contains(unknown.body, unknown.request.to_dict() | {"oid_partner": unknown.oid_partner}):
        raise InvalidRequest([Problem("body", "must be the signed form of the request", "another message")])
    return unknown


def _contains(body: bytes, fields: Mapping[str, str]) -> bool:
    try:
        return fields.items() <= wire.decode(body).items()
    except MalformedMessage:
        return False


def _read(data: Any, kinds: Mapping[str, type], where: str = "") -> dict[str, Any]:
    """Return the parsed values of an object with exactly the keys of ``kinds``; ``where`` prefixes names in errors."""
    if not isinstance(data, Mapping):
        raise InvalidRequest([Problem(where.rstrip("."), "must be an object", type(data).__name__)])
    for name in (*data, *kinds):
        if name not in kinds:
            raise InvalidRequest([Problem(f"{where}{printable(str(name))}", "is not a known field", "a value")])
        if name not in data:
            raise InvalidRequest([Problem(f"{where}{name}", "is required", "nothing")])
    return {name: _parse(f"{where}{name}", data[name], kind) for name, kind in kinds.items()}


def _parse(name: str, given: Any, kind: type) -> Any:
    if given is None and name in _MAY_BE_NONE:
        return None
    if kind is RefundRequest:
        return RefundRequest.from_record(given)
    if kind is str and name not in _ANY_TEXT:
        check_storable(given, name)
    if kind in _PARTS:
        return kind(**_read(given, _PARTS[kind], f"{name}."))
    value: object = given
    if kind is float:  # other languages may write 5.0 as 5
        value = float(given) if is_number(given) and abs(given) < LONGEST else None
    elif kind is datetime and isinstance(given, str):
        with suppress(ValueError):
            value = datetime.fromisoformat(given)
    if type(value) is not kind or (isinstance(value, datetime) and value.tzinfo is None):
        rules = {datetime: "must be a time with a UTC offset", float: f"must be a number below {LONGEST:g}"}
        raise InvalidRequest([Problem(name, rules.get(kind, f"must be of type {kind.__name__}"), type(given).__name__)])
    return value
