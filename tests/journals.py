"""What the tests of all journals share: how each is made, and refunds to put in."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import attrs

from lianlian_async.journal import Ending, Intent, Journal, MemoryJournal, SqliteJournal, State
from lianlian_async.journal.postgres import PostgresJournal

HOUR = timedelta(hours=1)
MADE = Ending(state=State.DONE, record={"ret_code": "0000", "ret_msg": "交易成功", "sta_refund": "2"})
ACCEPTED = Ending(state=State.ACCEPTED, record={"ret_code": "0000", "sta_refund": "1"})
REJECTED = Ending(state=State.REJECTED, record={"ret_code": "5003"})


def now():
    return datetime.now(UTC)


def intent(no_refund="R-1", *, hold=HOUR, money="200.01", body=b'{"sign":"1"}', **changed):
    """A refund whose content is its number and its amount."""
    fields = {"no_refund": no_refund, "money_refund": money, "no_order": "订单-1"}
    return Intent(
        **{"no_refund": no_refund, "digest": f"digest of {money}", "fields": fields, "body": body}
        | {"held_until": now() + hold}
        | changed
    )


@attrs.frozen
class Kind:
    """One kind of journal, and one place where it keeps its refunds."""

    make: Callable[[], Journal]
    """A journal at that place."""
    tolerance: timedelta
    """How far a moment may be off that goes in and comes out again."""

    def is_same(self, one: datetime | None, other: datetime | None) -> bool:
        return (one is None) is (other is None) and (one is None or abs(one - other) <= self.tolerance)


def memory():
    journal = MemoryJournal()
    return Kind(lambda: journal, timedelta(0))


def sqlite(folder):
    return Kind(lambda: SqliteJournal(folder / "journal.sqlite"), timedelta(0))


def postgres(dsn):
    schema = f"test {uuid4().hex}"
    return Kind(lambda: PostgresJournal(dsn, schema=schema), timedelta(minutes=10))  # between two clocks


def kind(name, request):
    """The kind called ``name``, at a place of the test's own."""
    match name:
        case "memory":
            return memory()
        case "sqlite":
            return sqlite(request.getfixturevalue("tmp_path"))
        case _:
            return postgres(request.getfixturevalue("postgres_dsn"))
