"""The explicit-state exploration in its small size: safe within the bounds, and no fault that it does not find."""

from __future__ import annotations

from shutil import which

import attrs
import pytest

from tests.exploration.explorer import explore
from tests.exploration.faults import FAULTS
from tests.exploration.model import Bounds
from tests.exploration.spin import FAULTS as SPIN_FAULTS
from tests.exploration.spin import Scenario

ONE = Bounds(journal="none", grace=2, lease=1, arrival=1, visibility=0, horizon=5)
TWO = attrs.evolve(ONE, workers=2, attempts=1, horizon=4)


@pytest.mark.parametrize(
    "bounds",
    [
        ONE,
        attrs.evolve(ONE, journal="file", crashes=1, arrival=0, visibility=1),
        attrs.evolve(TWO, journal="memory"),
        attrs.evolve(TWO, journal="postgres", arrival=0, stop=1),
    ],
    ids=["no journal", "file", "memory", "postgres"],
)
def test_within_the_bounds_no_interleaving_makes_a_refund_twice_or_denies_it(bounds):
    result = explore(bounds)
    assert result.twice is None
    assert result.denied is None
    assert result.states > 900


@pytest.mark.parametrize(
    ("bounds", "is_twice"),
    [
        (attrs.evolve(ONE, arrival=1, visibility=1), True),
        (attrs.evolve(ONE, journal="file", crashes=1, arrival=2), True),
        (attrs.evolve(TWO, journal="memory", arrival=1, stop=1), False),
        (attrs.evolve(TWO, journal="memory", arrival=1, stop=2), True),
        (attrs.evolve(TWO, journal="memory", arrival=0, stop=3), True),
    ],
)
def test_a_second_refund_needs_as_much_lateness_as_the_grace(bounds, is_twice):
    """The gateway's, and of two workers also that of bytes which leave after the end of their lease."""
    assert (explore(bounds, until_twice=True).twice is not None) is is_twice


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.is_small and fault.is_unsafe])
def test_a_fault_that_is_put_back_is_found(name):
    fault = FAULTS[name]
    with fault.patch():
        result = explore(fault.bounds, until_twice=True)
    assert result.twice or result.denied


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_can_be_put_back(name):
    """What a fault replaces exists: ``--size full`` explores also the faults that the suite leaves out."""
    with FAULTS[name].patch():
        pass


NEEDS_SPIN = pytest.mark.skipif(
    which("spin") is None or which("cc") is None, reason="needs Spin (Debian: spin) and a C compiler"
)


@NEEDS_SPIN
@pytest.mark.parametrize(
    ("scenario", "is_twice"),
    [
        (Scenario("one process", 1, 0, grace=2), False),
        (Scenario("one process", 1, 1, grace=2), True),
        (Scenario("file, crashes", 0, 1, grace=2, stop=1), False),
        (Scenario("file, crashes", 2, 0, grace=2), True),
        (Scenario("shared", 0, 1, grace=2), False),
        (Scenario("shared, crashes", 1, 0, grace=2, lease=2, stop=1), False),
        (Scenario("shared, crashes", 1, 0, grace=2, lease=2, stop=2), True),
        (Scenario("shared", 0, 0, grace=2, stop=2), False),
        (Scenario("shared", 0, 0, grace=2, stop=3), True),
    ],
    ids=str,
)
def test_spin_finds_a_second_refund_exactly_beyond_the_bound(scenario, is_twice):
    assert scenario.check()[0] is scenario.is_over_the_bound is is_twice


@NEEDS_SPIN
@pytest.mark.parametrize("scenario", SPIN_FAULTS, ids=lambda scenario: scenario.fault)
def test_spin_finds_a_fault_below_the_bound(scenario):
    assert not scenario.is_over_the_bound
    assert scenario.check()[0]
