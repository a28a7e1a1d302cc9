"""The deterministic simulation in a small size; see ``tests/simulation``."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import attrs

from lianlian_async.resolution import Case
from tests.simulation.plan import draw
from tests.simulation.run import Run
from tests.simulation.shrink import shrink

JOURNALS = ("none", "memory", "sqlite", "postgres")


def test_no_invariant_is_broken_in_a_few_runs():
    for seed in range(24):
        result = Run(draw(seed, 8, JOURNALS)).carry_out()
        assert result.violations == [], f"python -m tests.simulation --seed {seed} --refunds 8"


def test_one_seed_gives_one_trace_in_every_process():
    """Also where texts have other hash codes, and objects other addresses."""
    command = [sys.executable, "-m", "tests.simulation", "--seed", "24", "--refunds", "6", "--trace"]
    traces = [
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": number}, cwd=_root(), capture_output=True).stdout
        for number in ("1", "2")
    ]
    assert len(traces[0].splitlines()) > 100
    assert hashlib.sha256(traces[0]).hexdigest() == hashlib.sha256(traces[1]).hexdigest()


def _root() -> Path:
    return Path(__file__).resolve().parents[1]


def test_a_fault_is_found_shrunk_and_replayed(monkeypatch):
    """Where "no such record" is believed at once, a refund is made twice, or called rejected though it was made."""
    monkeypatch.setattr(Case, "not_found_is_believed", lambda case, asked_at: True)
    plans = [draw(seed, 8, JOURNALS) for seed in range(60)]
    plan = next(plan for plan in plans if Run(plan).carry_out().violations)
    small = shrink(plan, most_runs=100)
    sizes = [each.refunds + len(each.events) + len(each.faults) for each in (small, plan)]
    assert sizes[0] < sizes[1]
    traces: list[list[str]] = [[], []]
    first, second = (Run(small, trace.append).carry_out() for trace in traces)
    assert first.violations == second.violations != []
    assert traces[0] == traces[1]


def test_a_run_ends_with_real_signatures_too():
    assert Run(attrs.evolve(draw(3, 2, JOURNALS), real_rsa=True)).carry_out().violations == []
