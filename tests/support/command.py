"""Run the command ``lianlian`` in this process or in a new one, and check that its output contains no secret."""

from __future__ import annotations

import asyncio.events
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import pytest
from click.testing import CliRunner

from lianlian_async.cli.app import lianlian
from tests.support import ROOT


@attrs.frozen
class Ended:
    """The result of a finished command."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The JSON object that the command printed."""
        return json.loads(self.stdout)


def _environment(env: Mapping[str, str]) -> dict[str, str | None]:
    """Return ``env`` and the test's journal, without any merchant variables of the developer's environment."""
    return {
        name: None for name in os.environ if name.startswith("LIANLIAN_") and not name.endswith(("BACKEND", "JOURNAL"))
    } | dict(env)


def _checked(ended: Ended, env: Mapping[str, str]) -> Ended:
    assert "Traceback" not in ended.stderr
    for name in ("LIANLIAN_PRIVATE_KEY", "LIANLIAN_PRIVATE_KEY_PASSWORD", "PASSWORD"):
        secret = env.get(name)
        assert not secret or secret[-40:] not in ended.stdout + ended.stderr
    return ended


def run(*arguments: object, env: Mapping[str, str] | None = None, stdin: str | None = None) -> Ended:
    """Run ``lianlian`` with ``arguments`` in this process and the environment ``env``."""
    env = env or {}
    result = CliRunner().invoke(
        lianlian, [str(argument) for argument in arguments], env=_environment(env), input=stdin, catch_exceptions=False
    )
    return _checked(Ended(result.exit_code, result.stdout, result.stderr), env)


def start(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start ``python -m lianlian_async`` with ``arguments`` in a new process."""
    full = {**os.environ, **_environment(env or {}), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    return subprocess.Popen(
        [sys.executable, "-m", "lianlian_async", *map(str, arguments)],
        env={name: value for name, value in full.items() if value is not None},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def end(process: subprocess.Popen[str], env: Mapping[str, str] | None = None) -> Ended:
    """Wait until ``process`` has ended, and return its result, with the exit code that a shell shows.

    ``python -m`` ends by SIGINT, not with 130, if KeyboardInterrupt was raised inside ``exec(text)`` and was caught
    later (CPython, ``unhandled_keyboard_interrupt``). Dataclasses use ``exec``, so an import can be such a place.
    """
    stdout, stderr = process.communicate(timeout=60)
    exit_code = 128 - process.returncode if process.returncode == -signal.SIGINT else process.returncode
    return _checked(Ended(exit_code, stdout, stderr), env or {})


def until(holds: Callable[[], object]) -> None:
    """Wait until ``holds()`` is true; another thread or process makes it so."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < 60, "it did not happen"
        time.sleep(0.01)


@contextlib.contextmanager
def interruption(*, loops: int = 0) -> Iterator[None]:
    """Simulate Ctrl-C in this process when the event loop after the first ``loops`` is being created.

    Test later interruptions in a new process: on Python 3.11, coverage.py does not record code that runs
    after a coroutine was cancelled.
    """
    new_event_loop, left = asyncio.events.new_event_loop, iter(range(loops))

    def interrupted() -> asyncio.AbstractEventLoop:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return new_event_loop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.events, "new_event_loop", interrupted)
        yield
