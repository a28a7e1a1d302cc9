"""Runs programs in turns, each in a fresh process, and pairs what they measured."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from . import environment
from .programs.frame import Job

Sample = dict[str, float]


@dataclass(frozen=True)
class Spread:
    """A median with its minimum and maximum."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.low)}–{_short(self.high)})"


def _name(label: Hashable) -> str:
    return " ".join(map(str, label)) if isinstance(label, tuple) else str(label)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Program:
    """One module of ``benchmarks.programs``, with its job and environment."""

    module: str
    job: Job = field(default_factory=Job)
    core: bool = False
    """With the four dependencies only."""
    env: Mapping[str, str] = field(default_factory=dict)


class Rounds:
    """What every program measured in every round."""

    def __init__(self, samples: dict[Hashable, list[Sample]]) -> None:
        self._samples = samples

    def of(self, label: Hashable, figure: str) -> Spread:
        """Return a figure of one program."""
        return Spread.of([sample[figure] for sample in self._samples[label]])

    def ratio(self, one: Hashable, other: Hashable, figure: str, other_figure: str | None = None) -> Spread:
        """Return the figure of ``one`` divided by that of ``other``, in pairs of the same round."""
        pairs = zip(self._samples[one], self._samples[other], strict=True)
        return Spread.of([a[figure] / b[other_figure or figure] for a, b in pairs])


@dataclass(frozen=True)
class Server:
    """A running gateway: the URL to apply at, and the folder of the keys."""

    url: str
    keys: str
    stats: Callable[[], dict[str, int]]


class Bench:
    """One run: its options, its servers and its programs."""

    def __init__(
        self, *, rounds: int, quick: bool, bits: int, tls: bool, pinned: bool, requests: int, cache: Path
    ) -> None:
        self.rounds = rounds
        self.quick = quick
        self.bits = bits
        self.tls = tls
        self.requests = requests
        self._cache = cache
        self.pythons = {"all extras": sys.executable, "four dependencies": environment.core_python(cache)}
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.client_cpu, self.server_cpu = (cpus[0], cpus[-1]) if len(cpus) > 1 else (None, None)
        if not pinned:
            self.client_cpu = None

    def size(self, full: int) -> int:
        """Return ``full``, or a tenth of it in a quick run."""
        return max(1, full // 10) if self.quick else full

    @contextmanager
    def server(self, answers: int = 0, *, bits: int | None = None, delay: float = 0.0) -> Iterator[Server]:
        """Run a gateway process, which signs ``answers`` answers before it serves, with keys of ``bits``."""
        from . import openssl

        with tempfile.TemporaryDirectory(dir=self._cache) as folder:
            openssl.write_keys(Path(folder), bits or self.bits)
            command = [sys.executable, "-m", "benchmarks.server", "--keys", folder]
            command += ["--answers", str(answers), "--delay", str(delay), *(["--tls"] if self.tls else [])]
            command += [] if self.server_cpu is None else ["--cpu", str(self.server_cpu)]
            process = subprocess.Popen(command, cwd=environment.ROOT, stdout=subprocess.PIPE, text=True)
            try:
                ports = json.loads(process.stdout.readline())
                stats_url = f"http://127.0.0.1:{ports['plain']}/stats"

                def stats() -> dict[str, int]:
                    with urlopen(stats_url) as response:
                        told: dict[str, int] = json.load(response)
                    return told

                scheme = "https" if self.tls else "http"
                yield Server(f"{scheme}://127.0.0.1:{ports['served']}/exchangerefund.htm", folder, stats)
            finally:
                process.terminate()
                process.wait()

    def interleave(
        self, programs: Mapping[Any, Program], server: Server | None = None, *, rounds: int | None = None
    ) -> Rounds:
        """Run the programs A B C, A B C …; with a ``server``, check that it saw all refunds."""
        samples: dict[Hashable, list[Sample]] = {label: [] for label in programs}
        rounds = rounds or self.rounds
        for number in range(1, rounds + 1):
            for label, program in programs.items():
                sample = self._run(program)
                samples[label].append(sample)
                told = ", ".join(f"{name} {_short(value)}" for name, value in sample.items())
                print(f"  {number}/{rounds} {_name(label)}: {told}", file=sys.stderr)
                if server is not None:
                    seen = server.stats()
                    if seen["refused"] or seen["requests"] != program.job.warm_up + sample["refunds"]:
                        raise RuntimeError(f"{label} did not do its work: the server saw {seen}")
        return Rounds(samples)

    def _run(self, program: Program) -> Sample:
        python = self.pythons["four dependencies" if program.core else "all extras"]
        command = [python, "-m", f"benchmarks.programs.{program.module}", json.dumps(asdict(program.job))]
        # Keep compiled code, or an import would measure the compiler.
        env = {
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(self._cache / "bytecode"),
            "LIANLIAN_HTTP_BACKEND": "httpx" if program.core else "aiohttp",
            **program.env,
        }
        if self.tls and program.job.keys:
            certificate = str(Path(program.job.keys, "tls.pem"))
            env |= {"SSL_CERT_FILE": certificate, "REQUESTS_CA_BUNDLE": certificate}
        done = subprocess.run(command, cwd=environment.ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
        sample: Sample = json.loads(done.stdout)
        return sample
