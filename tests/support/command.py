"""Run the command ``lianlian`` in this process or in a new one, and check that its output contains no secret."""

from __future__ import annotations

import asyncio.events
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import attrs
import pytest
from click.testing import CliRunner

from lianlian_async import Merchant, RefundRequest, RefundSession
from lianlian_async.cli.app import lianlian
from lianlian_async.journal import SqliteJournal
from lianlian_async.sandbox import Fault, SandboxGateway
from tests.support import ROOT
from tests.support.batches import refund


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
    kept = ("BACKEND", "JOURNAL")
    return {name: None for name in os.environ if name.startswith("LIANLIAN_") and not name.endswith(kept)} | dict(env)


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


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, typed: str, *arguments: object, env: Mapping[str, str]) -> Any:
    """Run the command with a terminal as stdin on which ``typed`` is typed; return the exit code."""
    for name, text in env.items():
        monkeypatch.setenv(name, text)
    ours, theirs = os.openpty()
    os.write(ours, typed.encode())
    with os.fdopen(theirs, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        try:
            return lianlian.main([str(argument) for argument in arguments], standalone_mode=False)
        finally:
            os.close(ours)


def read_env_file(path: Path) -> dict[str, str]:
    """Return the variables of an environment file, as a POSIX shell reads them."""
    assignments = shlex.split(path.read_text("utf-8"), comments=True)
    return dict(assignment.split("=", 1) for assignment in assignments)


def leave_unknown(merchant: Merchant, journal: Path, gateway: SandboxGateway, *numbers: int) -> None:
    """Begin refunds, and cancel the calls when the gateway has received the requests."""

    async def begin() -> None:
        gateway.script(Fault.NO_ANSWER, times=len(numbers))
        async with (
            SqliteJournal(journal) as opened,
            RefundSession(merchant, journal=opened, max_connections=len(numbers)) as session,
            anyio.create_task_group() as group,
        ):
            for number in numbers:
                group.start_soon(session.apply_refund, RefundRequest.from_dict(refund(number)))
            await anyio.to_thread.run_sync(until, lambda: len(gateway.refunds) == len(numbers))
            group.cancel_scope.cancel()

    anyio.run(begin)
