"""The states of one refund, its workers, its journal and the gateway, and all possible steps from each state.

Time is counted in ticks of ``TICK`` seconds. A worker may pause for any number of ticks in any phase: this models
suspension, a slow scheduler and a slow journal. Only the pause between the last check of the lease and the sending
is bounded (``Bounds.stop``), and so are the delays of the gateway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import attrs

from lianlian_async.clock import Moment
from lianlian_async.errors import JournalError
from lianlian_async.exchange import Finding
from lianlian_async.flight import Flights
from lianlian_async.journal import Entry, Standing, operations
from lianlian_async.journal.operations import Begin, Operation
from lianlian_async.resolution import Case, Step
from lianlian_async.retry import Deadline

from . import parts


@attrs.frozen(kw_only=True)
class Bounds:
    """One scenario. All durations are in ticks."""

    journal: str
    """``none`` (the session's own memory), ``memory``, ``file`` (one process at a time) or ``postgres``."""
    workers: int = 1
    attempts: int = 2
    """Maximum sends of each worker, over all its runs."""
    grace: int = 3
    lease: int = 2
    arrival: int = 1
    """Maximum time from sending a request to its arrival."""
    visibility: int = 1
    """Maximum time from making a refund to its visibility in queries."""
    stop: int = 0
    """Maximum pause of a process between the check of its lease and the sending."""
    crashes: int = 0
    reboots: int = 0
    clock_steps: int = 0
    """Number of steps of a wall clock, each longer than grace and lease together."""
    has_dates: bool = False
    """Whether answers have a ``Date`` header; each may be read late."""
    refusals: int = 0
    horizon: int = 9


class Worker(NamedTuple):
    """One worker: the clocks of its machine, and the progress of its call."""

    phase: str = "idle"
    boot: int = 0
    wall: int = 0
    """Ticks by which the wall clock is ahead."""
    ahead: Any = None
    """The session clock's knowledge of the gateway's clock."""
    left: int = 0
    """Sends left."""
    entry: Entry | None = None
    sent_at: Moment | None = None
    is_rejected: bool = False
    since: int = 0
    """The tick at which the exchange began."""
    asked_at: Moment | None = None
    date: int = 0
    """The tick at which the gateway wrote the answer that is in transit."""


class Request(NamedTuple):
    """One request that left a worker."""

    worker: int
    left_at: int
    made_at: int | None = None


class World(NamedTuple):
    """One state."""

    now: int
    row: Any
    """The journal's entry: an ``Entry``; with PostgreSQL the JSON text of the row."""
    workers: tuple[Worker, ...]
    requests: tuple[Request, ...] = ()
    """Requests in transit, and requests whose refund is made but not visible yet."""
    made: int = 0
    is_visible: bool = False
    crashes: int = 0
    reboots: int = 0
    clock_steps: int = 0
    refusals: int = 0
    is_denied: bool = False
    """Whether a caller was told, or the journal says, "not sent" or "not made" about a refund that was."""

    @property
    def is_twice(self) -> bool:
        """Whether the refund was made twice."""
        return self.made > 1


Steps = Iterator[tuple[str, World]]


def first(bounds: Bounds) -> World:
    """Return the initial state."""
    return World(
        now=0,
        row=None,
        workers=(Worker(left=bounds.attempts),) * bounds.workers,
        crashes=bounds.crashes,
        reboots=bounds.reboots,
        clock_steps=bounds.clock_steps,
        refusals=bounds.refusals,
    )


def in_order(requests: list[Request]) -> tuple[Request, ...]:
    """Return ``requests`` sorted, so that equal states compare equal."""
    return tuple(sorted(requests, key=repr))


def _change(function: Callable[..., Entry | None], *arguments: Any) -> Operation[Any]:
    return Operation("R-1", partial(function, *arguments))


def _release(worker: Worker, sent_at: Moment | None) -> Operation[Any]:
    return _change(operations.release, worker.entry, sent_at, None, "")


class Model:
    """The steps of one scenario."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds

    def steps(self, world: World) -> Steps:
        """Yield every possible step: its name and the state after it."""
        yield from self._time(world)
        yield from self._gateway(world)
        for number, worker in enumerate(world.workers):
            for name, after in getattr(self, f"_{worker.phase}")(world, number, worker):
                yield f"worker {number}: {name}", after
            for name, after in self._misfortune(world, number, worker):
                yield f"worker {number}: {name}", after
            if self.bounds.has_dates:
                for name, after in self._dates(world, number, worker):
                    yield f"worker {number}: {name}", after

    # ── time, gateway, machines ──────────────────────────────────────────────────────────────────

    def _time(self, world: World) -> Steps:
        bounds, now = self.bounds, world.now
        if now >= bounds.horizon:
            return
        for request in world.requests:
            if request.made_at is None and now - request.left_at >= bounds.arrival:
                return
            if request.made_at is not None and now - request.made_at >= bounds.visibility:
                return
        if any(one.phase == "checked" and now - one.since >= bounds.stop for one in world.workers):
            return
        yield "tick", world._replace(now=now + 1)

    def _gateway(self, world: World) -> Steps:
        for request in set(world.requests):
            rest = list(world.requests)
            rest.remove(request)
            if request.made_at is None:
                # If a refund is visible already, the visibility of another one makes no difference.
                made = [] if world.is_visible else [request._replace(made_at=world.now)]
                yield (
                    f"gateway makes the refund of worker {request.worker}",
                    world._replace(requests=in_order([*rest, *made]), made=world.made + 1),
                )
                yield "network loses a request", world._replace(requests=tuple(rest))
            else:
                flying = tuple(one for one in rest if one.made_at is None)
                yield "gateway shows the refund", world._replace(requests=flying, is_visible=True)

    def _dates(self, world: World, number: int, worker: Worker) -> Steps:
        """Read a Date header from another refund's answer, possibly long after it was written."""
        if worker.ahead is not None or worker.phase not in ("idle", "waiting", "ask"):
            return
        for date in range(world.now + 1):
            heard = self._hear(world, number, worker._replace(date=date, since=date)).ahead
            if heard is not None:
                yield f"reads a Date of tick {date}", self._with(world, number, worker._replace(ahead=heard))

    def _misfortune(self, world: World, number: int, worker: Worker) -> Steps:
        row = world.row
        if worker.phase not in ("down", "done") and row is not None and world.crashes:
            if self.bounds.journal == "file" and row is not None:
                # The file keeps no lease: its lock proves that the process has ended.
                row = attrs.evolve(row, holder=None, leased_until=None)
            down = Worker("down", worker.boot, worker.wall, left=worker.left)
            yield "crashes", self._with(world._replace(crashes=world.crashes - 1, row=row), number, down)
        if world.clock_steps:
            far = self.bounds.grace + self.bounds.lease + 1
            for wall in (far, -far):
                stepped = world._replace(clock_steps=world.clock_steps - 1)
                yield f"wall clock is set to {wall:+d}", self._with(stepped, number, worker._replace(wall=wall))

    def _down(self, world: World, number: int, worker: Worker) -> Steps:
        yield "starts again", self._with(world, number, worker._replace(phase="idle"))
        if world.reboots:
            boot = worker.boot + 1
            booted = world._replace(reboots=world.reboots - 1)
            yield "boots", self._with(booted, number, worker._replace(phase="idle", boot=boot))

    # ── a call ───────────────────────────────────────────────────────────────────────────────────

    def _idle(self, world: World, number: int, worker: Worker) -> Steps:
        now = self._clock(world, number, worker)
        begin = Begin(parts.intent(self.bounds.lease), now, f"worker {number}")
        _, after = self._do(world, number, worker, _change(begin))
        standing, entry = begin.standing, parts.without_history(begin.found)
        if standing is Standing.FINISHED or standing is Standing.LEASED:
            return
        sent_at = entry.sent_at
        phase = "ready" if sent_at is None else "ask"
        call = worker._replace(phase=phase, entry=entry, sent_at=sent_at)
        yield f"begins, {standing}", self._with(after, number, call)

    def _ready(self, world: World, number: int, worker: Worker) -> Steps:
        """Check the lease once more before sending."""
        not_sent = self._no(world, number, worker, Finding.NOT_SENT)
        case = self._case(worker, self._clock(world, number, worker))
        if worker.left and case.apply.lease_holds():
            checked = worker._replace(phase="checked", since=world.now)
            if self.bounds.stop:
                yield "checks its lease", self._with(world, number, checked)
            else:
                yield from self._checked(world, number, checked)
            yield "cannot connect", not_sent
        else:
            yield "finds its lease over", not_sent

    def _checked(self, world: World, number: int, worker: Worker) -> Steps:
        request = Request(number, world.now)
        requests = in_order([*world.requests, request])
        waiting = worker._replace(phase="waiting", left=worker.left - 1, date=world.now)
        if not self.bounds.has_dates:
            waiting = waiting._replace(since=0)
        yield "sends", self._with(world._replace(requests=requests), number, waiting)

    def _waiting(self, world: World, number: int, worker: Worker) -> Steps:
        mine = Request(number, worker.date)
        if mine in world.requests:
            if world.refusals:
                rest = list(world.requests)
                rest.remove(mine)
                refused = world._replace(requests=tuple(rest), refusals=world.refusals - 1)
                yield "is rejected", self._with(refused, number, worker._replace(phase="refused"))
        elif world.made:
            yield "is told that it was made", self._made(world, number, worker)
        yield "gets no answer", self._with(world, number, self._take_in(world, number, worker, Finding.UNCERTAIN))

    def _refused(self, world: World, number: int, worker: Worker) -> Steps:
        yield "reads the rejection", self._no(world, number, worker, Finding.REJECTED)

    def _no(self, world: World, number: int, worker: Worker, finding: Finding) -> World:
        """Return the state after an attempt that was not sent or was rejected."""
        case = self._case(worker, self._clock(world, number, worker))
        if case.next_step(finding) is Step.RAISE:
            if finding is Finding.NOT_SENT and not case.apply.lease_holds() and self._is_taken(world, number, worker):
                return self._leave(world, number, worker)
            return self._told_not_made(world, number, worker)
        return self._with(world, number, self._take_in(world, number, worker, finding))

    def _is_taken(self, world: World, number: int, worker: Worker) -> bool:
        """Whether the journal shows a send after this worker released the lease (as in ``recording.keep``)."""
        _, after = self._do(world, number, worker, _release(worker, None))
        found, _ = self._do(after, number, worker, _change(operations.find))
        return found is not None and (found.sent_at is not None or found.ending is not None)

    def _take_in(self, world: World, number: int, worker: Worker, finding: Finding) -> Worker:
        case = self._case(worker, self._clock(world, number, worker))
        case.next_step(finding)
        case.take_in(parts.reply(finding))
        return worker._replace(
            phase="ask", sent_at=case.sent_at, is_rejected=case.rejection is not None, since=0, date=0
        )

    def _ask(self, world: World, number: int, worker: Worker) -> Steps:
        asked_at = self._clock(world, number, worker)
        asked = worker._replace(phase="asked", asked_at=asked_at, since=world.now)
        if self.bounds.has_dates:
            yield "queries", self._with(world, number, asked)
        else:  # a later answer adds nothing to an immediate answer and another query
            yield from self._asked(world, number, asked)
        yield "gives up", self._leave(world, number, worker)

    def _asked(self, world: World, number: int, worker: Worker) -> Steps:
        if world.is_visible:
            yield "finds the refund", self._made(world, number, worker)
        elif self.bounds.has_dates:
            answered = worker._replace(phase="answered", date=world.now)
            yield "is answered: no such record", self._with(world, number, answered)
        else:
            yield from self._heard(world, number, worker)

    def _answered(self, world: World, number: int, worker: Worker) -> Steps:
        heard = self._hear(world, number, worker)._replace(phase="heard")
        yield "reads the answer: no such record", self._with(world, number, heard)

    def _heard(self, world: World, number: int, worker: Worker) -> Steps:
        case = self._case(worker, self._clock(world, number, worker))
        is_believed = case.not_found_is_believed(worker.asked_at)
        name = f"{'believes' if is_believed else 'does not believe'} that there is no record"
        phase = "believed" if is_believed else "ask"
        judged = worker._replace(phase=phase, sent_at=case.sent_at, asked_at=None, since=0)
        yield name, self._with(world, number, judged)

    def _believed(self, world: World, number: int, worker: Worker) -> Steps:
        yield "gives up", self._leave(world, number, worker)
        case = self._case(worker, self._clock(world, number, worker))
        if not case.apply.lease_holds():
            return
        if worker.is_rejected:
            yield "reports the rejection", self._told_not_made(world, number, worker)
        elif worker.left:
            try:
                _, after = self._do(world, number, worker, _change(operations.resend, worker.entry, ""))
            except JournalError:
                yield "has lost its lease", self._leave(world, number, worker)
            else:
                yield "marks that it sends again", self._with(after, number, worker._replace(phase="ready"))

    # ── how a call ends ──────────────────────────────────────────────────────────────────────────

    def _made(self, world: World, number: int, worker: Worker) -> World:
        _, after = self._do(world, number, worker, _change(operations.finish, worker.entry, parts.MADE, ""))
        return self._with(after, number, self._ended(worker, "done"))

    def _told_not_made(self, world: World, number: int, worker: Worker) -> World:
        _, after = self._do(world, number, worker, _release(worker, None))
        is_denied = bool(world.made or world.requests)
        return self._with(after._replace(is_denied=is_denied), number, self._ended(worker))

    def _leave(self, world: World, number: int, worker: Worker) -> World:
        now = self._clock(world, number, worker)
        unknown = self._case(worker, now).unknown()
        _, after = self._do(world, number, worker, _release(worker, unknown.moment))
        return self._with(after, number, self._ended(worker))

    def _done(self, world: World, number: int, worker: Worker) -> Steps:
        """Do nothing: the caller knows the outcome and does not call again."""
        yield from ()

    def _ended(self, worker: Worker, phase: str = "idle") -> Worker:
        return Worker(phase, worker.boot, worker.wall, worker.ahead, worker.left)

    # ── the library's code, given the state ──────────────────────────────────────────────────────

    def _with(self, world: World, number: int, worker: Worker) -> World:
        workers = (*world.workers[:number], worker, *world.workers[number + 1 :])
        return world._replace(workers=workers)

    def _clock(self, world: World, number: int, worker: Worker) -> Moment:
        return parts.moment(world.now, worker.wall, number, worker.boot, worker.ahead)

    def _hear(self, world: World, number: int, worker: Worker) -> Worker:
        raw = parts.raw(world.now, worker.wall, number, worker.boot)
        took = (world.now - worker.since) * parts.TICK
        return worker._replace(ahead=parts.heard(raw, worker.date, took, worker.ahead), date=0)

    def _case(self, worker: Worker, now: Moment) -> Case:
        if self.bounds.journal == "none" or worker.entry is None:
            lease_holds = True
        else:
            lease_holds = Flights._is_before(parts.SessionStub(now), Deadline(worker.entry.leased_until.boot))
        return parts.case(self.bounds.grace, worker.sent_at, now, lease_holds)

    def _do(self, world: World, number: int, worker: Worker, operation: Operation[Any]) -> tuple[Any, World]:
        if self.bounds.journal != "postgres":
            answer = entry = operation.apply(world.row, False)
            if self.bounds.journal == "none" and (entry.ending is not None or entry.sent_at is None):
                entry = None  # OpenRefunds may forget these entries
            return parts.without_history(answer), world._replace(row=parts.without_history(entry))
        reading = parts.reading(world.now, self._clock(world, number, worker))
        answer, row = parts.in_database(operation, world.row, reading)
        return parts.without_history(answer), world._replace(row=row)
