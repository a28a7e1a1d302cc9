"""Helpers for the tests of all journals: create each kind of journal, and entries for it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from uuid import uuid4

import attrs

from lianlian_async.clock import Moment, system_clock
from lianlian_async.journal import Ending, Entry, Intent, Journal, MemoryJournal, SqliteJournal, State
from lianlian_async.journal.postgres import PostgresJournal
from tests.simulation.connections import modelled
from tests.simulation.database import Database

MADE = Ending(state=State.DONE, record={"ret_code": "0000", "ret_msg": "交易成功", "sta_refund": "2"})
ACCEPTED = Ending(state=State.ACCEPTED, record={"ret_code": "0000", "sta_refund": "1"})
REJECTED = Ending(state=State.REJECTED, record={"ret_code": "5003"})


def now(seconds=0.0):
    """Return the current moment plus ``seconds``."""
    return system_clock().after(seconds)


def intent(no_refund="R-1", *, lease=3600.0, money="200.01", body=b'{"sign":"1"}', **changed):
    """Return the intent of a refund over ``money``."""
    fields = {"no_refund": no_refund, "money_refund": money, "no_order": "订单-1"}
    return Intent(**{"no_refund": no_refund, "fields": fields, "body": body, "lease": lease, "grace": 900.0} | changed)


def held(no_refund="R-1", **changed):
    """Return the entry of :func:`intent` for a caller that knows only the refund's number."""
    begun = intent(no_refund, **changed)
    return Entry(no_refund=no_refund, fields=begun.fields, body=begun.body, sent_at=now())


@attrs.frozen
class Kind:
    """One kind of journal and one storage location."""

    make: Callable[[], Journal]
    """Create a journal object for that location."""
    tolerance: float
    """Maximum difference in seconds between a stored moment and the same moment after reading."""

    def is_same(self, one: Moment | None, other: Moment | None) -> bool:
        """Return whether both are the same moment; for a resolved refund only the wall clock is compared."""
        if one is None or other is None:
            return one is other
        if not one.timeline or not other.timeline:
            return abs((one.wall - other.wall).total_seconds()) <= self.tolerance
        return abs(one.boot - other.boot) <= self.tolerance


def memory():
    journal = MemoryJournal()
    return Kind(lambda: journal, 0.0)


def sqlite(folder):
    return Kind(lambda: SqliteJournal(folder / "journal.sqlite"), 0.0)


def postgres(dsn):
    schema = f"test {uuid4().hex}"
    return Kind(lambda: PostgresJournal(dsn, schema=schema), 600.0)  # between two clocks


def model(request):
    """Return the simulation's model of PostgreSQL on the test's event loop; all journals connect to it."""
    database = Database(time.monotonic, lambda *when: asyncio.get_running_loop().call_later(*when), random.Random(0))
    patch = modelled(database)
    patch.__enter__()
    request.addfinalizer(lambda: patch.__exit__(None, None, None))
    return database


def kind(name, request):
    """Return the kind ``name`` with a new location for this test."""
    match name:
        case "memory":
            return memory()
        case "sqlite":
            return sqlite(request.getfixturevalue("tmp_path"))
        case "model":
            model(request)
            return postgres("postgresql://model")
        case _:
            return postgres(request.getfixturevalue("postgres_dsn"))
