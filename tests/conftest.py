"""Fixtures for all tests: asyncio and trio, virtual time, keys, databases, LianLian's genuine signatures."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

if os.environ.get("LIANLIAN_TEST_HTTP") == "httpx2":
    import httpx2

    httpx2.alias_httpx()  # every import of httpx, here and in the package, is now httpx2

import pytest
from hypothesis import HealthCheck, settings

from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.journal import Journal, MemoryJournal, SqliteJournal
from lianlian_async.merchant import Merchant
from lianlian_async.sandbox import SandboxGateway
from lianlian_async.testing.virtual_time import VirtualTime
from tests.support import keypairs, notices, postgres

pytest_plugins = ["lianlian_async.testing.plugin"]

settings.register_profile(
    "lianlian",
    deadline=None,  # no test depends on the machine's speed
    database=None,  # no test depends on an earlier run
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("lianlian")

_VECTORS = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "signatures.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    kills = parser.getgroup("kill", "the killed batch (tests/programs/kill.py)")
    kills.addoption("--refunds", type=int, default=50, help="number of refunds in the batch; full size: 20000")
    kills.addoption("--kills", type=int, default=2, help="number of kills; full size: 20")
    kills.addoption("--seed", type=int, default=0, help="seed of the random faults and kills")
    fuzzes = parser.getgroup("fuzz", "the fuzzed parsers (tests/programs/fuzz.py)")
    fuzzes.addoption("--inputs", type=int, default=100, help="number of inputs of each parser; full size: 10000000")
    operator = parser.getgroup("operator", "the operator's day (tests/programs/operator_day.py)")
    operator.addoption("--lines", type=int, default=150, help="number of lines of the file; full size: 3000")
    power = parser.getgroup("power", "the power losses (tests/programs/power_loss.py)")
    power.addoption("--power-losses", type=int, default=60, help="number of power losses; full size: 5000")
    searches = parser.getgroup("secrets", "the search for secrets (tests/programs/secrets.py)")
    searches.addoption("--rounds", type=int, default=1, help="number of runs through every fault; full size: 20")
    services = parser.getgroup("services", "the notified services (tests/programs/services.py)")
    services.addoption("--notified", type=int, default=24, help="number of refunds; full size: 2000")
    sockets = parser.getgroup("sockets", "the disturbed sockets (tests/programs/proxy.py)")
    sockets.addoption("--scenes", type=int, default=25, help="number of scenes of each call; full size: all")
    soaks = parser.getgroup("soak", "the soak (tests/programs/soak.py)")
    soaks.addoption("--minutes", type=float, default=0.02, help="length of the soak; full size: 60")
    soaks.addoption("--deadline", type=float, default=0.4, help="seconds for each refund under attack; full size: 5")


def pytest_configure(config: pytest.Config) -> None:
    # Without cached bytecode, each worker and each child process of a test would compile every module again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    # Background commands of a shell ignore SIGINT, nohup ignores SIGHUP, and our child processes would inherit it.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    config.addinivalue_line("markers", "virtual_time: time jumps to the next timer (see lianlian_async.testing)")


@pytest.hookimpl(trylast=True)  # after pytest-cov has begun to measure
def pytest_sessionstart(session: pytest.Session) -> None:
    """Import a different share of the test modules in each worker first.

    In a fresh checkout, the workers then compile each module once, and not once in each worker.
    """
    worker = getattr(session.config, "workerinput", None)
    if worker is None or session.config.args != session.config.getini("testpaths"):
        return
    modules = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
    with warnings.catch_warnings(action="error"):
        for name in modules[int(worker["workerid"][2:]) :: worker["workercount"]]:
            importlib.import_module(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests of the programs: they are long, and a long test that starts last would run alone."""
    programs = {f"test_{path.name}" for path in (Path(__file__).parent / "programs").glob("*.py")}
    items.sort(key=lambda item: item.path.name not in programs)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of workers for ``-n auto``: two more than processors, because many tests wait for a process."""
    return len(os.sched_getaffinity(0)) + 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let a worker without tests take some of another's, so that all workers end at the same time."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run each ``anyio`` test on asyncio and on trio; with the mark ``virtual_time`` in virtual time."""
    if request.node.get_closest_marker("virtual_time") is None:
        yield request.param, {}
        return
    with pytest.MonkeyPatch.context() as patch:
        yield VirtualTime(patch).backend(request.param)


@pytest.fixture(autouse=True)
def _no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove proxy variables: the tests' servers are on this machine."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def merchant_keys() -> keypairs.Pair:
    """The merchant's own key pair."""
    return keypairs.pair("merchant")


@pytest.fixture(scope="session")
def gateway_keys() -> keypairs.Pair:
    """The key pair of the gateways in tests."""
    return keypairs.pair("gateway")


@pytest.fixture(scope="session")
def stranger_keys() -> keypairs.Pair:
    """A key pair that no merchant or gateway in tests trusts."""
    return keypairs.pair("stranger")


@pytest.fixture(scope="session")
def postgres_dsn() -> Iterator[str]:
    """The DSN of this test process's PostgreSQL server; every test uses its own schema."""
    with postgres.server() as dsn:
        yield dsn


@pytest.fixture(scope="session")
def _used_databases() -> list[str]:
    """The DSNs of the databases of earlier tests."""
    return []


@pytest.fixture
def database(postgres_dsn: str, _used_databases: list[str]) -> Iterator[str]:
    """The DSN of an empty database for one test, for code that creates its own tables."""
    dsn = _used_databases.pop() if _used_databases else postgres.new_database(postgres_dsn)
    yield dsn
    postgres.empty_database(dsn)  # takes a tenth of the time of a new one
    _used_databases.append(dsn)


@pytest.fixture
def handler() -> notices.Handler:
    """A handler for notified refunds."""
    return notices.Handler()


@pytest.fixture(params=["memory", "sqlite"])
async def journal(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Journal]:
    """An open journal that works in virtual time."""
    made = MemoryJournal() if request.param == "memory" else SqliteJournal(tmp_path / "journal.sqlite")
    async with made as opened:
        yield opened


@pytest.fixture
def gateway() -> SandboxGateway:
    """A sandbox in which every refund is final at once, and an order has 1000.00 yuan."""
    return SandboxGateway(default_order=Decimal("1000.00"), settle_after=0.0)


@pytest.fixture
def env(gateway: SandboxGateway) -> Iterator[dict[str, str]]:
    """The environment for the command: the gateway is served on a socket."""
    with serving(gateway) as url:
        yield environment(gateway, url)


@pytest.fixture
def merchant(merchant_keys: keypairs.Pair, gateway_keys: keypairs.Pair) -> Merchant:
    """A merchant with ``merchant_keys`` that trusts ``gateway_keys``."""
    return Merchant(
        oid_partner="201103171000000000",
        private_key=merchant_keys.private,
        gateway_public_keys=[gateway_keys.public],
        notify_url="https://shop.example/lianlian/refund",
    )


_ABSENT = "shared/vectors/signatures.json (genuine signatures) is not beside this checkout"


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    """LianLian's genuine signatures; the file is beside the checkout and not part of it."""
    if not _VECTORS.is_file():
        pytest.skip(_ABSENT)
    return json.loads(_VECTORS.read_text("utf-8"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with the argument ``vector`` once for each genuine signature in the file."""
    if "vector" in metafunc.fixturenames:
        held = json.loads(_VECTORS.read_text("utf-8"))["vectors"] if _VECTORS.is_file() else []
        absent = [pytest.param({}, marks=pytest.mark.skip(reason=_ABSENT), id="absent")]
        metafunc.parametrize("vector", [pytest.param(each, id=each["name"]) for each in held] or absent)
