"""The FastAPI adapter: the session as a dependency, its life, and the route of the notifications."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread
import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient

from lianlian_async import ConfigurationError, JournalError, LianLianError, NotificationEndpoint, RefundRequest
from lianlian_async.contrib.fastapi import Session, get_session, lifespan, notifications, refund_error
from lianlian_async.journal import MemoryJournal, SqliteJournal
from lianlian_async.sandbox import Fault
from lianlian_async.testing import notify
from tests.support.notices import HEADERS, Handler, notification
from tests.support.parties import EPOCH, boot_clock, refund_request, sandbox

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def served(app):
    """A client of ``app`` with its lifespan and state, as under a server."""
    state = {}

    async def stateful(scope, receive, send):
        await app({**scope, "state": dict(state)}, receive, send)

    async with (
        app.router.lifespan_context(app) as found,
        httpx.AsyncClient(transport=httpx.ASGITransport(stateful), base_url="https://shop.example") as http,
    ):
        state.update(found or {})
        yield http


@pytest.fixture
def handler():
    return Handler()


def service(session, *others):
    """A service that makes refunds."""
    app = FastAPI(lifespan=lifespan(*others, session))

    @app.post("/refunds/{number}")
    async def make_refund(number: int, session: Session) -> str | None:
        return (await session.apply_refund(refund_request(number))).sta_refund

    return app


async def test_the_session_is_a_dependency(tmp_path):
    """A route gets the lifespan's session, with its journal, by the type of a parameter."""
    gateway, journal = sandbox(), SqliteJournal(tmp_path / "journal.sqlite")
    async with served(service(gateway.session(journal=journal), journal)) as http:
        assert (await http.post("/refunds/1")).json() == "0"
        assert (await http.post("/refunds/1")).json() == "0"
    assert gateway.requests == {"apply": 1}


async def test_the_session_needs_no_thread():
    """Routes that are not async may have all threads of the server."""
    async with served(service(sandbox().session())) as http:
        threads = anyio.to_thread.current_default_thread_limiter()
        for number in range(int(threads.available_tokens)):
            threads.acquire_on_behalf_of_nowait(number)
        with anyio.fail_after(20):
            assert (await http.post("/refunds/1")).json() == "0"


async def test_the_session_lives_as_long_as_the_application():
    """The session is open while requests are served, and closed afterwards."""
    session = sandbox().session()
    async with served(service(session)):
        assert repr(session).endswith("open>")
    assert repr(session).endswith("closed>")


async def test_a_test_may_override_the_session():
    """httpx.ASGITransport passes no state of the lifespan, so a test overrides the dependency."""
    session = sandbox().session()
    app = service(session)
    app.dependency_overrides[get_session] = lambda: session
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://shop.example") as http,
    ):
        assert (await http.post("/refunds/1")).json() == "0"


async def test_a_missing_session_is_a_clear_error():
    """Without a lifespan that opens a session, the error says what to do."""
    app = FastAPI(lifespan=lifespan())

    @app.get("/")
    async def ask(session: Session) -> str:
        raise AssertionError(session)

    with pytest.raises(RuntimeError, match=r"exactly one RefundSession must be open: pass it to FastAPI\(lifespan="):
        async with served(app) as http:
            await http.get("/")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://shop.example") as http:
        with pytest.raises(
            RuntimeError, match=r"must run the lifespan \(for httpx.ASGITransport.* see lianlian_async.testing"
        ):
            await http.get("/")


@pytest.mark.parametrize("ours", [1, 2])
async def test_none_of_several_sessions_is_chosen(ours):
    """A refund must not be sent for the wrong merchant: the sessions may come from one lifespan, or from a router's."""
    router = APIRouter(lifespan=lifespan(sandbox().session()))
    app = FastAPI(lifespan=lifespan(*(sandbox().session() for _ in range(ours))))
    if ours == 1:
        app.include_router(router)

    @app.get("/")
    async def ask(session: Session) -> str:
        raise AssertionError(session)

    with pytest.raises(RuntimeError, match="with several sessions, such as one for each merchant, use a dependency of"):
        async with served(app) as http:
            await http.get("/")


@pytest.mark.virtual_time
async def test_the_lifespan_sweeps(handler, caplog):
    """It sweeps at the start and at intervals, and the handler is called once."""
    caplog.set_level("INFO", "lianlian_async")
    gateway, journal = sandbox(settle_after=1000), MemoryJournal()
    async with journal, gateway.session(journal=journal, clock=boot_clock) as session:
        await session.apply_refund(refund_request())
        endpoint = NotificationEndpoint(session.merchant, handler, journal=journal, session=session, clock=boot_clock)
        async with served(FastAPI(lifespan=lifespan(endpoint, sweep=900))):
            await anyio.sleep(2000)
    assert handler.numbers == ["R-1"]
    assert [record.message for record in caplog.records if record.message.startswith("sweep")] == [
        "sweep: 0 refunds resolved, 1 still open",
        "sweep: 0 refunds resolved, 1 still open",
        "sweep: 1 refunds resolved, 0 still open",
    ]


class FailingJournal(MemoryJournal):
    """A journal whose next calls of ``begin_acting`` raise ``errors``."""

    errors = ()

    async def begin_acting(self):
        *self.errors, error = self.errors or (None,)
        if error is not None:
            raise error
        await super().begin_acting()


class Halt(BaseException):
    """An error that is no ``Exception``."""


async def test_a_lifespan_that_cannot_sweep_is_a_clear_error(handler):
    """The endpoint has neither a journal nor a session."""
    with pytest.raises(ConfigurationError, match="sweep requires a session with the endpoint's journal"):
        lifespan(NotificationEndpoint(sandbox().merchant(), handler), sweep=900)


@pytest.mark.virtual_time
async def test_the_lifespan_sweeps_again_after_a_failure(handler, caplog, anyio_backend_name):
    """A failure is logged, also a cancellation that nobody requested. Another ``BaseException`` ends the sweep."""
    caplog.set_level("INFO", "lianlian_async")
    journal = FailingJournal()
    session = sandbox().session(journal=journal, clock=boot_clock)
    endpoint = NotificationEndpoint(session.merchant, handler, journal=journal, session=session, clock=boot_clock)
    async with journal, session, served(FastAPI(lifespan=lifespan(endpoint, sweep=900))):
        await anyio.sleep(100)
        stray = asyncio.CancelledError if anyio_backend_name == "asyncio" else OSError  # trio creates its own only
        journal.errors = [Halt(), stray(), JournalError("the disk is full")]
        await anyio.sleep(4000)
    assert [(record.message, record.exc_info and record.exc_info[0]) for record in caplog.records] == [
        ("sweep: 0 refunds resolved, 0 still open", None),
        ("sweep: failed, and runs again in 900 s", JournalError),
        ("sweep: failed, and runs again in 900 s", stray),
        ("sweep: ended, and does not run again: restart the service", Halt),
    ]


@pytest.mark.parametrize(
    ("contexts", "options", "problem"),
    [
        ((None,), {}, "lifespan: must be of type AbstractAsyncContextManager, not NoneType"),
        ((), {"sweep": 900}, "sweep: needs one NotificationEndpoint in the lifespan, not 0"),
        ((), {"sweep": 0}, "sweep: must be a number of seconds greater than 0 .* is 0"),
        ((), {"sweep": math.inf}, "sweep: .* at most 1000000000, is inf"),
    ],
)
def test_wrong_arguments_of_the_lifespan_are_clear_errors(contexts, options, problem):
    """They are found when the application is created."""
    with pytest.raises(ConfigurationError, match=problem):
        lifespan(*contexts, **options)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_each_test_may_run_the_lifespan_of_one_application(handler, tmp_path, backend):
    """With a ``TestClient`` for each test, an application at module level starts again in another event loop."""
    gateway, journal = sandbox(clock=time.monotonic, started_at=EPOCH), SqliteJournal(tmp_path / "journal.sqlite")
    session = gateway.session(journal=journal)
    endpoint = NotificationEndpoint(gateway.merchant(), handler, journal=journal, session=session)
    app = service(session, journal, endpoint)
    app.include_router(notifications(endpoint, "/lianlian/refund"))
    for number in (1, 2):
        with TestClient(app, backend=backend) as client:
            assert client.post(f"/refunds/{number}").status_code == 200
            assert client.portal.call(notify, app, gateway, f"R-{number}").status == 200
    assert handler.numbers == ["R-1", "R-2"]


async def test_a_closed_session_is_a_clear_error():
    """A background job that outlives the application gets an error."""
    session = sandbox().session()
    async with served(service(session)):
        pass
    with pytest.raises(RuntimeError, match="this RefundSession is closed"):
        await session.apply_refund(refund_request())


async def test_custom_lifespan_provides_the_session():
    """A custom lifespan can do other work, too."""
    gateway = sandbox()

    @asynccontextmanager
    async def own(_app):
        async with gateway.session() as session:
            yield {"refund_session": session, "cache": {}}

    app = service(gateway.session())
    app.router.lifespan_context = own
    async with served(app) as http:
        assert (await http.post("/refunds/1")).json() == "0"


async def test_an_error_is_an_honest_response():
    """The exception handler responds with the status, headers and body of the shared function."""
    gateway = sandbox()
    gateway.script(Fault.HTTP_500, times=99)
    app = service(gateway.session(deadline=0.1))
    app.add_exception_handler(LianLianError, refund_error)
    async with served(app) as http:
        answer = await http.post("/refunds/1")
    assert (answer.status_code, answer.json()["error"], answer.json()["no_refund"]) == (
        202,
        "RefundOutcomeUnknown",
        "R-1",
    )
    assert 0 <= int(answer.headers["retry-after"]) <= 900


async def test_notifications_route_reaches_the_endpoint(handler):
    """POST to the exact path reaches the endpoint with any content type; the OpenAPI schema does not show it."""
    session = sandbox().session()
    endpoint = NotificationEndpoint(session.merchant, handler, session=session)
    app = service(session)
    app.include_router(notifications(endpoint, "/lianlian/refund"))
    app.include_router(notifications(endpoint, "/again"), prefix="/shop")
    async with served(app) as http:
        for path in ("/lianlian/refund", "/shop/again"):
            answer = await http.post(path, content=notification(), headers=HEADERS)
            assert (answer.status_code, answer.content) == (200, b'{"ret_code":"0000","ret_msg":"ok"}')
        assert (await http.get("/lianlian/refund")).status_code == 405
        assert (await http.post("/lianlian/refund/x", content=notification())).status_code == 404
        assert list((await http.get("/openapi.json")).json()["paths"]) == ["/refunds/{number}"]
    assert handler.numbers == ["R-1"]


async def test_the_address_comes_from_the_server(handler):
    """The allow-list gets the address of the connection."""
    session = sandbox().session()
    app = FastAPI()
    for path, network in (("/in", "127.0.0.0/8"), ("/out", "203.0.113.0/24")):
        endpoint = NotificationEndpoint(session.merchant, handler, allow_from=[network])
        app.include_router(notifications(endpoint, path))
    async with served(app) as http:
        assert (await http.post("/in", content=notification())).status_code == 200
        assert (await http.post("/out", content=notification())).status_code == 403


@pytest.mark.virtual_time
async def test_a_request_may_wait_for_the_notification(handler):
    """The endpoint of a service wakes the session of the same service."""
    gateway = sandbox(settle_after=1000)
    session = gateway.session(clock=boot_clock)
    endpoint = NotificationEndpoint(session.merchant, handler, session=session, clock=boot_clock)
    app = FastAPI(lifespan=lifespan(session, endpoint))
    app.include_router(notifications(endpoint, "/lianlian/refund"))

    @app.post("/refunds")
    async def refund_and_wait(session: Session) -> str | None:
        return (await session.apply_and_wait(refund_request())).sta_refund

    async with served(app) as http, anyio.create_task_group() as tasks:

        async def notify():
            await anyio.sleep(1)
            assert (await http.post("/lianlian/refund", content=notification())).status_code == 200

        tasks.start_soon(notify)
        assert (await http.post("/refunds")).json() == "2"
        assert anyio.current_time() == pytest.approx(1)


@pytest.mark.parametrize("key", ["\\ud800", "k" * 300], ids=["lone surrogate", "long"])
async def test_a_client_may_send_any_key(key):
    """An unknown key is the client's fault. The response shows it, even if UTF-8 cannot encode it."""
    app = FastAPI(lifespan=lifespan(), exception_handlers={LianLianError: refund_error})

    @app.post("/refunds")
    async def make_refund(data: dict[str, str]) -> None:
        RefundRequest.from_dict(data)

    async with served(app) as http:
        answer = await http.post("/refunds", content=f'{{"{key}":"1"}}', headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["problems"][0] == {
        "field": key.replace("\\ud800", "?")[:100],
        "rule": "is not a field of RefundRequest",
    }
