"""How the database's clock and a worker's go together (``journal.postgres_moments``)."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import attrs
import pytest

from lianlian_async.clock import Moment, elapsed
from lianlian_async.journal.postgres_moments import Reading

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def moment(boot, timeline="here", gateway=None):
    return Moment(datetime(2026, 5, 6, tzinfo=UTC) + timedelta(seconds=boot), boot, timeline, gateway)


def reading(database=0.0, *, boot=0.0, era=1, began=-86_400.0, latency=0.25, timeline="here", same=True):
    """The database's clock so many seconds after noon, the worker's ``boot`` before the request."""
    return Reading(
        before=moment(boot, timeline),
        database=NOON + timedelta(seconds=database),
        after=moment(boot + latency, timeline),
        era=era,
        began=NOON + timedelta(seconds=began),
        is_same_incarnation=same,
    )


def stored(at, by):
    return json.loads(json.dumps(by.stored(at, None)))


def test_within_one_boot_a_moment_comes_back_as_it_was():
    """Its own boot clock measures exactly, however far the database's clock was off meanwhile."""
    at = moment(-10.0, gateway=NOON)
    later = reading(5000.0, boot=100.0)
    assert later.moment(stored(at, reading())) == at


def test_on_another_machine_a_moment_is_as_old_as_the_database_says_and_no_older():
    """The age is right up to the time that the two answers took, and never too great."""
    at = moment(-10.0)
    elsewhere = reading(300.0, boot=7000.0, timeline="there", latency=0.5)
    found = elsewhere.moment(stored(at, reading()))
    assert found.timeline == "there"
    assert 310.0 - 0.75 <= elsewhere.after.boot - found.boot <= 310.0


def test_of_two_moments_of_other_machines_the_row_keeps_only_its_own():
    """A call on a third machine brings the unknown outcome of a later send: the row must not say the earlier time."""
    recorded = stored(moment(-600.0, "there", NOON), reading(timeline="there"))
    here = reading(60.0)
    assert here.stored(here.moment(recorded), recorded) == recorded
    now = here.stored(here.after, None)
    for gateway in (NOON + timedelta(seconds=1), None):
        assert here.stored(moment(-100.0, "elsewhere", gateway), recorded) == now
    assert here.stored(moment(-100.0, "elsewhere", NOON), None) == now


def test_a_clone_of_a_virtual_machine_measures_by_the_database():
    """Its boot id is that of the snapshot, and its boot clock began at another time."""
    for boot in (5000.0, -5000.0):
        clone = reading(300.0, boot=boot)
        found = clone.moment(stored(moment(-10.0), reading()))
        assert clone.after.boot - found.boot <= 310.0


def test_a_clone_of_a_virtual_machine_waits_for_no_lease_that_is_over():
    """Its boot clock is an hour behind, so by that clock the lease begins in an hour."""
    clone = reading(61.0, boot=-3600.0)
    assert clone.moment(stored(moment(60.0), reading())).boot <= clone.after.boot
    assert clone.moment(stored(moment(62.0), reading())).boot > clone.before.boot


def test_on_another_machine_a_lease_is_over_when_the_database_says_so():
    """Also for a worker with a wrong clock; and it never ends earlier than its holder believes."""
    lease_end = moment(60.0)
    for passed, is_over in ((59.0, False), (60.5, True)):
        elsewhere = reading(passed, boot=-9000.0, timeline="there")
        assert (elsewhere.moment(stored(lease_end, reading())).boot <= elsewhere.after.boot) is is_over


def test_a_moment_of_another_boot_also_has_to_be_old_by_the_gateways_clock():
    """The database's clock was set while no worker ran: a timestamp is as recent as by the gateway's clock."""
    told = datetime(2026, 3, 4, tzinfo=UTC)
    elsewhere = reading(86_400.0, boot=50.0, timeline="there")
    found = elsewhere.moment(stored(moment(0.0, gateway=told), reading()))
    asked = attrs.evolve(elsewhere.after, gateway=told + timedelta(seconds=100))
    assert 0 < elapsed(found, asked) <= 100
    assert elapsed(found, attrs.evolve(asked, gateway=told + timedelta(days=2))) <= 86_400


def test_what_came_from_another_boot_is_stored_as_it_was():
    """A moment that the worker only carried back is not written in terms of its clock; without a record it is now."""
    at = stored(moment(0.0, gateway=NOON), reading())
    elsewhere = reading(500.0, boot=50.0, timeline="there")
    found = elsewhere.moment(at)
    assert elsewhere.stored(found, at) == at
    assert elsewhere.stored(found, None) == elsewhere.stored(elsewhere.after, None)


@pytest.mark.parametrize("timeline", ["here", "there"])
def test_in_another_era_a_moment_counts_from_its_beginning(timeline):
    """A timestamp before the beginning is as old as the era; one after it is younger by the difference."""
    later = reading(1e6, boot=40.0, era=2, began=1e6 - 30, timeline=timeline)
    for at, age in ((moment(-500.0), 30.0), (moment(20.0), 10.0)):
        found = later.moment(stored(at, reading()))
        assert found.timeline == timeline
        assert later.after.boot - found.boot == pytest.approx(age)


@pytest.mark.parametrize(
    ("later", "continues"),
    [
        (reading(100.0, boot=100.0), True),
        (reading(102.0, boot=100.0), True),
        (reading(100.0, boot=102.0), True),
        (reading(1001.0, boot=100.0), False),
        (reading(-7100.0, boot=100.0), False),
        (reading(1001.0, boot=100.0, era=2), True),
        (reading(100.0, boot=100.0, same=False), False),
        (reading(100.0, boot=100.0, era=2, same=False), False),
        (reading(100.0, boot=100.0, era=0), False),
        (reading(100.0, boot=100.0, began=-86_000.0), False),
    ],
)
def test_an_era_ends_when_the_boot_clock_or_another_incarnation_proves_it(later, continues):
    """Set forward, set back, another incarnation, or the way back to one; not for drift, nor in a later era."""
    assert later.continues(reading()) is continues


def test_no_moment_is_none():
    """What was never sent has no moment, stored or not."""
    assert reading().moment(None) is None
    assert reading().stored(None, {"at": "…"}) is None
