"""Clocks that are set between two attempts never make a refund twice (``tests/programs/clocks.py``, in small)."""

from __future__ import annotations

import random

import pytest

from tests.programs import clocks
from tests.programs.clocks import Life, Scene

CALM = {"life": Life.NEW_BOOT, "step": "+600 s", "journal": "sqlite", "backend": "httpx"}


@pytest.mark.parametrize(
    "chosen",
    [
        {"step": "+901 s", "backend": "httpx", "fate": "late"},
        {"step": "+1 day", "backend": "aiohttp", "fate": "lost", "journal": "sqlite"},
        {"step": "-2 h", "backend": "httpx", "fate": "lost", "life": Life.NEW_BOOT},
    ],
    ids=lambda chosen: " ".join(chosen.values()),
)
def test_a_clock_that_is_set_makes_no_refund_twice(chosen, postgres_dsn):
    """In every scenario, the refund is made exactly once, and its outcome becomes known."""
    scenes = list(clocks.scenes(**chosen))
    results = clocks.play(scenes, postgres_dsn)
    assert {scene: (result.made, result.refund is not None) for scene, result in results.items()} == dict.fromkeys(
        scenes, (1, True)
    )


@pytest.mark.parametrize(
    "wall",
    [lambda _: 0.0, lambda number: (-1) ** number * 3 * 3600.0, lambda n: random.Random(n).uniform(-4e4, 4e4)],
    ids=["right", "off by turns", "off at random"],
)
@pytest.mark.parametrize("fate", clocks.FATES)
def test_processes_on_fresh_boots_settle_within_a_day(fate, wall, postgres_dsn):
    """A process starts every 10 minutes after a new boot with a wall clock that may be wrong by hours."""
    [result] = clocks.play([Scene(**CALM, fate=fate)], postgres_dsn, wall=wall).values()
    assert (result.made, result.refund is not None) == (1, True)


@pytest.mark.parametrize(("fate", "made"), [("late", 1), ("lost", 0)])
def test_without_dates_a_new_boot_never_sends_again(fate, made, postgres_dsn):
    """Without Date headers, elapsed time is unknown after a boot: arrived refunds are found, others stay unknown."""
    [result] = clocks.play([Scene(**CALM, fate=fate, dates=False)], postgres_dsn, most=12).values()
    assert (result.made, result.refund is not None) == (made, bool(made))
