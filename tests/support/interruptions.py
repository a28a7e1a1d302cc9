"""Exceptions of a user's code that are not subclasses of ``Exception``."""

from __future__ import annotations

import anyio
import anyio.lowlevel


class Abort(BaseException):
    """A BaseException, which ``except Exception`` does not catch."""


async def stray_cancellation() -> None:
    """Raise the cancellation of a scope that has ended, as code does that awaits a cancelled task of others."""
    error: BaseException | None = None
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await anyio.lowlevel.checkpoint()
        except anyio.get_cancelled_exc_class() as cancellation:
            error = cancellation
            raise
    assert error is not None
    raise error
