"""The values with which the library's own functions are called: moments, entries, cases and database rows."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from functools import cache
from types import SimpleNamespace
from typing import Any

import attrs

from lianlian_async.clock import Moment, SessionClock
from lianlian_async.errors import LianLianError, RefundRejected
from lianlian_async.exchange import Exchange, Finding, Reply
from lianlian_async.journal import Ending, Entry, Intent, State
from lianlian_async.journal.operations import Operation
from lianlian_async.journal.postgres_moments import Reading
from lianlian_async.journal.postgres_rows import entry_of, rows_of
from lianlian_async.models import RefundRequest
from lianlian_async.resolution import Case
from lianlian_async.retry import RetryPolicy
from tests.support.exchanges import exchange

TICK = 10.0
"""Seconds: less than DATE_SLACK, so that a Date header may be one tick old."""

_WALL = datetime(2026, 1, 1, tzinfo=UTC)
_GATEWAY = datetime(2026, 3, 1, tzinfo=UTC)
_DATABASE = datetime(2026, 5, 1, tzinfo=UTC)
_BOOTS = (3000.0, 100.0, 9000.0, 500.0)
"""The boot clock's first value in each boot: a later boot may begin with a higher or a lower value."""


class Constant(dict):
    """A hashable mapping; it is never changed."""

    def __hash__(self) -> int:
        return len(self)


MADE = Ending(state=State.DONE, record=Constant(sta_refund="2"))
_FIELDS = Constant(no_refund="R-1", dt_refund="20260101000000")


_REQUEST = RefundRequest(
    no_refund="R-1",
    dt_refund=_WALL,
    money_refund=Decimal("1.00"),
    no_order="O-1",
    notify_url="https://shop.example/notify",
)


@cache
def intent(lease: int) -> Intent:
    """Return the intent of the one refund."""
    return Intent(no_refund="R-1", fields=_FIELDS, body=b"{}", lease=lease * TICK, grace=0.0)


@cache
def raw(now: int, wall: int, machine: int, boot: int) -> Moment:
    """Return the clocks of a machine at a tick, whose wall clock is ``wall`` ticks ahead."""
    seconds = now * TICK
    start = _BOOTS[(2 * machine + boot) % len(_BOOTS)]
    return Moment(_WALL + timedelta(seconds=seconds + wall * TICK), start + seconds, f"machine {machine}, boot {boot}")


@cache
def moment(now: int, wall: int, machine: int, boot: int, ahead: timedelta | None) -> Moment:
    """Return the moment that a session's clock reads from these clocks."""
    clock = SessionClock(lambda: raw(now, wall, machine, boot))
    clock._ahead = ahead
    return clock()


@cache
def heard(now: Moment, date: int, took: float, ahead: timedelta | None = None) -> timedelta | None:
    """Return a session clock's ``_ahead`` after an exchange of ``took`` seconds, answered at the tick ``date``."""
    clock = SessionClock(lambda: now)
    clock._ahead = ahead
    clock.observe_date(format_datetime(_GATEWAY + timedelta(seconds=date * TICK), usegmt=True), now.boot - took)
    return clock._ahead


class SessionStub(SimpleNamespace):
    """The part of a session that the functions under test use: its clock."""

    def __init__(self, now: Moment) -> None:
        super().__init__(_clock=lambda: now)


async def _nothing(*_: object) -> None:
    return None


@cache
def _exchange(grace: int, lease_holds: bool) -> Exchange:
    policy = RetryPolicy(not_found_grace=grace * TICK)
    asked = {"oid_partner": "201400000000000000"}
    return exchange(asked=asked, policy=policy, lease_holds=lambda: lease_holds)


def case(grace: int, sent_at: Moment | None, now: Moment, lease_holds: bool) -> Case:
    """Return the open case of a worker at one moment."""
    return Case(
        request=_REQUEST,
        apply=_exchange(grace, lease_holds),
        make_query=_nothing,
        clock=lambda: now,
        sent_at=sent_at,
        before_resend=_nothing,
        canary=_nothing,
    )


_REJECTION = RefundRejected("5006", "no money", verified=True, no_refund="R-1")
_SILENCE = LianLianError("no answer")


def reply(finding: Finding) -> Reply:
    """Return the reply to an apply attempt that needs a query."""
    return Reply(finding=finding, error=_REJECTION if finding is Finding.REJECTED else _SILENCE)


# ── PostgreSQL ───────────────────────────────────────────────────────────────────────────────────


def reading(now: int, worker: Moment) -> Reading:
    """Return a reading of the database's clock that took no time."""
    database = _DATABASE + timedelta(seconds=now * TICK)
    return Reading(before=worker, database=database, after=worker, era=1, began=_DATABASE, is_same_incarnation=True)


def in_database(operation: Operation[Any], row: str | None, reading: Reading) -> tuple[Any, str | None]:
    """Carry out an operation as ``PostgresJournal`` does; return its answer and the row after it."""
    recorded = {} if row is None else {"R-1": json.loads(row)}
    before = None if row is None else attrs.evolve(entry_of(recorded["R-1"], reading), fields=_FIELDS)
    entry = operation.apply(before, False)
    if entry is before or entry is None:
        return entry, row
    written = json.loads(rows_of([entry], recorded, reading))[0]
    return entry, json.dumps(written | {"history": ""})


def without_history(answer: Any) -> Any:
    """Return an entry without the facts: no decision reads them, but they split states."""
    return attrs.evolve(answer, history="") if isinstance(answer, Entry) else answer
