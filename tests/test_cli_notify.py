"""``lianlian notify`` and ``lianlian sandbox --notify``: test a service by hand."""

from __future__ import annotations

import json

import pytest
from test_cli_sandbox import APPLY, sandbox_in_this_process

from lianlian_async import Merchant, NotificationEndpoint
from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.sandbox import SandboxGateway
from tests.support.command import end, run, start, until
from tests.support.notices import Handler, notification, trusting
from tests.support.parties import OID_PARTNER, unused_port

SEND = ("--no-refund", "R-1", "--money-refund", "10.00")


@pytest.fixture
def gateway():
    return SandboxGateway(oid_partner=OID_PARTNER)


@pytest.fixture
def env(gateway):
    """The merchant's environment."""
    return environment(gateway, "http://127.0.0.1:9")


@pytest.fixture
def key_file(gateway, tmp_path):
    """The private key that replaces LianLian's."""
    file = tmp_path / "gateway.pem"
    file.write_text(gateway.gateway_key.to_pem())
    return file


@pytest.fixture
def handler():
    return Handler()


@pytest.fixture
def service(env, handler):
    """The URL of the merchant's service."""
    with serving(NotificationEndpoint(Merchant.from_env(env), handler)) as url:
        yield url


# ── send ─────────────────────────────────────────────────────────────────────────────────────────


def test_text_that_is_not_utf_8_is_refused(env, key_file):
    """A terminal may send GBK."""
    wrong = "退款".encode("gbk").decode("utf-8", "surrogateescape")
    ended = run("notify", "send", "http://127.0.0.1:9", "--gateway-key", key_file, *SEND, "--no-refund", wrong, env=env)
    assert (ended.exit_code, "no_refund: must not contain NUL or a lone surrogate" in ended.stderr) == (2, True)


def test_a_notification_is_sent_and_acknowledged(service, env, key_file, handler):
    """The service gets the fields of the options with a valid signature; its response is shown."""
    ended = run("notify", "send", service, "--gateway-key", key_file, *SEND, "--dt-refund", "20130515094018", env=env)
    assert ended.exit_code == 0
    assert "acknowledged: HTTP 200" in ended.stdout
    [refund] = handler.done
    assert (refund.no_refund, str(refund.money_refund), refund.sta_refund) == ("R-1", "10.00", "2")
    assert refund.raw["dt_refund"] == "20130515094018"


def test_refused_notification_is_shown(service, env, key_file):
    """A contradictory second state is refused: exit code 1, with the response."""
    command = ("notify", "send", service, "--gateway-key", key_file, *SEND, "--json")
    assert run(*command, env=env).json["outcome"] == "acknowledged"
    ended = run(*command, "--sta-refund", "3", env=env)
    assert (ended.exit_code, ended.json["outcome"], ended.json["status"]) == (1, "not acknowledged", 409)
    assert json.loads(ended.json["answer"])["ret_msg"] == "contradictory"


def test_unreachable_service_gives_no_response(env, key_file):
    """A refused connection is no response: exit code 1."""
    url = f"http://127.0.0.1:{unused_port()}/"
    ended = run("notify", "send", url, "--gateway-key", key_file, *SEND, env=env)
    assert ended.exit_code == 1
    assert ended.stdout.startswith("not acknowledged: no response: ")
    assert "ConnectError" in ended.stdout


def test_invalid_url_is_a_usage_error(env, key_file):
    """The error comes before anything is sent."""
    ended = run("notify", "send", "shop.example", "--gateway-key", key_file, *SEND, env=env)
    assert ended.exit_code == 2
    assert "must be an absolute http or https URL" in ended.stderr


def test_invalid_gateway_key_is_a_configuration_error(env, tmp_path):
    """The message names the option."""
    (tmp_path / "key").write_text("no key")
    ended = run("notify", "send", "http://127.0.0.1:9/", "--gateway-key", tmp_path / "key", *SEND, env=env)
    assert ended.exit_code == 2
    assert "--gateway-key" in ended.stderr


# ── verify ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "exit_code", "word"),
    [
        (notification(), 0, "made"),
        (notification(sta_refund="3"), 3, "failed"),
        (notification().replace(b"10.00", b"11.00"), 5, "signature invalid"),
        (notification(oid_partner="2011"), 1, "answer mismatch"),
        (notification(sta_refund=None), 1, "error"),
        (b"{", 1, "malformed message"),
    ],
)
def test_notify_verify_reads_a_body_like_a_service(tmp_path, body, exit_code, word):
    """A valid notification is shown as a refund, an invalid one as an error."""
    (tmp_path / "body").write_bytes(body)
    keys = trusting().load_keys()
    env = {
        "LIANLIAN_OID_PARTNER": OID_PARTNER,
        "LIANLIAN_PRIVATE_KEY": "".join(keys.private.to_pem().splitlines()[1:-1]),
        "LIANLIAN_GATEWAY_PUBLIC_KEYS": keys.gateway[0].to_base64(),
    }
    ended = run("notify", "verify", tmp_path / "body", "--json", env=env)
    assert (ended.exit_code, ended.json["outcome"]) == (exit_code, word)
    ended = run("notify", "verify", tmp_path / "body", env=env)
    assert ended.exit_code == exit_code
    assert word in ended.stdout + ended.stderr


# ── sandbox --notify ─────────────────────────────────────────────────────────────────────────────


def test_the_sandbox_notifies_a_service(tmp_path, handler):
    """A refund without notify_url is notified at the option's URL, and the result is printed."""
    endpoint = None

    async def shop(scope, receive, send):
        await endpoint(scope, receive, send)

    def apply(env):
        nonlocal endpoint
        endpoint = NotificationEndpoint(Merchant.from_env(env), handler)
        assert env["LIANLIAN_NOTIFY_URL"] == f"{url}/lianlian/refund"
        for number in (1, 2):  # when the second one is here, the first one's answer is back
            assert end(start(*APPLY, "--no-refund", f"R-{number}", env=env)).exit_code == 0
            until(lambda number=number: len(handler.done) == number)

    options = ("--settle-after", "0", "--notify")
    with serving(shop) as url:
        ended = sandbox_in_this_process(*options, f"{url}/lianlian/refund", env_file=tmp_path / "env", meanwhile=apply)
    assert ended.exit_code == 0
    assert handler.numbers == ["R-1", "R-2"]
    assert "notification of R-1: HTTP 200, acknowledged" in ended.stderr


def test_sandbox_notifies_port_8000_by_default(tmp_path):
    """Without a URL the option means port 8000 of this machine."""
    found = []
    sandbox_in_this_process("--notify", env_file=tmp_path / "env", meanwhile=found.append)
    assert found[0]["LIANLIAN_NOTIFY_URL"] == "http://127.0.0.1:8000/lianlian/refund"
