"""RSA for one event loop: sign in a thread; verify on the event loop if a verification is fast, else in the thread."""

from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Any, Final, Self, TypeVar, cast

import anyio
import anyio.to_thread
import attrs

from .background import call_soon_threadsafe
from .merchant import Merchant
from .protocol import Protocol

T = TypeVar("T")

INLINE_VERIFY_SECONDS: Final = 0.0005
"""Signatures are verified on the event loop if the test verification in :meth:`RsaWorker.open` takes less time."""
LONGEST_ROUND: Final = 0.005
"""Seconds after which a round (one call in the thread) starts no further signature, so that its caller can go on."""
DELIVER_AFTER: Final = 0.001
"""Seconds after which a round wakes the callers whose signatures are ready. Waking many at once delays other tasks."""


@attrs.define(eq=False)
class _Job:
    """One requested signature."""

    fields: Mapping[str, str]
    body: bytes | None = None
    error: BaseException | None = None
    wake_up: anyio.Event = attrs.field(factory=anyio.Event)
    """Set when the job is done, or when its caller may start the next round."""


@attrs.define(eq=False, slots=False)
class RsaWorker:
    """Signs and verifies with the loaded keys of a merchant; the thread runs one call at a time."""

    protocol: Protocol
    _limiter: anyio.CapacityLimiter
    _verify_inline: bool
    _jobs: deque[_Job] = attrs.field(factory=deque, init=False)
    _is_signing: bool = attrs.field(default=False, init=False)
    _call_soon: Callable[[Callable[[], object]], object] = attrs.field(factory=call_soon_threadsafe, init=False)

    @classmethod
    async def open(cls, merchant: Merchant) -> Self:
        """Load the keys in the thread, and measure how long a verification takes."""
        limiter = anyio.CapacityLimiter(1)  # more threads would compete with the event loop for the GIL
        keys = await anyio.to_thread.run_sync(merchant.load_keys, limiter=limiter)
        protocol = Protocol(merchant, keys)
        seconds = await anyio.to_thread.run_sync(_verify_seconds, protocol, limiter=limiter)
        return cls(protocol, limiter, verify_inline=seconds < INLINE_VERIFY_SECONDS)

    async def seal(self, fields: Mapping[str, str]) -> bytes:
        """Sign ``fields`` in the thread, and return the JSON to send.

        One caller starts a round, in which the thread signs for waiting callers; then another caller does.
        """
        job = _Job(fields)
        self._jobs.append(job)
        try:
            # After a round, too: if asyncio's Task.cancel ended its caller, the thread may still be signing this job.
            while job.body is None and job.error is None:
                if self._is_signing:
                    job.wake_up = anyio.Event()
                    await job.wake_up.wait()
                    continue
                self._is_signing = True
                try:
                    await anyio.to_thread.run_sync(self._sign_round, limiter=self._limiter)
                finally:
                    self._is_signing = False
        finally:
            with suppress(ValueError):  # the thread has taken the job
                self._jobs.remove(job)
            if self._jobs and not self._is_signing:
                self._jobs[0].wake_up.set()
        if job.error is not None:
            raise job.error
        return cast("bytes", job.body)

    def _sign_round(self) -> None:
        # The thread, not the caller, takes the jobs from the queue: a cancelled caller would lose the jobs it took.
        done: list[_Job] = []
        began = delivered = perf_counter()
        for _ in range(len(self._jobs)):
            try:
                job = self._jobs.popleft()
            except IndexError:  # a caller was cancelled and removed its job
                break
            try:
                job.body = self.protocol.seal(job.fields)
            except BaseException as error:  # noqa: BLE001 - raised in seal
                job.error = error
            done.append(job)
            now = perf_counter()
            if now > delivered + DELIVER_AFTER:
                self._call_soon(partial(_wake, done))
                done, delivered = [], now
            if now > began + LONGEST_ROUND:
                break
        self._call_soon(partial(_wake, done))

    async def check(self, read: Callable[..., T], *arguments: Any) -> T:
        """Return ``read(*arguments)``, which verifies signatures, on the event loop or in the thread."""
        if self._verify_inline:
            return read(*arguments)
        return await anyio.to_thread.run_sync(read, *arguments, limiter=self._limiter)

    async def wait_until_idle(self) -> None:
        """Wait until the thread is idle."""
        async with self._limiter:
            pass


def _wake(jobs: Iterable[_Job]) -> None:
    for job in jobs:
        job.wake_up.set()


def _verify_seconds(protocol: Protocol) -> float:
    """Return how many seconds a verification with these keys takes: the shortest of three measurements."""
    bits = max(key.bits for key in protocol.keys.gateway)
    # A signature that is shorter than the key would be rejected without an RSA operation.
    fields = {"sign": b64encode(b"\x55" * ((bits + 7) // 8)).decode()}

    def seconds() -> float:
        began = perf_counter()
        protocol.verify(fields)
        return perf_counter() - began

    return min(seconds() for _ in range(3))
