"""Checks of arguments of the public API. ``check_…`` raises ``ConfigurationError``."""

import sys
from inspect import iscoroutinefunction
from math import isnan
from types import UnionType
from typing import Final

from .errors import ConfigurationError

LOOPBACK_ONLY: Final = "LIANLIAN_LOOPBACK_ONLY"
"""The environment variable that limits connections to loopback. Our pytest plugin sets it, also for child processes."""

LONGEST: Final = 10**9
"""Seconds, about 32 years. Unlike infinity or 1e12 seconds, it can be added to a date."""


def is_number(value: object) -> bool:
    """Return whether ``value`` is a float but not NaN, or an int that a float can hold, but not a bool."""
    if isinstance(value, float):
        return not isnan(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_integer(name: str, value: object, *, least: int, most: int | None = None, bound: str = "") -> int:
    """Return ``value`` if it is an integer from ``least`` to ``most``; messages show ``most`` as ``bound``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        rule = f"of at least {least}" if most is None else f"from {least} to {bound}"
        raise ConfigurationError(f"{name}: must be an integer {rule}, is {value!r}")
    return value


def check_seconds(name: str, value: float, *, least: float | None = None, most: float = LONGEST) -> float:
    """Return ``value`` if it is a number of seconds from ``least`` (None: greater than 0) to ``most``."""
    if not is_number(value) or not (value > 0 if least is None else value >= least) or value > most:
        rule = "greater than 0" if least is None else f"of at least {least}"
        raise ConfigurationError(f"{name}: must be a number of seconds {rule} and at most {most}, is {value!r}")
    return value


def check_type(name: str, value: object, kind: type | UnionType) -> None:
    """Check that ``value`` is a ``kind``. The message shows only the type, because ``value`` may be a secret."""
    if not isinstance(value, kind):
        wanted = kind.__name__ if isinstance(kind, type) else str(kind)
        raise ConfigurationError(f"{name}: must be of type {wanted}, not {type(value).__name__}")


def check_function(name: str, value: object) -> None:
    """Check that ``value`` can be called and is not async: nobody would await its result, so it would never run."""
    if not callable(value) or any(map(iscoroutinefunction, (value, value.__call__))):
        raise ConfigurationError(f"{name}: must be a function, and not async")


def check_journal(journal: object) -> None:
    """Check that ``journal`` is a journal or None; a common mistake is the path of a ``SqliteJournal``."""
    if journal is not None and not hasattr(journal, "is_open"):
        raise ConfigurationError(
            f"journal: must be a journal, such as SqliteJournal(path), not {type(journal).__name__}"
        )
