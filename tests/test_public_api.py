"""The public API: its names and signatures, and the cost of importing it."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import lianlian_async
from lianlian_async import errors
from lianlian_async.middleware import Limit, RateLimit, attempt, retry
from lianlian_async.signing import signature_source

PACKAGE = Path(lianlian_async.__file__).parent
HERE = Path(__file__).parent


def keywords(function):
    """Return the parameters of ``function`` with their defaults, without self; ``...`` means no default."""
    return {
        name: ... if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("self", "cls")
    }


# ── names ────────────────────────────────────────────────────────────────────────────────────────


def test_public_names_are_explicit_sorted_and_complete():
    """``__all__`` is sorted, every name in it exists, and it contains every public class and function."""
    assert dir(lianlian_async) == sorted(set(lianlian_async.__all__))
    assert all(getattr(lianlian_async, name) is not None for name in lianlian_async.__all__)
    offered = {
        name for name, value in vars(lianlian_async).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert offered | {"__version__"} == set(lianlian_async.__all__)


def test_unknown_name_is_an_attribute_error():
    """An unknown name raises AttributeError with Python's own message."""
    with pytest.raises(AttributeError, match="module 'lianlian_async' has no attribute 'RefundSesion'"):
        _ = lianlian_async.RefundSesion


def test_importing_the_package_alone_is_quick():
    """``import lianlian_async`` imports no dependency: each public name imports what it needs at its first use."""
    loaded, own = modules_after("import lianlian_async")
    assert not loaded & {"httpx", "anyio", "attrs", "Crypto"}
    assert own == {"lianlian_async.codes", "lianlian_async.errors", "lianlian_async.version"}


@pytest.mark.parametrize(
    "name",
    [
        *("RefundSession", "Merchant", "Endpoints", "SigningKey", "VerifyingKey"),
        *("RefundRequest", "RefundQuery", "Refund", "RefundStatus", "RetryPolicy", "RetryBudget"),
        *("refund_many", "NotificationEndpoint", "Outcome", "LianLianError"),
    ],
)
def test_names_of_the_design_are_importable(name):
    """All names of the design can be imported from the package itself."""
    assert name in lianlian_async.__all__
    assert getattr(lianlian_async, name).__doc__


def test_every_error_is_public():
    """Every public error is importable from the package, is a LianLianError, and has a docstring."""
    tree = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.LianLianError) and not name.startswith("_")
    }
    assert tree >= {
        *("ConfigurationError", "InvalidRequest", "RefundNotSent", "RefundRejected", "RefundNotFound"),
        *("QueryRejected", "RefundOutcomeUnknown", "GatewayUnavailable", "RefundConflict"),
        *("SignatureInvalid", "AnswerMismatch", "MalformedMessage"),
    }
    assert tree <= set(lianlian_async.__all__)
    assert all(getattr(errors, name).__doc__ for name in tree)
    assert issubclass(errors.ConfigurationError, ValueError)
    assert issubclass(errors.InvalidRequest, ValueError)


def test_the_version_is_the_installed_one():
    """``__version__`` equals the version of the installed distribution."""
    assert lianlian_async.__version__ == version("lianlian-async")


# ── signatures ───────────────────────────────────────────────────────────────────────────────────


def test_options_of_the_session():
    """RefundSession's options, their defaults, and those of its calls."""
    options = keywords(lianlian_async.RefundSession)
    assert next(iter(options)) == "merchant"
    expected = {
        "client": None,
        "transport": None,
        "http_backend": None,
        "retry": lianlian_async.RetryPolicy(),
        "deadline": 30.0,
        "max_connections": 20,
        "warm_up": 0,
        "middleware": (),
        "limiter": None,
        "journal": None,
        "query_first": False,
        "listeners": (),
    }
    assert {name: options[name] for name in expected} == expected
    for call, first in (("apply_refund", "request"), ("query_refund", "query"), ("resolve", "unknown")):
        method = getattr(lianlian_async.RefundSession, call)
        assert inspect.iscoroutinefunction(method)
        assert keywords(method) == {first: ..., "deadline": None, "retry": None}
    for call in ("outcome_of", "apply_and_wait", "wait_refund", "resume"):
        method = getattr(lianlian_async.RefundSession, call)
        assert inspect.iscoroutinefunction(method)
        assert keywords(method).keys() >= {"deadline", "retry"}


def test_settings_of_the_merchant():
    """Merchant has the documented settings and the constructors from_env and from_toml."""
    options = keywords(lianlian_async.Merchant)
    assert list(options)[:3] == ["oid_partner", "private_key", "gateway_public_keys"]
    assert options["notify_url"] is None
    assert "endpoints" in options
    assert keywords(lianlian_async.Merchant.from_env) == {"environ": None}
    assert keywords(lianlian_async.Merchant.from_toml) == {"path": ...}


def test_the_endpoints_are_those_of_lianlians_pages():
    """By default refunds go to the cross-border product's endpoints."""
    endpoints = lianlian_async.Endpoints()
    assert endpoints.apply == "https://traderapi.lianlianpay.com/exchangerefund.htm"
    assert endpoints.query == "https://queryapi.lianlianpay.com/refundquery.htm"


def test_defaults_of_the_retry_policy():
    """Four attempts, backoff from 0.5 to 8 seconds with multiplier 2, and 15 minutes until NOT_FOUND is believed."""
    options = keywords(lianlian_async.RetryPolicy)
    expected = {
        "attempts": 4,
        "initial": 0.5,
        "maximum": 8.0,
        "multiplier": 2.0,
        "budget": lianlian_async.RetryBudget(),
        "not_found_grace": 900.0,
    }
    assert {name: options[name] for name in expected} == expected


def test_methods_of_the_keys():
    """Signing keys sign, verifying keys verify, and both are loaded by ``load``."""
    assert keywords(lianlian_async.SigningKey.load)["password"] is None
    assert keywords(lianlian_async.SigningKey.generate) == {"bits": 2048}
    assert list(keywords(lianlian_async.SigningKey.sign)) == ["source"]
    assert list(keywords(lianlian_async.VerifyingKey.verify)) == ["source", "signature"]
    assert list(keywords(signature_source)) == ["fields"]


def test_options_of_refund_many():
    """refund_many takes a session, requests and options, and yields outcomes."""
    options = keywords(lianlian_async.refund_many)
    assert list(options)[:2] == ["session", "requests"]
    assert (options["concurrency"], options["journal"]) == (None, None)
    assert (options["keep_going"], options["wait_unknown"]) == (False, False)
    fields = ["request", "refund", "error", "attempts", "queries", "seconds"]
    assert list(keywords(lianlian_async.Outcome)) == fields


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("journal", "MemoryJournal SqliteJournal"),
        ("journal.postgres", "PostgresJournal"),
        ("contrib.procrastinate", "RefundQueue"),
        ("contrib.fastapi", "Session get_session lifespan notifications refund_error"),
        ("contrib.aiohttp", "SESSION get_session lifespan notifications refund_errors"),
        ("sandbox", "SandboxGateway Fault When Repeated Notifier"),
        ("testing", "notify"),
        ("middleware", "RateLimit"),
    ],
)
def test_names_of_the_submodules(module, names):
    """Programs import these names."""
    imported = importlib.import_module(f"lianlian_async.{module}")
    assert all(hasattr(imported, name) for name in names.split())


def test_options_of_the_notification_endpoint():
    """It takes a merchant and a handler; ``handle`` takes bytes and headers, and returns status, headers and body."""
    options = keywords(lianlian_async.NotificationEndpoint)
    assert list(options)[:2] == ["merchant", "on_refund"]
    assert (options["journal"], options["session"], options["confirm"], options["inbox"]) == (None, None, False, False)
    assert list(keywords(lianlian_async.NotificationEndpoint.handle))[:2] == ["body", "headers"]


@pytest.mark.parametrize("layer", [retry, Limit.__call__, attempt])
def test_built_in_layers_are_middleware(layer):
    """Each built-in layer is called as a user's middleware, with an exchange and ``call_next``."""
    assert inspect.iscoroutinefunction(layer)
    assert list(keywords(layer)) == ["exchange", "call_next"]
    assert hasattr(RateLimit, "__aenter__")


# ── imports ──────────────────────────────────────────────────────────────────────────────────────

EXTRAS = {
    *("click", "rich", "uvicorn", "cryptography", "trio", "psycopg", "psycopg_pool", "fastapi", "aiohttp"),
    *("opentelemetry", "procrastinate", "tomllib", "hypothesis", "pytest", "asyncio"),
}


def modules_after(statement):
    """Return the modules that a new process has imported after ``statement``: top-level ones, and ours in full."""
    probe = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    modules = json.loads(done.stdout)
    return {name.partition(".")[0] for name in modules}, {
        name for name in modules if name.startswith("lianlian_async.")
    }


def test_importing_the_package_imports_no_extra():
    """All public names together import no extra, no command and no sandbox, beyond what httpx itself imports."""
    before, _ = modules_after("import anyio, attrs, httpx, Crypto")  # httpx imports click and rich where they are
    after, own = modules_after("from lianlian_async import *")
    assert {"httpx", "anyio", "attrs", "Crypto"} <= after
    assert not (after - before) & EXTRAS
    assert not {"lianlian_async.cli", "lianlian_async.sandbox", "lianlian_async.journal.postgres"} & own


def imported(file):
    """Return the top-level names of all imports in a module, including imports for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found


LOWER = ["errors", "codes", "wire", "signing", "models", "merchant", "retry", "exchange", "protocol"]


@pytest.mark.parametrize("module", LOWER)
def test_decision_modules_do_no_io_and_use_no_clock_or_randomness(module):
    """Decision modules are pure: time and randomness are arguments, and they never wait."""
    forbidden = {"httpx", "httpcore", "anyio", "asyncio", "trio", "sniffio", "time", "random", "secrets", "socket"}
    assert not imported(PACKAGE / f"{module}.py") & forbidden


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        (
            "httpx",
            {
                f"transport/{name}.py"
                for name in ("aiohttp", "connection", "own_transport", "pool", "sender", "tracked_request")
            },
        ),
        ("httpx2", {"transport/own_transport.py"}),
        ("aiohttp", {"transport/aiohttp.py", "contrib/aiohttp.py"}),
        ("Crypto", {"signing.py"}),
    ],
)
def test_each_dependency_is_imported_by_one_package(library, homes):
    """Only the transport knows HTTP clients, and only signing knows pycryptodome."""
    users = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if library in imported(file) and not file.is_relative_to(PACKAGE / "cli")
    }
    assert users == homes


def test_typing_test_uses_every_public_name():
    """The typing test uses every public name."""
    used = {
        alias.name
        for node in ast.walk(ast.parse((HERE / "typing_public_api.py").read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "lianlian_async"
        for alias in node.names
    }
    assert used == set(lianlian_async.__all__) - {"__version__"}
    assert (PACKAGE / "py.typed").is_file()


_FIRST_REQUEST = """
import sys, anyio
from lianlian_async import RefundNotSent, RefundRequest, RefundSession, RetryPolicy
from lianlian_async.sandbox import SandboxGateway

async def main():
    merchant = SandboxGateway().merchant("http://127.0.0.1:9")
    fields = {"no_refund": "R-1", "dt_refund": "20261122102000", "money_refund": "1", "no_order": "O-1"}
    async with RefundSession(merchant, http_backend=sys.argv[2], retry=RetryPolicy(attempts=1)) as session:
        opened = set(sys.modules)
        try:
            await session.apply_refund(RefundRequest(**fields))
        except RefundNotSent:
            print(sorted(set(sys.modules) - opened))

anyio.run(main, backend=sys.argv[1])
"""


@pytest.mark.parametrize(("backend", "sender"), [("asyncio", "httpx"), ("asyncio", "aiohttp"), ("trio", "httpx")])
def test_first_request_imports_no_module(backend, sender):
    """A session imports all modules when it opens, in a thread: an import would block the event loop for 0.2 s."""
    command = [sys.executable, "-c", _FIRST_REQUEST, backend, sender]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
