"""Group commit: operations that arrive while one transaction is written share the next one.

The batches are written by a background task, not by a caller, so the cancellation of a caller interrupts no batch.
"""

import os
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import chain
from typing import Any, Final, Self, TypeVar, cast

import anyio
import anyio.lowlevel
import attrs

from lianlian_async.background import BackgroundTask, complete, is_failure
from lianlian_async.models import check_storable

from .base import Entry, JournalError, Owner
from .interface import Journal
from .operations import Begin, Operation, Result

E = TypeVar("E", bound=Entry | None)

MAX_BATCH: Final = 500
"""Maximum number of operations in one transaction."""


@attrs.define(eq=False)
class Queued:
    """An operation whose caller waits for its result."""

    operation: Operation[Any]
    done: anyio.Event
    """Wakes the callers of a batch to check ``result``. An operation that gets its result later gets a new event."""
    result: Result | None = attrs.field(default=None, init=False)

    def fail(self, error: BaseException) -> None:
        """Give the caller a ``JournalError``, unless the operation has a result."""
        # A new exception for each caller: the traceback of a shared one would grow with each raise.
        self.result = self.result or Result(None, _failure(error))
        self.done.set()


class GroupCommitJournal(Journal):
    """Base of the durable journals: records operations by group commit. It works only in the event loop that opened it.

    If :meth:`_write` fails, each caller of its batch without a result gets a ``JournalError``; whether the operation
    was recorded is not known. If the background task fails or is cancelled, for example at the end of the event loop,
    all waiting and later callers get a ``JournalError``.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_open = False
        self._id = ""
        self.owner: Owner | None = None
        self._inbox: Journal | None = None
        self._inboxes = AsyncExitStack()
        self._inbox_lock = anyio.Lock()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name}>"

    @property
    def is_open(self) -> bool:
        return self._is_open

    async def __aenter__(self) -> Self:
        if self._is_open:
            raise RuntimeError(f"journal {self._name} is already open: enter each journal object only once at a time")
        self._process = os.getpid()
        self._event_loop = anyio.lowlevel.current_token()
        await self._open()
        self._batches = deque[list[Queued]]()
        self._writing: Sequence[Queued] = ()
        self._arrived = anyio.Event()
        self._failure: JournalError | None = None
        self._is_open = True
        self._background = BackgroundTask(self._run, self._end)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if os.getpid() == self._process:  # in a forked child, do nothing: the journal belongs to the parent
            self._check_usable()
            self._is_open, self._inbox = False, None
            self._arrived.set()
            with anyio.CancelScope(shield=True):
                async with self._inboxes:
                    try:
                        await complete(self._background.join)  # it writes all queued operations
                    finally:
                        await complete(self._close)

    @abstractmethod
    async def _open(self) -> None: ...

    @abstractmethod
    async def _close(self) -> None:
        """Close the journal. Must be idempotent: a cancelled call is repeated."""

    @abstractmethod
    def _new_inbox(self) -> Journal:
        """Return this journal's inbox, which is not open yet."""

    @abstractmethod
    async def _bind(self, owner: Owner) -> None: ...

    @abstractmethod
    async def _write(self, batch: Sequence[Queued]) -> None:
        """Record ``batch`` and give each of its operations a result, now or later."""

    def _check_usable(self) -> None:
        if not self._is_open:
            raise RuntimeError(f"journal {self._name} is not open: use it in `async with`")
        if os.getpid() != self._process:
            raise JournalError(
                f"journal {self._name} belongs to process {self._process}, the parent of this forked process; "
                "open the journal after the fork, in each process"
            )
        if anyio.lowlevel.current_token() != self._event_loop:
            raise RuntimeError(
                f"journal {self._name} was opened in another event loop: open it in the loop that uses it"
            )

    @property
    def id(self) -> str:
        self._check_usable()
        return self._id

    async def bind(self, oid_partner: str, apply_url: str) -> None:
        self._check_usable()
        owner = Owner(oid_partner, apply_url)
        if owner != self.owner:
            await self._bind(owner)
            self.owner = owner

    async def record(self, operation: Operation[E]) -> E:
        check_storable(operation.no_refund, "no_refund")
        self._check_usable()
        queued = self._put(operation)
        try:
            while queued.result is None:
                await queued.done.wait()
        except BaseException:  # a begin is taken back; any other operation is recorded nevertheless
            if isinstance(begin := operation.apply, Begin) and self._failure is None:
                begin.is_taken_back = (
                    True  # set now, not by take_back: PostgresJournal may be about to repeat this begin
                )
                self._put(Operation(operation.no_refund, begin.take_back))
            raise
        if queued.result.error is not None:
            raise queued.result.error
        return cast("E", queued.result.value)

    async def inbox(self) -> Journal:
        self._check_usable()
        async with self._inbox_lock:
            if self._inbox is None:
                self._inbox = await self._inboxes.enter_async_context(self._new_inbox())
            return self._inbox

    def _put(self, operation: Operation[Any]) -> Queued:
        if self._failure is not None:
            raise _failure(self._failure)
        if self._batches and len(self._batches[-1]) < MAX_BATCH:
            queued = Queued(operation, self._batches[-1][0].done)
            self._batches[-1].append(queued)
        else:
            queued = Queued(operation, anyio.Event())
            self._batches.append([queued])
            self._arrived.set()
        return queued

    async def _run(self) -> None:
        while self._batches or self._is_open:
            if self._batches:
                await anyio.lowlevel.checkpoint()  # tasks that are about to queue an operation join this batch
                await self._write_batch(self._batches.popleft())
            else:
                self._arrived = anyio.Event()
                await self._arrived.wait()

    async def _write_batch(self, batch: Sequence[Queued]) -> None:
        self._writing, done = batch, batch[0].done
        try:
            await self._write(batch)
        except BaseException as error:
            if not is_failure(error):
                raise
            for queued in batch:
                queued.fail(error)
        self._writing = ()
        done.set()

    def _end(self, error: BaseException | None) -> None:
        """Give each waiting caller an error if the background task has ended with ``error``."""
        if error is not None:
            self._failure = JournalError(
                f"journal {self._name}: its task ended with {error!r}, so it records nothing more; open it again"
            )
            self._failure.__cause__ = error
            for queued in chain(self._writing, *self._batches):
                queued.fail(self._failure)


def _failure(error: BaseException) -> JournalError:
    failure = JournalError(str(error))
    failure.__cause__ = error
    return failure
