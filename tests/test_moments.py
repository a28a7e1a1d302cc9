"""Moments and the time between them: by the boot clock, across boots by the smaller of two clocks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lianlian_async import clock
from lianlian_async.clock import DATE_SLACK, Moment, SessionClock, elapsed, latest, system_clock

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC)
HERE = Moment(NOON, 100.0, "this boot", NOON)
ELSEWHERE = Moment(NOON, 7.0, "another boot", NOON)

seconds = st.integers(-1_000_000, 1_000_000).map(float)


def later(moment, *, wall=0.0, boot=0.0, gateway=0.0):
    """``moment`` with each clock moved by itself."""
    told = None if moment.gateway is None or gateway is None else moment.gateway + timedelta(seconds=gateway)
    return attrs.evolve(moment, wall=moment.wall + timedelta(seconds=wall), boot=moment.boot + boot, gateway=told)


@given(wall=seconds, gateway=st.none() | seconds, boot=seconds)
def test_within_one_boot_only_the_boot_clock_counts(wall, gateway, boot):
    """The wall clock can step, and the gateway's clock is not ours."""
    assert elapsed(HERE, later(HERE, wall=wall, boot=boot, gateway=gateway)) == pytest.approx(boot)


@given(wall=seconds, gateway=seconds, boot=seconds)
def test_across_boots_the_smaller_difference_counts(wall, gateway, boot):
    """Less a slack for the header's resolution; a clock that went backward makes the count start again."""
    span = elapsed(HERE, later(ELSEWHERE, wall=wall, gateway=gateway, boot=boot))
    if min(wall, gateway) < 0:
        assert span is None
    else:
        assert span == pytest.approx(max(0.0, min(wall, gateway) - DATE_SLACK))


def test_across_boots_a_date_that_is_late_makes_no_time_pass():
    """A ``Date`` header may be as old as the longest exchange, 10 seconds, and tells whole seconds only."""
    assert (
        elapsed(HERE, later(ELSEWHERE, wall=911, gateway=911))
        < 900
        <= elapsed(HERE, later(ELSEWHERE, wall=930, gateway=930))
    )


def test_across_boots_nothing_is_known_without_the_gateways_time():
    unheard = attrs.evolve(HERE, gateway=None)
    assert elapsed(unheard, later(ELSEWHERE, wall=9999, gateway=9999)) is None
    assert elapsed(HERE, later(ELSEWHERE, wall=9999, gateway=None)) is None


@pytest.mark.parametrize("young", [5.0, 300.0])
def test_of_two_moments_the_later_one_is_known_across_boots(young):
    """Each is compared by the clocks that it shares with now."""
    now = later(HERE, wall=1000, boot=1000, gateway=1000)
    here, elsewhere = later(now, boot=-100.0), later(ELSEWHERE, wall=1000 - young, gateway=1000 - young)
    assert latest(here, elsewhere, now) is latest(elsewhere, here, now) is (elsewhere if young < 100 else here)


def test_of_two_moments_that_no_clock_can_compare_the_later_one_counts_as_now():
    """So that nothing is older than it is."""
    unheard = attrs.evolve(ELSEWHERE, gateway=None)
    now = later(HERE, wall=1000, boot=1000, gateway=1000)
    assert latest(HERE, unheard, now) is latest(unheard, HERE, now) is now


@given(span=seconds)
def test_a_moment_moves_on_all_clocks(span):
    moved = HERE.after(span)
    assert (moved.wall, moved.gateway) == (NOON + timedelta(seconds=span),) * 2
    assert (moved.boot, moved.timeline) == (100.0 + span, "this boot")
    assert attrs.evolve(HERE, gateway=None).after(span).gateway is None


def test_a_moment_is_dated_by_what_the_gateway_told_later():
    """Only within one boot, and only if the timestamp had no ``Date`` before."""
    unheard = attrs.evolve(HERE, gateway=None)
    assert unheard.dated(later(HERE, boot=60, gateway=90)).gateway == NOON + timedelta(seconds=30)
    for now in (unheard, ELSEWHERE):
        assert unheard.dated(now) is unheard
    assert HERE.dated(later(HERE, boot=60, gateway=90)) is HERE


def test_this_machines_clocks():
    """The boot clock counts suspension, which the monotonic clock does not; two processes share a timeline."""
    before, moment = time.clock_gettime(time.CLOCK_BOOTTIME), system_clock()
    assert before <= moment.boot <= time.clock_gettime(time.CLOCK_BOOTTIME)
    assert abs(moment.wall - datetime.now(UTC)) < timedelta(minutes=1)
    assert moment.gateway is None
    program = "from lianlian_async.clock import system_clock; print(system_clock().timeline)"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == moment.timeline


def test_without_a_boot_id_a_process_counts_as_a_boot(monkeypatch):
    """Elsewhere than on Linux no file tells it."""
    monkeypatch.setattr(clock, "_BOOT_ID", clock._BOOT_ID / "missing")
    assert clock.read_timeline() != clock.read_timeline()


@pytest.mark.parametrize(
    ("missing", "reading"),
    [
        ([], "CLOCK_BOOTTIME"),
        (["CLOCK_BOOTTIME"], "CLOCK_MONOTONIC"),
        (["CLOCK_BOOTTIME", "CLOCK_MONOTONIC"], "monotonic"),
    ],
)
def test_the_best_clock_of_the_machine_is_taken(missing, reading, monkeypatch):
    """MacOS has no CLOCK_BOOTTIME, and Windows no clock_gettime."""
    numbers = {getattr(time, name): name for name in ("CLOCK_BOOTTIME", "CLOCK_MONOTONIC")}
    monkeypatch.setattr(time, "clock_gettime", numbers.get)
    monkeypatch.setattr(time, "monotonic", lambda: "monotonic")
    for name in missing:
        monkeypatch.delattr(time, name)
    assert clock.boot_clock()() == reading


# ── the gateway's time ───────────────────────────────────────────────────────────────────────────


class Dials:
    """The clocks of a machine, each moved by hand."""

    def __init__(self):
        self.moment = attrs.evolve(HERE, gateway=None)

    def __call__(self):
        return self.moment


def test_a_session_learns_the_gateways_time_from_its_answers():
    """It moves on with the boot clock, whatever the wall clock does; each new header sets it again."""
    dials = Dials()
    session_clock = SessionClock(dials)
    assert session_clock().gateway is None
    session_clock.observe_date("Thu, 26 Nov 2026 20:00:00 GMT", 100.0)
    assert session_clock().gateway == NOON + timedelta(hours=8)
    dials.moment = later(dials.moment, boot=60, wall=-7200)
    session_clock.observe_date("Thu, 26 Nov 2026 20:00:00 GMT", 100.0)
    assert session_clock().gateway == NOON + timedelta(hours=8, seconds=60)
    session_clock.observe_date("Thu, 26 Nov 2026 20:00:30 GMT", 160.0)
    assert session_clock().gateway == NOON + timedelta(hours=8, seconds=30)


@pytest.mark.parametrize(("seconds", "is_heard"), [(14.0, True), (14.5, False), (7200.0, False)])
def test_a_date_that_is_read_long_after_its_exchange_began_teaches_nothing(seconds, is_heard):
    """A process that was suspended reads a header of unknown age; DATE_SLACK allows for 15 s with the resolution."""
    session_clock = SessionClock(Dials())
    session_clock.observe_date("Thu, 26 Nov 2026 20:00:00 GMT", 100.0 - seconds)
    assert (session_clock().gateway is not None) is is_heard


@pytest.mark.parametrize(
    "date", ["", "yesterday", "Thu, 99 Nov 2026 20:00:00 GMT", "Fri, 31 Dec 9999 23:59:59 GMT", "0", "\x00"]
)
def test_a_date_that_cannot_be_read_teaches_nothing(date):
    session_clock = SessionClock(Dials())
    session_clock.observe_date(date, 100.0)
    assert session_clock().gateway is None


def test_a_date_without_a_zone_is_in_gmt():
    """RFC 9110 §5.6.7 has no other zone."""
    session_clock = SessionClock(Dials())
    session_clock.observe_date("Thu, 26 Nov 2026 20:00:00 -0000", 100.0)
    assert session_clock().gateway == NOON + timedelta(hours=8)


def test_the_module_needs_no_linux(tmp_path):
    """Importing it on a machine without a boot id or the boot clock gives a timeline of the process."""
    program = (
        "import time; del time.CLOCK_BOOTTIME\n"
        "import pathlib; pathlib.Path.readlink = lambda self: (_ for _ in ()).throw(OSError())\n"
        "from lianlian_async.clock import system_clock; print(system_clock().timeline)"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert done.stdout.startswith("process ")
