"""Set clocks between the attempts at one refund: ``python -m tests.programs.clocks``.

The gateway carries out every request. The first apply call gets no answer and arrives 890 seconds later or never;
until then the gateway answers "no such record". A client that believes this answer before its grace of 900 seconds
has passed makes the refund twice. A clock is set between the first attempt and the second one 10 seconds later. Then
there is one attempt every 10 minutes, until the refund is made or a day has passed. The refund must be made once.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from enum import StrEnum
from itertools import product
from pathlib import Path
from uuid import uuid4

import anyio
import attrs

from lianlian_async import LianLianError, Refund, RefundOutcomeUnknown, RefundSession, RetryBudget, RetryPolicy
from lianlian_async.cli.sandbox.server import serving
from lianlian_async.exchange import Call
from lianlian_async.journal import Journal, SqliteJournal
from lianlian_async.journal.postgres import PostgresJournal
from tests.support import postgres
from tests.support.dials import Front, Machine, Street, World
from tests.support.parties import refund_request

STEPS = {"-2 h": -7200.0, "+600 s": 600.0, "+901 s": 901.0, "+1 day": 86_400.0}
JOURNALS = ("no journal", "sqlite", "postgres")
BACKENDS = ("httpx", "aiohttp")
FATES = {"late": 890.0, "lost": None}
A_DAY = 1 + 144
"""Attempts."""

POLICY = RetryPolicy(initial=0.001, maximum=0.001, budget=RetryBudget(capacity=1, per_second=0))
"""The default grace; a call ends after two queries."""


class Life(StrEnum):
    """The process or worker of the second attempt."""

    SAME_PROCESS = "same process"
    NEW_PROCESS = "new process"
    NEW_BOOT = "new boot"
    TWO_WORKERS = "two workers, one clock steps"
    ELSEWHERE = "copied unknown, elsewhere"
    BACK = "copied unknown, back again"
    SUSPENDED = "suspended past its lease"
    DATABASE = "the database's clock steps"
    DATABASE_UNSEEN = "database's clock, no worker runs"


@attrs.frozen(kw_only=True)
class Scene:
    """The conditions of one run."""

    life: Life
    step: str
    journal: str
    backend: str
    fate: str
    dates: bool = True
    """Whether the gateway's answers have ``Date`` headers."""

    @property
    def is_possible(self) -> bool:
        """Whether the journal fits: a lease needs a journal, and only PostgreSQL has its own clock."""
        if self.life in (Life.DATABASE, Life.DATABASE_UNSEEN):
            return self.journal == "postgres"
        return self.life is not Life.SUSPENDED or (self.journal != "no journal" and self.fate == "late")


@attrs.frozen
class Result:
    """The result of a scene."""

    made: int
    attempts: int
    refund: Refund | None


@attrs.define(kw_only=True)
class Stage:
    """A running scene."""

    scene: Scene
    world: World
    front: Front
    base_url: str
    folder: Path
    wall: Callable[[int], float] | None = None
    """The seconds by which the wall clock is ahead at each attempt; overrides the scene's step."""
    most: int = A_DAY
    """Maximum number of attempts."""
    unknown: bytes = b""
    """The pickled error of the last attempt."""

    @asynccontextmanager
    async def worker(self, machine: Machine, *, place: str = "one", shared: Journal | None = None, **options: object):
        """Open a session on ``machine`` with the journal at ``place``, or with ``shared``, an open journal."""
        async with AsyncExitStack() as stack:
            journal = shared
            if self.scene.journal == "postgres":
                schema = f"{self.world.name} {place}"
                journal = await stack.enter_async_context(
                    PostgresJournal(self.world.dsn, schema=schema, clock=machine.clock)
                )
            elif self.scene.journal == "sqlite" and shared is None:
                journal = await stack.enter_async_context(SqliteJournal(self.folder / place))
            merchant = self.front.gateway.merchant(self.base_url)
            yield (
                journal,
                await stack.enter_async_context(
                    RefundSession(
                        merchant,
                        journal=journal,
                        retry=POLICY,
                        clock=machine.clock,
                        http_backend=self.scene.backend,
                        **options,
                    )
                ),
            )

    async def attempt(self, session: RefundSession, *, copied: bool = False) -> Refund | None:
        """Make one call for the refund; ``copied``: resolve the pickled error of the last call."""
        try:
            if copied:
                return await session.resolve(pickle.loads(self.unknown))
            return await session.apply_refund(refund_request())
        except RefundOutcomeUnknown as unknown:
            self.unknown = pickle.dumps(unknown)
            return None

    async def lose(self, session: RefundSession) -> None:
        """Make an attempt that never arrives, then let 1000 seconds pass."""
        late, self.front.late = self.front.late, None
        await self.attempt(session)
        self.front.late, self.front.gives_up = late, True
        self.world.advance(1000)

    async def attempts(self) -> AsyncGenerator[Refund | None]:
        """Make one attempt after the other, each in the scene's process or worker, and yield the refunds."""
        scene, here, there = self.scene, Machine(self.world, "here"), Machine(self.world, "there")
        without, is_copied = scene.journal == "no journal", scene.life in (Life.ELSEWHERE, Life.BACK)
        step = STEPS[scene.step]
        if scene.life in (Life.NEW_PROCESS, Life.NEW_BOOT, Life.DATABASE_UNSEEN) or is_copied:
            if scene.life is Life.BACK:
                async with self.worker(there, place="two") as (_, session):
                    await self.lose(session)
            for number in range(self.most):
                machine, place = (there, "two") if number and is_copied else (here, "one")
                if scene.life in (Life.NEW_BOOT, Life.DATABASE_UNSEEN):
                    machine.boot()
                if scene.life is Life.DATABASE_UNSEEN:
                    self.world.set_database(step if number else 0.0)
                else:
                    machine.step = self.wall(number) if self.wall is not None else step if number else 0.0
                async with self.worker(machine, place=place) as (_, session):
                    yield await self.attempt(session, copied=number > 0 and (without or is_copied))
            return
        async with self.worker(here) as (journal, first), self.worker(there, shared=journal) as (_, second):
            yield await self.attempt(first)
            if scene.life is Life.DATABASE:
                self.world.set_database(step)
            else:
                (there if scene.life is Life.TWO_WORKERS else here).step = step
            for number in range(1, self.most):
                session = first if scene.life is Life.SAME_PROCESS or number % 2 == 0 else second
                yield await self.attempt(session, copied=without and scene.life is Life.TWO_WORKERS)

    async def suspended(self) -> AsyncGenerator[Refund | None]:
        """Suspend a worker right before it sends, let another one make the refund, and yield the refunds."""
        here, there = Machine(self.world, "here"), Machine(self.world, "there")
        refunds: list[Refund | None] = []

        async def sleep(exchange, call_next):
            if exchange.call is Call.APPLY and not refunds:
                here.step = STEPS[self.scene.step]
                for _ in range(3):
                    self.world.advance(1000)
                    refunds.append(await self.attempt(second))
            return await call_next(exchange)

        self.front.gives_up = False
        async with (
            self.worker(here, middleware=(sleep,)) as (journal, first),
            self.worker(there if self.scene.journal == "postgres" else here, shared=journal) as (_, second),
        ):
            try:
                refunds.append(await first.apply_refund(refund_request()))
            except LianLianError:
                refunds.append(await self.attempt(first))
            for refund in refunds:
                yield refund

    async def play(self) -> Result:
        """Run the scene to its end."""
        number, refund = 0, None
        async with aclosing(self.suspended() if self.scene.life is Life.SUSPENDED else self.attempts()) as attempts:
            async for refund in attempts:
                number += 1
                if refund is not None and self.scene.life is not Life.SUSPENDED:
                    break
                self.world.advance(10 if number == 1 else 600)
        self.world.advance(3600)
        return Result(self.front.gateway.times_made("R-1"), number, refund)


def scenes(**fixed: object) -> Iterator[Scene]:
    """Yield all possible scenes with the values of ``fixed``."""
    for life, step, journal, backend, fate in product(Life, STEPS, JOURNALS, BACKENDS, FATES):
        scene = Scene(life=life, step=step, journal=journal, backend=backend, fate=fate)
        if scene.is_possible and all(getattr(scene, name) == value for name, value in fixed.items()):
            yield scene


def play(chosen: list[Scene], dsn: str, **options: object) -> dict[Scene, Result]:
    """Run each scene over a real socket."""
    results, street = {}, Street()
    with serving(street) as base_url, tempfile.TemporaryDirectory() as folder:
        for number, scene in enumerate(chosen):
            world = World(f"scene_{uuid4().hex}", dsn if scene.journal == "postgres" else None)
            front = street.houses[str(number)] = Front(world, late=FATES[scene.fate], dates=scene.dates)
            home = Path(folder) / str(number)
            home.mkdir()
            stage = Stage(
                scene=scene, world=world, front=front, base_url=f"{base_url}/{number}", folder=home, **options
            )
            results[scene] = anyio.run(stage.play)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("life", "step", "journal", "backend", "fate"):
        parser.add_argument(f"--{name}", help=f"run only scenes with this {name}")
    fixed = {name: value for name, value in vars(parser.parse_args()).items() if value}
    with postgres.server() as dsn:
        results = play(list(scenes(**fixed)), dsn)
    for scene, result in results.items():
        print(f"{scene.life:30} {scene.step:7} {scene.journal:10} {scene.backend:8} {scene.fate:5}", end="")
        print(f"made {result.made} times, known after {result.attempts} attempts")
    twice = sum(result.made > 1 for result in results.values())
    open_ = sum(result.made < 1 or result.refund is None for result in results.values())
    print(f"{len(results)} scenes, made twice: {twice}, left open: {open_}")
    return 1 if twice or open_ else 0


if __name__ == "__main__":
    sys.exit(main())
