"""What all tests share: both backends, virtual time, one set of keys, the genuine signatures."""

from __future__ import annotations

import json
import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psycopg
import psycopg.conninfo
import pytest
from hypothesis import HealthCheck, settings

from lianlian_async.journal import Journal, MemoryJournal, SqliteJournal
from lianlian_async.merchant import Merchant
from tests.support import keypairs, notices, postgres
from tests.support.clock import virtual_backend

settings.register_profile(
    "lianlian",
    deadline=None,  # no test depends on how fast the machine is
    database=None,  # nor on an earlier run
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("lianlian")

_VECTORS = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "signatures.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    kills = parser.getgroup("kill", "the batch that is killed (tests/programs/kill.py)")
    kills.addoption("--refunds", type=int, default=100, help="how many refunds it is of; 20000 for the whole thing")
    kills.addoption("--kills", type=int, default=2, help="how often it is killed; 20 for the whole thing")
    kills.addoption("--seed", type=int, default=0, help="where the dice of its faults and kills start")
    services = parser.getgroup("services", "the services that are notified (tests/programs/services.py)")
    services.addoption("--notified", type=int, default=24, help="of how many refunds; 2000 for the whole thing")


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts a command in its background with SIGINT ignored, and our child processes would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "virtual_time: time jumps to the next timer (see tests/support/clock.py)")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each test marked ``anyio`` runs on both backends; marked ``virtual_time`` too, in virtual time."""
    if request.node.get_closest_marker("virtual_time") is None:
        yield request.param, {}
        return
    with pytest.MonkeyPatch.context() as patch:
        yield virtual_backend(request.param, patch)


@pytest.fixture(autouse=True)
def _no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' servers are on this machine, whatever proxy its environment names."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def merchant_keys() -> keypairs.Pair:
    """The merchant's own key pair."""
    return keypairs.pair("merchant")


@pytest.fixture(scope="session")
def gateway_keys() -> keypairs.Pair:
    """The gateway's key pair, as far as the tests play the gateway."""
    return keypairs.pair("gateway")


@pytest.fixture(scope="session")
def stranger_keys() -> keypairs.Pair:
    """A key pair that nobody here trusts."""
    return keypairs.pair("stranger")


@pytest.fixture(scope="session")
def postgres_dsn() -> Iterator[str]:
    """A PostgreSQL server of this test process, where every test names a schema of its own."""
    with postgres.server() as dsn:
        yield dsn


@pytest.fixture
def database(postgres_dsn: str) -> str:
    """The DSN of a database of the test's own, for what brings its own tables."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return psycopg.conninfo.make_conninfo(postgres_dsn, dbname=name)


@pytest.fixture
def handler() -> notices.Handler:
    """The handler of a service that is notified."""
    return notices.Handler()


@pytest.fixture(params=["memory", "sqlite"])
async def journal(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Journal]:
    """An open journal that virtual time can wait for."""
    made = MemoryJournal() if request.param == "memory" else SqliteJournal(tmp_path / "journal.sqlite")
    async with made as opened:
        yield opened


@pytest.fixture
def merchant(merchant_keys: keypairs.Pair, gateway_keys: keypairs.Pair) -> Merchant:
    """A merchant that holds its own private key and trusts ``gateway_keys``."""
    return Merchant(
        oid_partner="201103171000000000",
        private_key=merchant_keys.private,
        gateway_public_keys=[gateway_keys.public],
        notify_url="https://shop.example/lianlian/refund",
    )


_ABSENT = "the genuine signatures (shared/vectors/signatures.json) do not lie beside this checkout"


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    """LianLian's genuine signatures, which lie beside the checkout and are copied nowhere."""
    if not _VECTORS.is_file():
        pytest.skip(_ABSENT)
    return json.loads(_VECTORS.read_text("utf-8"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``vector`` runs once for each genuine signature that the file holds."""
    if "vector" in metafunc.fixturenames:
        held = json.loads(_VECTORS.read_text("utf-8"))["vectors"] if _VECTORS.is_file() else []
        absent = [pytest.param({}, marks=pytest.mark.skip(reason=_ABSENT), id="absent")]
        metafunc.parametrize("vector", [pytest.param(each, id=each["name"]) for each in held] or absent)
