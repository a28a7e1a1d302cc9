"""Check refund.pml with Spin on both sides of the bound: ``python -m tests.exploration.spin`` prints the results.

Needs Spin (Debian: ``spin``) and a C compiler. Time and sends are unbounded in this model, but it has only one clock.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

JOURNALS = {"one process": (1, 0), "file, crashes": (1, 1), "shared": (2, 0), "shared, crashes": (2, 1)}
"""WORKERS and CRASH of refund.pml."""


class Scenario(NamedTuple):
    """One set of refund.pml's parameters; durations in ticks."""

    journal: str
    n: int
    v: int
    grace: int
    lease: int = 1
    stop: int = 0
    fault: str = "NO_FAULT"

    @property
    def is_over_the_bound(self) -> bool:
        """Whether the README says that a refund can be made twice."""
        # The last tick of a lease of n ticks begins at n - 1.
        after_lease = 0 if self.journal == "one process" else max(0, self.stop - 1)
        return self.n + self.v + after_lease >= self.grace

    def check(self) -> tuple[bool, str]:
        """Visit every state up to the first second refund; return whether there is one, and the figures to print."""
        workers, crash = JOURNALS[self.journal]
        values = f"WORKERS={workers} CRASH={crash} N={self.n} V={self.v} GRACE={self.grace} LEASE={self.lease}"
        defines = [f"-D{name}" for name in f"{values} STOP={self.stop} {self.fault}".split()]
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            for command in (
                ["spin", *defines, "-a", str(Path(__file__).with_name("refund.pml"))],
                ["cc", "-w", "-DSAFETY", "-o", "pan", "pan.c"],
                ["./pan", "-b", "-m100000", "-w20"],  # -b: reaching this depth is an error
            ):
                report = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
        is_twice = "assertion violated (made<=1)" in report
        found = re.search(r"depth reached (\d+), errors: (\d+)\s+(\d+) states, stored", report)
        if found is None or int(found[2]) != is_twice:  # a deadlock, or the depth limit
            raise RuntimeError(report)
        return is_twice, f"{int(found[3]):>9,} {int(found[1]):>7,} {time.perf_counter() - began:7.1f}"


FAULTS = (
    Scenario("shared", 0, 0, 2, fault="NO_LEASE_CHECK"),
    Scenario("one process", 1, 0, 2, fault="FIRST_SEND_COUNTS"),
    Scenario("one process", 1, 0, 2, fault="NOT_FOUND_BELIEVED"),
    Scenario("file, crashes", 1, 0, 2, fault="NO_MARK"),
)
"""Faults below the bound, each in a scenario that reveals it."""


def frontier() -> Iterator[Scenario]:
    """Yield for each scenario the longest safe delay of the gateway, and the shortest unsafe one."""
    for journal, grace, lease, stop in product(JOURNALS, (1, 2, 3), (1, 3), (0, 2, 3)):
        if journal == "one process" and stop:  # the worker's own clock counts from after the send
            continue
        first = grace - max(0, stop - 1)
        for late in range(max(0, first - 1), max(0, first) + 1):
            yield Scenario(journal, late - late // 2, late // 2, grace, lease, stop)


def main() -> int:
    """Print the table; return 1 if Spin disagrees with the README."""
    is_wrong = False
    print(f"{'journal':<16} N V grace lease stop fault{'':<18} {'states':>9} {'depth':>7} seconds")
    for one in (*frontier(), *FAULTS):
        is_twice, figures = one.check()
        is_right = is_twice is (one.is_over_the_bound or one in FAULTS)
        is_wrong |= not is_right
        name = f"{one.journal:<16} {one.n} {one.v} {one.grace:>5} {one.lease:>5} {one.stop:>4} {one.fault:<22}"
        print(name, figures, " twice" if is_twice else " safe ", "" if is_right else "WRONG", flush=True)
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
