"""RSA for one event loop: signatures are made in a thread, and checked on the loop only if that is quick."""

from __future__ import annotations

from base64 import b64encode
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import perf_counter
from typing import Any, Final, TypeVar, cast

import anyio
import anyio.to_thread

from .merchant import Merchant
from .protocol import Protocol

T = TypeVar("T")

INLINE_VERIFY_SECONDS: Final = 0.0005
"""A signature is checked on the event loop if that took less time when the keys were loaded, else in the thread."""

# One visit to the thread may make several signatures: without this, a refund takes 16 % more CPU time.
VISIT_SECONDS: Final = 0.001
"""How long the signatures of one visit may take."""
MOST_PER_VISIT: Final = 3
"""The most signatures in one visit: all its waiters continue at once, and delay other users of the event loop."""


class _Job:
    """One requested signature."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.fields = fields
        self.body: bytes | None = None
        self.error: Exception | None = None


class RsaWorker:
    """The loaded keys of a merchant; one RSA operation at a time runs in the thread."""

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
        """Load the keys in the thread, and measure how long signing and verifying take."""
        turn = anyio.CapacityLimiter(1)  # more threads would compete with the event loop for the GIL
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
        """Sign in the thread; once for each request, so that every attempt sends the same bytes.

        Jobs that arrive while the thread is busy share the next visit. The first waiter leads the visit; another one
        may find that an earlier visit has done its job.
        """
        job = _Job(fields)
        self._jobs.append(job)
        try:
            async with self._leading:
                # Repeats only if the thread still works on this job for a leader that asyncio's Task.cancel ended.
                while job.body is None and job.error is None:
                    await anyio.to_thread.run_sync(self._sign, limiter=self._turn)
        except BaseException:
            with suppress(ValueError):  # the thread has taken the job
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
            except Exception as error:  # noqa: BLE001 - raised in seal
                job.error = error

    async def check(self, read: Callable[..., T], *arguments: Any) -> T:
        """Call ``read(*arguments)``, which checks one signature, here or in the thread."""
        if self._verify_inline:
            return read(*arguments)
        return await anyio.to_thread.run_sync(read, *arguments, limiter=self._turn)

    async def rest(self) -> None:
        """Wait until the thread is idle."""
        async with self._turn:
            pass


def _costs(protocol: Protocol) -> tuple[float, float]:
    """Return the seconds to make and to check a signature with these keys, each the best of three."""
    longest = max(key.bits for key in protocol.gateway_keys)
    # Of full length: a shorter signature is refused without an RSA operation.
    fields = {"sign": b64encode(b"\x55" * ((longest + 7) // 8)).decode()}

    def seconds(function: Callable[[Mapping[str, str]], object]) -> float:
        began = perf_counter()
        function(fields)
        return perf_counter() - began

    return min(seconds(protocol.seal) for _ in range(3)), min(seconds(protocol.verify) for _ in range(3))
