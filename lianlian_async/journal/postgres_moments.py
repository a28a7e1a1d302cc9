"""Moments in a PostgreSQL journal: the database's clock writes and judges them, each worker counts by its boot clock.

Each transaction begins with a :class:`Reading`: the database's clock, and the worker's own before and after. It
leads from one to the other, both ways, and errs on the late side: nothing is older than it is, no lease is shorter.

A stored moment is a JSON object. ``at``: the database's clock. ``era``: where that clock can be compared. ``ahead``:
seconds by which the moment lay in the future when it was written (a lease does). ``boot``, ``timeline``: the writer's
boot clock, which measures exactly for workers of the same boot. ``gateway``: the gateway's clock, if it was known.

An *era* ends when the database is another incarnation than before (a restart, a failover, a restore), or when a
worker's boot clock proves that the database's clock was set. In a new era, a moment of an earlier one counts from the
era's beginning. ``pg_postmaster_start_time()`` names the incarnation: a standby or a restored copy has its own, any
role may call it, and no managed service withholds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final

import attrs

from lianlian_async import wire
from lianlian_async.clock import Moment

__all__ = ["Reading"]

_DRIFT: Final = 0.001
"""How much faster or slower a clock may run than another: more than quartz does, and than NTP corrects."""
_SLACK: Final = 2.0
"""Seconds by which the database's clock may also be off before that counts as set."""


@attrs.frozen(kw_only=True)
class Reading:
    """One look at the database's clock, and at this worker's clocks before and after it."""

    before: Moment
    database: datetime
    """The database's clock, at some moment between ``before`` and ``after``."""
    after: Moment
    era: int
    began: datetime
    """When the era began, by the database's clock."""
    is_same_incarnation: bool
    """Whether the era's incarnation of the database is the one that answered."""

    def continues(self, earlier: Reading) -> bool:
        """Whether this is still the era that is on record, as far as this worker can tell."""
        if not self.is_same_incarnation or self.era != earlier.era:
            return self.is_same_incarnation
        passed = (self.database - earlier.database).total_seconds()
        least, most = self.before.boot - earlier.after.boot, self.after.boot - earlier.before.boot
        slack = _SLACK + _DRIFT * most
        return least - slack <= passed <= most + slack

    def may_have_lost(self, fields: Mapping[str, str], grace: float) -> bool:
        """Whether the journal may have lost that this refund was sent: another era began after its ``dt_refund``."""
        if self.era == 1 or not grace:
            return False
        since = self.began + timedelta(seconds=grace)
        return self.database < since or fields.get("dt_refund", "") < wire.format_timestamp(since)

    def stored(self, moment: Moment | None, recorded: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """``moment`` to be stored; one of another timeline was read from ``recorded``, which stays."""
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
        """A stored moment, on this worker's clocks.

        One of another boot also has to be that old by the gateway's clock, where that is known: no worker can
        prove that the database's clock was set while none was at work.
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
