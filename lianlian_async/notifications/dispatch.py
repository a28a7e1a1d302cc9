"""Acting on a final state: who may, the handler within its time, and what becomes of the refund that it held."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import Any, Protocol, TypeVar

import anyio

from lianlian_async.background import is_failure
from lianlian_async.journal import Standing
from lianlian_async.models import Refund

__all__ = ["Book", "act_on"]

logger = logging.getLogger("lianlian_async")

Held = TypeVar("Held")


class Book(Protocol[Held]):
    """Knows which final states were notified, and which of them were acted on."""

    async def learn(self, refund: Refund) -> Refund:
        """``refund``, if nothing that is on record contradicts it, with what it leaves out; else ``RefundConflict``."""

    async def take(self, refund: Refund) -> tuple[Standing, Held]:
        """Take hold of a final state to act on it, once whoever holds it lets go; LEASED if that takes too long.

        FINISHED: it was acted on. Else it is the caller's, who ends with :meth:`finish` or :meth:`release`.
        Raises ``RefundConflict`` if another final state, or another amount, was notified before.
        """

    async def finish(self, held: Held, refund: Refund) -> None:
        """It was acted on."""

    async def release(self, held: Held) -> None:
        """It was not: the next delivery finds it free."""


async def act_on(
    refund: Refund, book: Book[Held], held: Held, act: Callable[[Refund], Coroutine[Any, Any, None]], seconds: float
) -> bool:
    """Have ``act`` act on what ``book.take`` gave, in so many seconds; whether it did."""
    try:
        await _within(seconds, act(refund))
    except BaseException as error:
        is_ours = is_failure(error)
        if is_ours:
            logger.exception("refund %s: its notification was not acted on, it will be tried again", refund.no_refund)
        await book.release(held)
        if not is_ours:
            raise
        return False
    await book.finish(held, refund)
    return True


@coroutine
def _within(seconds: float, work: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
    """Await ``work``, for so many seconds from its first wait on; one that never waits costs no timer."""
    with anyio.CancelScope() as scope:
        try:
            wait = work.send(None)
            scope.deadline = anyio.current_time() + seconds
            while True:
                try:
                    answer = yield wait
                except BaseException as error:  # noqa: BLE001 - it is raised in the work
                    wait = work.throw(error)
                else:
                    wait = work.send(answer)
        except StopIteration:
            pass
    if scope.cancelled_caught:
        raise TimeoutError(f"the handler took more than {seconds:g} s")
