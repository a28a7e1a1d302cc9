"""``lianlian apply`` and ``lianlian query`` over a socket, with every exit code."""

import json
import signal
from decimal import Decimal

import pytest

from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.sandbox import Fault
from lianlian_async.signing import signature_source
from tests.support.command import end, interruption, run, start, until

# The sample request of LianLian's apply page, unchanged.
SAMPLE = """{
"oid_partner":"201103171000000000",
"dt_refund":"20130515094018",
"no_refund":"2013051500005",
"money_refund":"200.01",
"dt_order":"20130515094013",
"no_order":"2013051500001",
"oid_paybill":"2013051613121201",
"notify_url":"http://payhttp.xiaofubao.com/***/refund.htm",
"sign_type ":"RSA",
"sign":"ZPZULntRpJwFmGNIVKwjLEF2Tze7bqs60rxQ22CqT5J1UlvGo575QK9z/+p+7E9cOoRoWzqR6xHZ6WVv3dloyGKDR0btvrdqPgUAoeaX/YOWzTh00vwcQ+HBtXE+vPTfAqjCTxiiSJEOY7ATCF1q7iP3sfQxhS0nDUug1LP3OLk="
}"""
# The fields of the page's sample response.
ANSWER = {
    *("ret_code", "ret_msg", "oid_partner", "no_refund", "dt_refund", "oid_refundno", "money_refund"),
    *("money_foreign_refund", "rate_id", "rate", "exchange_bankcode", "sta_refund", "settle_date"),
}
REFUND = ("--no-refund", "R-1", "--dt-refund", "20130515094018", "--money-refund", "200.01", "--no-order", "O-1")
QUESTION = ("--no-refund", "R-1", "--dt-refund", "20130515094018")


@pytest.fixture
def sample(tmp_path):
    """A file with the sample request."""
    file = tmp_path / "sample.json"
    file.write_text(SAMPLE, "utf-8")
    return file


def cells_in(table):
    """Return the value of each field in a printed table."""
    return dict([cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line)


# ── made, and found ──────────────────────────────────────────────────────────────────────────────


def test_the_sample_request_of_the_vendors_page_is_made(env, sample, gateway):
    """The page's sample is accepted and signed again, despite its old signature and misspelt key."""
    ended = run("apply", sample, "--json", env=env)
    assert ended.exit_code == 0
    assert ended.json["outcome"] == "made"
    assert ended.json["refund"].keys() >= {*ANSWER, "sign", "sign_type"}
    assert gateway.money_moved("2013051500005") == Decimal("200.01")


@pytest.mark.parametrize("command", ["apply", "query"])
def test_every_field_of_the_sample_response_is_shown_with_its_type(env, sample, command):
    """The table has each documented field with value and type."""
    if command == "query":
        run("apply", sample, env=env)
    ended = run(command, sample, env=env)
    assert ended.exit_code == 0
    cells = cells_in(ended.stdout)
    assert cells.keys() == ANSWER
    assert (cells["sta_refund"], cells["money_refund"]) == ("2 (success)", "200.01")


def test_query_accepts_the_file_of_apply(env, sample):
    """A query takes its fields from the file of the request."""
    made = run("apply", sample, "--json", env=env).json["refund"]
    found = run("query", "-", "--json", "--oid-refundno", made["oid_refundno"], env=env, stdin=SAMPLE)
    assert found.exit_code == 0
    assert found.json["refund"]["oid_refundno"] == made["oid_refundno"]


def test_a_request_can_be_given_by_options_alone(env, gateway):
    """Without a file, the options are the request, and notify_url comes from the environment."""
    assert run("apply", *REFUND, env=env).exit_code == 0
    assert gateway.times_made("R-1") == 1


def test_options_override_the_file_and_empty_fields_are_absent(env, gateway):
    """Options override fields of the file; an empty field counts as absent."""
    stdin = json.dumps({**json.loads(SAMPLE), "oid_paybill": "", "money_refund": "1.00"})
    ended = run("apply", "-", "--money-refund", "2.00", "--json", env=env, stdin=stdin)
    assert ended.json["refund"]["money_refund"] == "2.00"


def test_the_merchant_can_come_from_a_toml_file(env, tmp_path):
    """--config takes the place of the environment."""
    names = {
        "oid_partner": "LIANLIAN_OID_PARTNER",
        "private_key": "LIANLIAN_PRIVATE_KEY",
        "gateway_public_keys": "LIANLIAN_GATEWAY_PUBLIC_KEYS",
        "apply_url": "LIANLIAN_APPLY_URL",
        "query_url": "LIANLIAN_QUERY_URL",
        "notify_url": "LIANLIAN_NOTIFY_URL",
    }
    config = tmp_path / "merchant.toml"
    config.write_text("".join(f"{name} = {json.dumps(env[variable])}\n" for name, variable in names.items()), "utf-8")
    assert run("apply", *REFUND, "--config", config).exit_code == 0


def test_a_refund_that_is_not_final_shows_what_is_absent(env, gateway):
    """A field that the gateway left out is shown as absent."""
    gateway._ledger.settle_after = 3600.0
    ended = run("apply", *REFUND, env=env)
    cells = cells_in(ended.stdout)
    assert cells.keys() == ANSWER
    assert (cells["sta_refund"], cells["settle_date"]) == ("0 (initialized)", "-")


def test_undocumented_fields_are_shown_with_escaped_characters(gateway):
    """An undocumented signed field is shown with escaped control characters."""
    answer = {
        "ret_code": "0000",
        "oid_partner": gateway.oid_partner,
        "no_refund": "R-1",
        "news": "\x1b[2J[bold]hello",
        "rate": "much",
    }
    body = json.dumps(answer | {"sign": gateway.gateway_key.sign(signature_source(answer))}).encode()

    async def application(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    with serving(application) as url:
        ended = run("query", *QUESTION, env=environment(gateway, url))
    assert ended.exit_code == 0
    assert "\x1b" not in ended.stdout
    assert "\\x1b[2J[bold]hello" in ended.stdout
    assert cells_in(ended.stdout)["rate"] == "much"


# ── refused before anything is sent ──────────────────────────────────────────────────────────────


def test_a_request_of_another_merchant_is_refused(env, gateway):
    """A file with an oid_partner that differs from the configured one is not sent."""
    ended = run("apply", "-", env=env, stdin=SAMPLE.replace("201103171000000000", "201304121000001004"))
    assert ended.exit_code == 2
    assert "oid_partner: must be the configured merchant's, 201103171000000000" in ended.stderr
    assert not gateway.requests


def test_all_broken_rules_are_listed_at_once(env, gateway):
    """An invalid request names every problem, for people and in JSON."""
    arguments = ("apply", *REFUND, "--money-refund", "0.001", "--notify-url", "nowhere")
    people, machine = run(*arguments, env=env), run(*arguments, "--json", env=env)
    assert people.exit_code == machine.exit_code == 2
    assert people.stderr.startswith("invalid request: nothing was sent\n  money_refund: ")
    assert "\n  notify_url: " in people.stderr
    assert machine.json["outcome"] == "invalid request"
    assert [problem["field"] for problem in machine.json["error"]["problems"]] == ["money_refund", "notify_url"]
    assert not gateway.requests


def test_a_missing_configuration_names_its_variables():
    """Without a merchant the missing variables are named."""
    ended = run("query", *QUESTION)
    assert ended.exit_code == 2
    assert "LIANLIAN_OID_PARTNER, LIANLIAN_PRIVATE_KEY, LIANLIAN_GATEWAY_PUBLIC_KEYS" in ended.stderr


@pytest.mark.parametrize("text", ["no json", "[]", '{"a": "1", "a": "2"}'])
def test_invalid_message_file_is_a_usage_error(env, text):
    """FILE must be a flat JSON object of strings."""
    ended = run("apply", "-", env=env, stdin=text)
    assert ended.exit_code == 2
    assert "FILE" in ended.stderr


def test_byte_order_mark_is_ignored(env):
    """JSON with a byte order mark is read."""
    assert run("apply", "-", env=env, stdin="\ufeff" + SAMPLE).exit_code == 0


@pytest.mark.parametrize("deadline", ["0", "-1", "soon"])
def test_deadline_must_be_positive(env, deadline):
    """A deadline of 0 is a usage error."""
    assert run("query", *QUESTION, "--deadline", deadline, env=env).exit_code == 2


# ── every other end ──────────────────────────────────────────────────────────────────────────────


def test_a_rejected_refund_exits_3(env):
    """A rejection is shown with its code, its message and advice."""
    ended = run("apply", *REFUND, "--money-refund", "1000.01", env=env)
    assert ended.exit_code == 3
    assert ended.stderr.startswith("rejected: ")
    assert "5003" in ended.stderr
    document = run("apply", *REFUND, "--money-refund", "1000.01", "--json", env=env).json
    assert (document["outcome"], document["error"]["type"]) == ("rejected", "RefundRejected")
    assert document["error"]["ret_code"] == "5003"
    assert document["error"]["verified"] is True


def test_a_failed_refund_exits_3(env, gateway):
    """A refund that failed at the bank is not made."""
    gateway.fail("R-1")
    ended = run("apply", *REFUND, "--json", env=env)
    assert (ended.exit_code, ended.json["outcome"]) == (3, "failed")


def test_a_refund_that_was_not_sent_exits_1(env):
    """After a refused connection the output says that the refund was not sent."""
    closed = {**env, "LIANLIAN_APPLY_URL": "http://127.0.0.1:9/exchangerefund.htm"}
    ended = run("apply", *REFUND, "--deadline", "1", env=closed)
    assert ended.exit_code == 1
    assert ended.stderr.startswith("not sent: ")


def test_unknown_outcome_exits_4_and_shows_the_query_command(env, gateway):
    """After a lost response the text has the query command, and JSON all facts."""
    gateway.script(Fault.TOO_MANY, times=2, delay=60.0)  # a query would start after the deadline
    people, machine = run("apply", *REFUND, env=env), run("apply", *REFUND, "--json", env=env)
    assert people.exit_code == machine.exit_code == 4
    assert "query it with: lianlian query --no-refund R-1 --dt-refund 20130515094018" in people.stderr
    error = machine.json["error"]
    assert error["query"] == {"no_refund": "R-1", "dt_refund": "20130515094018"}
    assert error["request"]["money_refund"] == "200.01"
    assert error["attempts"] == 1
    assert error["sent_at"] < error["ask_again_at"]


def test_a_forged_answer_exits_5(env, gateway):
    """An answer without LianLian's signature is an error."""
    gateway.script(Fault.WRONG_SIGNATURE, times=1000)
    ended = run("query", *QUESTION, env=env)
    assert ended.exit_code == 5
    assert ended.stderr.startswith("signature invalid: ")


def test_query_of_unknown_number_exits_1(env):
    """The answer "no such record" has its own error."""
    ended = run("query", *QUESTION, "--json", env=env)
    assert (ended.exit_code, ended.json["outcome"]) == (1, "not found")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_apply_exits_130_and_shows_the_query_command(env, gateway, number):
    """Ctrl-C or SIGTERM ends the command at once, and it says that the refund may have been made."""
    gateway.script(Fault.NO_ANSWER)
    process = start("apply", *REFUND, env=env)
    until(lambda: gateway.requests["apply"])
    process.send_signal(number)
    ended = end(process, env)
    assert ended.exit_code == 130
    query = "lianlian query --no-refund R-1 --dt-refund 20130515094018"
    assert f"R-1 may have been made; query it with: {query}" in ended.stdout
    assert ended.stderr.endswith("interrupted\n")
    assert gateway.times_made("R-1") == 1


def test_interrupted_apply_prints_json(gateway):
    """With --json the output has the query."""
    with interruption():
        ended = run("apply", *REFUND, "--json", env=environment(gateway, "http://127.0.0.1:9"))
    assert ended.exit_code == 130
    assert ended.json == {"outcome": "interrupted", "query": {"no_refund": "R-1", "dt_refund": "20130515094018"}}


def test_outcome_is_shown_once(env):
    """A rejection is on standard error once: as the command's own text, not as a warning of the library's log, too."""
    ended = end(start("apply", *REFUND, "--money-refund", "1000.01", env=env), env)
    assert ended.exit_code == 3
    assert ended.stderr.count("5003") == 1
