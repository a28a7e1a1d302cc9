"""``python -m benchmarks [CASE ...]``: run cases, print their tables, and write them down with ``--out``."""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
from pathlib import Path

from . import environment
from .report import Report, store
from .runner import Bench

CASES = (
    "programs",
    "concurrency",
    "transport",
    "own_cpu",
    "lag",
    "gather",
    "memory",
    "imports",
    "journal",
    "stream",
    "notifications",
    "fleet",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default: 7); some cases limit or multiply them")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, two rounds: to see that it runs")
    parser.add_argument("--out", type=Path, help="write sections and charts there, such as benchmarks/RESULTS.md")
    parser.add_argument("--bits", type=int, default=2048, choices=(1024, 2048, 4096), help="size of both RSA keys")
    parser.add_argument("--tls", action="store_true", help="serve over TLS")
    parser.add_argument("--requests", type=int, default=1_000_000, help="length of stream, journal and queue")
    parser.add_argument("--unpinned", action="store_true", help="let every program use all processors")
    default_cache = Path(tempfile.gettempdir()) / "lianlian-async-benchmarks"
    parser.add_argument("--cache", type=Path, default=default_cache, help="keeps the four-dependency environment")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if missing := environment.missing_extras():
        parser.error(f"pip install 'lianlian-async[bench]': {', '.join(missing)} not found")
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    bench = Bench(
        rounds=rounds,
        quick=options.quick,
        bits=options.bits,
        tls=options.tls,
        pinned=not options.unpinned,
        requests=options.requests,
        cache=options.cache,
    )
    variant = _variant(options)
    conditions = f"{options.bits}-bit keys, {'TLS' if options.tls else 'plain HTTP'}, rounds: {rounds}"
    for case in options.cases or CASES:
        module = importlib.import_module(f"benchmarks.cases.{case}")
        title, _, text = (module.__doc__ or "").partition("\n")
        report = Report(case, variant, title.rstrip("."), text)
        before = os.getloadavg()[0]
        module.run(bench, report)
        ran = f"{conditions}; load average before the run: {before:.1f}. {environment.description(bench.pythons)}"
        print("\n" + report.markdown(ran), flush=True)
        if options.out:
            store(report, options.out, ran)


def _variant(options: argparse.Namespace) -> list[str]:
    """Return the options of a variant, which has sections and charts of its own."""
    return [
        *([f"--bits {options.bits}"] if options.bits != 2048 else []),
        *(f"--{name}" for name in ("tls", "unpinned", "quick") if getattr(options, name)),
    ]


if __name__ == "__main__":
    main()
