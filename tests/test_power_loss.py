"""No power loss loses a refund or its outcome: ``tests/programs/power_loss.py``, in small."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import closing

import attrs
import pytest

from lianlian_async.journal.operations import Begin, Operation
from lianlian_async.journal.sqlite_file import JournalFile, restore
from tests.programs import power_loss
from tests.programs.power_loss import Recording, Request, Sync, Told
from tests.support.journals import intent, now

REFUNDS = 10


@pytest.fixture(scope="module")
def recording(tmp_path_factory, pytestconfig) -> Recording:
    """The recorded steps of a batch."""
    strace = shutil.which("strace")
    if (
        strace is None
        or subprocess.run([strace, "-f", "--seccomp-bpf", "-o", "/dev/null", "true"], capture_output=True).returncode
    ):
        pytest.skip("strace is not installed, or may not trace processes")
    folder = tmp_path_factory.mktemp("power")
    return power_loss.record(folder, refunds=REFUNDS, seed=pytestconfig.getoption("seed"))


def without_syncs(recording: Recording, name: str) -> Recording:
    """Return the steps of a process that never synced the file or folder ``name``."""
    syncs = [step for step in recording.steps if isinstance(step, Sync) and step.path.endswith(name)]
    return attrs.evolve(recording, steps=[step for step in recording.steps if step not in syncs])


def test_a_refund_and_the_journals_names_are_synced_before_its_request_leaves(recording):
    """The order of syncs and sends: each row, each new folder and each file is on disk before the first byte."""
    requests = {step.no_refund for step in recording.steps if isinstance(step, Request)} - {None}
    told = {step.about for step in recording.steps if isinstance(step, Told)} - {"journal"}
    assert requests == told == {f"R-{number}" for number in range(1, REFUNDS + 1)}
    assert power_loss.sent_too_early(recording.steps) == []


@pytest.mark.anyio
async def test_a_journal_survives_a_power_loss_at_any_point(recording, pytestconfig):
    """It is intact, and has each refund that was sent and each outcome that was printed."""
    states, seed = (pytestconfig.getoption(name) for name in ("power_losses", "seed"))
    report = await power_loss.lose_power(recording, states=states, seed=seed)
    assert report.problems == {}
    assert sum(report.states.values()) == states


@pytest.mark.anyio
@pytest.mark.parametrize("name", [".sqlite", "-wal", "folder"])
async def test_the_search_finds_a_missing_sync(recording, name):
    """Without the syncs of the database, of its WAL or of their folder, a power loss does harm."""
    report = await power_loss.lose_power(without_syncs(recording, name), states=40, seed=0)
    assert report.problems != {}


@pytest.mark.parametrize("name", ["-wal", "folder", "root/new", "root"])
def test_the_check_of_the_order_finds_a_missing_sync(recording, name):
    """Without the syncs of the WAL or of a folder, requests leave too early."""
    assert power_loss.sent_too_early(without_syncs(recording, name).steps)


def test_the_names_of_a_backup_and_of_a_restored_journal_are_synced(tmp_path, monkeypatch):
    """Each file has its name when its folder is synced: else a power loss could remove a journal that was restored."""
    journal, backup, restored = (tmp_path / name for name in ("journal", "backup", "restored"))
    synced, fsync = [], os.fsync

    def noted(descriptor):
        synced.append(set(os.listdir(descriptor)))  # noqa: PTH208 - pathlib takes no descriptor
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", noted)
    with closing(JournalFile(str(journal))) as file:
        file.write([Operation("R-1", Begin(intent("R-1"), now()))])
        file.backup(backup)
    restore(backup, restored, now())
    assert [backup.name in synced[0], restored.name in synced[-1]] == [True, True]
