"""``lianlian sandbox``: a gateway on a real socket, its environment file, and its end."""

import os
import signal
import socket
import stat
import subprocess
import threading
from decimal import Decimal
from pathlib import Path

import httpx
import pytest
from test_cli_refunds import ANSWER, SAMPLE, cells_in

from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.sandbox import Fault, SandboxGateway
from lianlian_async.signing import SigningKey
from tests.support.batches import refund, write_csv
from tests.support.command import end, read_env_file, run, start, until

APPLY = ("apply", "--no-refund", "R-1", "--dt-refund", "20130515094018", "--money-refund", "1.00", "--no-order", "O-1")


@pytest.fixture
def served(tmp_path):
    """``lianlian sandbox`` as a process, and its environment file."""
    env_file = tmp_path / "the sandbox's.env"
    process = start("sandbox", "--settle-after", "0", "--env-file", env_file)
    ready = process.stdout.readline()
    assert "http://127.0.0.1:" in ready
    yield process, env_file
    process.kill()
    process.communicate()


def sandbox_in_this_process(*options, env_file, number=signal.SIGTERM, meanwhile=lambda _env: None):
    """Run the command in this process, call ``meanwhile``, then stop the command with a signal."""

    def stop():
        until(lambda: env_file.exists() and env_file.read_text("utf-8").endswith("/lianlian/refund\n"))
        try:
            meanwhile(read_env_file(env_file))
        finally:
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        return run("sandbox", "--env-file", env_file, *options)
    finally:
        thread.join()


# ── as a process of its own ──────────────────────────────────────────────────────────────────────


def test_vendor_sample_works_with_a_new_sandbox(served):
    """Start a sandbox, apply with the page's sample, and query: two processes and a socket."""
    _process, env_file = served
    env = read_env_file(env_file)
    sample = env_file.with_name("sample.json")
    sample.write_text(SAMPLE, "utf-8")
    made = run("apply", sample, env=env)
    found = run("query", sample, "--json", env=env)
    assert (made.exit_code, found.exit_code) == (0, 0)
    assert cells_in(made.stdout).keys() == ANSWER
    assert found.json["refund"]["no_refund"] == "2013051500005"
    assert found.json["refund"]["sta_refund"] == "2"


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_printed_line_sets_the_environment_of_a_shell(served):
    """The printed line works in sh, whatever the name of the file."""
    process, _env_file = served
    _, _, line = process.stdout.readline().partition("use it:")
    script = f'{line}\nprintf %s "$LIANLIAN_OID_PARTNER"'
    shell = subprocess.run(["/bin/sh", "-euc", script], capture_output=True, text=True, check=True, timeout=60)
    assert shell.stdout == "201103171000000000"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_the_sandbox_cleanly(served, number):
    """SIGINT, SIGTERM and the end of the terminal stop the server, remove the environment file, and exit with 0."""
    process, env_file = served
    process.send_signal(number)
    ended = end(process)
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert not env_file.exists()


@pytest.mark.parametrize("fault", [Fault.NO_ANSWER, Fault.RESET])
def test_sandbox_ends_without_traceback_during_a_request(fault, caplog):
    """A waiting request or a broken connection neither delays the end nor appears in the log."""
    gateway = SandboxGateway(default_order=Decimal("100.00"))
    gateway.script(fault, times=1000)
    with serving(gateway) as url:
        client = start(*APPLY, env=environment(gateway, url))
        until(lambda: gateway.requests["apply"])
    client.kill()
    client.communicate()
    assert [record for record in caplog.records if record.name == "uvicorn.error"] == []


def test_unexpected_error_in_the_server_is_logged(caplog):
    """An unexpected exception in the sandbox is logged with its traceback."""

    async def broken(_scope, _receive, _send):
        raise ZeroDivisionError("a bug")

    with serving(broken) as url:
        assert httpx.get(url).status_code == 500
    assert "ZeroDivisionError: a bug" in caplog.text


# ── in this process ──────────────────────────────────────────────────────────────────────────────


def test_env_file_is_private_and_removed_at_the_end(tmp_path):
    """The environment file holds a private key: mode 0600, never printed, and removed at the end."""
    env_file, seen = tmp_path / "sandbox.env", {}

    def look(env):
        seen.update(env, mode=stat.S_IMODE(env_file.stat().st_mode))

    ended = sandbox_in_this_process("--json", env_file=env_file, meanwhile=look)
    assert ended.exit_code == 0
    assert seen["mode"] == 0o600
    assert ended.json == {
        "url": seen["LIANLIAN_APPLY_URL"].removesuffix("/exchangerefund.htm"),
        "env_file": str(env_file),
    }
    assert seen["LIANLIAN_PRIVATE_KEY"] not in ended.stdout
    assert not env_file.exists()


def test_existing_env_file_is_not_touched(tmp_path):
    """An existing file is never overwritten."""
    env_file = tmp_path / "sandbox.env"
    env_file.write_text("precious")
    ended = run("sandbox", "--env-file", env_file)
    assert ended.exit_code == 2
    assert env_file.read_text() == "precious"


def test_keys_folder_keeps_the_keys(tmp_path):
    """--keys creates a folder with both keys once, and uses them again."""
    seen = []
    for _ in range(2):
        sandbox_in_this_process("--keys", tmp_path / "keys", env_file=tmp_path / "sandbox.env", meanwhile=seen.append)
    assert seen[0]["LIANLIAN_PRIVATE_KEY"] == seen[1]["LIANLIAN_PRIVATE_KEY"]
    key = tmp_path / "keys" / "merchant.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert SigningKey.load(seen[0]["LIANLIAN_PRIVATE_KEY"]).fingerprint == SigningKey.load(key).fingerprint


def test_sandbox_options_configure_the_gateway(tmp_path):
    """Merchant number, orders, duplicates and faults follow the options."""
    answers = []

    def refund(env):
        # In other processes: the main thread of this process runs the sandbox.
        answers.extend(end(start(*APPLY, "--json", env=env), env).json for _ in range(2))

    options = ("--oid-partner", "P1", "--default-order", "2.00", "--repeated", "again", "--fault", "delay=0.0")
    sandbox_in_this_process(*options, env_file=tmp_path / "sandbox.env", meanwhile=refund)
    first, second = (answer["refund"] for answer in answers)
    assert first["oid_partner"] == "P1"
    assert first["oid_refundno"] != second["oid_refundno"]


def test_orders_of_a_batch_file_exist(tmp_path):
    """Each order of the file has the sum of its refunds; no other order exists; damaged lines are noted."""
    file = tmp_path / "refunds.csv"
    file.write_text(
        "退款单号,订单号,支付单号,退款时间,金额\n"
        'R-1,O-1,P-1,2026/11/01 10:20,"¥1,200.00"\n'
        "R-2,O-1,,2026/11/01 10:21,¥34.50\n"
        "R-3,,P-1,2026/11/01 10:22,0.06\n"
        "R-4,,P-4,2026/11/01 10:23,5.00\n"
        "R-5,O-5,,yesterday,5.00\n",
        "gb18030",
    )
    columns = (
        "no_refund=退款单号",
        "no_order=订单号",
        "oid_paybill=支付单号",
        "dt_refund=退款时间",
        "money_refund=金额",
    )
    reading = ("--encoding", "gb18030", "--date-format", "YYYY/MM/DD hh:mm", "--money-format", "¥1,234.56")
    reading += tuple(word for column in columns for word in ("--map", column))
    ended = []

    def send(env):
        batch = ("batch", file, *reading, "--journal", tmp_path / "journal", "--yes", "--skip-invalid", "--json")
        beyond = ("apply", "--no-refund", "X", "--dt-refund", "20261101102000", "--money-refund", "0.01", "--json")
        commands = (batch, (*beyond, "--no-order", "O-1"), (*beyond, "--no-order", "O-5"))
        ended.extend(end(start(*command, env=env), env) for command in commands)

    served = sandbox_in_this_process("--orders", file, *reading, env_file=tmp_path / "sandbox.env", meanwhile=send)
    made, too_much, other = ended
    assert made.json["outcomes"]["made"] == {"refunds": 4, "yuan": "1239.56"}
    assert [each.json["error"]["ret_code"] for each in (too_much, other)] == ["5007", "5002"]
    assert "line 6: dt_refund: does not match --date-format" in served.stderr


def test_order_that_cannot_exist_is_a_usage_error(tmp_path):
    """The refunds of an order together exceed LianLian's largest amount."""
    rows = [refund(number, no_order="O-1", money_refund="60000000.00") for number in (1, 2)]
    file = write_csv(tmp_path / "refunds.csv", rows)
    ended = run("sandbox", "--orders", file, "--env-file", tmp_path / "sandbox.env")
    assert ended.exit_code == 2
    assert "must be between 0.01 and 100000000.00 yuan" in ended.stderr


def test_sandbox_on_all_addresses_is_used_on_this_machine(tmp_path):
    """With 0.0.0.0, which a container needs, the URL is that of the loopback address."""
    ended = sandbox_in_this_process("--host", "0.0.0.0", "--json", env_file=tmp_path / "sandbox.env")
    assert ended.json["url"].startswith("http://127.0.0.1:")


@pytest.mark.parametrize("host", ["::1", "::"])
def test_an_ipv6_address_is_written_in_brackets(tmp_path, host):
    """The URL of a sandbox at ::1 has brackets."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    ended = sandbox_in_this_process("--host", host, "--json", env_file=tmp_path / "sandbox.env")
    assert ended.json["url"].startswith("http://[::1]:")


def test_address_in_use_is_named(tmp_path):
    """A port in use is an error, and no file remains."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run("sandbox", "--port", port, "--env-file", tmp_path / "sandbox.env")
    assert ended.exit_code == 2
    assert f"127.0.0.1 port {port}: " in ended.stderr
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--fault", "flood=0.1"), "'flood' is not one of delay, no-answer, late"),
        (("--fault", "reset"), "must be NAME=PROBABILITY"),
        (("--default-order", "0"), "must be between 0.01"),
        (("--repeated", "maybe"), "reject"),
    ],
)
def test_invalid_sandbox_options_are_usage_errors(tmp_path, options, reason):
    """A usage error names the valid values."""
    ended = run("sandbox", *options, "--env-file", tmp_path / "sandbox.env")
    assert ended.exit_code == 2
    assert reason in " ".join(ended.stderr.split())


def test_probabilities_beyond_one_are_refused(tmp_path):
    """Probabilities with a sum above 1 are a configuration error."""
    ended = run("sandbox", "--fault", "reset=0.6", "--fault", "busy=0.6", "--env-file", tmp_path / "sandbox.env")
    assert ended.exit_code == 2
    assert "their sum at most 1" in ended.stderr


# ── its statement ────────────────────────────────────────────────────────────────────────────────


def test_sandbox_writes_a_statement_at_its_end(tmp_path):
    """In a folder the file gets LianLian's name; it includes refunds not final before, and agrees with the journal."""
    file, journal = write_csv(tmp_path / "refunds.csv", [refund(0), refund(1)]), tmp_path / "journal.sqlite"

    def batch(env):
        assert end(start("batch", file, "--journal", journal, "--yes", env=env), env).exit_code == 0

    options = ("--notify", "--settle-after", "3600", "--statement", tmp_path)
    assert sandbox_in_this_process(*options, env_file=tmp_path / "env", meanwhile=batch).exit_code == 0
    [statement] = tmp_path.glob("JYMX_*.txt")
    ended = run("reconcile", statement, "--journal", journal, "--json")
    assert (ended.exit_code, ended.json["agrees"]) == (0, 2)


def test_unwritable_statement_is_an_error(tmp_path):
    options = ("--notify", "--statement", tmp_path / "none" / "JYMX_M1_20261101.txt")
    ended = sandbox_in_this_process(*options, env_file=tmp_path / "env")
    assert ended.exit_code == 1
    assert "JYMX_M1_20261101.txt: No such file or directory" in ended.stderr
