"""A merchant's keys at work: RSA in a thread of its own, checks on the event loop where they are cheap enough."""

from __future__ import annotations

from base64 import b64encode
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import perf_counter
from typing import Any, Final, TypeVar, cast

import anyio
import anyio.to_thread
import attrs

from .merchant import Merchant
from .protocol import Protocol

__all__ = ["RsaWorker"]

T = TypeVar("T")

INLINE_VERIFY_SECONDS: Final = 0.0005
"""A signature is checked on the event loop only if that took less when the keys were loaded, else in the thread."""

VISIT_SECONDS: Final = 0.001
"""How long one visit to the thread may take that makes several signatures, and …"""
MOST_PER_VISIT: Final = 3
"""… how many it makes at most: all who waited for it go on at once, and other users of the event loop wait for them."""


@attrs.define(eq=False)
class _Job:
    """One signature that is asked for."""

    fields: Mapping[str, str]
    body: bytes | None = None
    error: Exception | None = None


class RsaWorker:
    """Loaded keys, for one event loop. :meth:`open` it; one at a time is computed in the thread."""

    def __init__(
        self, protocol: Protocol, turn: anyio.CapacityLimiter, *, verify_inline: bool, jobs_per_visit: int
    ) -> None:
        self.protocol = protocol
        self._turn = turn
        self._verify_inline = verify_inline
        self._jobs_per_visit = jobs_per_visit
        self._jobs: deque[_Job] = deque()
        self._leading = anyio.Lock(fast_acquire=True)

    @classmethod
    async def open(cls, merchant: Merchant) -> RsaWorker:
        """Load the keys, in the thread, and measure what a signature costs to make and to check."""
        # One thread at a time does RSA: more would fight the event loop for the interpreter, and win.
        turn = anyio.CapacityLimiter(1)
        keys = await anyio.to_thread.run_sync(merchant.load_keys, limiter=turn)
        protocol = Protocol(merchant, keys.private, keys.gateway)
        signing, checking = await anyio.to_thread.run_sync(_costs, protocol, limiter=turn)
        return cls(
            protocol,
            turn,
            verify_inline=checking < INLINE_VERIFY_SECONDS,
            jobs_per_visit=max(1, min(int(VISIT_SECONDS / signing), MOST_PER_VISIT)),
        )

    async def seal(self, fields: Mapping[str, str]) -> bytes:
        """Sign, in the thread; once for each request, so that every attempt sends the same bytes.

        What is asked for while the thread is busy goes there together next: a visit costs as much as an OpenSSL
        signature. Whoever comes first leads the next visit, and finds its own job done if it was in another's.
        """
        job = _Job(fields)
        self._jobs.append(job)
        try:
            async with self._leading:
                # Once, but for a job that the thread is still at for a leader whom asyncio's own Task.cancel took away.
                while job.body is None and job.error is None:
                    await anyio.to_thread.run_sync(self._sign, limiter=self._turn)
        except BaseException:
            with suppress(ValueError):  # not there: the thread has just taken it
                self._jobs.remove(job)
            raise
        if job.error is not None:
            raise job.error
        return cast("bytes", job.body)

    def _sign(self) -> None:
        # The thread takes the job, not the leader: a leader that is cancelled while it waits would lose the job.
        for _ in range(self._jobs_per_visit):
            try:
                job = self._jobs.popleft()
            except IndexError:
                return
            try:
                job.body = self.protocol.seal(job.fields)
            except Exception as error:  # noqa: BLE001 - it is raised where the signature is awaited
                job.error = error

    async def check(self, read: Callable[..., T], *arguments: Any) -> T:
        """What ``read(*arguments)`` returns or raises, which checks one signature: here or in the thread."""
        if self._verify_inline:
            return read(*arguments)
        return await anyio.to_thread.run_sync(read, *arguments, limiter=self._turn)

    async def rest(self) -> None:
        """Wait until nothing is being computed any more."""
        async with self._turn:
            pass


def _costs(protocol: Protocol) -> tuple[float, float]:
    """Seconds that making and checking a signature take on this machine with these keys: each the best of three."""
    longest = max(key.bits for key in protocol.gateway_keys)
    # Any signature of full length costs the same; one that is shorter is refused before it costs anything.
    fields = {"sign": b64encode(b"\x55" * ((longest + 7) // 8)).decode()}

    def seconds(function: Callable[[Mapping[str, str]], object]) -> float:
        began = perf_counter()
        function(fields)
        return perf_counter() - began

    return min(seconds(protocol.seal) for _ in range(3)), min(seconds(protocol.verify) for _ in range(3))
