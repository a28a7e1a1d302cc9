"""``lianlian doctor``: each broken set-up has its line and its cure; over real sockets, also with TLS."""

from __future__ import annotations

import ipaddress
import shutil
import socket
import sqlite3
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import anyio
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lianlian_async import Merchant, RefundRequest, RefundSession
from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.errors import JournalError
from lianlian_async.journal import SqliteJournal
from lianlian_async.journal.postgres import PostgresJournal
from lianlian_async.sandbox import SandboxGateway
from tests.support import keypairs
from tests.support.batches import PASSWORD, refund, url_of
from tests.support.command import run


@pytest.fixture
def gateway():
    """A sandbox in which a refund is final at once; its merchant has a key of 2048 bits."""
    key = keypairs.pair("merchant", 2048).private
    return SandboxGateway(default_order=Decimal("1000.00"), settle_after=0, merchant_key=key)


@pytest.fixture
def env(gateway, tmp_path):
    """The environment of the served gateway, and a journal."""
    with serving(gateway) as url:
        yield environment(gateway, url) | {"LIANLIAN_JOURNAL": str(tmp_path / "journal.sqlite")}


@pytest.fixture
def made(env):
    """The environment after the refund R-1 was made."""
    make(env, SqliteJournal(env["LIANLIAN_JOURNAL"]))
    return env


def make(env, journal, number=1):
    async def apply():
        async with journal, RefundSession(Merchant.from_env(env), journal=journal) as session:
            await session.apply_refund(RefundRequest.from_dict(refund(number)))

    anyio.run(apply)


def lines(env, *options, exit_code=0):
    """Run the command; return (state, text, cure) of all checks by name, the last one of each name."""
    ended = run("doctor", "--json", *options, env=env)
    assert ended.exit_code == exit_code
    found = {check["name"]: (check["state"], check["text"], check["cure"]) for check in ended.json["checks"]}
    states = {state for state, _, _ in found.values()}
    assert ended.json["outcome"] == next(each for each in ("failure", "warning", "ok") if each in states)
    assert all(bool(cure) is (state != "ok") for state, _, cure in found.values())
    return found


# ── nothing is wrong ─────────────────────────────────────────────────────────────────────────────


def test_good_setup_is_ok(made, gateway):
    """A person sees each check; the public half of the private key can be copied; no refund was sent."""
    applied = gateway.requests["apply"]
    ended = run("doctor", env=made | {"COLUMNS": "120"})
    assert ended.exit_code == 0
    assert "│ warning" not in ended.stdout
    key = gateway.gateway_key.fingerprint
    assert f"│ verified: {key} signed" in ended.stdout
    assert ended.stdout.splitlines()[-1] == gateway.merchant_key.public_key().to_base64()
    assert (gateway.requests["apply"], gateway.requests["query"]) == (applied, 1)
    found = lines(made)
    assert {state for state, _, _ in found.values()} == {"ok"}
    assert found["private key"][1] == f"2048 bits, {gateway.merchant_key.fingerprint}"
    assert found["LianLian's key"][1] == f"verified: {key} signed the record of R-1"
    assert found["journal"][1] == f"{made['LIANLIAN_JOURNAL']}: 1 refunds, belongs to this merchant"
    assert "lianlian-async " in found["versions"][1]


def test_offline_does_not_connect(made, gateway):
    requests = gateway.requests.copy()
    assert not {"connection", "clock", "TLS"} & lines(made, "--offline").keys()
    assert gateway.requests == requests


def test_a_person_sees_each_cure(env):
    """A warning has its cure below it, and does not change the exit code."""
    ended = run("doctor", env=env)
    assert ended.exit_code == 0
    text = " ".join(ended.stdout.replace("│", " ").split())
    assert "not provable yet: no refund to query is known → run this again after the first refund" in text


# ── keys and settings ────────────────────────────────────────────────────────────────────────────


def test_missing_setting(env):
    del env["LIANLIAN_OID_PARTNER"]
    state, text, cure = lines(env, exit_code=1)["merchant"]
    assert (state, text) == ("failure", "required, but missing: LIANLIAN_OID_PARTNER")
    assert cure == "correct this setting (LIANLIAN_ variables, or the file of --config)"


def test_swapped_keys(env):
    """The other checks still run."""
    private, public = env["LIANLIAN_PRIVATE_KEY"], env["LIANLIAN_GATEWAY_PUBLIC_KEYS"]
    found = lines(env | {"LIANLIAN_PRIVATE_KEY": public, "LIANLIAN_GATEWAY_PUBLIC_KEYS": private}, exit_code=1)
    problem = "LIANLIAN_PRIVATE_KEY: this is a public key"
    assert found["keys"] == ("failure", problem, "use the merchant's private key here (are the two settings swapped?)")
    assert found["connection"][0] == "ok"


def test_own_key_instead_of_the_gateways(env, gateway):
    public = gateway.merchant_key.public_key().to_base64()
    found = lines(env | {"LIANLIAN_GATEWAY_PUBLIC_KEYS": public}, exit_code=1)
    problem = "LIANLIAN_GATEWAY_PUBLIC_KEYS: contains the merchant's own public key"
    assert found["keys"] == ("failure", problem, "use LianLian's public key here")


def test_damaged_key(env):
    found = lines(env | {"LIANLIAN_PRIVATE_KEY": env["LIANLIAN_PRIVATE_KEY"][:400]}, exit_code=1)
    state, text, cure = found["keys"]
    assert (state, cure[:20]) == ("failure", "correct this setting")
    assert text.startswith("LIANLIAN_PRIVATE_KEY: the key is cut off")


@pytest.mark.parametrize(
    ("bits", "problem"), [(1024, "1024 bits are weak"), (1536, "LianLian accepts 1024, 2048 or 4096 bits")]
)
def test_size_of_the_key(env, bits, problem):
    pair = keypairs.pair("odd", bits)
    state, text, cure = lines(env | {"LIANLIAN_PRIVATE_KEY": pair.private_pem})["private key"]
    assert (state, text) == ("warning", f"{bits} bits, {pair.private.fingerprint}: {problem}")
    assert "lianlian keygen" in cure


def test_unknown_backend(env):
    found = lines(env | {"LIANLIAN_HTTP_BACKEND": "curl"}, exit_code=1)
    problem = "LIANLIAN_HTTP_BACKEND: must be httpx or aiohttp, is 'curl'"
    assert found["backends"] == ("failure", problem, "correct this variable")


# ── connection, TLS and clock ────────────────────────────────────────────────────────────────────


@contextmanager
def serving_tls(gateway, folder, *, days, organization="Test CA"):
    """Serve ``gateway`` with a self-signed certificate that expires in ``days``; yield the URL and its file."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = [x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")]
    name += [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)] if organization else []
    certificate = (
        x509.CertificateBuilder(x509.Name(name), x509.Name(name), key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=10))
        .not_valid_after(now + timedelta(days=days, minutes=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file, private = folder / "server.pem", folder / "server.key"
    file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    unlocked = serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, unlocked))
    options = {"ssl_certfile": file, "ssl_keyfile": private, "date_header": False, "log_config": None}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(gateway, lifespan="off", ws="none", **options))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"https://127.0.0.1:{listener.getsockname()[1]}", str(file)
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.parametrize(
    ("days", "organization", "state", "text", "cure"),
    [
        (60, "Test CA", "ok", "trusted, issued by Test CA, expires in 60 days", ""),
        (60, "", "ok", "trusted, issued by 127.0.0.1, expires in 60 days", ""),
        (
            3,
            "Test CA",
            "warning",
            "trusted, issued by Test CA, expires in 3 days",
            "ask LianLian's support when they will renew it",
        ),
    ],
)
def test_certificate(gateway, tmp_path, days, organization, state, text, cure):
    """The certificate is that of a real TLS connection, over which the refund is made and queried, too."""
    with serving_tls(gateway, tmp_path, days=days, organization=organization) as (url, file):
        env = environment(gateway, url) | {"LIANLIAN_JOURNAL": str(tmp_path / "j.sqlite"), "SSL_CERT_FILE": file}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSL_CERT_FILE", file)
            make(env, SqliteJournal(env["LIANLIAN_JOURNAL"]))
        found = lines(env)
    assert found["TLS"] == (state, text, cure)
    assert found["LianLian's key"][0] == "ok"


@pytest.mark.parametrize("days", [60, -1], ids=["untrusted", "expired"])
def test_certificate_that_is_not_trusted(gateway, tmp_path, days):
    with serving_tls(gateway, tmp_path, days=days) as (url, file):
        trusted = {"SSL_CERT_FILE": file} if days < 0 else {}
        state, text, cure = lines(environment(gateway, url) | trusted, exit_code=1)["connection"]
    assert state == "failure"
    assert "certificate has expired" in text if days < 0 else "self-signed certificate" in text
    assert cure == "check this machine's date; behind a proxy that decrypts TLS, set SSL_CERT_FILE to the proxy's CA"


def test_unreadable_ca_file(env, tmp_path):
    state, text, cure = lines(env | {"SSL_CERT_FILE": str(tmp_path / "none.pem")}, exit_code=1)["connection"]
    assert state == "failure"
    assert "none.pem: cannot read CA certificates" in text
    assert cure.startswith("check ")


def test_refused_connection(made):
    """It says nothing about LianLian's key."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    found = lines(made | {"LIANLIAN_QUERY_URL": f"http://{address}/refundquery.htm"}, exit_code=1)
    state, text, cure = found["connection"]
    assert (state, cure) == ("failure", "check the URL, DNS, the firewall and HTTPS_PROXY")
    assert text.startswith(f"{address}: ConnectError: ")
    assert found["query"][0] == "failure"
    assert found["LianLian's key"][0] == "ok"  # it could be read


def test_proxy_is_named_without_its_password(made, gateway):
    async def proxy(scope, receive, send):
        await gateway({**scope, "path": "/" + scope["path"].rpartition("/")[2]}, receive, send)

    with serving(proxy) as url:
        found = lines(made | {"HTTP_PROXY": url.replace("//", "//user:sesame@")})
    host = made["LIANLIAN_APPLY_URL"].split("/")[2]
    assert found["connection"] == ("ok", f"{host}, through the proxy {url}", "")


def test_unusable_proxy(env):
    found = lines(env | {"HTTP_PROXY": "socks://127.0.0.1:1"}, exit_code=1)
    state, text, cure = found["connection"]
    assert (state, "HTTP_PROXY: must be the URL" in text) == ("failure", True)
    assert cure == "or add 127.0.0.1 to NO_PROXY to connect directly"


@pytest.mark.parametrize(("seconds", "side"), [(100, "behind"), (-100, "ahead of")])
def test_wrong_clock(tmp_path, seconds, side):
    gateway = SandboxGateway(started_at=datetime.now(UTC) + timedelta(seconds=seconds))
    with serving(gateway) as url:
        state, text, cure = lines(environment(gateway, url), exit_code=1)["clock"]
    assert (state, cure) == ("failure", "set this machine's clock by NTP (timedatectl set-ntp true)")
    assert text.endswith(f" s {side} the server's clock")


def test_answer_without_a_date(gateway):
    async def without_date(scope, receive, send):
        async def reply(message):
            if "headers" in message:
                message["headers"] = [header for header in message["headers"] if header[0] != b"date"]
            await send(message)

        await gateway(scope, receive, reply)

    with serving(without_date) as url:
        state, text, cure = lines(environment(gateway, url))["clock"]
    assert (state, text) == ("warning", "unknown: the answer has no Date header")
    assert "the library uses it to measure time" in cure


# ── journal ──────────────────────────────────────────────────────────────────────────────────────


def test_missing_journal(env):
    state, text, cure = lines(env)["journal"]
    assert (state, cure) == ("warning", "name the journal with --journal or LIANLIAN_JOURNAL")
    assert text == f"{env['LIANLIAN_JOURNAL']} does not exist; `lianlian batch` creates it"


def test_new_journal_belongs_to_nobody(env):
    async def create():
        async with SqliteJournal(env["LIANLIAN_JOURNAL"]):
            pass

    anyio.run(create)
    assert lines(env)["journal"][1].endswith(": 0 refunds, belongs to no merchant yet")


def test_no_default_journal_in_a_container(env):
    del env["LIANLIAN_JOURNAL"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LIANLIAN_JOURNAL", raising=False)
        state, text, cure = lines(env | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})["journal"]
    assert (state, cure) == ("warning", "name the journal with --journal or LIANLIAN_JOURNAL")
    assert text.startswith("a container loses its files when it ends")


def test_journal_of_another_merchant(made, gateway):
    found = lines(made | {"LIANLIAN_OID_PARTNER": "M2"}, "--offline", exit_code=1)
    state, text, cure = found["journal"]
    assert (state, cure) == ("failure", "check the database, or name the journal with --journal or LIANLIAN_JOURNAL")
    assert f"belongs to merchant {gateway.oid_partner} at " in text


def test_copy_of_a_journal(made, tmp_path):
    copy = shutil.copy(made["LIANLIAN_JOURNAL"], tmp_path / "copy")
    state, text, cure = lines(made, "--journal", copy, exit_code=1)["journal"]
    assert (state, text) == (
        "failure",
        "this is a backup or another copy of a journal, and later refunds may have been made",
    )
    assert cure.endswith("use `lianlian journal restore FILE`")


def test_journal_whose_wal_is_missing(made):
    """As after a crash, if the WAL was deleted. Nothing is written: a second check and a session report it, too."""
    path = Path(made["LIANLIAN_JOURNAL"])

    async def crash():
        async with SqliteJournal(path):
            return await anyio.Path(path).read_bytes()

    path.write_bytes(anyio.run(crash))
    for _ in range(2):
        state, text, cure = lines(made, "--offline", exit_code=1)["journal"]
        assert (state, text.split(" with it")[0]) == ("failure", f"{path}-wal is missing or empty and,")
        assert cure.startswith("put it back, or, if it is lost, move this file away and use `lianlian journal restore")
    with pytest.raises(JournalError, match="-wal is missing or empty"):
        anyio.run(crash)
    path.rename(f"{path}-wal")
    state, text, cure = lines(made, "--offline", exit_code=1)["journal"]
    assert (state, text.split(":")[1]) == (
        "failure",
        f" the file is missing or empty, but {path}-wal has its latest refunds",
    )
    assert cure.startswith("put the file back, or, if it is lost, move the -wal file away")


def test_journal_of_another_schema(made):
    with sqlite3.connect(made["LIANLIAN_JOURNAL"]) as database:
        database.execute("PRAGMA user_version = 999")
    state, text, cure = lines(made, "--offline", exit_code=1)["journal"]
    assert (state, cure) == ("failure", "install the release that upgraded it, or a later one")
    assert "schema version 999, and this release supports" in text


def test_file_that_is_no_journal(made, tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, but longer than its header " * 10)
    state, _, cure = lines(made, "--offline", "--journal", tmp_path / "notes.txt", exit_code=1)["journal"]
    assert (state, cure) == ("failure", "name another file")


def test_unusable_place_of_a_journal(made):
    place = f"{made['LIANLIAN_JOURNAL']}/below-a-file"
    state, text, _ = lines(made, "--offline", "--journal", place, exit_code=1)["journal"]
    assert (state, "Not a directory" in text) == ("failure", True)


def test_full_disk(made, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 500 << 20))
    found = lines(made, "--offline", exit_code=1)
    assert found["disk"] == (
        "failure",
        "0.5 GiB free for the journal",
        "free some space: no refund is sent without a journal entry",
    )


def test_journal_in_postgresql(env, database):
    """The password of the DSN is shown nowhere."""
    make(env, PostgresJournal(database))
    ended = run("doctor", "--json", env=env | {"LIANLIAN_JOURNAL": url_of(database)})
    assert ended.exit_code == 0
    assert PASSWORD not in ended.stdout
    found = {check["name"]: check["text"] for check in ended.json["checks"]}
    assert found["journal"] == "in PostgreSQL: 1 refunds, belongs to this merchant"
    assert found["LianLian's key"].startswith("verified: ")


def test_database_that_does_not_answer(env):
    dsn = f"postgresql://user:{PASSWORD}@127.0.0.1:1/none"
    state, text, cure = lines(env | {"LIANLIAN_JOURNAL": dsn}, "--offline", exit_code=1)["journal"]
    assert (state, cure) == ("failure", "check the database, or name the journal with --journal or LIANLIAN_JOURNAL")
    assert "refused Is the server running" in text  # in one line
    assert PASSWORD not in text


# ── the proof of the gateway's key ───────────────────────────────────────────────────────────────


def test_wrong_gateway_key(made):
    changed = {"LIANLIAN_GATEWAY_PUBLIC_KEYS": keypairs.pair("stranger").public.to_base64()}
    state, text, cure = lines(made | changed, exit_code=1)["LianLian's key"]
    assert state == "failure"
    assert "invalid signature: no gateway key verifies it" in text
    assert cure == "compare LianLian's public key and the URLs with LianLian's dashboard and documentation"


def test_own_public_key_is_not_in_the_dashboard(made):
    """The gateway's signed refusal proves its key; ours is the one that is wrong."""
    found = lines(made | {"LIANLIAN_PRIVATE_KEY": keypairs.pair("stranger", 2048).private_pem}, exit_code=1)
    assert found["LianLian's key"] == ("ok", "verified: it signed the answer 1001", "")
    state, text, cure = found["query"]
    assert (state, "1001" in text) == ("failure", True)
    assert cure == "check that LianLian's dashboard has the public key of your private key"


def test_query_service_without_the_refund(made):
    """A query address of another system does not know the refund."""
    other = SandboxGateway(merchant_key=keypairs.pair("merchant", 2048).private)
    with serving(other) as url:
        found = lines(made | {"LIANLIAN_QUERY_URL": f"{url}/refundquery.htm"}, exit_code=1)
    state, text, _ = found["LianLian's key"]
    assert (state, text) == ("warning", "not verified: the answer 8901 has no signature")
    state, text, cure = found["query"]
    assert (state, cure) == ("failure", "check LIANLIAN_QUERY_URL: that server must have a record of this refund")
    assert "no record of refund R-1" in text


def test_refund_of_more_than_three_months_ago(made, gateway):
    gateway.advance(100 * 86_400.0)
    found = lines(made, exit_code=1)  # the clock differs, too
    assert found["query"][0] == "warning"
    assert found["query"][2] == "use --refund with a newer refund"


def test_given_refund_is_queried(made, gateway):
    """--refund names a refund of the journal."""
    make(made, SqliteJournal(made["LIANLIAN_JOURNAL"]), 2)
    proof = lines(made, "--refund", "R-1")["LianLian's key"]
    assert proof[1].endswith("signed the record of R-1")
    state, text, cure = lines(made, "--refund", "R-3")["LianLian's key"]
    assert (state, text) == ("warning", "not provable yet: R-3 is not in the journal")
    assert cure == "run this again after the first refund, or run `lianlian query`, which verifies the answer, too"
