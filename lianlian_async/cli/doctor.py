"""``lianlian doctor``: check keys, connection, clock and journal, and name the cure of each problem."""

import os
import platform
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import anyio
import click

from lianlian_async import __version__
from lianlian_async.clock import system_clock
from lianlian_async.errors import ConfigurationError, GatewayUnavailable, LianLianError, QueryRejected, RefundNotFound
from lianlian_async.flight import choose_canary
from lianlian_async.journal import Owner, SqliteReader
from lianlian_async.journal.sqlite_file import COPY
from lianlian_async.merchant import Keys, Merchant
from lianlian_async.models import RefundQuery, RefundRequest
from lianlian_async.retry import RetryPolicy
from lianlian_async.secret import without_locals
from lianlian_async.session import RefundSession
from lianlian_async.signing import BACKEND, SigningKey, VerifyingKey, signature_source
from lianlian_async.transport import http_backend, probe_server

from .options import JOURNAL, is_dsn, load_merchant, place_name
from .output import Output, printable, table
from .stores import default_place, make_reader

_PACKAGES: Final = ("httpx", "anyio", "pycryptodome", "cryptography", "aiohttp", "psycopg", "procrastinate")
_STYLES: Final = {"ok": "", "warning": "yellow", "failure": "red"}
_THEIR_KEY: Final = "LianLian's key"
_SETTING: Final = "correct this setting (LIANLIAN_ variables, or the file of --config)"
_JOURNAL: Final = f"name the journal with --journal or {JOURNAL}"


class _Check(NamedTuple):
    """The result of one check, and the cure if the state is not ok."""

    name: str
    text: str
    state: str = "ok"
    cure: str = ""


def _warning(name: str, text: str, cure: str) -> _Check:
    return _Check(name, text, "warning", cure)


def _failure(name: str, problem: LianLianError | str, cure: str) -> _Check:
    """Return a failure with ``cure``, or with the cure that ``problem`` itself contains (``problem; cure``)."""
    text, _, own = str(problem).rpartition("; ")
    return _Check(name, text or own, "failure", own if text else cure)


def doctor(output: Output, /, *, config: Path | None, **options: Any) -> int:
    """Run ``lianlian doctor``."""
    checks, public_key = [*_installation()], None
    try:
        merchant = load_merchant(config)
    except ConfigurationError as error:
        checks.append(_failure("merchant", error, _SETTING))
    else:
        checks.append(_Check("merchant", merchant.oid_partner))
        try:
            keys = merchant.load_keys()
        except ConfigurationError as error:
            swapped = "private key and LianLian's public key are swapped; exchange the two settings"
            checks.append(_failure("keys", swapped if _are_swapped(merchant) else error, _SETTING))
        else:
            checks += _keys(keys)
            public_key = keys.private.public_key().to_base64()
        checks += anyio.run(_external_checks, merchant, options)
    state = max((check.state for check in checks), key=list(_STYLES).index)
    drawn = table("", ("", "check", ""), ())
    for check in checks:
        text = "\n→ ".join(printable(part) for part in (check.text, check.cure) if part)
        drawn.add_row(check.state, check.name, text, style=_STYLES[check.state])
    upload = ("your public key, for LianLian's dashboard:", public_key) if public_key else ()
    document = {"outcome": state, "checks": [check._asdict() for check in checks], "public_key_base64": public_key}
    output.show(document, drawn, *upload)
    return int(state == "failure")


def _installation() -> Iterator[_Check]:
    versions = [f"lianlian-async {__version__}", f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    yield _Check("versions", ", ".join(versions))
    try:
        yield _Check("backends", f"signs with {BACKEND}, sends with {http_backend()}")
    except ConfigurationError as error:
        yield _failure("backends", error, "correct this variable")


@without_locals
def _are_swapped(merchant: Merchant) -> bool:
    private, [public, *_] = merchant.private_key.reveal(), merchant.gateway_public_keys.reveal()
    try:
        VerifyingKey.load(private)  # type: ignore[arg-type]  # the command loads keys from text and files only
        SigningKey.load(public, merchant.private_key_password.reveal())  # type: ignore[arg-type]
    except ConfigurationError:
        return False
    return True


def _keys(keys: Keys) -> Iterator[_Check]:
    bits, text = keys.private.bits, f"{keys.private.bits} bits, {keys.private.fingerprint}"
    weak = {1024: "1024 bits are weak", 2048: "", 4096: ""}.get(bits, "LianLian accepts 1024, 2048 or 4096 bits")
    cure = "generate a key pair with `lianlian keygen`, and enter its public key in LianLian's dashboard"
    yield _warning("private key", f"{text}: {weak}", cure) if weak else _Check("private key", text)
    for key in keys.gateway:
        yield _Check(_THEIR_KEY, f"{key.bits} bits, {key.fingerprint}")


async def _external_checks(merchant: Merchant, options: dict[str, Any]) -> list[_Check]:
    """Check the connections, the journal, and LianLian's key."""
    checks, endpoints, no_refund = list[_Check](), merchant.endpoints, options["no_refund"]
    origins = {urlsplit(url)[:2]: url for url in (endpoints.apply, endpoints.query)}
    if not options["offline"]:
        for url in origins.values():
            checks += [check async for check in _connection(url)]
    is_complete = no_refund and options["dt_refund"]
    query = RefundQuery(no_refund=no_refund, dt_refund=options["dt_refund"]) if is_complete else None
    try:
        place = options["place"] or default_place(merchant)
        checks += [] if is_dsn(place) else _file(Path(place))
        async with make_reader(place) as reader:
            now, grace = system_clock().wall, RetryPolicy().not_found_grace
            known = choose_canary(await reader.canaries(), now, grace)
            entry = await reader.find(no_refund) if no_refund else known
            refunds, name = sum((await reader.counts()).values()), place_name(place)
            Owner(merchant.oid_partner, endpoints.apply).confirm(reader.owner, name)
            belongs = "to this merchant" if reader.owner else "to no merchant yet"
            checks.append(_Check("journal", f"{name}: {refunds:,} refunds, belongs {belongs}"))
            if isinstance(reader, SqliteReader) and reader.is_copy:
                checks.append(_failure("journal", COPY, _JOURNAL))
            query = RefundRequest.from_record(entry.fields).query() if entry else query
    except FileNotFoundError:
        checks.append(_warning("journal", f"{place} does not exist; `lianlian batch` creates it", _JOURNAL))
    except click.UsageError as error:
        checks.append(_warning("journal", error.message, _JOURNAL))
    except (LianLianError, OSError) as error:
        checks.append(_failure("journal", str(error), f"check the database, or {_JOURNAL}"))
    if query is not None:
        queried = [] if options["offline"] else [check async for check in _query(merchant, query)]
        return [*checks, *queried]
    problem = f"{no_refund} is not in the journal" if no_refund else "no refund to query is known"
    cure = "use --dt-refund, too" if no_refund else "run this again after the first refund, or use --refund"
    return [*checks, _warning(_THEIR_KEY, f"not verified: {problem}", cure)]


async def _connection(url: str) -> AsyncIterator[_Check]:
    host = urlsplit(url).netloc
    try:
        proxy, ahead, issuer, expires_at = await probe_server(url)
    except LianLianError as error:
        cure = "check the URL, DNS, the firewall and HTTPS_PROXY"
        if "certificate" in str(error):
            cure = "check this machine's date; behind a proxy that decrypts TLS, set SSL_CERT_FILE to the proxy's CA"
        yield _failure("connection", f"{host}: {error}", cure)
        return
    yield _Check("connection", f"{host}, {'no proxy' if proxy is None else f'through the proxy {proxy}'}")
    days = (expires_at - system_clock().wall).days if expires_at else None
    if days is None:
        yield _Check("TLS", "none: plain http, which is allowed only on this machine")
    else:
        tls = _Check("TLS", f"trusted certificate of {issuer}, expires in {days} days")
        yield tls if days >= 14 else _warning(*tls[:2], "ask LianLian's support when they will renew it")
    if ahead is None:
        cure = "find the proxy that removes this header: the library uses it to measure time across a reboot"
        yield _warning("clock", "unknown: the answer has no Date header", cure)
    elif abs(ahead) > 10:
        text = f"{abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's clock"
        yield _failure("clock", text, "set this machine's clock by NTP (timedatectl set-ntp true)")
    else:
        yield _Check("clock", "agrees with the server's clock")


def _file(path: Path) -> Iterator[_Check]:
    about = path.stat()
    user = getattr(os, "geteuid", lambda: about.st_uid)()
    if about.st_uid != user:
        text = f"{path} belongs to user {about.st_uid}, but this command runs as user {user}"
        yield _warning("journal", text, "run every command as the user that owns the journal")
    if not about.st_mode & 0o200:
        yield _failure("journal", f"{path} is read-only", f"chmod u+w {path}")
    if about.st_mode & 0o022:
        yield _warning("journal", f"other users can change {path}", f"chmod go-w {path}")
    free = shutil.disk_usage(path.parent).free
    disk = _Check("disk", f"{free / (1 << 30):,.1f} GiB free for the journal")
    yield disk if free > 1 << 30 else _failure(*disk[:2], "free some space: no refund is sent without a journal entry")


async def _query(merchant: Merchant, query: RefundQuery) -> AsyncIterator[_Check]:
    """Query a refund, and verify the signature of the answer with LianLian's key."""
    try:
        async with RefundSession(merchant, deadline=15.0, retry=RetryPolicy(attempts=1)) as session:
            refund = await session.query_refund(query)
    except (QueryRejected, RefundNotFound) as error:
        if error.verified:
            yield _Check(_THEIR_KEY, f"verified: it signed the answer {error.ret_code}")
        else:
            text = f"not verified: the answer {error.ret_code} has no signature"
            yield _warning(_THEIR_KEY, text, "solve the problem below, or use --refund with another refund")
        check = _failure("query", error, "check LIANLIAN_QUERY_URL: that server must have a record of this refund")
        is_old = error.ret_code == "3005"
        yield _warning("query", check.text, "use --refund with a newer refund") if is_old else check
    except LianLianError as error:
        cure = "compare LianLian's public key and the URLs with LianLian's dashboard and documentation"
        yield _failure("query" if isinstance(error, GatewayUnavailable) else _THEIR_KEY, error, cure)
    else:
        signed = signature_source(refund.raw), refund.raw["sign"]
        [key, *_] = (key for key in merchant.load_keys().gateway if key.verify(*signed))
        yield _Check(_THEIR_KEY, f"verified: {key.fingerprint} signed the record of {refund.no_refund}")
