"""Timestamps and elapsed time; only this module reads the boot clock and the boot id.

Safety depends on elapsed time: "no such record" is reliable only some time after the last send, and a lease must not
end early. Within one boot of one machine, the boot clock measures elapsed time: unlike the wall clock, it cannot be
set, and it also counts while the machine is suspended. Across boots, elapsed time is the smaller of two differences, of
the wall clock and of the gateway's clock (its ``Date`` headers), minus ``DATE_SLACK``.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final
from uuid import uuid4

import attrs

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

DATE_SLACK: Final = 15.0
"""Seconds by which a ``Date`` header may be late: its resolution plus the longest exchange whose header is used."""
_DATE_RESOLUTION: Final = 1.0


@attrs.frozen
class Moment:
    """The readings of all clocks at one moment, by one process."""

    wall: datetime
    """The wall clock (UTC): for display, and for comparison across boots."""
    boot: float
    """Seconds of the boot clock; comparable only within one ``timeline``."""
    timeline: str
    """Identifies the boot and the time namespace in which ``boot`` was read."""
    gateway: datetime | None = None
    """The gateway's clock (UTC), from its ``Date`` headers; None: not known."""

    def after(self, seconds: float) -> "Moment":
        """Return the moment ``seconds`` later."""
        span = timedelta(seconds=seconds)
        gateway = None if self.gateway is None else self.gateway + span
        return Moment(self.wall + span, self.boot + seconds, self.timeline, gateway)

    def dated(self, now: "Moment") -> "Moment":
        """Return this moment; add the gateway's time if only ``now``, of the same timeline, has one."""
        if self.gateway is not None or now.gateway is None or self.timeline != now.timeline:
            return self
        return attrs.evolve(self, gateway=now.gateway - timedelta(seconds=now.boot - self.boot))


def elapsed(since: Moment, now: Moment) -> float | None:
    """Return the seconds that have certainly passed from ``since`` to ``now``; None if no clock can tell.

    For moments of different boots it is None if a gateway time is missing, or if ``since`` is later than ``now``: then
    a clock was set. In both cases the caller must measure again from now.
    """
    if since.timeline == now.timeline:
        return now.boot - since.boot
    if since.gateway is None or now.gateway is None:
        return None
    wall, gateway = (now.wall - since.wall).total_seconds(), (now.gateway - since.gateway).total_seconds()
    shortest = min(wall, gateway)
    return None if shortest < 0 else max(0.0, shortest - DATE_SLACK)


def latest(one: Moment, other: Moment, now: Moment) -> Moment:
    """Return the later of two moments, even of different boots; return ``now`` if they cannot be compared."""
    since_one, since_other = elapsed(one, now), elapsed(other, now)
    if since_one is None or since_other is None:
        return one if one == other else now
    return one if since_one <= since_other else other


Clock = Callable[[], Moment]
"""A function that reads all clocks."""


class SessionClock:
    """A clock that adds the gateway's time, computed from the last usable ``Date`` header and the boot clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._date = ""
        self._ahead: timedelta | None = None
        """The gateway's clock (time since 1970) minus the boot clock."""

    def __call__(self) -> Moment:
        """Read all clocks."""
        now = self._clock()
        if self._ahead is None:
            return now
        gateway = _EPOCH + self._ahead + timedelta(seconds=now.boot)
        return Moment(now.wall, now.boot, now.timeline, gateway)  # attrs.evolve takes three times as long

    def observe_date(self, date: str, began: float) -> None:
        """Read the ``Date`` header of an answer; ignore it if it is unreadable, or if the exchange took too long.

        ``began``: the boot clock's seconds at the start of the exchange. After a long exchange, for example one during
        which the machine was suspended, the age of the header is unknown.
        """
        if date == self._date:  # a Date header changes once a second
            return
        received_at = self._clock().boot
        if received_at - began > DATE_SLACK - _DATE_RESOLUTION:
            return
        self._date = date
        if (gateway := parse_http_date(date)) is not None:
            self._ahead = gateway - _EPOCH - timedelta(seconds=received_at)


def parse_http_date(text: str) -> datetime | None:
    """Return the time of a ``Date`` header; None if it is unreadable or far from the present."""
    try:
        moment = parsedate_to_datetime(text)
    except (ArithmeticError, LookupError, TypeError, ValueError):  # every exception that the parser raises
        return None
    if not 2000 <= moment.year < 2200:  # a sum with such a moment could overflow
        return None
    return moment.replace(tzinfo=moment.tzinfo or UTC)


def boot_clock() -> Callable[[], float]:
    """Return the boot clock: CLOCK_BOOTTIME (Linux), CLOCK_MONOTONIC (macOS), or ``time.monotonic`` (Windows)."""
    for name in ("CLOCK_BOOTTIME", "CLOCK_MONOTONIC"):
        if hasattr(time, name):
            number: int = getattr(time, name)
            return lambda: time.clock_gettime(number)
    return time.monotonic


_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_TIME_NAMESPACE: Final = Path("/proc/self/ns/time")


def read_timeline() -> str:
    """Return the boot id and the time namespace (Linux), else a unique id, so that each process counts as a boot."""
    try:
        return f"{_BOOT_ID.read_text('ascii').strip()} {_TIME_NAMESPACE.readlink()}"
    except OSError:
        return f"process {uuid4()}"


_boot_seconds: Final = boot_clock()
_this_timeline: Final = read_timeline()


def system_clock() -> Moment:
    """Read this machine's clocks."""
    return Moment(datetime.now(UTC), _boot_seconds(), _this_timeline)
