"""Faults injected into the library: the exploration must find each one that can lead to a second refund."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from unittest.mock import patch

import attrs

from lianlian_async import clock, flight, resolution
from lianlian_async.clock import Moment, SessionClock
from lianlian_async.exchange import Finding
from lianlian_async.journal import operations
from lianlian_async.resolution import Case

from .model import Bounds

_PAIR = Bounds(journal="memory", workers=2, attempts=1, grace=2, lease=1, arrival=1, visibility=0, horizon=5)
_BOOTS = Bounds(
    journal="file",
    grace=2,
    lease=1,
    arrival=1,
    visibility=0,
    crashes=1,
    reboots=1,
    has_dates=True,
    horizon=4,
    clock_steps=1,
)

_heard, _take_in = SessionClock.observe_date, Case.take_in


def _by_the_wall(since: Moment, now: Moment) -> float:
    return (now.wall - since.wall).total_seconds()


def _no_slack(since: Moment, now: Moment) -> float | None:
    with patch.object(clock, "DATE_SLACK", 0.0):
        return clock.elapsed(since, now)


def _first_send_counts(case: Case, reply: resolution.Reply) -> None:
    sent_at = case.sent_at
    _take_in(case, reply)
    case.sent_at = sent_at or case.sent_at


def _no_lease_in_next_step(case: Case, finding: Finding) -> resolution.Step:
    return resolution.NEXT_STEP[finding][case.sent_at is not None]


def _late_date(session_clock: SessionClock, date: str, began: float) -> None:
    _heard(session_clock, date, session_clock._clock().boot)


def _measurable_in_each_boot(moment: Moment, now: Moment) -> Moment:
    return now if operations._is_ahead(moment, now) else moment


def _dated_at_the_answer(moment: Moment, now: Moment) -> Moment:
    return attrs.evolve(moment, gateway=now.gateway)


@attrs.frozen(kw_only=True)
class Fault:
    """A fault, the scenario that reveals it, and the patch that injects it."""

    bounds: Bounds
    patch: partial[AbstractContextManager[object]]
    is_small: bool = True
    """Whether the search takes only a few seconds."""
    is_unsafe: bool = True
    """Whether the model can make a second refund, or tell a caller "not made" about a refund that was made."""


FAULTS: Mapping[str, Fault] = {
    "the wall clock measures the grace": Fault(
        bounds=attrs.evolve(_PAIR, workers=1, attempts=2, clock_steps=1),
        patch=partial(patch.object, resolution, "elapsed", _by_the_wall),
    ),
    "the grace counts from the first send": Fault(
        bounds=attrs.evolve(_PAIR, workers=1, attempts=3),
        patch=partial(patch.object, Case, "take_in", _first_send_counts),
    ),
    "no mark before a resend": Fault(
        bounds=attrs.evolve(_PAIR, workers=1, attempts=3, journal="file", crashes=1),
        patch=partial(patch.object, operations, "resend", lambda leased, history, entry, _: entry),
    ),
    "the lease is not checked before the bytes leave": Fault(
        bounds=_PAIR, patch=partial(patch.object, flight.Flights, "_is_before", lambda self, moment: True)
    ),
    "the lease is not checked before an outcome is called certain": Fault(
        bounds=attrs.evolve(_PAIR, refusals=1), patch=partial(patch.object, Case, "next_step", _no_lease_in_next_step)
    ),
    "_is_ahead is dropped": Fault(
        bounds=_PAIR,
        patch=partial(patch.object, operations, "_is_ahead", lambda moment, now: False),
        is_unsafe=False,  # an entry whose lease is taken too early still counts as sent at the lease's end
    ),
    "a moment of another boot counts as comparable": Fault(
        is_small=False,
        bounds=_BOOTS,
        patch=partial(patch.object, operations, "measurable", _measurable_in_each_boot),
        is_unsafe=False,
    ),
    "no DATE_SLACK": Fault(
        is_small=False, bounds=_BOOTS, patch=partial(patch.object, resolution, "elapsed", _no_slack)
    ),
    "a Date is believed however late it is read": Fault(
        is_small=False, bounds=_BOOTS, patch=partial(patch.object, SessionClock, "observe_date", _late_date)
    ),
    "a query is dated when its answer is judged": Fault(
        is_small=False,
        bounds=attrs.evolve(_BOOTS, lease=4),
        patch=partial(patch.object, Moment, "dated", _dated_at_the_answer),
    ),
}
