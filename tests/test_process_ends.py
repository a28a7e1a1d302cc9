"""A process that ends in the middle of its work ends by itself, and its journal tells what may have been made."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

import pytest

from lianlian_async.journal import State
from tests.programs import process_ends
from tests.support import ROOT, program

pytestmark = pytest.mark.anyio

NUMBERS = {f"R-{number}" for number in range(1, process_ends.REFUNDS + 1)}

ENDS = {
    "return": 0,
    "raise": 1,
    "exit": 7,
    "cancel all": 0,
    "stop the loop": 1,
    "SIGINT": -signal.SIGINT,
    "SIGINT twice": -signal.SIGINT,
    "SIGTERM": -signal.SIGTERM,
    "abort in the handler": 0,
    "exit in the handler": 7,
    "abort in the middleware": 1,
    "exit in the middleware": 7,
}
"""The ways to end, and the exit code of each."""


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(params=["sqlite", "postgres"])
def place(request, tmp_path):
    if request.param == "sqlite":
        return str(tmp_path / "journal.sqlite")
    return request.getfixturevalue("database")


def run(way: str, place: str) -> tuple[int, str]:
    """Return the exit code and the text on stderr."""
    command = [*program("process_ends"), way, place]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            first = process.stdout.readline()
            if way.startswith("SIG"):
                process.send_signal(getattr(signal, way.removesuffix(" twice")))
            if way.endswith("twice"):
                time.sleep(0.0005)  # the event loop has seen the first one, and is at work to end
                process.send_signal(signal.SIGINT)
                # The second one may interrupt asyncio's own shutdown. Then idle threads of anyio, or a task that is not
                # cancelled again, keep the process alive, and a third one ends it.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=10)
                process.send_signal(signal.SIGINT)  # no effect if the process has ended
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    assert first == "at work\n", stderr
    return process.returncode, stderr


@pytest.mark.parametrize("way", ENDS)
async def test_it_ends_and_the_journal_tells_what_may_have_been_made(way, place):
    """However it ends, nothing waits for ever; the next process opens the journal and finds each refund unresolved."""
    exit_code, stderr = run(way, place)
    assert exit_code == ENDS[way], stderr
    assert ("it has ended" in stderr) is (exit_code == 0)
    async with process_ends.make_journal(place) as journal:
        entries = [entry async for entry in journal.entries()]
    assert {entry.no_refund for entry in entries} == NUMBERS
    for entry in entries:
        assert entry.state is State.UNRESOLVED
        assert entry.sent_at is not None or entry.no_refund == "R-1"  # it ended before its first byte
