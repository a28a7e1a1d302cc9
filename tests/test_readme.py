"""The README's examples work as the text describes."""

import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import anyio
import attrs
import httpx
import psycopg
import pytest
from aiohttp.test_utils import TestClient, TestServer

import lianlian_async
from lianlian_async import RefundRequest, RefundStatus, RetryPolicy, wire
from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.contrib.procrastinate import RefundQueue
from lianlian_async.journal import State
from lianlian_async.journal.postgres import PostgresJournal
from lianlian_async.sandbox import Fault, SandboxGateway, When
from lianlian_async.signing import signature_source
from tests.support import ROOT, keypairs, postgres
from tests.support.batches import read_csv, refund, write_csv
from tests.support.readme import EXAMPLES, README, RECIPES, TRANSLATION, run_example, served


def a_request() -> RefundRequest:
    return RefundRequest(
        no_refund="R-1",
        dt_refund=datetime.now(UTC),
        money_refund="200.01",
        no_order="O-1",
        notify_url="https://shop.example/lianlian/refund",
    )


def test_twelve_lines_make_a_refund():
    """The twelve lines, run as a program of their own, print the state of the refund that they made."""
    gateway = SandboxGateway(default_order=Decimal("500.00"), settle_after=0)
    with serving(gateway) as base_url:
        ran = subprocess.run(
            [sys.executable, "-W", "error", "-c", EXAMPLES["twelve-lines"]],
            env=os.environ | environment(gateway, base_url),
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ran.stderr == ""
    (record,) = gateway.refunds
    assert ran.stdout == f"{RefundStatus.SUCCESS} {record.oid_refundno} True\n"
    shown = README.partition(EXAMPLES["twelve-lines"])[2].split("```")[2].strip()
    assert re.sub(r"\d{16}", record.oid_refundno, shown) == ran.stdout.strip()
    assert gateway.money_moved("R-20261122-0001") == Decimal("200.01")


@pytest.mark.anyio
async def test_unknown_refund_is_resolved_later():
    """The example stores an unknown refund, and resolves it later."""
    example = run_example("unknown")
    gateway, todo = SandboxGateway(default_order=Decimal("500.00")), []
    gateway.script(Fault.RESET, call="apply", when=When.AFTER)
    gateway.script(Fault.BAD_GATEWAY, call="query", times=100)
    async with gateway.session(deadline=0.2, retry=RetryPolicy(initial=0.01)) as session:
        assert await example["refund_or_note"](session, a_request(), todo) is None
    (unknown,) = todo
    gateway = SandboxGateway(default_order=Decimal("500.00"))
    async with gateway.session(retry=RetryPolicy(not_found_grace=0)) as session:
        refund = await example["ask_again"](session, unknown)
    assert refund.no_refund == "R-1"


def test_keys_are_loaded_from_the_files_it_names(tmp_path, monkeypatch):
    """The merchant of the example reads its own key and both of LianLian's."""
    monkeypatch.chdir(tmp_path)
    Path("merchant.pem").write_text(keypairs.pair("merchant").private_pem)
    Path("lianlian-2026.pem").write_text(keypairs.pair("gateway").public_pem)
    Path("lianlian-2027.pem").write_text(keypairs.pair("stranger").public_pem)
    assert len(run_example("keys")["merchant"].load_keys().gateway) == 2


@pytest.mark.anyio
async def test_a_session_takes_every_setting_it_shows(merchant):
    """A session with the example's settings opens and closes."""
    async with run_example("retry")["make_session"](merchant, print) as session:
        assert session.max_connections == 20


@pytest.mark.anyio
async def test_the_sandbox_example_is_a_test_that_passes(lianlian_gateway, lianlian_session):
    """The README's own test of a reset connection passes."""
    await run_example("sandbox")["test_a_reset_connection_is_asked_about"](lianlian_gateway, lianlian_session)


def in_a_folder_and_environment(gateway, base_url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in environment(gateway, base_url).items():
        monkeypatch.setenv(name, value)


def notification(gateway: SandboxGateway) -> bytes:
    fields = {
        "oid_partner": gateway.oid_partner,
        "no_refund": "R-1",
        "money_refund": "200.01",
        "sta_refund": "2",
        "sign_type": "RSA",
    }
    return wire.encode(fields | {"sign": gateway.gateway_key.sign(signature_source(fields))})


@pytest.mark.anyio
async def test_a_batch_is_run_again_without_sending_again(tmp_path, monkeypatch):
    """The overnight batch makes each refund once, however often it is run."""
    gateway, told = SandboxGateway(default_order=Decimal("500.00"), settle_after=0), []
    monkeypatch.chdir(tmp_path)
    overnight = run_example("batch")["refund_overnight"]
    with serving(gateway) as base_url:
        for _ in range(2):
            await overnight(gateway.merchant(base_url), [a_request()], lambda *outcome: told.append(outcome))
    assert [(number, refund.no_refund, attempts) for number, refund, attempts in told] == [
        ("R-1", "R-1", 1),
        ("R-1", "R-1", 0),
    ]
    assert gateway.times_made("R-1") == 1


WORKER = """
import asyncio, os
from lianlian_async import Merchant
from tests.support.readme import run_example

asyncio.run(run_example("fleet")["work"](os.environ["TESTS_DSN"], Merchant.from_env()))
"""


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_fleet_takes_refunds_from_its_queue(database):
    """A worker with the same journal makes them, and finishes what is in flight after SIGTERM (asyncio only)."""
    example, gateway = run_example("fleet"), SandboxGateway(default_order=Decimal("500.00"))
    other = attrs.evolve(a_request(), no_refund="R-2")
    with serving(gateway) as base_url:
        await example["produce"](database, [a_request()])
        async with RefundQueue(database) as queue, await psycopg.AsyncConnection.connect(database) as connection:
            await connection.execute("CREATE TABLE orders AS SELECT 'O-1' AS number, 'paid' AS state")
            await connection.commit()
            await example["refund_order"](queue, connection, "O-1", other)
        gateway.script(Fault.DELAY, call="apply", delay=1.0, times=2)
        env = os.environ | environment(gateway, base_url) | {postgres.DSN: database}
        async with await anyio.open_process([sys.executable, "-c", WORKER], env=env, cwd=ROOT, stderr=None) as worker:
            while gateway.requests["apply"] < 2:  # noqa: ASYNC110 - no event tells
                await anyio.sleep(0.01)
            worker.terminate()
            await worker.wait()
    async with RefundQueue(database) as queue, PostgresJournal(database) as journal:
        assert not any((await queue.counts()).values())
        assert (await journal.counts())[State.ACCEPTED] == 2
    assert (gateway.times_made("R-1"), gateway.times_made("R-2")) == (1, 1)


def test_the_fastapi_service_makes_refunds_and_takes_notifications(tmp_path, monkeypatch, capsys):
    """The FastAPI example makes a refund, and calls its handler for a signed notification."""
    gateway = SandboxGateway(default_order=Decimal("500.00"))
    with serving(gateway) as base_url:
        in_a_folder_and_environment(gateway, base_url, tmp_path, monkeypatch)
        with served(run_example("fastapi")["app"]) as url, httpx.Client(base_url=url) as client:
            assert client.post("/refunds", json=a_request().to_dict()).json() == "0"
            invalid = client.post("/refunds", json=a_request().to_dict() | {"money_refund": "2.001"})
            assert (invalid.status_code, invalid.json()["problems"][0]["field"]) == (422, "money_refund")
            answer = client.post("/lianlian/refund", content=notification(gateway))
    assert answer.json() == {"ret_code": "0000", "ret_msg": "ok"}
    assert capsys.readouterr().out == "R-1 is final: 2\n"


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_aiohttp_service_makes_refunds_and_takes_notifications(tmp_path, monkeypatch, capsys):
    """The aiohttp example does the same (asyncio only, as aiohttp is)."""
    gateway = SandboxGateway(default_order=Decimal("500.00"))
    with serving(gateway) as base_url:
        in_a_folder_and_environment(gateway, base_url, tmp_path, monkeypatch)
        service = run_example("fastapi")
        parts = {name: service[name] for name in ("journal", "session", "endpoint")}
        async with TestClient(TestServer(run_example("aiohttp", **parts)["app"])) as client:
            async with client.post("/refunds", json=a_request().to_dict()) as answer:
                assert await answer.json() == "0"
            async with client.post("/refunds", data=b"\xff") as answer:
                assert (answer.status, (await answer.json())["problems"][0]["field"]) == (422, "body")
            async with client.post("/lianlian/refund", data=notification(gateway)) as answer:
                assert await answer.json() == {"ret_code": "0000", "ret_msg": "ok"}
    assert capsys.readouterr().out == "R-1 is final: 2\n"


def test_the_rehearsal_ends_with_an_agreeing_statement(tmp_path):
    """The commands, run by a shell, make the refunds of the file, and the statement agrees with the journal."""
    write_csv(tmp_path / "refunds.csv", [refund(number) for number in range(5)])
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "lianlian"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -W error -m lianlian_async "$@"\n')
    command.chmod(0o755)
    [script] = re.findall(r"<!-- rehearsal -->\n```sh\n(.*?)```", README, re.DOTALL)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    env = {name: text for name, text in os.environ.items() if not name.startswith("LIANLIAN_")}
    ran = subprocess.run(
        ["/bin/sh", "-euc", f"trap 'kill $! 2>/dev/null || :' EXIT\n{script}"],
        cwd=tmp_path,
        env=env | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ran.returncode, "Traceback" in ran.stderr) == (0, False)
    assert [row["outcome"] for row in read_csv(tmp_path / "results.csv")] == ["made"] * 5
    assert re.search(r"│ agrees +│ 5 +│ 50\.00 │", ran.stdout)
    assert re.search(r"│ not in journal +│ 0 ", ran.stdout)


def test_every_example_is_run():
    """Every Python block in the README has a name that a test uses."""
    assert len(re.findall("```python", README)) == len(EXAMPLES)
    source = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert [name for name in EXAMPLES | RECIPES if f'"{name}"' not in source] == []


@pytest.mark.parametrize("text", [README, TRANSLATION], ids=["en", "zh"])
def test_capacity_of_a_fleet_follows_from_the_results(text):
    """The table shows 20 refunds in flight in each worker; RESULTS.md has the rate and the WAL bytes for 8."""
    results = (ROOT / "benchmarks/RESULTS.md").read_text("utf-8")
    rate, bytes_of_wal = re.search(
        r"^\| one worker \| 8 \| (\d+) .*\| ([\d,]+) \(.*\|$", results, re.MULTILINE
    ).groups()
    rows = re.findall(
        r"^\| (\d+) \| ([\d,]+) \| [\d.]+ \| [\d.]+ \| (\d+) MB/s \|$", text.replace(",", ""), re.MULTILINE
    )
    assert [workers for workers, _, _ in rows] == ["1", "4", "16", "64"]
    for workers, refunds, megabytes in rows:
        assert int(refunds) == pytest.approx(int(workers) * int(rate) * 20 / 8, rel=0.05)
        assert int(megabytes) == pytest.approx(int(refunds) * int(bytes_of_wal.replace(",", "")) / 1e6, rel=0.05)


def test_the_translation_has_the_same_code_blocks():
    """The Chinese README shows the same commands, code and output, in the same order."""
    assert re.findall(r"```.*?```", TRANSLATION, re.DOTALL) == re.findall(r"```.*?```", README, re.DOTALL)


@pytest.mark.parametrize("text", [README, TRANSLATION], ids=["en", "zh"])
def test_every_link_inside_the_repository_leads_somewhere(text):
    """Linked files exist, and linked headings are headings of the page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = [link for link in re.findall(r"\]\((.+?)\)", text) if not link.startswith("https:")]
    assert [link for link in links if link not in anchors and not (ROOT / link).is_file()] == []


def test_the_error_tree_is_complete():
    """The README draws every error that the package exports, each once."""
    errors = [name for name in lianlian_async.__all__ if isinstance(getattr(lianlian_async, name), type)]
    errors = [name for name in errors if issubclass(getattr(lianlian_async, name), Exception)]
    assert [name for name in errors if len(re.findall(rf"(?:── |^){name}\b", README, re.MULTILINE)) != 1] == []
