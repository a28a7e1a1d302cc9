"""Group commit: what many tasks ask of a journal while one batch is being written makes up the next batch.

A task of the journal's own writes the batches, one at a time: whoever is cancelled takes no other's work along.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from itertools import count
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast
from uuid import uuid4

import anyio
import anyio.lowlevel
import attrs

from lianlian_async.background import BackgroundTask, complete
from lianlian_async.clock import Moment
from lianlian_async.event_loop import is_failure

from .base import Ending, Entry, Intent, Journal, JournalError, Owner, Standing
from .operations import Acted, Begin, Finish, Look, Operation, Release, Resend, Result, TakeBack

__all__ = ["GroupCommitJournal"]

T = TypeVar("T")

MAX_BATCH: Final = 500
"""Operations in one transaction. While one batch is written, the callers of the batch before ask for the next."""

ENOUGH: Final = 16
"""Operations: so many are not kept waiting for more."""

NAP: Final = 0.001
"""Seconds that a few operations wait for others, and again, if the first nap brings some."""

NAPS: Final = 2
"""At most: where the gateway is what takes time, every millisecond here makes a refund take longer."""


@attrs.define(eq=False)
class _Batch:
    """Operations that are written together, and their answers in the same order."""

    operations: list[Operation[Any]] = attrs.field(factory=list, init=False)
    answers: Sequence[Result] = attrs.field(default=(), init=False)
    is_full: bool = attrs.field(default=False, init=False)
    """Takes no more operations."""
    done: anyio.Event = attrs.field(factory=anyio.Event, init=False)

    def fail(self, error: BaseException) -> None:
        """Answer every operation with a ``JournalError``; one for each, as a traceback grows with each raise."""
        self.answers = self.answers or [Result(None, _failure(error)) for _ in self.operations]
        self.done.set()


class _GroupCommit:
    """Hands batches of operations to ``write``, and its answers to those who asked; ``name`` is the journal's.

    If ``write`` fails, nothing of its batch is recorded, and everyone in it gets a ``JournalError``. So does everyone,
    now and later, once the task that writes has ended in an error or was cancelled, as an event loop's end does.
    """

    def __init__(self, name: str, write: Callable[[Sequence[Operation[Any]]], Awaitable[Sequence[Result]]]) -> None:
        self._name = name
        self._write = write
        self._batches: deque[_Batch] = deque()
        self._asked = anyio.Event()
        self._stopping = False
        self._failure: JournalError | None = None
        self._background = BackgroundTask(self._drain, self._end)

    async def stop(self) -> None:
        """Write what has been asked for, and end; also if the caller is cancelled meanwhile."""
        self._stopping = True
        self._asked.set()
        await complete(self._background.join)

    async def do(self, operation: Operation[T], *, if_cancelled: Operation[None] | None = None) -> T:
        """Have ``operation`` recorded. Its answer, once that is durable.

        It is recorded even if the caller is cancelled meanwhile; ``if_cancelled`` then follows it.
        """
        batch, place = self._put(operation)
        try:
            await batch.done.wait()
            answer = batch.answers[place]
            while answer.later is not None:
                answer = await answer.later()
        except BaseException:
            if if_cancelled is not None and self._failure is None:
                self._put(if_cancelled)
            raise
        if answer.error is not None:
            raise answer.error
        return cast("T", answer.value)

    def _put(self, operation: Operation[Any]) -> tuple[_Batch, int]:
        if self._failure is not None:
            raise _failure(self._failure)
        if not self._batches or self._batches[-1].is_full:
            self._batches.append(_Batch())
            self._asked.set()
        batch = self._batches[-1]
        batch.operations.append(operation)
        batch.is_full = len(batch.operations) == MAX_BATCH
        return batch, len(batch.operations) - 1

    async def _drain(self) -> None:
        while self._batches or not self._stopping:
            if self._batches:
                # It stays in the queue until it is done, where the end of this task finds it.
                await self._gather(self._batches[0])
                await self._write_batch(self._batches[0])
                self._batches.popleft()
            else:
                self._asked = anyio.Event()
                await self._asked.wait()

    def _end(self, error: BaseException | None) -> None:
        """Release everyone who still waits: the task that writes has ended."""
        if error is not None:
            self._failure = JournalError(
                f"journal {self._name}: nothing more is recorded, open it again; it was closed by {error!r}"
            )
            self._failure.__cause__ = error
            for batch in self._batches:
                batch.fail(self._failure)

    async def _gather(self, batch: _Batch) -> None:
        """Let others ask, too, who are about to: a batch costs as much as ten operations in it.

        Whoever is alone is not kept waiting, so that one refund after the other takes no longer.
        """
        await anyio.lowlevel.checkpoint()
        naps, before = 0, 1
        while naps < NAPS and before < len(batch.operations) < ENOUGH:
            naps, before = naps + 1, len(batch.operations)
            await anyio.sleep(NAP)

    async def _write_batch(self, batch: _Batch) -> None:
        batch.is_full = True
        try:
            batch.answers = await self._write(batch.operations)
        except BaseException as error:
            if not is_failure(error):
                raise
            batch.fail(error)
        else:
            batch.done.set()


def _failure(error: BaseException) -> JournalError:
    failure = JournalError(str(error))
    failure.__cause__ = error
    return failure


class GroupCommitJournal:
    """What the durable journals share: being open, in one process, and their verbs as operations of a group."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._group: _GroupCommit | None = None
        self._id = ""
        self._owner: Owner | None = None
        self._inbox: Journal | None = None
        self._inboxes = AsyncExitStack()
        self._inbox_turn = anyio.Lock()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name}>"

    @property
    def is_open(self) -> bool:
        """See :attr:`Journal.is_open`."""
        return self._group is not None

    async def __aenter__(self) -> Self:
        if self._group is not None:
            raise RuntimeError(f"journal {self._name} is open already")
        self._process = os.getpid()
        self._holder, self._calls = uuid4().hex, count(1)
        await self._open()
        self._group = _GroupCommit(self._name, self._write)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if os.getpid() == self._process:  # a forked child leaves everything to its parent
            group, self._group = self._opened(), None
            self._inbox = None
            with anyio.CancelScope(shield=True):
                async with self._inboxes:
                    try:
                        await group.stop()
                    finally:
                        await complete(self._close)

    @abstractmethod
    async def _open(self) -> None: ...

    @abstractmethod
    async def _close(self) -> None:
        """Close it; idempotent, as a cancelled call is made again."""

    @abstractmethod
    def _beside(self) -> Journal:
        """Another journal of this kind, at the place that belongs to this one's inbox."""

    @abstractmethod
    async def _bind(self, owner: Owner) -> None: ...

    @abstractmethod
    async def _write(self, operations: Sequence[Operation[Any]]) -> Sequence[Result]: ...

    def _opened(self) -> _GroupCommit:
        if self._group is None:
            raise RuntimeError(f"journal {self._name} is not open: use it in `async with`")
        if os.getpid() != self._process:
            raise JournalError(
                f"journal {self._name} belongs to process {self._process}, which this one was forked from; "
                "open journals after forking, each process its own"
            )
        return self._group

    @property
    def id(self) -> str:
        """See :attr:`Journal.id`."""
        self._opened()
        return self._id

    async def bind(self, oid_partner: str, apply_url: str) -> None:
        """See :meth:`Journal.bind`."""
        self._opened()
        owner = Owner(oid_partner, apply_url)
        if owner != self._owner:
            await self._bind(owner)
            self._owner = owner

    async def begin(self, intent: Intent, now: Moment) -> tuple[Standing, Entry]:
        """See :meth:`Journal.begin`."""
        group = self._opened()
        begin = Begin(intent, now, f"{self._holder}-{next(self._calls)}")
        return await group.do(begin, if_cancelled=TakeBack(begin))

    async def resend(self, entry: Entry) -> None:
        """See :meth:`Journal.resend`."""
        await self._opened().do(Resend(entry))

    async def finish(self, entry: Entry, ending: Ending) -> Entry:
        """See :meth:`Journal.finish`."""
        return await self._opened().do(Finish(entry, ending))

    async def acted(self, no_refund: str) -> None:
        """See :meth:`Journal.acted`."""
        await self._opened().do(Acted(no_refund))

    async def release(self, entry: Entry, sent_at: Moment | None, refused: Mapping[str, str] | None = None) -> None:
        """See :meth:`Journal.release`."""
        await self._opened().do(Release(entry, sent_at, refused))

    async def find(self, no_refund: str) -> Entry | None:
        """See :meth:`Journal.find`."""
        return await self._opened().do(Look(no_refund))

    async def inbox(self) -> Journal:
        """See :meth:`Journal.inbox`."""
        self._opened()
        async with self._inbox_turn:
            if self._inbox is None:
                self._inbox = await self._inboxes.enter_async_context(self._beside())
            return self._inbox
