"""Group commit: what many tasks ask for while one batch is being written makes up the next batch.

A task of the journal's own writes the batches, one at a time: whoever is cancelled takes no other's work along.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar, cast

import anyio
import attrs

from lianlian_async.background import Background

from .base import JournalError
from .operations import Answer, Operation

__all__ = ["GroupCommit"]

T = TypeVar("T")

MAX_BATCH: Final = 500
"""Operations in one transaction. While one batch is written, the callers of the batch before ask for the next."""


@attrs.define(eq=False)
class _Ticket:
    operation: Operation[Any]
    done: anyio.Event = attrs.field(factory=anyio.Event, init=False)
    answer: Answer = attrs.field(default=Answer(None), init=False)


class GroupCommit:
    """Hands batches of operations to ``write``, whose answers go to those who asked.

    If ``write`` fails, nothing of its batch is recorded, and everyone in it gets a ``JournalError``.
    """

    def __init__(self, write: Callable[[Sequence[Operation[Any]]], Awaitable[Sequence[Answer]]]) -> None:
        self._write = write
        self._queue: deque[_Ticket] = deque()
        self._asked = anyio.Event()
        self._stopping = False
        self._stopped = anyio.Event()
        Background(self._drain)

    async def stop(self) -> None:
        """Write what has been asked for, and end."""
        self._stopping = True
        self._asked.set()
        with anyio.CancelScope(shield=True):
            await self._stopped.wait()

    async def do(self, operation: Operation[T], *, if_cancelled: Operation[None] | None = None) -> T:
        """Have ``operation`` recorded. Its answer, once that is durable.

        It is recorded even if the caller is cancelled meanwhile; ``if_cancelled`` then follows it.
        """
        if self._stopping:
            raise RuntimeError("this journal is closed")
        ticket = self._put(operation)
        try:
            await ticket.done.wait()
        except BaseException:
            if if_cancelled is not None:
                self._put(if_cancelled)
            raise
        if ticket.answer.error is not None:
            raise ticket.answer.error
        return cast("T", ticket.answer.value)

    def _put(self, operation: Operation[Any]) -> _Ticket:
        ticket = _Ticket(operation)
        self._queue.append(ticket)
        self._asked.set()
        return ticket

    async def _drain(self) -> None:
        while self._queue or not self._stopping:
            if self._queue:
                await self._write_batch([self._queue.popleft() for _ in range(min(len(self._queue), MAX_BATCH))])
            else:
                self._asked = anyio.Event()
                await self._asked.wait()
        self._stopped.set()

    async def _write_batch(self, batch: Sequence[_Ticket]) -> None:
        try:
            answers = await self._write([ticket.operation for ticket in batch])
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is awaited
            for ticket in batch:
                ticket.answer = Answer(None, _failure(error))
        else:
            for ticket, answer in zip(batch, answers, strict=True):
                ticket.answer = answer
        for ticket in batch:
            ticket.done.set()


def _failure(error: Exception) -> JournalError:
    """One for each waiter: an exception that is raised in many tasks grows with each."""
    failure = JournalError(str(error))
    failure.__cause__ = error
    return failure
