"""The frame of every measured program: its job, its processor, its clocks."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from inspect import iscoroutine
from pathlib import Path
from typing import Any

Refund = Callable[[int], Awaitable[Any]]


@dataclass(frozen=True)
class Job:
    """The work of one program, written by the runner."""

    url: str = ""
    keys: str = ""
    """The folder of the keys."""
    refunds: int = 1000
    in_flight: int = 64
    warm_up: int = 0
    """Refunds before the clock starts: connections get opened, imports get made."""
    idle: float = 0.0
    """Seconds to watch the idle loop for; with it, the loop's lag is measured."""
    cpu: int | None = None
    """The processor to stay on."""
    option: str = ""
    """Which variant of the program runs."""


def main(program: Callable[[Job], Any]) -> None:
    """Run ``program`` (a function or a coroutine function) on the job in argv, and print what it returns."""
    job = Job(**json.loads(sys.argv[1]))
    if job.cpu is not None:
        os.sched_setaffinity(0, {job.cpu})
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    result = program(job)
    print(json.dumps(asyncio.run(result) if iscoroutine(result) else result))


def timed(count: int, began: tuple[float, float]) -> dict[str, float]:
    """Return the figures of ``count`` refunds since ``began = clocks()``."""
    return figures(count, began, clocks())


def figures(count: int, began: tuple[float, float], ended: tuple[float, float]) -> dict[str, float]:
    """Return the figures of ``count`` refunds between two readings of the clocks."""
    return {
        "refunds": count,
        "seconds": ended[0] - began[0],
        "rate": count / (ended[0] - began[0]),
        "cpu_ms": 1000 * (ended[1] - began[1]) / count,
        "share": (ended[1] - began[1]) / (ended[0] - began[0]),
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    """Return the peak of this process's resident memory, in MiB."""
    # Not getrusage: on Linux its ru_maxrss begins with what the parent process had.
    return _status("VmHWM")


def resident_mib() -> float:
    """Return the resident memory of this process, in MiB; on systems without /proc, its peak."""
    return _status("VmRSS")


def _status(name: str) -> float:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def clocks() -> tuple[float, float]:
    """Return a monotonic time and this process's CPU time over all of its threads, in seconds."""
    return time.perf_counter(), time.process_time()


async def measured(job: Job, refund: Refund) -> dict[str, float]:
    """Make the job's refunds with ``in_flight`` workers. Return rate, CPU and, with ``idle``, the loop's lag."""
    await drive(refund, range(job.warm_up), job.in_flight)
    idle = Lag()
    if job.idle:
        async with idle:
            await asyncio.sleep(job.idle)
    busy = Lag()
    if job.idle:
        await busy.__aenter__()
    began = clocks()
    await drive(refund, range(job.warm_up, job.warm_up + job.refunds), job.in_flight)
    result = timed(job.refunds, began)
    if job.idle:
        await busy.__aexit__()
        result |= {"idle_p99": idle.p(0.99), "busy_p99": busy.p(0.99), "busy_max": busy.p(1.0)}
    return result


async def drive(refund: Refund, numbers: Iterable[int], in_flight: int) -> None:
    """Call ``refund`` for every number, ``in_flight`` at a time."""
    todo = iter(numbers)

    async def worker() -> None:
        for number in todo:
            await refund(number)

    await asyncio.gather(*(worker() for _ in range(in_flight)))


class Lag:
    """Watches how late the event loop runs a timer that is due every millisecond.

    Every tick that a stall delayed counts with its own lateness (no coordinated omission).
    """

    INTERVAL = 0.001

    def __init__(self) -> None:
        self.milliseconds: list[float] = []

    async def __aenter__(self) -> Lag:
        self._task = asyncio.create_task(self._watch())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _watch(self) -> None:
        due = time.perf_counter() + self.INTERVAL
        while True:
            await asyncio.sleep(due - time.perf_counter())
            now = time.perf_counter()
            while due <= now:
                self.milliseconds.append(1000 * (now - due))
                due += self.INTERVAL

    def p(self, share: float) -> float:
        """Return the quantile ``share``, in milliseconds."""
        ordered = sorted(self.milliseconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
