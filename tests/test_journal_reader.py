"""Reading an SQLite journal while another process uses it."""

import contextlib
import os
import sqlite3
from pathlib import Path

import pytest

from lianlian_async.errors import JournalError
from lianlian_async.journal import SqliteJournal, SqliteReader, State
from tests.support.journals import MADE, held, intent, now

pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path):
    return tmp_path / "100% journal?.sqlite"


def open_files():
    """Return the paths of this process's open files; none where the system does not show them."""
    descriptors = Path("/proc/self/fd")
    return [os.path.realpath(each) for each in descriptors.iterdir()] if descriptors.exists() else []


async def test_a_journal_can_be_read_while_it_is_in_use(path):
    """A reader sees the begun and resolved refunds, and does not block the writer."""
    async with SqliteJournal(path) as journal, SqliteReader(path) as before:
        await journal.begin(intent("R-1"), now())
        await journal.finish(held("R-1"), MADE)
        await journal.begin(intent("R-2"), now())
        async with SqliteReader(path) as reader:
            assert [entry.no_refund async for entry in reader.entries()] == ["R-1", "R-2"]
            assert [entry.no_refund async for entry in reader.pending()] == ["R-2"]
            assert (await reader.counts())[State.DONE] == (await before.counts())[State.DONE] == 1
            await journal.finish(held("R-2"), MADE)
        assert [entry async for entry in before.entries()] == []


async def test_reading_changes_nothing(path):
    """Reading a closed journal changes no byte of it, and takes no lock."""
    async with SqliteJournal(path) as journal:
        await journal.begin(intent("R-1"), now())
    before = path.read_bytes()
    async with SqliteReader(path) as reader:
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader._file._connection.execute("DELETE FROM refunds")
        assert (await reader.counts())[State.UNRESOLVED] == 1
    assert path.read_bytes() == before
    async with SqliteReader(path), SqliteJournal(path) as journal:
        assert await journal.find("R-1") is not None


async def test_reading_creates_no_journal(path):
    """If the file is missing or not a journal, the reader raises and creates nothing."""
    with pytest.raises(JournalError, match="unable to open"):
        async with SqliteReader(path):
            pass
    assert not path.exists()
    path.touch()
    with pytest.raises(JournalError, match="not a journal"):
        async with SqliteReader(path):
            pass
    assert path.read_bytes() == b""


async def test_a_reader_that_cannot_be_opened_closes_the_file(path):
    """A damaged owner raises, and no connection stays open."""
    async with SqliteJournal(path):
        pass
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE journal SET oid_partner = x'00ff'")
    with pytest.raises(JournalError, match="JSON cannot hold BLOB"):
        async with SqliteReader(path):
            pass
    assert str(path) not in open_files()


async def test_a_reader_writes_nothing(path):
    """A session with it raises before anything is sent."""
    async with SqliteJournal(path) as journal:
        await journal.begin(intent("R-1"), now())
    async with SqliteReader(path) as reader:
        with pytest.raises(JournalError, match="open for reading only"):
            await reader.begin(intent("R-2"), now())
        with pytest.raises(JournalError, match="unable to open"):
            await reader.inbox()
        assert [entry.no_refund async for entry in reader.entries()] == ["R-1"]
