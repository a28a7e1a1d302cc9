"""A world whose clocks are dials: true time, each machine's wall clock and boot clock, the gateway's, the database's.

The event loop's clock is none of them: it runs on by itself, and stands almost still while the dials are turned. So
a machine that was suspended for an hour, and a wall clock that stepped, take no time. The gateway is a real sandbox
behind a proxy of its own; it carries out every apply call that reaches it.
"""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from lianlian_async import asgi
from lianlian_async.clock import Moment
from lianlian_async.sandbox import Fault, Repeated
from tests.support.parties import EPOCH, sandbox


class World:
    """True time, and the clock of a database if ``dsn`` names one."""

    def __init__(self, name: str, dsn: str | None = None) -> None:
        self.now = 0.0
        """Seconds of true time: the gateway's clock goes by it."""
        self._database_step = 0.0
        self.name = name
        self._server = dsn
        # Its own clock_timestamp() goes before PostgreSQL's: that is the database's dial.
        self.dsn = "" if dsn is None else make_conninfo(dsn, options=f"-c search_path={name},pg_catalog")
        if dsn is not None:
            self._execute(
                f"CREATE SCHEMA {name}; CREATE TABLE {name}.dial (at timestamptz);"
                f"INSERT INTO {name}.dial VALUES ('{EPOCH.isoformat()}');"
                f"CREATE FUNCTION {name}.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS "
                f"'SELECT at FROM {name}.dial'"
            )

    def _execute(self, statement: str) -> None:
        with psycopg.connect(self._server, autocommit=True) as connection:
            connection.execute(statement)

    def set_database(self, step: float) -> None:
        """Set the database's clock to be so many seconds ahead."""
        self._database_step = step
        self.advance(0)

    def advance(self, seconds: float) -> None:
        """Let true time pass: every clock moves, also that of a machine that is suspended."""
        self.now += seconds
        if self._server is not None:
            at = EPOCH + timedelta(seconds=self.now + self._database_step)
            self._execute(f"UPDATE {self.name}.dial SET at = '{at.isoformat()}'")


class Machine:
    """A computer: its wall clock can be set, its boot clock begins at each boot."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._name = name
        self._boots = 0
        self._booted_at = world.now
        self.step = 0.0
        """Seconds by which the wall clock is ahead."""

    def boot(self) -> None:
        """Start it again."""
        self._boots += 1
        self._booted_at = self._world.now

    def clock(self) -> Moment:
        """Read all clocks; a ``lianlian_async.clock.Clock``."""
        wall = EPOCH + timedelta(seconds=self._world.now + self.step)
        return Moment(wall, self._world.now - self._booted_at, f"{self._name}, boot {self._boots}")


class Front:
    """The gateway behind a proxy that answers the first apply call with 502, and without a ``Date`` header.

    That call reaches the gateway ``late`` seconds afterwards, or never (None). ``dates``: whether the gateway's own
    answers have a ``Date`` header.
    """

    def __init__(self, world: World, *, late: float | None, dates: bool = True) -> None:
        self.gateway = sandbox(
            repeated=Repeated.AGAIN,
            default_order=Decimal("100000000.00"),
            clock=lambda: world.now,
            started_at=EPOCH,
        )
        self.late = late
        """Seconds; None: never."""
        self._dates = dates
        self.gives_up = True
        """Whether the next apply call is answered with 502."""

    async def __call__(self, scope: asgi.Message, receive: asgi.Receive, send: asgi.Send) -> None:
        async def sending(message: asgi.Message) -> None:
            if message["type"] == "http.response.start" and not self._dates:
                message["headers"] = [header for header in message["headers"] if header[0] != b"date"]
            await send(message)

        if scope["path"] == "/refundquery.htm" or not self.gives_up:
            await self.gateway(scope, receive, sending)
            return
        self.gives_up = False
        body = await asgi.read(receive, 10_000)
        if self.late is not None:
            await self._pass_on(scope, body)
        await asgi.respond(send, 502, {"content-type": "text/html"}, b"<html>Bad Gateway</html>")

    async def _pass_on(self, scope: asgi.Message, body: bytes) -> None:
        """Give it to the gateway, which has it carried out later, and go away."""
        messages: list[dict[str, Any]] = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]

        async def receive() -> dict[str, Any]:
            return messages.pop(0)

        async def nobody_hears(message: asgi.Message) -> None:
            raise AssertionError(message)

        self.gateway.script(Fault.LATE, call="apply", delay=self.late)
        await self.gateway(scope, receive, nobody_hears)


class Street:
    """Many gateways on one socket, each under its own first part of the path; an ASGI application."""

    def __init__(self) -> None:
        self.houses: dict[str, Front] = {}

    async def __call__(self, scope: asgi.Message, receive: asgi.Receive, send: asgi.Send) -> None:
        _, house, page = scope["path"].split("/", 2)
        await self.houses[house]({**scope, "path": f"/{page}"}, receive, send)
