"""psycopg's connection and pool for the model of PostgreSQL: the network between a node and its database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, ClassVar, Self
from unittest import mock

import anyio
import attrs
from psycopg import Error, OperationalError
from psycopg.sql import SQL, Composed

from lianlian_async.journal import postgres

from .database import Answers, Database, Session

WAIT = 0.01
"""Seconds before a statement tries to take a lock again; they double with each attempt, up to ``LONGEST_WAIT``."""
LONGEST_WAIT = 1.0


@attrs.frozen
class Cursor:
    """The rows of each statement of a message."""

    answers: Answers
    description: ClassVar[str] = "of the columns"

    async def fetchall(self) -> list[dict[str, Any]]:
        return self.answers[0]

    def nextset(self) -> None:
        self.answers.pop(0)


class Connection:
    """The replacement of ``psycopg.AsyncConnection``."""

    database: ClassVar[Database]

    def __init__(self, session: Session, *, autocommit: bool) -> None:
        self._session = session
        self._loop = asyncio.get_running_loop()
        self._is_in_transaction = not autocommit
        self._arrives_at = 0.0
        self._is_half_open = False
        self.is_closed = False

    def __class_getitem__(cls, row: object) -> type[Self]:
        return cls

    @classmethod
    async def connect(cls, dsn: str, *, autocommit: bool = False, **options: Any) -> Self:
        database = cls.database
        await asyncio.sleep(_delay(database))
        if database.is_in("hangs"):
            await asyncio.sleep(database.trouble_until - database.time())
        if database.is_in("refuses"):
            raise OperationalError("connection refused")
        return cls(database.connect(), autocommit=autocommit)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        try:
            if exc_type is None:
                await self._end(self.database.commit)
        finally:
            self.close()

    async def set_isolation_level(self, level: object) -> None: ...

    @property
    def broken(self) -> bool:
        return self.is_closed

    async def execute(self, message: str | Composed, parameters: Sequence[Any] = ()) -> Cursor:
        left, statements, schema = list(parameters), [], ""
        texts = message if isinstance(message, Composed) and isinstance(next(iter(message)), Composed) else [message]
        for text, name in map(_parsed, filter(lambda part: part != SQL(";"), texts)):
            schema = name or schema
            count = text.count("%s")
            statements.append((text, left[:count]))
            del left[:count]
        assert not left
        self._session.is_in_transaction |= self._is_in_transaction
        return Cursor(await self._ask(lambda: self.database.execute(self._session, schema, statements)))

    async def roll_back(self) -> None:
        """Roll back, as the pool does after an exception."""
        if not self.is_closed:
            with suppress(Error):
                await self._end(self.database.roll_back)

    async def _end(self, how: Callable[[Session], None]) -> None:
        def end() -> Generator[None, None, Answers]:
            yield from ()
            self.database.check(self._session)
            how(self._session)
            return []

        await self._ask(end)

    async def _ask(self, work: Callable[[], Generator[None, None, Answers]]) -> Answers:
        """Do ``work`` at the server and return its answer. A cancelled call closes the connection."""
        if self.is_closed or getattr(self._loop, "is_dead", False):
            raise OperationalError("the connection is closed")
        database, answered = self.database, self._loop.create_future()

        def hear(answer: Answers | Error) -> None:
            if not answered.done():
                answered.set_result(answer)

        def answer(outcome: Answers | Error) -> None:
            if database.is_in("hangs") or database.dice.random() < database.flaky:
                self._is_half_open = True
            elif database.dice.random() < database.flaky:  # possibly after a commit
                hear(OperationalError("server closed the connection unexpectedly"))
            else:
                database.after(_delay(database), lambda: hear(outcome))

        def go_on(begun: Generator[None, None, Answers], wait: float = WAIT) -> None:
            try:
                next(begun)
            except StopIteration as end:
                answer(end.value)
            except Error as error:
                answer(error)
            else:
                database.after(wait, lambda: go_on(begun, min(2 * wait, LONGEST_WAIT)))

        self._send(lambda: go_on(work()))
        try:
            outcome = await answered
        except BaseException:
            self.close()
            raise
        if isinstance(outcome, OperationalError):
            self.close()
        if isinstance(outcome, Error):
            raise outcome
        return outcome

    def _send(self, event: Callable[[], None]) -> None:
        """Call ``event`` at the server after all earlier messages; never on a half-open connection."""
        database = self.database

        def arrive() -> None:
            self._is_half_open |= database.is_in("hangs")
            if not self._is_half_open:
                event()

        now = database.time()
        self._arrives_at = max(self._arrives_at, now + _delay(database))
        database.after(self._arrives_at - now, arrive)

    def close(self) -> None:
        """Close the connection. If the machine died, the server gets no message: the idle timeout rolls back."""
        if self.is_closed:
            return
        self.is_closed = True
        database, session = self.database, self._session
        if getattr(self._loop, "is_dead", False) and database.dice.random() < 0.5:
            return

        def end() -> None:
            if session.incarnation == database.incarnation:
                database.roll_back(session)
            session.is_terminated = True

        self._send(end)


class Pool:
    """The replacement of ``psycopg_pool.AsyncConnectionPool``."""

    def __init__(self, dsn: object, *, connection_class: type[Connection], max_size: int, **options: Any) -> None:
        self._class = connection_class
        self._free = anyio.Semaphore(max_size)
        self._idle: list[Connection] = []

    async def open(self) -> None: ...

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        async with self._free:
            connection = await self._get()
            try:
                yield connection
            except Exception:
                await connection.roll_back()
                raise
            finally:
                if not connection.is_closed:
                    self._idle.append(connection)

    async def _get(self) -> Connection:
        while True:
            try:
                return self._idle.pop() if self._idle else await self._class.connect("", autocommit=True)
            except OperationalError:
                await asyncio.sleep(1.0)


def _parsed(statement: str | Composed) -> tuple[str, str]:
    """The text of one statement, and the schema that it names."""
    text, schema = statement if isinstance(statement, str) else "", ""
    for part in statement if isinstance(statement, Composed) else ():
        text += part.as_string() if isinstance(part, SQL) else "{schema}"
        schema = schema if isinstance(part, SQL) else part._obj[0]  # type: ignore[attr-defined]
    return text, schema


def _delay(database: Database) -> float:
    """Return the seconds from one side to the other."""
    slow = 4.0 if database.is_in("slow") else 0.001
    return slow * database.dice.random()


@contextmanager
def modelled(database: Database) -> Generator[None]:
    """Make ``PostgresJournal`` connect to ``database`` for every DSN."""
    connection = type("Connection", (Connection,), {"database": database})
    with mock.patch.multiple(postgres, AsyncConnection=connection, AsyncConnectionPool=Pool):
        yield
