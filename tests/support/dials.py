"""Simulated clocks that a test sets: true time, each machine's wall and boot clock, the gateway's and the database's.

The event loop's clock is not simulated. Setting a simulated clock takes almost no time by the event loop's clock, so
a suspension of an hour or a step of a wall clock takes no real time. The gateway is a real sandbox
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
    """True time, and the clock of the database ``dsn`` if it is given."""

    def __init__(self, name: str, dsn: str | None = None) -> None:
        self.now = 0.0
        """True time in seconds; the gateway's clock shows it."""
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
        """Set the database's clock ``step`` seconds ahead of true time."""
        self._database_step = step
        self.advance(0)

    def advance(self, seconds: float) -> None:
        """Advance true time and every clock, also the boot clock of a suspended machine."""
        self.now += seconds
        if self._server is not None:
            at = EPOCH + timedelta(seconds=self.now + self._database_step)
            self._execute(f"UPDATE {self.name}.dial SET at = '{at.isoformat()}'")


class Machine:
    """A computer whose wall clock can be set and whose boot clock starts at each boot."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._name = name
        self._boots = 0
        self._booted_at = world.now
        self.step = 0.0
        """Seconds by which the wall clock is ahead of true time."""

    def boot(self) -> None:
        """Reboot the machine."""
        self._boots += 1
        self._booted_at = self._world.now

    def clock(self) -> Moment:
        """Read all clocks; a ``lianlian_async.clock.Clock``."""
        wall = EPOCH + timedelta(seconds=self._world.now + self.step)
        return Moment(wall, self._world.now - self._booted_at, f"{self._name}, boot {self._boots}")


class Front:
    """A proxy before the gateway; it answers the first apply call with 502, without a ``Date`` header.

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
        """Delay of that call in seconds; None: it never arrives."""
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
        """Forward the call to the gateway later, without waiting for the response."""
        messages: list[dict[str, Any]] = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]

        async def receive() -> dict[str, Any]:
            return messages.pop(0)

        async def nobody_hears(message: asgi.Message) -> None:
            raise AssertionError(message)

        self.gateway.script(Fault.LATE, call="apply", delay=self.late)
        await self.gateway(scope, receive, nobody_hears)


class Street:
    """An ASGI application with many gateways on one socket; the first path segment selects the gateway."""

    def __init__(self) -> None:
        self.houses: dict[str, Front] = {}

    async def __call__(self, scope: asgi.Message, receive: asgi.Receive, send: asgi.Send) -> None:
        _, house, page = scope["path"].split("/", 2)
        await self.houses[house]({**scope, "path": f"/{page}"}, receive, send)
