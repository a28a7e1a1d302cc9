"""Search everything that a program shows for its secrets: ``python -m tests.programs.secrets --rounds 20``.

A merchant with an encrypted key makes refunds through every fault of the sandbox, with a journal in a database that
has a password, and takes good and forged notifications. Then follow wrong settings and the commands. All that a log, an
error tracker, a tracer, a debugger, a cache or a client may show of this is kept: log records of every level,
tracebacks with local variables, reprs, attributes, dicts and pickles of objects, events, spans, metrics, HTTP
responses, output of commands, files and tables. None may contain a part of a private key (as base64, bytes or numbers),
the passphrase of the key or the password of the database.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import logging
import pickle
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import attrs
import psycopg
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lianlian_async import (
    LianLianError,
    Merchant,
    NotificationEndpoint,
    RefundOutcomeUnknown,
    RefundQuery,
    RefundRequest,
    RefundSession,
    RetryBudget,
    RetryPolicy,
    refund_many,
)
from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.contrib.opentelemetry import OpenTelemetry
from lianlian_async.contrib.web import respond
from lianlian_async.journal import Journal, SqliteJournal
from lianlian_async.journal.postgres import PostgresJournal
from lianlian_async.sandbox import Fault, SandboxGateway, When
from lianlian_async.transport import http_backend
from tests.support import command, keypairs, postgres
from tests.support.batches import refund, url_of, write_csv
from tests.support.notices import HEADERS, notification
from tests.support.parties import OID_PARTNER, refund_request

PASSPHRASE: Final = "passphrase 7351 of the key"
DSN_PASSWORD: Final = "password-4822-of-the-dsn"
LIBRARIES: Final = ("lianlian_async", "httpx", "httpcore", "aiohttp", "asyncio", "psycopg", "procrastinate", "uvicorn")
"""Loggers, all set to DEBUG."""
KEY: Final = keypairs.pair("merchant")
LOCKED: Final = KEY.locked_pem(PASSPHRASE)
POLICY: Final = RetryPolicy(initial=0.1, maximum=0.4, budget=RetryBudget(capacity=1e9))
DEADLINE: Final = 0.5
QUERY: Final = ("query", "--no-refund", "R-1", "--dt-refund", "20261122020000")
WINDOW: Final = 24
"""Characters: a part of a key that is at least twice as long is found."""

# ── what is searched for ─────────────────────────────────────────────────────────────────────────


def _windows(text: str) -> set[str]:
    return {text[at : at + WINDOW] for at in range(0, len(text) - WINDOW + 1, WINDOW)}


def _escaped(data: bytes) -> str:
    return repr(data)[2:-1]


def _forms(pair: keypairs.Pair) -> Iterator[tuple[str, str]]:
    """Yield the names and texts of a private key."""
    for name, form in {"PKCS#8": PrivateFormat.PKCS8, "PKCS#1": PrivateFormat.TraditionalOpenSSL}.items():
        der = pair.oracle.private_bytes(Encoding.DER, form, NoEncryption())
        yield f"{name} in base64", base64.b64encode(der).decode()
    numbers = pair.oracle.private_numbers()
    for name in ("d", "p", "q", "dmp1", "dmq1", "iqmp"):
        number = getattr(numbers, name)
        yield f"{name} in decimal", str(number)
        yield f"{name} in hex", f"{number:x}"
        yield f"{name} as bytes", _escaped(number.to_bytes((number.bit_length() + 7) // 8))


def forms(**pairs: keypairs.Pair) -> dict[str, set[str]]:
    """Return the texts by the secret that they give away: parts of keys, the passphrase and the password."""
    public = "".join(
        base64.b64encode(
            pair.oracle.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        ).decode()
        for pair in pairs.values()
    )
    found = {
        f"{owner}'s key, {name}": {window for window in _windows(text) if window not in public}
        for owner, pair in pairs.items()
        for name, text in _forms(pair)
    }
    found["encrypted key"] = _windows("".join(LOCKED.splitlines()[1:-1]))
    for name, word in {"passphrase": PASSPHRASE, "DSN password": DSN_PASSWORD}.items():
        found[name] = {word, quote(word), base64.b64encode(word.encode()).decode(), word.encode().hex()}
    return found


# ── what is searched ─────────────────────────────────────────────────────────────────────────────

_BREAKS: Final = re.compile(r"\s|\\n|\\r|\\u000a")


def _plain(text: str) -> str:
    """Return ``text`` without blanks and line breaks, in lower case."""
    return _BREAKS.sub("", text).lower()


@attrs.define(repr=False)
class Evidence(logging.Handler):
    """Texts by the kind of their source."""

    texts: dict[str, set[str]] = attrs.field(factory=dict)

    def __attrs_pre_init__(self) -> None:
        super().__init__(logging.NOTSET)

    __hash__ = object.__hash__

    def add(self, kind: str, text: str) -> None:
        """Keep one text."""
        self.texts.setdefault(kind, set()).add(text)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a log record: its message, its attributes, and its traceback."""
        self.add("log", record.getMessage())
        self.add("log", repr(vars(record)))
        if record.exc_info is not None and record.exc_info[1] is not None:
            self.show_error(record.exc_info[1])

    def show(self, value: object) -> None:
        """Keep the text forms of an object that debuggers, loggers and caches show."""
        self.add("repr", f"{value!r} {value}")
        with contextlib.suppress(TypeError):  # it has slots
            self.add("attributes", repr(vars(value)))
        if attrs.has(type(value)):
            self.add("asdict", f"{attrs.asdict(value)} {attrs.astuple(value)}")  # type: ignore[call-overload]
        for protocol in (0, pickle.HIGHEST_PROTOCOL):
            try:
                self.add("pickle", pickle.dumps(value, protocol).decode("latin-1"))
            except Exception as error:  # noqa: BLE001 - each class that cannot be pickled raises as it likes
                self.show_error(error)

    def show_error(self, error: BaseException) -> None:
        """Keep an error's traceback with the local variables of every frame."""
        lines = traceback.TracebackException.from_exception(error, capture_locals=True).format()
        self.add("traceback", "".join(lines))

    def event(self, event: object) -> None:
        """Keep an event: a listener."""
        self.show(event)
        self.add("event", repr(attrs.asdict(event)))  # type: ignore[arg-type]

    def secrets(self, wanted: Mapping[str, set[str]]) -> dict[str, list[str]]:
        """Return the secrets that were found, by kind."""
        found = {}
        for kind, texts in self.texts.items():
            searched = _plain("\n".join(texts))
            if names := [name for name, parts in wanted.items() if any(_plain(part) in searched for part in parts)]:
                found[kind] = names
        return found


@contextlib.contextmanager
def everything_logged(evidence: Evidence) -> Iterator[None]:
    """Let every logger of the library and below it log everything."""
    root = logging.getLogger()
    loggers = [root, *map(logging.getLogger, LIBRARIES)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    root.addHandler(evidence)
    try:
        yield
    finally:
        root.removeHandler(evidence)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ── what happens ─────────────────────────────────────────────────────────────────────────────────


_merchant: Final = partial(Merchant, oid_partner=OID_PARTNER, gateway_public_keys=keypairs.pair("gateway").public)


def _script(gateway: SandboxGateway, name: str) -> Iterator[RefundRequest]:
    """Script every fault of applications, before and after the refund, and of queries; yield the refunds."""
    for fault in Fault:
        for when in When:
            request = refund_request(f"{name}-{fault.name}-{when.name}")
            gateway.script(fault, call="apply", when=when, no_refund=request.no_refund, delay=0.1)
            yield request
        request = refund_request(f"{name}-{fault.name}-QUERY")
        gateway.script(Fault.RESET, call="apply", no_refund=request.no_refund)
        gateway.script(fault, call="query", no_refund=request.no_refund, delay=0.1, times=100)
        yield request


def _unknown(gateway: SandboxGateway, name: str) -> RefundRequest:
    """Return a refund whose outcome stays unknown, also on a loaded machine: its call has enough time to send it."""
    request = refund_request(f"{name}-UNKNOWN")
    gateway.script(Fault.RESET, call="apply", no_refund=request.no_refund)
    gateway.script(Fault.HTTP_500, call="query", no_refund=request.no_refund, times=1000)
    return request


async def fault_run(evidence: Evidence, journal: Journal, http_backend: str, name: str) -> None:
    """Make refunds through every fault, and take notifications; keep all that is shown."""
    gateway = _gateway()
    spans, metrics = InMemorySpanExporter(), InMemoryMetricReader()
    tracers = TracerProvider(shutdown_on_exit=False)
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    telemetry = OpenTelemetry(tracers, MeterProvider([metrics], shutdown_on_exit=False))
    requests = [*_script(gateway, name)]
    with serving(gateway) as base_url:
        merchant = gateway.merchant(base_url, private_key=LOCKED, private_key_password=PASSPHRASE)
        options = {"retry": POLICY, "deadline": DEADLINE, "max_connections": 60, "http_backend": http_backend}
        async with (
            journal,
            RefundSession(merchant, journal=journal, listeners=[evidence.event, telemetry], **options) as session,
            NotificationEndpoint(merchant, _fails, journal=journal, session=session) as endpoint,
        ):
            calls = [*map(session.outcome_of, requests), session.outcome_of(_unknown(gateway, name), deadline=3.0)]
            for outcome in await asyncio.gather(*calls):
                evidence.show(outcome)
                _show_outcome(evidence, outcome.error or outcome.refund)
            conflict = attrs.evolve(requests[0], money_refund=Decimal("9.99"))
            unknown = RefundQuery(no_refund="R-404", dt_refund=conflict.dt_refund)
            for call in (
                lambda: session.apply_refund(conflict),
                lambda: session.query_refund(unknown),
                lambda: session.wait_refund(requests[0].query(), deadline=0.1),
                lambda: _batch(session, gateway, name),
            ):
                await _shown(evidence, call)
            for body in (notification(f"{name}1"), notification(2, keypairs.pair("stranger").private), b"{}"):
                evidence.show(await endpoint.handle(body, HEADERS))
            await endpoint.sweep()
            for value in (merchant, merchant.load_keys(), session, journal, endpoint, telemetry, *requests[:1]):
                evidence.show(value)
    for span in spans.get_finished_spans():
        evidence.add("span", span.to_json())
    if (measured := metrics.get_metrics_data()) is not None:
        evidence.add("metrics", measured.to_json())


def _gateway() -> SandboxGateway:
    return SandboxGateway(
        oid_partner=OID_PARTNER,
        merchant_key=KEY.private,
        gateway_key=keypairs.pair("gateway").private,
        default_order=Decimal("10.00"),
    )


async def _fails(_refund: object) -> None:
    raise RuntimeError("the handler of a notification fails")


async def _batch(session: RefundSession, gateway: SandboxGateway, name: str) -> None:
    """Make refunds whose answers are forged, until the batch stops."""
    gateway.script(Fault.WRONG_SIGNATURE, times=100)
    async for _ in refund_many(session, [refund_request(f"{name}F{number}") for number in range(8)]):
        pass


async def _shown(evidence: Evidence, call: Callable[[], Any]) -> None:
    """Keep the text forms of the result or the error of ``call``."""
    try:
        _show_outcome(evidence, await call())
    except LianLianError as error:
        _show_outcome(evidence, error)


def _show_outcome(evidence: Evidence, result: object) -> None:
    evidence.show(result)
    if isinstance(result, LianLianError):
        evidence.show_error(result)
        evidence.add("HTTP response", repr(respond(result)))
    if isinstance(result, RefundOutcomeUnknown):
        evidence.add("JSON", json.dumps(result.to_dict()))


async def wrong_settings(evidence: Evidence) -> None:
    """Keep what is shown of errors about keys and databases; no variable here holds a secret when they are raised."""
    for make in (
        lambda: _merchant(private_key=LOCKED, private_key_password=PASSPHRASE + "x"),
        lambda: _merchant(private_key=LOCKED),
        lambda: _merchant(private_key=LOCKED[:300], private_key_password=PASSPHRASE),
        lambda: _merchant(private_key=KEY.private_pem[:300]),
        lambda: _merchant(private_key=Path(KEY.private_pem)),
        lambda: _merchant(private_key=KEY.private_pem, gateway_public_keys=[KEY.private_pem]),
        lambda: _merchant(private_key=KEY.private_pem, oid_partner=KEY.private_pem),
        lambda: PostgresJournal(f"postgresql://me:{DSN_PASSWORD}@127.0.0.1:1/none", timeout=0.5),
        lambda: PostgresJournal(f"postgresql://me:{DSN_PASSWORD}@[::1/none"),
    ):

        async def opened(make: Callable[[], Merchant | PostgresJournal] = make) -> None:
            made = make()
            async with RefundSession(made) if isinstance(made, Merchant) else made:
                pass

        await _shown(evidence, opened)


def commands(evidence: Evidence, dsn: str, folder: Path) -> None:
    """Keep the output of commands that succeed and that fail, and the files that they write."""
    gateway = _gateway()
    gateway.script(Fault.RESET, call="apply")
    file, message = write_csv(folder / "refunds.csv", [refund(1), refund(2)]), folder / "message.json"
    message.write_bytes(notification())
    with serving(gateway) as base_url:
        env = environment(gateway, base_url) | {
            "LIANLIAN_PRIVATE_KEY": LOCKED,
            "LIANLIAN_PRIVATE_KEY_PASSWORD": PASSPHRASE,
            "LIANLIAN_JOURNAL": dsn,
        }
        wrong_key = env | {"LIANLIAN_PRIVATE_KEY_PASSWORD": PASSPHRASE + "x"}
        broken_key = env | {"LIANLIAN_PRIVATE_KEY": env["LIANLIAN_PRIVATE_KEY"][:300]}
        unreachable = {"LIANLIAN_JOURNAL": f"postgresql://me:{DSN_PASSWORD}@127.0.0.1:1/x"}
        for code, arguments, changed in (
            (0, ("batch", file, "--yes", "--out", folder / "results.csv"), env),
            (0, ("batch", file, "--yes", "--queue"), env),
            (0, ("worker", "--until-empty"), env),
            (0, ("doctor",), env),
            (0, ("doctor", "--json"), env),
            (0, ("explain", "R-1"), env),
            (0, ("journal", "show"), env),
            (0, ("journal", "export", "--out", folder / "export.jsonl"), env),
            (0, (*QUERY, "--json"), env),
            (0, ("verify", message), env),
            (2, ("verify", file), env),
            (1, ("doctor",), wrong_key),
            (2, ("batch", file, "--yes"), wrong_key),
            (1, ("doctor", "--json"), broken_key),
            (2, ("verify", message), broken_key),
            (1, ("doctor",), env | unreachable),
            (1, ("journal", "show"), env | unreachable),
            (1, ("batch", file, "--yes"), env | unreachable),
            (1, ("worker", "--until-empty"), env | unreachable),
        ):
            _ended(evidence, command.run(*arguments, env=changed), code)
        _ended(evidence, command.end(command.start(*QUERY, env=env | {"LIANLIAN_LOG": "debug"})), 0)


def _ended(evidence: Evidence, ended: command.Ended, code: int) -> None:
    """Keep the output of a command; raise if its exit code is not the expected one."""
    evidence.add("command", ended.stdout + ended.stderr)
    if ended.exit_code != code:
        raise RuntimeError(f"exit code {ended.exit_code}: {ended}")


def stored(evidence: Evidence, dsn: str, folder: Path) -> None:
    """Keep every file below ``folder`` and every row of the database."""
    for path in folder.rglob("*"):
        if path.is_file():
            evidence.add("file", path.read_bytes().decode("latin-1"))
    with psycopg.connect(dsn) as connection:
        tables = connection.execute(
            "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables"
            " WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        )
        for [table] in tables.fetchall():
            rows = connection.execute(f"SELECT row_to_json(t)::text FROM {table} AS t")
            evidence.add("table", "\n".join(row for [row] in rows))


@attrs.frozen
class Report:
    """The result of the search."""

    searched: dict[str, int]
    """The number of texts by kind."""
    found: dict[str, list[str]]
    """The secrets that were found by kind; must be empty."""


def wanted() -> dict[str, set[str]]:
    """Return the texts that give away a secret of the run."""
    return forms(merchant=KEY, gateway=keypairs.pair("gateway"))


def run(dsn: str, folder: Path, *, rounds: int) -> Report:
    """Do everything with the empty database ``dsn``, and search it; rounds alternate journal and backend."""
    evidence, backends = Evidence(), sorted(("httpx", "aiohttp"), key=lambda name: name != http_backend())
    dsn = url_of(dsn, password=DSN_PASSWORD)
    with everything_logged(evidence):
        for number in range(rounds):
            is_file = bool(number % 2)
            journal = SqliteJournal(folder / f"{number}") if is_file else PostgresJournal(dsn, schema=f"round{number}")
            asyncio.run(fault_run(evidence, journal, backends[is_file], str(number)))
        asyncio.run(wrong_settings(evidence))
        commands(evidence, dsn, folder)
        stored(evidence, dsn, folder)
    return Report({kind: len(texts) for kind, texts in evidence.texts.items()}, evidence.secrets(wanted()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="number of runs through every fault")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, postgres.server() as dsn:
        report = run(dsn, Path(folder), rounds=options.rounds)
    print(json.dumps(attrs.asdict(report), indent=2))
    return 1 if report.found else 0


if __name__ == "__main__":
    sys.exit(main())
