"""Convert and check the fields of requests, so that one ``InvalidRequest`` reports the problems of all fields.

A converter returns :class:`Broken` for an invalid value. ``__attrs_post_init__`` of the request reports all of them.
"""

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from functools import cache, partial, wraps
from typing import Any, Final, NamedTuple, TypeVar, cast

import attrs

from . import text_rules, wire
from .errors import InvalidRequest, Problem, printable

_NOT_STORABLE: Final = re.compile("[\0\ud800-\udfff]")

T = TypeVar("T")


class Broken(NamedTuple):
    """Replaces an invalid or missing value."""

    rule: str
    value: object


MISSING: Final = Broken("is required", attrs.NOTHING)


def _or_broken(parse: Callable[..., T], value: object, *limits: int) -> T:
    if isinstance(value, Broken):
        return cast("T", value)
    try:
        return parse(value, *limits)
    except ValueError as error:
        return cast("T", Broken(str(error), value))


def money(value: Decimal | int | str) -> Decimal:
    """Convert an amount in yuan."""
    return _or_broken(wire.parse_money, value)


def timestamp(value: datetime | str) -> datetime:
    """Convert a time."""
    return _or_broken(wire.parse_timestamp, value)


def new_number(value: str) -> str:
    """Check the ``no_refund`` of a new refund."""
    return _or_broken(text_rules.new_number, value, 32)


def string_32(value: str) -> str:
    """Check an identifier of at most 32 characters."""
    return _or_broken(text_rules.existing, value, 32)


def string_18(value: str) -> str:
    """Check an identifier of at most 18 characters."""
    return _or_broken(text_rules.existing, value, 18)


def string_16(value: str) -> str:
    """Check an identifier of at most 16 characters."""
    return _or_broken(text_rules.existing, value, 16)


def url(value: str) -> str:
    """Check a ``notify_url``."""
    return _or_broken(text_rules.notify_url, value)


@cache
def names(cls: type[Any]) -> tuple[str, ...]:
    """Return the names of the fields of ``cls``."""
    return tuple(field.name for field in attrs.fields(cls))


def values(instance: Any) -> dict[str, Any]:
    """Return the fields of ``instance`` by name."""
    return {name: getattr(instance, name) for name in names(instance.__class__)}


def shown(value: object) -> str:
    """Return ``value`` for an error message, cut off after 80 characters."""
    if value is attrs.NOTHING:
        return "nothing"
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def expect(value: object, kind: type, name: str) -> None:
    """Raise :class:`~lianlian_async.InvalidRequest` about the argument ``name`` unless ``value`` is a ``kind``."""
    if not isinstance(value, kind):
        rule = f"must be a {kind.__name__}"
        if isinstance(value, Mapping) and hasattr(kind, "from_dict"):
            rule += f" ({kind.__name__}.from_dict reads a mapping)"
        raise InvalidRequest([Problem(name, rule, f"{shown(value)} of type {type(value).__name__}")])


def check_storable(value: Any, name: str) -> None:
    """Raise :class:`~lianlian_async.InvalidRequest` about ``name`` unless ``value`` is a string that can be stored."""
    # A journal writes many refunds at once: another value would make the writes of all of them fail.
    expect(value, str, name)
    if _NOT_STORABLE.search(value):
        raise InvalidRequest([Problem(name, "must not contain NUL or a lone surrogate", shown(value))])


def fields_by_name(cls: type[T]) -> type[T]:
    """Decorate ``cls``, so that a missing or unknown field raises ``InvalidRequest`` instead of ``TypeError``."""
    init = cls.__init__

    @wraps(init)
    def checked(self: T, /, **fields: Any) -> None:
        call(partial(init, self), cls, fields)

    cls.__init__ = checked  # type: ignore[assignment,method-assign]
    return cls


def call(make: Callable[..., T], cls: type[Any], data: Mapping[str, Any]) -> T:
    """Call ``make`` with the fields in ``data``. Raises ``InvalidRequest`` with all of its problems."""
    arguments, problems = given(cls, data)
    try:
        made = make(**arguments)
    except InvalidRequest as error:
        problems += error.problems
    if problems:
        raise InvalidRequest(problems)
    return made


def given(cls: type[Any], data: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return ``data`` as arguments of ``cls``, with ``MISSING`` for each missing field, and the unknown fields."""
    expect(data, Mapping, "data")
    known = {field.name: field for field in attrs.fields(cls)}
    problems = [
        Problem(printable(str(key)), f"is not a field of {cls.__name__}", shown(data[key]))
        for key in data
        if key not in known
    ]
    required = {name: MISSING for name, field in known.items() if field.default is attrs.NOTHING}
    return required | {name: data[name] for name in known if name in data}, problems


def wire_text(value: object) -> str:
    """Return the wire form of a field."""
    match value:
        case datetime():
            return wire.format_timestamp(value)
        case Decimal():
            return wire.format_money(value)
        case _:
            return str(value)
