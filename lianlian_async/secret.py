"""Keep secrets out of output: a container that does not show its value, and tracebacks without local variables.

Error trackers copy the local variables of every frame of a traceback. Decorate functions with a key, passphrase or
password as an argument with :func:`without_locals`.
"""

import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Secret(Generic[T]):
    """Holds a value that ``repr``, ``vars`` and ``attrs.asdict`` do not show. Compares by value."""

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
    """Decorate ``function``: if it raises, clear the local variables of its frames in the tracebacks of the error.

    An error raised ``from None`` also loses its context, whose text may quote a secret.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        outer = sys.exception()  # the exception that the caller is handling: keep it unchanged
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            del args, kwargs
            link: BaseException | None = error
            while link is not None and link is not outer:
                traceback.clear_frames(link.__traceback__)
                if link.__suppress_context__:
                    link.__context__ = link.__cause__
                link = link.__context__
            raise

    return wrapper


def drop_secrets(error: BaseException | None) -> None:
    """Remove tracebacks and connections from ``error`` and its context: they may contain a database password."""
    while error is not None:
        error.__traceback__ = None
        if "_pgconn" in vars(error):  # psycopg: the failed connection, password included
            vars(error)["_pgconn"] = None
        error = error.__context__


def init_without_locals(cls: type[T]) -> type[T]:
    """Decorate a class: apply :func:`without_locals` to its ``__init__``, which attrs generates."""
    cls.__init__ = without_locals(cls.__init__)  # type: ignore[method-assign]
    return cls
