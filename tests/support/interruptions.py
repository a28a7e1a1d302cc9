"""What code of a user's own may raise in place of an ``Exception``."""

from __future__ import annotations

import anyio
import anyio.lowlevel


class Abort(BaseException):
    """Nothing that an ``except Exception`` catches."""


async def stray_cancellation() -> None:
    """Raise the cancellation of a scope that has ended, as code does that waits for what others have cancelled."""
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
