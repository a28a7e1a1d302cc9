"""Feed damaged input to every parser of the library: ``python -m tests.programs.fuzz --seconds 60``.

Each target is one function of bytes and the errors that its callers expect. Another exception, a property that does not
hold, or more than 5 s of CPU time for one input is a finding; it is printed with the bytes that caused it. Names select
targets: ``python -m tests.programs.fuzz wire answers --inputs 100000``. The mutations depend only on ``--seed``.

``python -m tests.programs.fuzz wire --atheris --seconds 600`` lets atheris choose the input by coverage instead;
install it with ``python -m pip install atheris`` (Linux only). It runs one target, and stops at the first finding.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import attrs
import click

from lianlian_async import (
    AnswerMismatch,
    ConfigurationError,
    InvalidRequest,
    JournalError,
    MalformedMessage,
    Merchant,
    RefundRequest,
    SignatureInvalid,
    SigningKey,
    VerifyingKey,
    wire,
)
from lianlian_async.cli.batch.rows import Columns, damaged, read_rows, rounded
from lianlian_async.exchange import Call, HttpResponse
from lianlian_async.journal import SqliteJournal, SqliteReader
from lianlian_async.merchant import Keys
from lianlian_async.protocol import Protocol
from lianlian_async.reconcile import Reconciliation, StatementError
from tests.support import journals
from tests.support.exchanges import exchange
from tests.support.keypairs import pair
from tests.support.notices import asked, notification
from tests.support.parties import OID_PARTNER, as_json, made, refund_request, sealed

MOST_SECONDS = 5.0
"""CPU time for one input."""
MOST_MEMORY = 1 << 30
"""Bytes of address space that a run may add to that of its start."""

TOKENS = (
    *(b"null", b"true", b"NaN", b"-1", b"1e999", b"9" * 5000, b'""', b"{}", b"[" * 2000, b"\\ud800", b"\\u0000"),
    *(b"\0", b"\r", b"\n", b"\r\n", b'"', b"'", b",", b"|", b";", b"\t", b"=", b"sep=", b"\xef\xbb\xbf", b"\xff\xfe"),
    *("²".encode(), "１".encode(), "\u2028".encode(), "\u200b".encode(), b"\xed\xa0\x80", b"\x30\x80", b"\x30\x84\xff"),
    *(b"-----BEGIN RSA PRIVATE KEY-----", b"-----END PUBLIC KEY-----", b"00000000", b"99999999", b"0.00", b"0000"),
)
"""Pieces that parsers treat in a special way."""


class HangError(BaseException):
    """One input took too much CPU time. No ``except Exception`` catches it."""


# ── targets ──────────────────────────────────────────────────────────────────────────────────────


def wire_values(data: bytes) -> None:
    """Read a message and each form of value; encoding what was read gives the same message."""
    text = data.decode("utf-8", "replace")
    for parse in (wire.parse_money, wire.parse_decimal, wire.parse_timestamp, wire.parse_date):
        with contextlib.suppress(ValueError):
            parse(text)
    fields = wire.decode(data)
    assert wire.decode(wire.encode(fields)) == fields


def keys(data: bytes) -> None:
    """Load a private and a public key from bytes and, unless it is a path, from text."""
    errors = []
    for material in (data, data.decode("latin-1")):
        if isinstance(material, str) and "/" in material.strip()[:1]:
            continue  # the path of a device would be read for ever
        for load in (lambda key: SigningKey.load(key, "password"), SigningKey.load, VerifyingKey.load):
            try:
                loaded = load(material)
            except ConfigurationError as error:
                errors.append(error)
            else:
                key = loaded.public_key() if isinstance(loaded, SigningKey) else loaded
                key.verify(b"source", "AAAA")
    if errors:
        raise errors[0]


def key_files(data: bytes) -> None:
    """Load a private and a public key from a file."""
    with _file(data) as path:
        for load in (SigningKey.load, VerifyingKey.load):
            with contextlib.suppress(ConfigurationError):
                load(path)


def answers(data: bytes) -> None:
    """Read an answer as it is, and with the gateway's signature, to an apply and a query call."""
    for body in _signed(data):
        for call in (Call.APPLY, Call.QUERY):
            fields = {**asked(), "money_refund": "10.00"}
            headers = {"retry-after": data[:20].decode("latin-1")}
            _protocol().read(exchange(call, asked=fields), HttpResponse(200, headers, body))


def notifications(data: bytes) -> None:
    """Read a notification as it is, and with the gateway's signature."""
    for body in reversed(list(_signed(data))):
        _protocol().read_notification(body)


def requests(data: bytes) -> None:
    """Make a request from any JSON value; its wire form gives the same request."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    request = RefundRequest.from_dict(value)
    assert RefundRequest.from_dict(request.to_dict()) == request


def batch_files(data: bytes) -> None:
    """Read the rows of a CSV and of a JSON Lines file, and make requests from them."""
    for name in ("refunds.csv", "refunds.jsonl", "refunds"):
        with contextlib.suppress(click.UsageError):
            for row in read_rows(io.BytesIO(data), name, Columns({}, True, True), "utf-8"):
                list(damaged(row.fields))
                list(rounded(row.fields))
                with contextlib.suppress(InvalidRequest):
                    RefundRequest.from_dict({**row.fields})


def toml(data: bytes) -> None:
    """Read a merchant from a TOML file; the keys that it names are not loaded."""
    with _file(data) as path:
        Merchant.from_toml(path)


def statements(data: bytes) -> None:
    """Compare a statement and its summary, which a form feed separates, with one entry of a journal."""
    text, _, summary = data.decode("gb18030", "replace").partition("\f")
    found = Reconciliation()
    with contextlib.closing(found._file):
        found.add_statement(f"JYMX_{OID_PARTNER}_20261101.txt", io.StringIO(text), summary)
        found.compare(journals.held(fields=refund_request(dt_refund="20261101102030").to_dict()))
        found.finish()


def journal_files(data: bytes) -> None:
    """Read a damaged journal, and open it for writing."""
    with _file(data, ".journal") as path:
        anyio.run(_read_journal, path)


async def _read_journal(path: Path) -> None:
    for journal in (SqliteReader(path), SqliteJournal(path)):
        with contextlib.suppress(JournalError):
            async with journal:
                for read in (journal.counts, journal.canaries, functools.partial(journal.find, "R-1")):
                    with contextlib.suppress(JournalError):
                        await read()
                for walk in (journal.entries, journal.pending):
                    with contextlib.suppress(JournalError):
                        async for entry in walk():
                            repr(entry.state)


@functools.cache
def _protocol() -> Protocol:
    private, gateway = pair("merchant"), pair("gateway")
    merchant = Merchant(
        oid_partner=OID_PARTNER, private_key=private.private_pem, gateway_public_keys=gateway.public_pem
    )
    return Protocol(merchant, Keys(private.private, (gateway.public,)))


def _signed(data: bytes) -> Iterator[bytes]:
    """Yield ``data`` and, if it is a message, the same fields with a valid signature."""
    yield data
    with contextlib.suppress(MalformedMessage):
        fields = wire.decode(data)
        fields.pop("sign", None)
        yield as_json(sealed(fields))


@contextlib.contextmanager
def _file(data: bytes, suffix: str = "") -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"input{suffix}")
        path.write_bytes(data)
        yield path


# ── seeds ────────────────────────────────────────────────────────────────────────────────────────


def message_seeds() -> list[bytes]:
    query = {**asked(), "money_refund": "10.00"}
    return [
        as_json(made(query)),
        notification(),
        as_json(sealed({"ret_code": "5007", "ret_msg": "no"})),
        b'{"ret_code":"9999"}',
    ]


def value_seeds() -> list[bytes]:
    return [*message_seeds(), b"200.01", b"20261101102030", b"20261101", b"-0.5"]


def key_seeds() -> list[bytes]:
    merchant = pair("merchant")
    pem = [merchant.private_pem, merchant.public_pem, merchant.locked_pem("password")]
    return [*map(str.encode, pem), *("".join(text.splitlines()[1:-1]).encode() for text in pem)]


def request_seeds() -> list[bytes]:
    return [json.dumps(refund_request(1).to_dict()).encode()]


def batch_seeds() -> list[bytes]:
    fields = refund_request(1).to_dict()
    table = ",".join(fields) + "\r\n" + ",".join(fields.values()) + "\r\n"
    return [table.encode(), table.encode("utf-16"), ("sep=;\n" + table.replace(",", ";")).encode(), *request_seeds()]


def toml_seeds() -> list[bytes]:
    return [
        f'[lianlian]\noid_partner = "{OID_PARTNER}"\nprivate_key = "merchant.pem"\ngateway_public_keys = ["a.pem"]\n'
        'notify_url = "https://shop.example/notify"\nquery_url = "https://gw.example/query"\n'.encode()
    ]


def statement_seeds() -> list[bytes]:
    row = f"R-1,{OID_PARTNER},20261101 10:20:30,101001,O-1,20261101,-88.5,1,5,20261101 10:21:00,0,a,b,c\n"
    header = "no_refund|oid_partner|dt_refund|currency_order|money_refund|transaction_status|info_order\n"
    return [(row * 2 + "\fa|b|c|2|-177|d|e").encode(), header.encode() + b"R-1|1|20261101102030|CNY|-1|5|x\n"]


def journal_seeds() -> list[bytes]:
    async def fill(path: Path) -> None:
        async with SqliteJournal(path) as journal:
            for number, ending in enumerate([journals.MADE, journals.ACCEPTED, journals.REJECTED, None]):
                _, entry = await journal.begin(journals.intent(f"R-{number}"), journals.now())
                if ending is not None:
                    await journal.finish(entry, ending)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "seed.journal")
        anyio.run(fill, path)
        return [path.read_bytes()]


@attrs.frozen
class Target:
    """A function of bytes, the errors that its callers expect, and well-formed input."""

    run: Callable[[bytes], None]
    documented: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]


TARGETS = {
    "wire": Target(wire_values, (MalformedMessage,), value_seeds),
    "keys": Target(keys, (ConfigurationError,), key_seeds),
    "key_files": Target(key_files, (), key_seeds),
    "answers": Target(answers, (), message_seeds),
    "notifications": Target(notifications, (MalformedMessage, SignatureInvalid, AnswerMismatch), message_seeds),
    "requests": Target(requests, (InvalidRequest,), request_seeds),
    "batch_files": Target(batch_files, (), batch_seeds),
    "toml": Target(toml, (ConfigurationError,), toml_seeds),
    "statements": Target(statements, (StatementError,), statement_seeds),
    "journal_files": Target(journal_files, (), journal_seeds),
}


# ── the run ──────────────────────────────────────────────────────────────────────────────────────


def mutated(dice: random.Random, seeds: list[bytes]) -> bytes:
    """Return a seed with one to four changes."""
    data = bytearray(dice.choice(seeds))
    for _ in range(dice.choice([1, 1, 2, 4])):
        at = dice.randrange(len(data) + 1)
        end = min(len(data), at + dice.choice([0, 1, 1, 2, 8, 64]))
        match dice.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                data[at:end] = dice.randbytes(dice.randrange(4))
            case 2:
                data[at:end] = dice.choice(TOKENS)
            case 3:
                data[at:at] = data[at:end] * dice.choice([1, 2, 100])
            case 4:
                other = dice.choice(seeds)
                data[at:end] = other[(start := dice.randrange(len(other))) : start + dice.randrange(64)]
            case _:
                del data[at : end if dice.random() < 0.9 else len(data)]
    return bytes(data)


def finding(target: Target, data: bytes) -> BaseException | None:
    """Return the unexpected exception that the target raises for ``data``. Must run in the main thread."""

    def interrupt(*_: object) -> None:
        raise HangError(f"{MOST_SECONDS} s of CPU time")

    before = signal.signal(signal.SIGPROF, interrupt)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        target.run(data)
    except target.documented:
        return None
    except (Exception, HangError) as error:  # noqa: BLE001 - anything else is the finding
        return error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return None


def fuzz(name: str, *, inputs: int, seconds: float, seed: int) -> tuple[int, dict[str, bytes]]:
    """Return the number of inputs, and for each kind of finding the first input. ``seconds`` are of CPU time."""
    target, dice = TARGETS[name], random.Random(f"{name} {seed}")
    seeds = target.seeds()
    found, end = dict[str, bytes](), time.process_time() + seconds
    for number in range(inputs):
        if time.process_time() > end:
            return number, found
        data = mutated(dice, seeds) if number >= len(seeds) else seeds[number]
        if (error := finding(target, data)) is not None:
            found.setdefault(f"{type(error).__name__}: {str(error)[:80]}", data)
    return inputs, found


def fuzz_by_coverage(name: str, seconds: float) -> None:
    """Run one target under atheris, which ends the process."""
    import atheris

    target = TARGETS[name]

    def run(data: bytes) -> None:
        with contextlib.suppress(*target.documented):
            target.run(data)

    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(target.seeds()):
            Path(corpus, str(number)).write_bytes(data)
        atheris.instrument_all()
        limits = [f"-max_total_time={seconds:.0f}", f"-timeout={MOST_SECONDS:.0f}", "-rss_limit_mb=1024"]
        atheris.Setup([sys.argv[0], *limits, corpus], run)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", help=f"default: all ({', '.join(TARGETS)})")
    parser.add_argument("--inputs", type=int, default=10**7, help="most inputs of each target")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="most CPU time of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="let atheris choose the input of one target")
    arguments = parser.parse_args()
    if arguments.atheris:
        fuzz_by_coverage(arguments.targets[0], min(arguments.seconds, 86400))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, resource.RLIM_INFINITY))
    failed = False
    for name in arguments.targets or TARGETS:
        begun = time.process_time()
        count, found = fuzz(name, inputs=arguments.inputs, seconds=arguments.seconds, seed=arguments.seed)
        rate = count / (time.process_time() - begun)
        print(f"{name}: {count:,} inputs, {rate:,.0f} a second, {len(found)} findings", flush=True)
        for error, data in found.items():
            failed = True
            print(f"  {error}\n    {data[:2000]!r}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
