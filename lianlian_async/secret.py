"""Secrets in memory: a holder that shows nothing, and errors whose frames hold no local variables.

Error trackers and tracebacks "with locals" copy the variables of every frame that an error passed. No key, passphrase
or password may be among them: functions that get one as an argument are decorated with :func:`without_locals`.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Generic, ParamSpec, TypeVar

__all__ = ["Secret", "drop_secrets", "init_without_locals", "without_locals"]

P = ParamSpec("P")
T = TypeVar("T")


class Secret(Generic[T]):
    """Holds a value that neither ``repr`` nor ``vars`` nor ``attrs.asdict`` shows. Compares by that value."""

    __slots__ = ("reveal",)

    def __init__(self, value: T) -> None:
        self.reveal: Callable[[], T] = lambda: value
        """Return the value."""

    def __repr__(self) -> str:
        return "<Secret>"

    def __eq__(self, other: object) -> bool:
        return self.reveal() == other.reveal() if isinstance(other, Secret) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.reveal())


def without_locals(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate ``function``: the frames of an error that leaves it keep their lines, but no local variables.

    An error that was raised ``from None`` loses its context, whose text may quote a secret.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        outer = sys.exception()  # the caller is handling it: its frames are not ours to clear
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            del args, kwargs
            link: BaseException | None = error
            while link is not None and link is not outer:
                traceback.clear_frames(link.__traceback__)
                if link.__suppress_context__:
                    link.__context__ = link.__cause__
                link = link.__context__  # where there is a __cause__, Python has set it as the context, too
            raise

    return wrapper


def drop_secrets(error: BaseException | None) -> None:
    """Take from a foreign ``error``, and from all that it hangs on, whatever may hold a database's password."""
    while error is not None:
        error.__traceback__ = None
        if "_pgconn" in vars(error):  # the settings of psycopg's failed connection, password included
            vars(error)["_pgconn"] = None
        error = error.__context__


def init_without_locals(cls: type[T]) -> type[T]:
    """Decorate a class whose ``__init__`` is generated: see :func:`without_locals`."""
    cls.__init__ = without_locals(cls.__init__)  # type: ignore[method-assign]
    return cls
