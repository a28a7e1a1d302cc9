"""Shrink a plan that fails to a smaller one that also fails: fewer refunds, nodes, callers, events and faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import attrs

from .plan import Plan
from .run import Run

MOST_RUNS: Final = 400
TRIES: Final = 4
"""Number of seeds tried for each smaller plan, because every change also changes the later random choices."""


def shrink(plan: Plan, most_runs: int = MOST_RUNS) -> Plan:
    """Return the smallest failing plan found in ``most_runs`` runs; ``plan`` must fail."""
    runs = 0
    is_smaller = True
    while is_smaller and runs < most_runs:
        is_smaller = False
        for smaller in _smaller(plan):
            found, tried = _failing(smaller)
            runs += tried
            if found is not None:
                plan, is_smaller = found, True
                break
            if runs >= most_runs:
                break
    return plan


def _failing(plan: Plan) -> tuple[Plan | None, int]:
    seed = plan.seed.partition("~")[0]
    for number in range(TRIES):
        tried = attrs.evolve(plan, seed=f"{seed}~{number}" if number else plan.seed)
        if Run(tried).carry_out().violations:
            return tried, number + 1
    return None, TRIES


def _smaller(plan: Plan) -> Iterator[Plan]:
    """Yield plans that are smaller in one respect, the largest reduction first."""
    for refunds in (1, plan.refunds // 4, plan.refunds // 2, plan.refunds - 1):
        if 0 < refunds < plan.refunds:
            yield attrs.evolve(plan, refunds=refunds)
    half = len(plan.events) // 2
    if half:
        yield attrs.evolve(plan, events=plan.events[:half])
        yield attrs.evolve(plan, events=plan.events[half:])
    for place in range(len(plan.events)):
        yield attrs.evolve(plan, events=plan.events[:place] + plan.events[place + 1 :])
    for place in range(len(plan.faults)):
        yield attrs.evolve(plan, faults=plan.faults[:place] + plan.faults[place + 1 :])
    for place in range(len(plan.notices)):
        yield attrs.evolve(plan, notices=plan.notices[:place] + plan.notices[place + 1 :])
    plain: dict[str, Any] = {
        "nodes": 1,
        "callers": 1,
        "rejects": 0.0,
        "reused": 0.0,
        "blind": False,
        "dated": True,
        "program": "service",
        "query_first": False,
        "interleaved_threads": 0.0,
        "window": 1,
        "notifies": False,
        "inbox": False,
    }
    for name, value in plain.items():
        if getattr(plan, name) != value:
            yield attrs.evolve(plan, **{name: value})
