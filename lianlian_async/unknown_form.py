"""The JSON form of ``RefundOutcomeUnknown``, so that an unknown refund can be stored outside Python."""

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from . import wire
from .clock import Moment
from .errors import InvalidRequest, MalformedMessage, Problem, RefundOutcomeUnknown, RefundRejected
from .models import RefundRequest
from .settings import is_number

_VERSION: Final = 1
_UNKNOWN: Final = {
    **dict.fromkeys(("oid_partner", "body", "last_error", "reason"), str),
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
_MAY_BE_NONE: Final = ("gateway", "refused")


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
    """Return the error in ``data``. Raises ``InvalidRequest`` with every wrong, missing or unknown field."""
    version = data.get("version") if isinstance(data, Mapping) else None
    if version != _VERSION:
        raise InvalidRequest([Problem("version", f"must be {_VERSION}", repr(version))])
    fields = _read(data, _UNKNOWN)
    del fields["version"]
    fields["body"] = fields["body"].encode(errors="surrogatepass")  # a body with lone surrogates is refused below
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
    problems = [Problem(f"{where}{name}", "is not a known field", "a value") for name in data if name not in kinds]
    values = dict[str, Any]()
    for name, kind in kinds.items():
        try:
            values[name] = _parse(name, data[name], kind)
        except KeyError:
            problems.append(Problem(f"{where}{name}", "is required", "nothing"))
        except InvalidRequest as error:
            problems += error.problems
        except (TypeError, ValueError, OverflowError) as error:
            problems.append(Problem(f"{where}{name}", str(error), type(data[name]).__name__))
    if problems:
        raise InvalidRequest(problems)
    return values


def _parse(name: str, value: Any, kind: type) -> Any:
    if value is None and name in _MAY_BE_NONE:
        return None
    if kind is RefundRequest:
        return RefundRequest.from_record(value)
    if kind in _PARTS:
        return kind(**_read(value, _PARTS[kind], f"{name}."))
    if kind is float and is_number(value):  # a JSON writer of another language may write 5.0 as 5
        if math.isinf(value):
            raise ValueError("must be finite")
        return float(value)
    if kind is datetime:
        value = datetime.fromisoformat(value)
        if value.tzinfo is None:
            raise ValueError("must have a UTC offset")
    if kind is float or type(value) is not kind:
        raise TypeError(f"must be of type {kind.__name__}")
    return value
