"""The recipes in docstrings: Starlette, Django, middleware, and synchronous programs."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from urllib.parse import urlsplit

import anyio
import httpx
import pytest
from django.test.utils import override_settings
from django.urls import path

from lianlian_async import NotificationEndpoint, RefundRejected
from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.exchange import Call, Finding
from lianlian_async.journal import SqliteJournal, State
from lianlian_async.sandbox import Fault, SandboxGateway, When
from tests.support import ROOT
from tests.support.notices import ACKNOWLEDGED, HEADERS, Handler
from tests.support.parties import refund_request
from tests.support.readme import RECIPES, run_example, served, set_up_django

URLS = types.ModuleType("shop_urls")
"""Django's URL configuration: the test sets its ``urlpatterns``."""


@pytest.fixture
def gateway():
    """A sandbox by the wall clock, because the recipes run in threads with event loops of their own."""
    return SandboxGateway(default_order=Decimal("10.00"))


@pytest.fixture
def parts(gateway, tmp_path):
    """The journal, the session and the endpoint that the recipes use."""
    journal, handler = SqliteJournal(tmp_path / "journal.sqlite"), Handler()
    session = gateway.session(journal=journal)
    endpoint = NotificationEndpoint(session.merchant, handler, journal=journal, session=session)
    return {"journal": journal, "session": session, "endpoint": endpoint}


def makes_refunds_and_takes_notifications(url, gateway):
    with httpx.Client(base_url=url) as client:
        made = client.post("/refunds", json=refund_request().to_dict())
        (record,) = gateway.refunds
        acknowledged = client.post("/lianlian/refund", content=gateway.notification(record), headers=HEADERS)
        gateway.script(Fault.BUSY, call="apply", ret_code="5006")
        refused = client.post("/refunds", json=refund_request(2).to_dict())
        invalid = client.post("/refunds", content=b'{"no_refund": ')
    assert (invalid.status_code, invalid.json()["problems"][0]["field"]) == (422, "body")
    assert (acknowledged.status_code, acknowledged.content) == (200, ACKNOWLEDGED)
    assert (refused.status_code, refused.json()["ret_code"]) == (402, "5006")
    return made.json()


def test_the_starlette_service(gateway, parts):
    """It makes a refund, takes its notification, and responds to a rejection."""
    with served(run_example("starlette", **parts)["app"]) as url:
        assert makes_refunds_and_takes_notifications(url, gateway) == "0"


def test_the_django_service(gateway, parts, tmp_path, caplog):
    """It does the same; a refund whose client disconnects is completed, recorded and logged."""
    sys.modules["shop_urls"] = URLS
    set_up_django()
    example = run_example("django", **parts)
    URLS.urlpatterns = [path("refunds", example["make_refund"])]
    ours = override_settings(ROOT_URLCONF="shop_urls", ALLOWED_HOSTS=["*"], MIDDLEWARE=[])
    with ours, served(example["application"]) as url:
        assert makes_refunds_and_takes_notifications(url, gateway) == {"sta_refund": "0"}
        gateway.script(Fault.DELAY, delay=0.3, no_refund="R-3")
        disconnect_after_sending(url, refund_request(3), gateway)
    assert gateway.times_made("R-3") == 1
    assert asyncio.run(recorded(tmp_path, "R-3")) is State.ACCEPTED
    assert any("was cancelled; the refund's outcome: Refund(" in message for message in caplog.messages)


def disconnect_after_sending(url, request, gateway):
    """Send a request, and close the connection once the gateway has the refund and before it answers."""
    place, body = urlsplit(url), httpx.Request("POST", url, json=request.to_dict()).content
    with socket.create_connection((place.hostname, place.port)) as stream:
        head = f"POST /refunds HTTP/1.1\r\nHost: shop\r\nContent-Length: {len(body)}\r\n\r\n"
        stream.sendall(head.encode() + body)
        while not gateway.times_made(request.no_refund):
            stream.settimeout(0.01)
            with pytest.raises(TimeoutError):
                stream.recv(1)


async def recorded(folder, number):
    async with SqliteJournal(folder / "journal.sqlite") as journal:
        return (await journal.find(number)).state


# ── synchronous programs ─────────────────────────────────────────────────────────────────────────


@pytest.mark.anyio
async def test_the_middleware_counts_the_findings(gateway):
    """It is called for the attempt whose answer is lost, and for the query that finds the refund."""
    example = run_example("middleware")
    gateway.script(Fault.RESET, call="apply", when=When.AFTER)
    async with gateway.session(middleware=[example["count_findings"]]) as session:
        await session.apply_refund(refund_request())
    assert example["findings"] == {(Call.APPLY, Finding.UNCERTAIN): 1, (Call.QUERY, Finding.FOUND): 1}


def test_threads_share_one_session(gateway):
    """Twenty refunds from five threads are made, each once; errors and closing reach the caller."""
    session = gateway.session()
    with run_example("synchronous")["synchronous"](session) as call, ThreadPoolExecutor(5) as threads:
        refunds = list(threads.map(lambda number: call(session.apply_refund, refund_request(number)), range(20)))
        gateway.script(Fault.BUSY, call="apply", ret_code="5003")
        with pytest.raises(RefundRejected):
            call(session.apply_refund, refund_request(20))
    assert [refund.no_refund for refund in refunds] == [f"R-{number}" for number in range(20)]
    assert gateway.requests == {"apply": 21}
    assert repr(session).endswith("closed>")


FORKING = """
import os
from lianlian_async import Merchant, RefundSession
from tests.support.parties import refund_request

session = RefundSession(Merchant.from_env())
with synchronous(session) as call:
    child = os.fork()
    try:
        print(call(session.apply_refund, refund_request()).no_refund, flush=True)
    except RuntimeError as error:
        print(error, flush=True)
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_a_forked_process_gets_a_clear_error(gateway):
    """The child has no thread with the event loop, so it would wait for ever; the parent's session still works."""
    with serving(gateway) as base_url:
        ran = subprocess.run(
            [sys.executable, "-c", RECIPES["synchronous"] + FORKING],
            env=os.environ | environment(gateway, base_url) | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ran.stderr == ""
    assert sorted(ran.stdout.splitlines()) == [
        "R-1",
        "the RefundSession was opened before a fork: open one in each process",
    ]
    assert gateway.times_made("R-1") == 1


def test_a_second_event_loop_gets_an_error_that_names_the_portal(gateway):
    """A session that is open in ``asyncio.run`` works in no other ``asyncio.run``."""
    session = gateway.session()
    asyncio.run(session.__aenter__())
    for call in (lambda: session.apply_refund(refund_request()), session.__aenter__):
        with pytest.raises(RuntimeError, match=r"see the blocking portal in lianlian_async\.contrib"):
            anyio.run(call)
