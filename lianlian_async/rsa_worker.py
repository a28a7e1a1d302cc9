"""RSA for one event loop: signs in a thread; verifies on the event loop if verification is fast, else in the thread."""

from __future__ import annotations

from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Any, Final, TypeVar, cast

import anyio
import anyio.to_thread

from .background import call_soon_threadsafe
from .merchant import Merchant
from .protocol import Protocol

T = TypeVar("T")

INLINE_VERIFY_SECONDS: Final = 0.0005
"""A signature is verified on the event loop if a measurement at start-up took less time, else in the thread."""

LONGEST_VISIT: Final = 0.005
"""Seconds after which a visit (one call in the thread) starts no further signature: its caller waits for the end."""
DELIVER_AFTER: Final = 0.001
"""Seconds after which a visit wakes the callers whose signatures are ready. Waking too many together delays others."""


class _Job:
    """One requested signature."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.fields = fields
        self.body: bytes | None = None
        self.error: BaseException | None = None
        self.leads = False
        self.turn = anyio.Event()
        """Set when the job is done, or when its caller must lead the next visit."""


class RsaWorker:
    """The loaded keys of a merchant; one RSA operation at a time runs in the thread."""

    def __init__(self, protocol: Protocol, turn: anyio.CapacityLimiter, *, verify_inline: bool) -> None:
        self.protocol = protocol
        self._turn = turn
        self._verify_inline = verify_inline
        self._jobs: deque[_Job] = deque()
        self._is_led = False
        self._call_soon = call_soon_threadsafe()

    @classmethod
    async def open(cls, merchant: Merchant) -> RsaWorker:
        """Load the keys in the thread, and measure how long a verification takes."""
        turn = anyio.CapacityLimiter(1)  # more threads would compete with the event loop for the GIL
        keys = await anyio.to_thread.run_sync(merchant.load_keys, limiter=turn)
        protocol = Protocol(merchant, keys.private, keys.gateway)
        seconds = await anyio.to_thread.run_sync(_verify_seconds, protocol, limiter=turn)
        return cls(protocol, turn, verify_inline=seconds < INLINE_VERIFY_SECONDS)

    async def seal(self, fields: Mapping[str, str]) -> bytes:
        """Sign ``fields`` in the thread. A request is signed once, so that every attempt sends the same bytes.

        The first waiting caller leads: it starts a visit to the thread, which signs for all waiting callers. Afterwards
        the next waiting caller leads.
        """
        job = _Job(fields)
        self._jobs.append(job)
        try:
            if self._is_led:
                await job.turn.wait()
            else:
                self._is_led = job.leads = True
            # Repeat if the thread is still signing this job in a visit whose leader asyncio's Task.cancel has ended.
            while job.body is None and job.error is None:
                await anyio.to_thread.run_sync(self._visit, limiter=self._turn)
        finally:
            with suppress(ValueError):  # the thread has taken the job
                self._jobs.remove(job)
            if job.leads:
                self._pass_on()
        if job.error is not None:
            raise job.error
        return cast("bytes", job.body)

    def _pass_on(self) -> None:
        """Let the next waiting caller lead."""
        try:
            job = self._jobs[0]
        except IndexError:
            self._is_led = False
        else:
            job.leads = True
            job.turn.set()

    def _visit(self) -> None:
        # The thread takes the jobs from the queue: a leader that took them could be cancelled and lose them.
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
            if now > began + LONGEST_VISIT:
                break
        self._call_soon(partial(_wake, done))

    async def check(self, read: Callable[..., T], *arguments: Any) -> T:
        """Call ``read(*arguments)``, which verifies one signature, on the event loop or in the thread."""
        if self._verify_inline:
            return read(*arguments)
        return await anyio.to_thread.run_sync(read, *arguments, limiter=self._turn)

    async def rest(self) -> None:
        """Wait until the thread is idle."""
        async with self._turn:
            pass


def _wake(jobs: Iterable[_Job]) -> None:
    for job in jobs:
        job.turn.set()


def _verify_seconds(protocol: Protocol) -> float:
    """Return the seconds that verifying a signature with these keys takes: the best of three measurements."""
    longest = max(key.bits for key in protocol.gateway_keys)
    # Use the full length: a shorter signature would be rejected without an RSA operation.
    fields = {"sign": b64encode(b"\x55" * ((longest + 7) // 8)).decode()}

    def seconds() -> float:
        began = perf_counter()
        protocol.verify(fields)
        return perf_counter() - began

    return min(seconds() for _ in range(3))
