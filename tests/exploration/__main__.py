"""``python -m tests.exploration [--size small|full]``: print the results for scenarios, bounds and injected faults."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import attrs

from .explorer import Result, explore
from .faults import FAULTS
from .model import Bounds

_ONE = Bounds(journal="none", grace=3, lease=2, arrival=1, visibility=1)
_TWO = Bounds(journal="memory", workers=2, attempts=1, grace=2, lease=1, arrival=1, visibility=0, horizon=5)
SAFE = {
    "no journal": _ONE,
    "no journal, three sends, clock steps": attrs.evolve(_ONE, attempts=3, clock_steps=1, refusals=1),
    "file, crashes": attrs.evolve(_ONE, journal="file", crashes=2, refusals=1),
    "shared in a process, two workers": attrs.evolve(_TWO, refusals=1),
    "PostgreSQL, two workers": attrs.evolve(_TWO, journal="postgres"),
    "PostgreSQL, two workers, stop": attrs.evolve(_TWO, journal="postgres", arrival=0, stop=1),
}
SAFE_IN_FULL = {
    "file, boots, clock steps, Dates": attrs.evolve(
        _ONE,
        journal="file",
        grace=2,
        lease=1,
        visibility=0,
        crashes=1,
        reboots=1,
        clock_steps=1,
        has_dates=True,
        horizon=4,
    ),
    "PostgreSQL, crash, refusal": attrs.evolve(_TWO, journal="postgres", crashes=1, refusals=1),
    "PostgreSQL, two sends each": attrs.evolve(_TWO, journal="postgres", attempts=2),
}
"""Scenarios with too many states for the small size."""


def frontier(size: str) -> Iterator[tuple[str, Bounds, bool]]:
    """Yield scenarios on both sides of the bound, and whether a second refund can be made."""
    for grace in (1, 2, 3):
        for late in range(grace + 2):
            one = attrs.evolve(_ONE, grace=grace, arrival=late, visibility=0, horizon=2 * grace + 2)
            yield f"no journal: grace {grace}, late {late}", one, late >= grace
            split = attrs.evolve(one, journal="file", crashes=1, arrival=late // 2, visibility=late - late // 2)
            yield f"file: grace {grace}, late {late // 2}+{late - late // 2}", split, late >= grace
    for grace in (1, 2):
        for lease in (1, 2) if size == "full" else (1,):
            for stop in range(grace + 3):
                for late in range(grace):
                    if size == "small" and stop + late not in (grace, grace + 1):
                        continue
                    two = attrs.evolve(
                        _TWO, grace=grace, lease=lease, arrival=late, stop=stop, horizon=lease + grace + 1
                    )
                    # The last tick of a lease of n ticks begins at n - 1.
                    yield f"shared: grace {grace}, lease {lease}, late {late}, stop {stop}", two, stop + late > grace


def main() -> int:
    """Print the table; return 1 if a search gave an unexpected result."""
    parser = argparse.ArgumentParser(prog="python -m tests.exploration")
    parser.add_argument("--size", choices=("small", "full"), default="small")
    size = parser.parse_args().size
    is_wrong = False

    def row(name: str, result: Result, is_right: bool) -> None:
        nonlocal is_wrong
        is_wrong |= not is_right
        found = "twice" if result.twice else "denied" if result.denied else "safe"
        print(
            f"{name:<72} {result.states:>9,} {result.transitions:>10,} {result.seconds:7.1f}  "
            f"{found:<6} {'' if is_right else 'WRONG'}",
            flush=True,
        )
        if not is_right:
            print(*(result.twice or result.denied or ()), sep="\n")

    print(f"{'':<72} {'states':>9} {'steps':>10} {'seconds':>7}")
    for name, bounds in (SAFE if size == "small" else SAFE | SAFE_IN_FULL).items():
        result = explore(bounds)
        row(name, result, not (result.twice or result.denied))
    for name, bounds, is_twice in frontier(size):
        result = explore(bounds, until_twice=True)
        row(name, result, bool(result.twice) is is_twice)
    for name, fault in FAULTS.items():
        if size == "full" or fault.is_small:
            with fault.patch():
                result = explore(fault.bounds, until_twice=True)
            row(f"fault: {name}", result, bool(result.twice or result.denied) is fault.is_unsafe)
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
