"""Moments in a PostgreSQL journal: stored by the database's clock, and converted to the workers' boot clocks.

Each transaction begins with a :class:`Reading` of the database's clock, and of the worker's clocks before and after.
It converts moments in both directions. It errs on the safe side: no moment appears too old, and no lease too short.

A stored moment is a JSON object. ``at``: the database's clock. ``era``: a period without a restart or a clock step.
``ahead``: seconds by which the moment was in the future when written (as the end of a lease). ``boot``, ``timeline``:
the writer's boot clock, exact for workers of the same boot. ``gateway``: the gateway's clock, if known.

An *incarnation* of the database is one start of the database server, identified by ``pg_postmaster_start_time()``: a
standby or a restored copy has another one. Any role may call it, also on managed services. A new *era* begins with
another incarnation (a restart, a failover, a restore), and when a worker's boot clock proves that the database's clock
was set. The age of a moment of an earlier era starts with the new era.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final

import attrs

from lianlian_async.clock import Moment

from .operations import may_be_lost

_DRIFT: Final = 0.001
"""Upper bound for the relative drift between two clocks; quartz and the corrections of NTP stay below it."""
_SLACK: Final = 2.0
"""Seconds: if two clocks differ by more than this and the drift, the database's clock was set."""


@attrs.frozen(kw_only=True)
class Reading:
    """One reading of the database's clock, and of this worker's clocks before and after it."""

    before: Moment
    database: datetime
    """The database's clock, at some moment between ``before`` and ``after``."""
    after: Moment
    era: int
    began: datetime
    """The beginning of the era, by the database's clock."""
    is_same_incarnation: bool
    """Whether the era belongs to the incarnation of the database that answered."""

    def continues(self, earlier: Reading) -> bool:
        """Return whether the recorded era continues, by this worker's clocks."""
        if not self.is_same_incarnation or self.era != earlier.era:
            return self.is_same_incarnation
        passed = (self.database - earlier.database).total_seconds()
        least, most = self.before.boot - earlier.after.boot, self.after.boot - earlier.before.boot
        slack = _SLACK + _DRIFT * most
        return least - slack <= passed <= most + slack

    def may_have_lost(self, fields: Mapping[str, str], grace: float) -> bool:
        """Return whether the row of this refund may be lost, because another era began after its ``dt_refund``."""
        if self.era == 1 or not grace:
            return False
        return may_be_lost(fields, self.database, self.began + timedelta(seconds=grace))

    def stored(self, moment: Moment | None, recorded: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Return the stored form of ``moment``. If it is from another boot, ``recorded`` is kept."""
        if moment is None:
            return None
        if moment.timeline != self.after.timeline:
            return recorded or self.stored(self.after, None)
        ahead = moment.boot - self.before.boot
        return {
            "at": (self.database + timedelta(seconds=ahead)).isoformat(),
            "era": self.era,
            "ahead": max(0.0, ahead),
            "boot": moment.boot,
            "timeline": moment.timeline,
            "gateway": None if moment.gateway is None else moment.gateway.isoformat(),
        }

    def moment(self, stored: Mapping[str, Any] | None) -> Moment | None:
        """Return a stored moment, converted to this worker's clocks.

        The age of a moment of another boot is also measured by the gateway's clock, if known: the database's clock may
        have been set while no worker ran.
        """
        if stored is None:
            return None
        gateway = stored["gateway"] and datetime.fromisoformat(stored["gateway"])
        if stored["era"] != self.era:
            at, gateway = self.began + timedelta(seconds=stored["ahead"]), None
        elif stored["timeline"] == self.after.timeline:
            return attrs.evolve(self.after.after(stored["boot"] - self.after.boot), gateway=gateway)
        else:
            at = datetime.fromisoformat(stored["at"])
        ahead = (at - self.database).total_seconds()
        local = attrs.evolve(self.after.after(ahead), gateway=gateway)
        return local if gateway is None or ahead > 0 else attrs.evolve(local, timeline=f"database, era {self.era}")
