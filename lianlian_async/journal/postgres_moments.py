"""Convert timestamps between the database's clock, which all workers share, and the clocks of one worker.

A transaction that writes first reads the database's clock, and the worker's clocks around it (:class:`Reading`). This
reading converts a worker's :class:`~lianlian_async.clock.Moment` to its stored form and back. Unless the database's
clock is set unnoticed, this never makes the time since a send longer, or a lease shorter.

The stored form is a JSON object:

- ``at``: the time by the database's clock.
- ``era``: the number of the era in which it was written.
- ``ahead``: for the end of a lease, the seconds from the write to it; 0 for a time in the past.
- ``boot``, ``timeline``: the writer's boot clock, which is exact for workers of the same boot. It is not used if the
  database's clock says that the moment is later.
- ``gateway``: the gateway's clock, if known.

An *incarnation* is one run of the database server with one copy of the tables. ``pg_postmaster_start_time()``, which
any role may call, identifies the run. ``xmin`` of a row and the database's OID identify the copy: a restored dump has a
new ``xmin``, and a database that was created from a template has a new OID. An *era* is a period within which times of
the database's clock can be compared. A new era begins with another incarnation (after a restart, a failover or a
restore), and when a worker's boot clock proves that the database's clock was set. A timestamp of an earlier era is read
as the start of the current era, plus ``ahead``.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final

import attrs

from lianlian_async.clock import Moment

_DRIFT: Final = 0.001
"""Upper bound for the relative drift between two clocks; quartz and the corrections of ntpd stay below it."""
_SLACK: Final = 2.0
"""Seconds: if two clocks' elapsed times differ by more than this plus the drift, the database's clock was set."""


@attrs.frozen(kw_only=True)
class Reading:
    """One reading of the database's clock, and of this worker's clocks before and after it."""

    before: Moment
    database: datetime
    """The database's clock, read at some time between ``before`` and ``after``."""
    after: Moment
    era: int
    began: datetime
    """The start of the era, by the database's clock."""
    is_same_incarnation: bool
    """Whether the server that answered is the incarnation in which the era began."""

    def continues(self, earlier: "Reading") -> bool:
        """Compare with an ``earlier`` reading; return whether the era continues. If not, a new era must begin."""
        if not self.is_same_incarnation or (self.era, self.began) != (earlier.era, earlier.began):
            # Another worker has begun a later era. An earlier or unknown one is that of another server or copy.
            return self.is_same_incarnation and self.era > earlier.era
        passed = (self.database - earlier.database).total_seconds()
        least, most = self.before.boot - earlier.after.boot, self.after.boot - earlier.before.boot
        slack = _SLACK + _DRIFT * most
        return least - slack <= passed <= most + slack

    def stored(self, moment: Moment | None, recorded: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Return the stored form of ``moment``; ``recorded`` is the form in its row, None for a new row.

        A moment of another boot cannot be converted: return ``recorded`` if it has the same ``gateway``, and so is the
        same moment; else the current time.
        """
        if moment is None:
            return None
        if moment.timeline != self.after.timeline:
            gateway = None if moment.gateway is None else moment.gateway.isoformat()
            is_recorded = gateway is not None and recorded is not None and gateway == recorded["gateway"]
            return recorded if is_recorded else self.stored(self.after, None)
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
        """Return the moment with the stored form ``stored``, by this worker's clocks.

        The database's clock may have been set while no worker ran. So a past moment of another boot whose ``gateway``
        is known gets another timeline: :func:`~lianlian_async.clock.elapsed` then also uses the gateway's clock.
        """
        if stored is None:
            return None
        gateway = stored["gateway"] and datetime.fromisoformat(stored["gateway"])
        is_same_era, at = stored["era"] == self.era, datetime.fromisoformat(stored["at"])
        if not is_same_era:
            at, gateway = self.began + timedelta(seconds=stored["ahead"]), None
        ahead, boot_ahead = (at - self.database).total_seconds(), stored["boot"] - self.after.boot
        # Clones of a virtual machine have the same timeline, but different boot clocks: for some of them, the write of
        # the moment is in the future.
        is_same_boot = stored["timeline"] == self.after.timeline and boot_ahead <= stored["ahead"]
        if is_same_era and is_same_boot and ahead <= boot_ahead + _SLACK:
            return attrs.evolve(self.after.after(boot_ahead), gateway=gateway)
        local = attrs.evolve(self.after.after(ahead), gateway=gateway)
        return local if gateway is None or ahead > 0 else attrs.evolve(local, timeline=f"database, era {self.era}")
