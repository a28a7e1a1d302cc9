"""Deliver events to listeners, and to the logger ``lianlian_async``: one line for the outcome of each refund call.

A refund that was made is logged at INFO, a refund call that failed at WARNING, and so is a query that finds a conflict.
All other events, except the beginnings of calls and requests, are logged at DEBUG.
``record.event_name`` is the type of the event (:mod:`lianlian_async.events`); the event's fields are attributes of the
record. A session shows the lines on stderr if the environment variable ``LIANLIAN_LOG`` is ``info`` or ``debug``. For
JSON lines, set up ``logging`` or structlog::

    import logging
    from pythonjsonlogger.json import JsonFormatter        # pip install python-json-logger
    from structlog.processors import JSONRenderer
    from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level

    json_formatter = JsonFormatter("%(levelname)s %(message)s")
    structlog_formatter = ProcessorFormatter(JSONRenderer(), foreign_pre_chain=[add_log_level, ExtraAdder()])

    def set_up(formatter):
        handler = logging.StreamHandler()
        handler.setFormatter(formatter)
        logging.getLogger("lianlian_async").addHandler(handler)
        logging.getLogger("lianlian_async").setLevel(logging.INFO)
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Final

import attrs

from .errors import ConfigurationError
from .events import AttemptBegan, CallBegan, CallEnded, Event, Listener
from .settings import check_function, check_type

SLOW: Final = 0.01
"""Seconds. A listener that takes longer for one event is reported in the log."""

logger = logging.getLogger("lianlian_async")
_NOTHING: Final = nullcontext()
_HANDLER: Final = logging.StreamHandler()
_HANDLER.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))


def set_up_from_environment() -> None:
    """Show the log on stderr if ``LIANLIAN_LOG`` is set. Raises ``ConfigurationError`` for an unknown value."""
    if wanted := os.environ.get("LIANLIAN_LOG"):
        if wanted not in ("debug", "info"):
            raise ConfigurationError(f"LIANLIAN_LOG: must be debug or info, is {wanted!r}")
        logger.setLevel(wanted.upper())
        logger.addHandler(_HANDLER)  # a second call with the same handler has no effect


class Listeners:
    """The listeners of one session or endpoint, and the logger if ``is_logged``; ``timer`` returns seconds."""

    def __init__(
        self, listeners: Iterable[Listener] = (), *, timer: Callable[[], float] = float, is_logged: bool = False
    ) -> None:
        check_type("listeners", listeners, Iterable)
        self._listeners = tuple(listeners)
        for each in self._listeners:
            check_function("listeners", each)
        self.timer = timer  # the default, float(), always returns 0.0: no durations are measured
        self._is_logged = is_logged
        self._reported = set[tuple[int, str]]()
        self.backend = ""

    def want(self, level: int = logging.DEBUG) -> bool:
        """Return whether a listener, or the logger at ``level``, wants an event."""
        return bool(self._listeners) or (self._is_logged and logger.isEnabledFor(level))

    def tell(self, kind: type[Event], **fields: Any) -> None:
        """Deliver an event, and exit the context managers of the listeners at once."""
        with self.span(kind, **fields):
            pass

    def span(self, kind: type[Event], **fields: Any) -> AbstractContextManager[None]:
        """Return a context manager that delivers an event. When it exits, the listeners' context managers exit."""
        is_wanted = self.want() or kind is CallEnded
        return self._deliver(kind(backend=self.backend, **fields)) if is_wanted else _NOTHING

    @contextmanager
    def _deliver(self, event: Event) -> Iterator[None]:
        with ExitStack() as entered:
            for each in self._listeners:
                self._call(each, self._enter, each, event, entered)
            _log(event)
            yield

    def _enter(self, listener: Listener, event: Event, entered: ExitStack) -> None:
        context: Any = listener(event)
        if hasattr(context, "__exit__"):
            context.__enter__()
            entered.push(partial(self._call, listener, context.__exit__))

    def _call(self, listener: Listener, function: Callable[..., object], *arguments: Any) -> None:
        """Call ``function``, which is code of ``listener``, and log what it raises."""
        began = self.timer()
        try:
            function(*arguments)  # ignore the result: if __exit__ returned true, it would suppress a refund's error
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - even CancelledError is a failure: the function is not async
            self._warn_once(listener, "listener %s failed; its further failures are not logged", error)
        if self.timer() - began > SLOW:
            self._warn_once(listener, "listener %s blocked the event loop for more than 10 ms")

    def _warn_once(self, listener: Listener, message: str, error: BaseException | None = None) -> None:
        if (id(listener), message) not in self._reported:
            self._reported.add((id(listener), message))
            logger.warning(message, getattr(listener, "__qualname__", type(listener).__qualname__), exc_info=error)


def _log(event: Event) -> None:
    level, text = logging.DEBUG, None
    if isinstance(event, CallEnded) and (
        event.outcome == "RefundConflict" or (event.call != "query_refund" and event.outcome != "cancelled")
    ):
        level, text = (logging.INFO if event.error is None else logging.WARNING), event.error
    # The beginnings of calls and requests are not logged, because their ends are.
    if logger.isEnabledFor(level) and not isinstance(event, CallBegan | AttemptBegan):
        name, fields = type(event).__name__, attrs.asdict(event, recurse=False)
        text = text or " ".join([name, *(f"{field}={value}" for field, value in fields.items() if value is not None)])
        logger.log(level, "%s", text, extra={"event_name": name, **fields})


NOBODY: Final = Listeners()
"""For callers without listeners and log."""
