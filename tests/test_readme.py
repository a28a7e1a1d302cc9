"""The README's examples do what the text around them says."""

import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import keypairs
import pytest
from readme import EXAMPLES, run_example

import lianlian_async
from lianlian_async import RefundRequest, RefundStatus, RetryPolicy
from lianlian_async.cli.serving import environment, serving
from lianlian_async.sandbox import Fault, SandboxGateway, When

README = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")


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
    assert gateway.money_moved("R-20261122-0001") == Decimal("200.01")


@pytest.mark.anyio
async def test_what_was_left_unknown_is_asked_about_again():
    """The example notes a refund that was left unknown, and finds out about it later."""
    example = run_example("unknown")
    gateway, todo = SandboxGateway(default_order=Decimal("500.00")), []
    gateway.script(Fault.RESET, call="apply", when=When.AFTER)
    gateway.script(Fault.BAD_GATEWAY, call="query", times=100)
    async with gateway.session(deadline=0.2, retry=RetryPolicy(initial=0.01)) as session:
        assert await example["refund_or_note"](session, a_request(), todo) is None
    (unknown,) = todo
    gateway = SandboxGateway(default_order=Decimal("500.00"))
    async with gateway.session(retry=RetryPolicy(absence_grace=0)) as session:
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
async def test_the_sandbox_example_is_a_test_that_passes():
    """The README's own test of a reset connection passes."""
    await run_example("sandbox")["test_a_reset_connection_is_asked_about"]()


def test_every_example_is_run():
    """No Python in the README goes without a name, and so without a test here."""
    assert len(re.findall("```python", README)) == len(EXAMPLES)
    source = Path(__file__).read_text("utf-8")
    assert [name for name in EXAMPLES if f'"{name}"' not in source] == []


def test_the_error_tree_is_complete():
    """The README draws every error that the package exports."""
    errors = [name for name in lianlian_async.__all__ if isinstance(getattr(lianlian_async, name), type)]
    errors = [name for name in errors if issubclass(getattr(lianlian_async, name), Exception)]
    assert [name for name in errors if not re.search(rf"(── |^){name}\b", README, re.MULTILINE)] == []
