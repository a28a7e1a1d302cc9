"""Moments and the time between them: the one place that reads the wall clock, the boot clock and the boot id.

Elapsed time is a safety argument here: "no such record" is believed only some time after the last send, and a
lease ends only when its time is over. The wall clock can step, so within one boot of one machine the boot clock
measures, which nobody sets and which counts suspension. Across boots the smaller of two differences counts: the wall
clock's, and that of the gateway's ``Date`` headers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final
from uuid import uuid4

import attrs

__all__ = ["Clock", "Moment", "SessionClock", "elapsed", "latest", "system_clock"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

DATE_SLACK: Final = 15.0
"""Seconds by which a ``Date`` header may be off: its resolution, and the longest exchange that it may belong to."""

_DATE_RESOLUTION: Final = 1.0


@attrs.frozen
class Moment:
    """One moment, as one process read it."""

    wall: datetime
    """The wall clock (UTC): for people, and across boots."""
    boot: float
    """Seconds of the boot clock; comparable only within one ``timeline``."""
    timeline: str
    """Names the boot and the time namespace in which ``boot`` was read."""
    gateway: datetime | None = None
    """The gateway's clock (UTC), as far as its ``Date`` headers told it."""

    def after(self, seconds: float) -> Moment:
        """Return the moment so many seconds later."""
        span = timedelta(seconds=seconds)
        gateway = None if self.gateway is None else self.gateway + span
        return Moment(self.wall + span, self.boot + seconds, self.timeline, gateway)

    def dated(self, now: Moment) -> Moment:
        """Return this moment with the gateway's time, where ``now`` knows it and this moment does not."""
        if self.gateway is not None or now.gateway is None or self.timeline != now.timeline:
            return self
        return attrs.evolve(self, gateway=now.gateway - timedelta(seconds=now.boot - self.boot))


def elapsed(since: Moment, now: Moment) -> float | None:
    """Return the seconds from ``since`` to ``now`` that certainly passed; None where no clock can tell.

    None also where ``since`` lies in the future of another boot: a clock was set, so the count has to start again.
    """
    if since.timeline == now.timeline:
        return now.boot - since.boot
    if since.gateway is None or now.gateway is None:
        return None
    wall, gateway = (now.wall - since.wall).total_seconds(), (now.gateway - since.gateway).total_seconds()
    shortest = min(wall, gateway)
    return None if shortest < 0 else max(0.0, shortest - DATE_SLACK)


def latest(one: Moment, other: Moment, now: Moment) -> Moment:
    """Return the later of two moments, which may be of different boots; ``now`` where no clock can tell which."""
    since_one, since_other = elapsed(one, now), elapsed(other, now)
    if since_one is None or since_other is None:
        return now
    return one if since_one <= since_other else other


Clock = Callable[[], Moment]
"""Reads all clocks at once."""


class SessionClock:
    """A clock that also knows what time it is at the gateway, from the ``Date`` header of its last answer."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._date = ""
        self._ahead: timedelta | None = None
        """The gateway's clock less the boot clock's seconds, as a span since 1970."""

    def __call__(self) -> Moment:
        """Read all clocks."""
        now = self._clock()
        if self._ahead is None:
            return now
        gateway = _EPOCH + self._ahead + timedelta(seconds=now.boot)
        return Moment(now.wall, now.boot, now.timeline, gateway)  # evolve takes three times as long

    def heard(self, date: str, began: float) -> None:
        """Take over the ``Date`` header of an answer; one that cannot be read teaches nothing.

        ``began``: the boot clock's seconds when the exchange began. After a long one, as after a suspension, nobody
        knows how old the header is: it teaches nothing either.
        """
        if date == self._date:  # read already: it changes once a second
            return
        heard_at = self._clock().boot
        if heard_at - began > DATE_SLACK - _DATE_RESOLUTION:
            return
        self._date = date
        try:
            told = parsedate_to_datetime(date)
        except (ArithmeticError, LookupError, TypeError, ValueError):  # what the parser raises for odd texts
            return
        self._ahead = told.replace(tzinfo=told.tzinfo or UTC) - _EPOCH - timedelta(seconds=heard_at)


def boot_clock() -> Callable[[], float]:
    """Return the clock that counts suspension: CLOCK_BOOTTIME of Linux, CLOCK_MONOTONIC of macOS, Windows' ticks."""
    for name in ("CLOCK_BOOTTIME", "CLOCK_MONOTONIC"):
        if hasattr(time, name):
            number: int = getattr(time, name)
            return lambda: time.clock_gettime(number)
    return time.monotonic


_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_TIME_NAMESPACE: Final = Path("/proc/self/ns/time")


def read_timeline() -> str:
    """Return the boot id and the time namespace (Linux); elsewhere an id of this process, which counts as a boot."""
    try:
        return f"{_BOOT_ID.read_text('ascii').strip()} {_TIME_NAMESPACE.readlink()}"
    except OSError:
        return f"process {uuid4()}"


_boot_seconds: Final = boot_clock()
_this_timeline: Final = read_timeline()


def system_clock() -> Moment:
    """Read this machine's clocks."""
    return Moment(datetime.now(UTC), _boot_seconds(), _this_timeline)
