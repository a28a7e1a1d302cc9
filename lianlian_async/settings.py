"""Checks of the arguments that users set: each raises ``ConfigurationError`` that names the argument and its value."""

from __future__ import annotations

from types import UnionType

from .errors import ConfigurationError

__all__ = ["check_integer", "check_journal", "check_type", "is_number", "positive_seconds"]


def is_number(value: object) -> bool:
    """Return whether ``value`` is an int or float; a bool, a NaN, and text such as ``"30"`` are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # noqa: PLR0124 - NaN


def check_integer(name: str, value: object, *, least: int, most: int | None = None, bound: str = "") -> int:
    """Return ``value``, an integer of at least ``least`` and at most ``most``, which messages call ``bound``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        rule = f"of at least {least}" if most is None else f"from {least} to {bound}"
        raise ConfigurationError(f"{name}: must be an integer {rule}, is {value!r}")
    return value


def positive_seconds(name: str, value: float) -> float:
    """Return ``value``, a number of seconds that is more than 0."""
    if not is_number(value) or not value > 0:
        raise ConfigurationError(f"{name}: must be more than 0 and a number of seconds, is {value!r}")
    return value


def check_type(name: str, value: object, kind: type | UnionType) -> None:
    """Refuse ``value`` if it is no ``kind``; only its type is shown, since it may be a secret."""
    if not isinstance(value, kind):
        wanted = kind.__name__ if isinstance(kind, type) else str(kind)
        raise ConfigurationError(f"{name}: must be of type {wanted}, not {type(value).__name__}")


def check_journal(journal: object) -> None:
    """Refuse what is neither a journal nor None: a path, for example, which belongs into ``SqliteJournal``."""
    if journal is not None and not hasattr(journal, "is_open"):
        raise ConfigurationError(
            f"journal: must be a journal, such as SqliteJournal(path), not {type(journal).__name__}"
        )
