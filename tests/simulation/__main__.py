"""``python -m tests.simulation --seeds N --refunds M [--first S] [--seed S --trace|--shrink] [--journal KIND]``."""

from __future__ import annotations

import argparse
import gc
import os
import re
import signal
import sys
import time
from collections import Counter
from functools import partial
from multiprocessing import Pool

from .plan import Plan, draw
from .run import Result, Run
from .shrink import shrink


def main() -> int:
    """Run one seed or all of them; return 1 if an invariant was violated."""
    options = _options()
    journals = tuple(options.journal.split(","))
    if options.seed is not None:
        return _replay(draw(options.seed, options.refunds, journals), trace=options.trace, smaller=options.shrink)
    began = time.perf_counter()
    figures, told, failed = Counter[str](), Counter[str](), 0
    seeds = range(options.first, options.first + options.seeds)
    stopped: list[int] = []
    with Pool(options.jobs, _collect_rarely) as pool:
        signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))  # print the figures so far
        for result in pool.imap(partial(_carry_out, refunds=options.refunds, journals=journals), seeds, chunksize=4):
            plan = result.plan
            figures.update(refunds=plan.refunds, ends=result.ends, steps=result.steps, hours=int(result.seconds / 3600))
            told.update(result.told)
            if result.violations:
                failed += 1
                print(f"seed {plan.seed} ({plan.journal}): {result.violations[0]}"[:300], flush=True)
                if failed == 1 and not options.no_shrink:
                    _replay(plan, trace=False, smaller=True)
                if failed >= options.most:
                    break
            if stopped or (options.seconds and time.perf_counter() - began > options.seconds):
                break
    seconds = time.perf_counter() - began
    print(
        f"{figures['refunds']:,} refunds, {figures['ends']:,} node ends, {figures['steps']:,} steps, "
        f"{figures['hours']:,} virtual hours, {failed} violations, {seconds:.1f} s "
        f"({figures['refunds'] / seconds:,.0f} refunds/s); told {dict(told)}"
    )
    return 1 if failed else 0


def _collect_rarely() -> None:
    """Run the garbage collector only between two runs: one run leaves much garbage."""
    gc.collect()
    gc.freeze()
    gc.disable()


def _carry_out(seed: int, refunds: int, journals: tuple[str, ...]) -> Result:
    if seed % 20 == 0:
        gc.collect()
    return Run(draw(seed, refunds, journals)).carry_out()


def _replay(plan: Plan, *, trace: bool, smaller: bool) -> int:
    """Run ``plan`` once and print its trace; ``smaller``: shrink it first and omit the steps of the event loops."""
    if smaller:
        plan = shrink(plan)
    lines: list[str] = []
    result = Run(plan, lines.append).carry_out()
    if trace:
        print(*lines, sep="\n")
    elif smaller:
        print(*[line for line in lines if not _STEP.match(line)][-60:], sep="\n")
    print(plan)
    print(*(result.violations or ["no violation"]), sep="\n")
    return 1 if result.violations else 0


_STEP = re.compile(r"[0-9.]+ node [0-9.]+: (?!.* is cancelled|the batch|resume:)")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.simulation")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--refunds", type=int, default=30, help="number of refunds in each run")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", help="run only this seed")
    parser.add_argument("--trace", action="store_true", help="print each step of --seed")
    parser.add_argument("--shrink", action="store_true", help="shrink the plan of --seed before running it")
    parser.add_argument("--no-shrink", action="store_true", help="do not shrink the first seed that fails")
    parser.add_argument("--journal", default="none,memory,sqlite,postgres", help="kinds of journals to choose from")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of processes")
    parser.add_argument("--most", type=int, default=5, help="stop after this number of violations")
    parser.add_argument("--seconds", type=float, default=0, help="stop after this number of seconds; 0: no limit")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
