"""``lianlian_async.testing``: fixtures for each async plugin, ``notify``, and the guard against connections."""

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from contextlib import AsyncExitStack

import httpx
import httpx2
import pytest

from lianlian_async import ConfigurationError, RefundSession, RefundStatus, testing, wire
from lianlian_async.events import AttemptEnded
from lianlian_async.journal import MemoryJournal
from lianlian_async.sandbox import SandboxGateway
from lianlian_async.settings import LOOPBACK_ONLY
from lianlian_async.testing import notify, plugin
from lianlian_async.transport.connection import check_loopback
from tests.support import ROOT
from tests.support.parties import answering, refund_request

pytest_plugins = ["pytester"]

RECIPES = "".join(map(textwrap.dedent, re.findall(r"::\n\n((?:    .*\n|\n)+)", testing.__doc__)))


@pytest.fixture
def run_pytest(pytester, monkeypatch):
    """Run pytest in this process on a test module, with our plugin and with those that are installed."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:lianlian -p lianlian_async.testing.plugin -p no:cacheprovider")
    monkeypatch.delenv("LIANLIAN_HTTP_BACKEND", raising=False)  # pytest-httpx and respx mock httpx

    def run(module, *args, ini=""):
        pytester.makepyfile(module)
        pytester.makeini(f"[pytest]\nfilterwarnings = error\nasyncio_default_fixture_loop_scope = function\n{ini}")
        return pytester.runpytest_inprocess(*args)

    return run


# ── fixtures ─────────────────────────────────────────────────────────────────────────────────────


def test_recipes_run_with_anyio_on_asyncio_and_trio(run_pytest):
    """The tests in the docstring pass, the async ones on both backends."""
    run_pytest(RECIPES).assert_outcomes(passed=7)


def test_recipes_run_with_pytest_asyncio_in_strict_mode(run_pytest):
    """They pass with the mark of pytest-asyncio."""
    run_pytest(RECIPES.replace("mark.anyio", "mark.asyncio"), "--asyncio-mode=strict").assert_outcomes(passed=4)


@pytest.mark.parametrize(("option", "passed"), [("--asyncio-mode=auto", 4), ("--anyio-mode=auto", 7)])
def test_recipes_run_without_marks_in_an_automatic_mode(run_pytest, option, passed):
    """They pass without marks if a plugin runs all async tests."""
    run_pytest(re.sub("@pytest.mark.*", "", RECIPES), option).assert_outcomes(passed=passed)


VIRTUAL = """
import anyio, pytest
from datetime import datetime, timezone
from lianlian_async import RefundRequest

REQUEST = RefundRequest(no_refund="R-1", dt_refund=datetime.now(timezone.utc), money_refund="200.01", no_order="O-1")

@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request, lianlian_virtual_time):
    return lianlian_virtual_time.backend(request.param)

@pytest.mark.anyio
async def test_with_anyio(lianlian_session, lianlian_virtual_time):
    async with lianlian_session as session:
        assert (await session.apply_and_wait(REQUEST)).is_final
    assert lianlian_virtual_time.now() == anyio.current_time() >= 2

@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_in_two_runs(lianlian_gateway, lianlian_virtual_time, backend):
    for seconds in (60.0, 90.0):
        lianlian_virtual_time.run(anyio.sleep, seconds, backend=backend)
    assert lianlian_virtual_time.now() == 150.0
    assert lianlian_gateway.now() == 150.0
"""


def test_virtual_time_is_shared_by_gateway_session_and_event_loop(run_pytest):
    """The session waits until the refund is final, in no real time."""
    run_pytest(VIRTUAL).assert_outcomes(passed=4)


OPTIONS = """
import pytest
from lianlian_async.journal import MemoryJournal

@pytest.fixture
def lianlian_session_options():
    return {"journal": MemoryJournal(), "deadline": 5.0}

def test_session(lianlian_session, lianlian_session_options):
    assert lianlian_session.journal is lianlian_session_options["journal"]
"""
OWN_CLIENT = """
import httpx, pytest

@pytest.fixture
def lianlian_session_options(lianlian_gateway):
    return {"client": httpx.AsyncClient(transport=httpx.ASGITransport(lianlian_gateway))}

@pytest.mark.anyio
async def test_session(lianlian_session, lianlian_session_options):
    async with lianlian_session_options["client"], lianlian_session:
        pass
"""


@pytest.mark.parametrize(("options", "passed"), [(OPTIONS, 1), (OWN_CLIENT, 2)], ids=["journal", "client"])
def test_session_takes_options(run_pytest, options, passed):
    """A fixture of the suite returns them. With a client of its own, the session gets no transport."""
    run_pytest(options).assert_outcomes(passed=passed)


def test_plugin_starts_without_the_library():
    """A suite that does not use the fixtures pays only for the plugin itself."""
    program = "import sys, lianlian_async.testing.plugin; print({'anyio', 'attrs', 'httpx', 'ssl'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (ran.stdout, ran.stderr) == ("set()\n", "")


def test_entry_point_leads_to_the_plugin():
    """An installation of the package makes pytest load the plugin."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"lianlian": plugin.__name__}


# ── notify ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.anyio
async def test_notify_reaches_a_server_and_tells_the_final_state(lianlian_gateway, lianlian_session):
    """A URL is notified over a socket; a refund that fails is reported as failed."""
    async with lianlian_session as session:
        await session.apply_refund(refund_request())
    lianlian_gateway.fail("R-1")
    async with answering(b"{}", status="503 Service Unavailable") as server:
        assert (await notify(f"{server.url}/refunds", lianlian_gateway, "R-1")).status == 503
    (_, head, body), *_ = server.requests
    assert head.startswith(b"POST /refunds ")
    assert wire.decode(body)["sta_refund"] == RefundStatus.FAILED


@pytest.mark.anyio
async def test_notify_raises_what_the_application_raised(lianlian_gateway, lianlian_session):
    """The test shows the application's own exception."""

    async def broken(scope, receive, send):
        raise ZeroDivisionError("in the application")

    async with lianlian_session as session:
        await session.apply_refund(refund_request())
    with pytest.raises(RuntimeError, match=r"no response to the notification of R-1: .*in the application") as caught:
        await notify(broken, lianlian_gateway, "R-1")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.anyio
async def test_notify_needs_a_refund(lianlian_gateway):
    """A refund that was not made cannot be notified."""
    with pytest.raises(LookupError, match="no refund R-1"):
        await notify("http://127.0.0.1/", lianlian_gateway, "R-1")


# ── the guard, which is active in this suite, too ────────────────────────────────────────────────


@pytest.mark.anyio
@pytest.mark.parametrize("over", ["httpx", "aiohttp", "client", "httpx2 client", "transport", "proxy"])
async def test_guard_refuses_a_connection_before_anything_is_sent(over):
    """Both calls raise at once, nothing is sent again, and the journal knows that nothing was sent."""
    replies = []
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(answering())
        options = {
            "httpx": lambda: {"http_backend": "httpx"},
            "aiohttp": lambda: {"http_backend": "aiohttp"},
            "client": lambda: {"client": httpx.AsyncClient()},
            "httpx2 client": lambda: {"client": httpx2.AsyncClient()},
            "transport": lambda: {"transport": httpx.AsyncHTTPTransport()},
            "proxy": lambda: {"client": httpx.AsyncClient(proxy=proxy.url)},
        }[over]()
        if "client" in options:
            await stack.enter_async_context(options["client"])
        journal = await stack.enter_async_context(MemoryJournal())

        def listener(event):
            if isinstance(event, AttemptEnded):
                replies.append(event.finding)

        merchant = SandboxGateway().merchant("https://gateway.example")
        session = RefundSession(merchant, journal=journal, warm_up=1, listeners=[listener], **options)
        async with session:
            with pytest.raises(ConfigurationError, match=r"this is a test, so no connection to gateway\.example"):
                await session.apply_refund(refund_request())
            with pytest.raises(ConfigurationError, match="set lianlian_allow_network = true"):
                await session.query_refund(refund_request().query())
        assert (await journal.find("R-1")).sent_at is None
        assert proxy.opened == 0
    assert replies == ["NOT_SENT"] * 2


def test_child_process_inherits_the_guard():
    """A program that a test starts makes no real refund, either."""
    program = (
        "import anyio; from lianlian_async import *; from lianlian_async.sandbox import SandboxGateway\n"
        "async def main():\n"
        "    async with RefundSession(SandboxGateway().merchant('https://gateway.example')) as session:\n"
        "        await session.query_refund(RefundQuery(no_refund='R-1', dt_refund='20260105080000'))\n"
        "anyio.run(main)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert "ConfigurationError: this is a test" in ran.stderr


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.10", "::1"])
def test_guard_passes_loopback(host):
    """Servers on this machine can be reached."""
    check_loopback(host)


@pytest.mark.parametrize("host", ["gateway.example", "localhost.example", "10.0.0.1", "0.0.0.0", "::", ""])
def test_guard_refuses_other_hosts(host):
    """Names are not looked up, and other addresses are not this machine's."""
    with pytest.raises(ConfigurationError, match="this is a test"):
        check_loopback(host)


GUARDED = """
import pytest
from lianlian_async import RefundQuery, RefundSession
from lianlian_async.sandbox import SandboxGateway
from lianlian_async.transport.connection import check_loopback

PRODUCTION = SandboxGateway().merchant("https://gateway.example")

@pytest.mark.anyio
@pytest.mark.parametrize("http_backend", ["httpx", "aiohttp"])
async def test_production(http_backend):
    async with RefundSession(PRODUCTION, http_backend=http_backend) as session:
        await session.query_refund(RefundQuery(no_refund="R-1", dt_refund="20260105080000"))

@pytest.fixture
def reached():
    check_loopback("gateway.example")

@pytest.mark.lianlian_allow_network
def test_marked(reached):
    check_loopback("gateway.example")

def test_after_the_marked_one():
    check_loopback("gateway.example")
"""


def test_guard_is_lifted_only_for_marked_tests(run_pytest):
    """A mark lifts the guard for a test and its fixtures; the next test is guarded again."""
    result = run_pytest(GUARDED, "--strict-markers")
    result.assert_outcomes(passed=1, failed=5)
    result.stdout.fnmatch_lines_random(["E *ConfigurationError: this is a test, so no connection to gateway.example*"])


@pytest.mark.parametrize(("ini", "outcomes"), [("true", {"passed": 2}), ("false", {"passed": 1, "failed": 1})])
def test_ini_option_lifts_the_guard(run_pytest, ini, outcomes):
    """One line of the configuration lifts the guard for the whole run, and not for the run around it."""
    result = run_pytest(GUARDED, "-k", "marked", ini=f"lianlian_allow_network = {ini}")
    result.assert_outcomes(**outcomes, deselected=4)
    assert os.environ[LOOPBACK_ONLY]
