"""``lianlian doctor``: check keys, connection, clock and journal, and name the cure of each problem."""

import platform
import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import anyio
import attrs
import click

from lianlian_async import __version__
from lianlian_async.clock import system_clock
from lianlian_async.errors import ConfigurationError, GatewayUnavailable, LianLianError, QueryRejected, RefundNotFound
from lianlian_async.flight import choose_canary
from lianlian_async.journal import Owner, SqliteReader
from lianlian_async.journal.sqlite_file import check_file
from lianlian_async.merchant import Keys, Merchant
from lianlian_async.models import RefundQuery, RefundRequest
from lianlian_async.retry import RetryPolicy
from lianlian_async.session import RefundSession
from lianlian_async.signing import BACKEND, signature_source
from lianlian_async.transport import http_backend, probe_server

from .options import JOURNAL, is_dsn, load_merchant, place_name
from .output import Output, printable, table
from .stores import default_place, make_reader

_PACKAGES: Final = ("httpx", "anyio", "pycryptodome", "cryptography", "aiohttp", "psycopg", "procrastinate")
_STYLES: Final = {"ok": "", "warning": "yellow", "failure": "red"}
_THEIR_KEY: Final = "LianLian's key"
_SETTING: Final = "correct this setting (LIANLIAN_ variables, or the file of --config)"
_JOURNAL: Final = f"name the journal with --journal or {JOURNAL}"


@attrs.frozen
class _Report:
    """The results of all checks, each with ``name``, ``text``, ``state`` and ``cure``."""

    checks: list[dict[str, str]] = attrs.field(factory=list)

    def add(self, name: str, text: str, *, warning: str = "", failure: str = "") -> None:
        """Add a result: ok, or a warning or failure with its cure."""
        state = "failure" if failure else "warning" if warning else "ok"
        self.checks.append({"name": name, "text": text, "state": state, "cure": failure or warning})

    def fail(self, name: str, problem: LianLianError | str, cure: str) -> None:
        """Add a failure with the cure that ``problem`` contains (``problem; cure``), else with ``cure``."""
        text, _, own = str(problem).rpartition("; ")
        self.add(name, text or own, failure=own if text else cure)


def doctor(output: Output, /, *, config: Path | None, **options: Any) -> int:
    report, public_key = _Report(), None
    _check_installation(report)
    try:
        merchant = load_merchant(config)
    except ConfigurationError as error:
        report.fail("merchant", error, _SETTING)
    else:
        report.add("merchant", merchant.oid_partner)
        try:
            keys = merchant.load_keys()
        except ConfigurationError as error:
            report.fail("keys", error, _SETTING)
        else:
            _check_keys(report, keys)
            public_key = keys.private.public_key().to_base64()
        anyio.run(_check_outside, report, merchant, options)
    state = max((check["state"] for check in report.checks), key=list(_STYLES).index)
    drawn = table("", ("", "check", ""), ())
    for check in report.checks:
        text = "\n→ ".join(printable(part) for part in (check["text"], check["cure"]) if part)
        drawn.add_row(check["state"], check["name"], text, style=_STYLES[check["state"]])
    upload = ("your public key, for LianLian's dashboard:", public_key) if public_key else ()
    output.show({"outcome": state, "checks": report.checks, "public_key_base64": public_key}, drawn, *upload)
    return int(state == "failure")


def _check_installation(report: _Report) -> None:
    versions = [f"lianlian-async {__version__}", f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    report.add("versions", ", ".join(versions))
    try:
        report.add("backends", f"signs with {BACKEND}, sends with {http_backend()}")
    except ConfigurationError as error:
        report.fail("backends", error, "correct this variable")


def _check_keys(report: _Report, keys: Keys) -> None:
    bits = keys.private.bits
    weak = {1024: "1024 bits are weak", 2048: "", 4096: ""}.get(bits, "LianLian accepts 1024, 2048 or 4096 bits")
    cure = "generate a key pair with `lianlian keygen`, and enter its public key in LianLian's dashboard"
    text = f"{bits} bits, {keys.private.fingerprint}" + (f": {weak}" if weak else "")
    report.add("private key", text, warning=cure if weak else "")
    for key in keys.gateway:
        report.add(_THEIR_KEY, f"{key.bits} bits, {key.fingerprint}")


async def _check_outside(report: _Report, merchant: Merchant, options: dict[str, Any]) -> None:
    """Check the connections, the journal, and LianLian's key."""
    endpoints, no_refund = merchant.endpoints, options["no_refund"]
    if not options["offline"]:
        for url in {urlsplit(url)[:2]: url for url in (endpoints.apply, endpoints.query)}.values():
            await _check_connection(report, url)
    query = None
    try:
        place = options["place"] or default_place(merchant)
        if not is_dsn(place):
            _check_disk(report, Path(place))
        async with make_reader(place) as reader:
            newest = choose_canary(await reader.canaries(), system_clock().wall, RetryPolicy().not_found_grace)
            entry = await reader.find(no_refund) if no_refund else newest
            refunds, name = sum((await reader.counts()).values()), place_name(place)
            Owner(merchant.oid_partner, endpoints.apply).confirm(reader.owner, name)
            belongs = "to this merchant" if reader.owner else "to no merchant yet"
            report.add("journal", f"{name}: {refunds:,} refunds, belongs {belongs}")
            if isinstance(reader, SqliteReader) and reader.problem:
                report.fail("journal", reader.problem, _JOURNAL)
            query = RefundRequest.from_record(entry.fields).query() if entry else None
    except FileNotFoundError:
        report.add("journal", f"{place} does not exist; `lianlian batch` creates it", warning=_JOURNAL)
    except click.UsageError as error:
        report.add("journal", error.message, warning=_JOURNAL)
    except (LianLianError, OSError) as error:
        report.fail("journal", str(error), f"check the database, or {_JOURNAL}")
    if query is None:
        problem = f"{no_refund} is not in the journal" if no_refund else "no refund to query is known"
        cure = "run this again after the first refund, or run `lianlian query`, which verifies the answer, too"
        report.add(_THEIR_KEY, f"not provable yet: {problem}", warning=cure)
    elif not options["offline"]:
        await _check_query(report, merchant, query)


async def _check_connection(report: _Report, url: str) -> None:
    host = urlsplit(url).netloc
    try:
        proxy, ahead, issuer, expires_at = await probe_server(url)
    except LianLianError as error:
        cure = "check the URL, DNS, the firewall and HTTPS_PROXY"
        if "certificate" in str(error):
            cure = "check this machine's date; behind a proxy that decrypts TLS, set SSL_CERT_FILE to the proxy's CA"
        report.fail("connection", f"{host}: {error}", cure)
        return
    report.add("connection", f"{host}, {'no proxy' if proxy is None else f'through the proxy {proxy}'}")
    if expires_at is None:
        report.add("TLS", "none: plain http, which is allowed only on this machine")
    else:
        days = (expires_at - system_clock().wall).days
        renew = "" if days >= 14 else "ask LianLian's support when they will renew it"
        report.add("TLS", f"trusted, issued by {issuer}, expires in {days} days", warning=renew)
    if ahead is None:
        cure = "find the proxy that removes this header: the library uses it to measure time across a reboot"
        report.add("clock", "unknown: the answer has no Date header", warning=cure)
    elif abs(ahead) > 10:
        text = f"{abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's clock"
        report.add("clock", text, failure="set this machine's clock by NTP (timedatectl set-ntp true)")
    else:
        report.add("clock", "agrees with the server's clock")


def _check_disk(report: _Report, path: Path) -> None:
    check_file(path)
    free = shutil.disk_usage(path.resolve(strict=True).parent).free
    cure = "" if free > 1 << 30 else "free some space: no refund is sent without a journal entry"
    report.add("disk", f"{free / (1 << 30):,.1f} GiB free for the journal", failure=cure)


async def _check_query(report: _Report, merchant: Merchant, query: RefundQuery) -> None:
    """Query a refund, and verify the signature of the answer with LianLian's key."""
    try:
        async with RefundSession(merchant, deadline=15.0, retry=RetryPolicy(attempts=1)) as session:
            refund = await session.query_refund(query)
    except (QueryRejected, RefundNotFound) as error:
        if error.verified:
            report.add(_THEIR_KEY, f"verified: it signed the answer {error.ret_code}")
        else:
            text = f"not verified: the answer {error.ret_code} has no signature"
            report.add(_THEIR_KEY, text, warning="solve the problem below, or use --refund with another refund")
        if error.ret_code == "3005":
            report.add("query", str(error), warning="use --refund with a newer refund")
        else:
            report.fail("query", error, "check LIANLIAN_QUERY_URL: that server must have a record of this refund")
    except LianLianError as error:
        cure = "compare LianLian's public key and the URLs with LianLian's dashboard and documentation"
        report.fail("query" if isinstance(error, GatewayUnavailable) else _THEIR_KEY, error, cure)
    else:
        signed = signature_source(refund.raw), refund.raw["sign"]
        [key, *_] = (key for key in merchant.load_keys().gateway if key.verify(*signed))
        report.add(_THEIR_KEY, f"verified: {key.fingerprint} signed the record of {refund.no_refund}")
