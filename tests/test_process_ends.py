"""A process that ends in the middle of its work ends by itself, and its journal tells what may have been made."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest

from lianlian_async.journal import State
from tests.programs import process_ends
from tests.support import ROOT, postgres, program

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


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def journals(request, tmp_path_factory):
    """The folder or the database of the journals."""
    if request.param == "sqlite":
        return str(tmp_path_factory.mktemp("journals"))
    return postgres.new_database(request.getfixturevalue("postgres_dsn"))


@pytest.fixture(scope="module")
def ends(journals):
    """The exit code and the text on stderr of the process that ended in each way."""
    ended = subprocess.run(
        [*program("process_ends"), journals, *ENDS], cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=250
    )
    return json.loads(ended.stdout)


@pytest.mark.parametrize("way", ENDS)
async def test_it_ends_and_the_journal_tells_what_may_have_been_made(way, journals, ends):
    """However it ends, nothing waits for ever; the next process opens the journal and finds each refund unresolved."""
    exit_code, stderr = ends[way]
    assert exit_code == ENDS[way], stderr
    assert ("it has ended" in stderr) is (exit_code == 0)
    async with process_ends.make_journal(journals, way) as journal:
        entries = [entry async for entry in journal.entries()]
    assert {entry.no_refund for entry in entries} == NUMBERS
    for entry in entries:
        assert entry.state is State.UNRESOLVED
        assert entry.sent_at is not None or entry.no_refund == "R-1"  # it ended before its first byte
