"""The pytest plugin: fixtures, and the network guard. See :mod:`lianlian_async.testing`.

pytest imports this module for every test suite, so a fixture imports most of the library only when a test uses it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from lianlian_async.settings import LOOPBACK_ONLY

if TYPE_CHECKING:
    from lianlian_async import Merchant, RefundSession
    from lianlian_async.sandbox import SandboxGateway

    from .virtual_time import VirtualTime

_ALLOW = "lianlian_allow_network"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the ini option that turns the guard off."""
    parser.addini(_ALLOW, "let refund sessions connect to hosts other than loopback", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Turn the guard on, or off with the ini option, until the end of the run; child processes inherit it."""
    config.addinivalue_line("markers", f"{_ALLOW}: let this test's refund sessions connect to any host")
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    if config.getini(_ALLOW):
        patch.delenv(LOOPBACK_ONLY, raising=False)
    else:
        patch.setenv(LOOPBACK_ONLY, "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Turn the guard off for a test with the mark, and for the fixtures that are set up with it."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker(_ALLOW) is not None:
            patch.delenv(LOOPBACK_ONLY, raising=False)
        return (yield)


@pytest.fixture
def lianlian_virtual_time() -> Iterator[VirtualTime]:
    """Return the test's virtual time."""
    from .virtual_time import VirtualTime

    with pytest.MonkeyPatch.context() as patch:
        yield VirtualTime(patch)


def _clock(request: pytest.FixtureRequest, method: str) -> dict[str, Any]:
    """Return the option ``clock``, a ``method`` of the test's virtual time, if the test uses virtual time."""
    if "lianlian_virtual_time" not in request.fixturenames:
        return {}
    return {"clock": getattr(request.getfixturevalue("lianlian_virtual_time"), method)}


@pytest.fixture
def lianlian_gateway(request: pytest.FixtureRequest) -> SandboxGateway:
    """Return a sandbox gateway that knows every order, with 1000.00 yuan each."""
    from lianlian_async.sandbox import SandboxGateway

    return SandboxGateway(default_order=Decimal("1000.00"), **_clock(request, "now"))


@pytest.fixture
def lianlian_merchant(lianlian_gateway: SandboxGateway) -> Merchant:
    """Return the merchant of ``lianlian_gateway``."""
    return lianlian_gateway.merchant()


@pytest.fixture
def lianlian_session_options() -> dict[str, Any]:
    """Return further options for ``lianlian_session``; override this fixture in a module or in ``conftest.py``."""
    return {}


@pytest.fixture
def lianlian_session(
    request: pytest.FixtureRequest,
    lianlian_gateway: SandboxGateway,
    lianlian_merchant: Merchant,
    lianlian_session_options: dict[str, Any],
) -> RefundSession:
    """Return a session, not yet open, that calls ``lianlian_gateway`` in this process."""
    from lianlian_async import RefundSession
    from lianlian_async.transport import asgi_transport

    options = _clock(request, "moment") | lianlian_session_options
    if "client" not in options:
        options.setdefault("transport", asgi_transport(lianlian_gateway))
    return RefundSession(lianlian_merchant, **options)
