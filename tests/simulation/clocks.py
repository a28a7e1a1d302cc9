"""Machines and their clocks: a monotonic boot clock, and a wall clock that is set, steps and drifts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

import attrs

from lianlian_async.clock import Moment

from .world import World

EPOCH: Final = datetime(2026, 1, 5, 8, 0, tzinfo=UTC)
"""The true time when the world begins."""


@attrs.define(eq=False)
class Machine:
    """One machine. Its clocks run while it is suspended; only the event loops of its nodes stop."""

    world: World
    name: str
    offset: float = 0.0
    """Seconds by which the wall clock is ahead of the true time."""
    drift: float = 0.0
    """Seconds that the wall clock gains in one second."""
    boots: int = 1
    booted_at: float = 0.0
    _read_at: tuple[float, float, int] | None = None
    _reading: Moment = attrs.field(init=False)

    def boot(self) -> None:
        """Reboot: the boot id changes, and the boot clock starts at 0."""
        self.boots += 1
        self.booted_at = self.world.now

    def slew(self, rate: float) -> None:
        """Let the wall clock gain this number of seconds in each second from now on, as when NTP slews it."""
        self.offset += self.world.now * (self.drift - rate)
        self.drift = rate

    def clock(self) -> Moment:
        """Read all clocks of the machine."""
        now = self.world.now
        key = now, self.offset, self.boots
        if key != self._read_at:  # several reads within one step
            self._read_at = key
            wall = EPOCH + timedelta(seconds=now * (1 + self.drift) + self.offset)
            self._reading = Moment(wall, now - self.booted_at, f"{self.name} boot {self.boots}")
        return self._reading
