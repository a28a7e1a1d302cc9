"""Each fault of the sandbox occurs only on request, and has its documented effect only."""

import json
import math
from decimal import Decimal

import anyio
import pytest

from lianlian_async import wire
from lianlian_async.errors import ConfigurationError
from lianlian_async.sandbox import Fault, Repeated, SandboxGateway, When
from tests.support.sandbox_client import APPLICATION, CROSS_BORDER, QUERY, QUESTION, Client

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

BOTH = pytest.mark.parametrize(("when", "made"), [(When.BEFORE, 0), (When.AFTER, 1)])


def client_of(**options):
    options = {"default_order": Decimal("1000.00"), "clock": lambda: 100.0} | options
    return Client(SandboxGateway(**options))


async def post(client):
    return await client.send(CROSS_BORDER, json=client.signed(APPLICATION))


# ── about the response ───────────────────────────────────────────────────────────────────────────


@BOTH
@pytest.mark.parametrize(
    ("fault", "status", "header"),
    [
        (Fault.HTTP_500, 500, ("content-type", "text/html")),
        (Fault.BAD_GATEWAY, 502, ("content-type", "text/html")),
        (Fault.TOO_MANY, 429, ("retry-after", "3")),
        (Fault.REDIRECT, 302, ("location", "https://elsewhere.invalid/")),
    ],
)
async def test_fault_returns_an_html_page(fault, status, header, when, made):
    """The status and an HTML page, whether or not the refund was carried out."""
    client = client_of()
    client.gateway.script(fault, when=when, delay=2.5)
    response = await post(client)
    assert response.status_code == status
    assert response.headers[header[0]] == header[1]
    assert response.text.startswith("<html>")
    assert client.gateway.times_made("R-1") == made


@BOTH
@pytest.mark.parametrize(("ret_code", "ret_msg"), [("1007", "网络链接繁忙"), ("5006", "交易失败")])
async def test_busy_fault_returns_its_ret_code(ret_code, ret_msg, when, made):
    """Any code can be scripted as a signed answer; unknown codes get a common message."""
    client = client_of()
    client.gateway.script(Fault.BUSY, when=when, ret_code=ret_code)
    answer = await client.apply()
    assert (answer["ret_code"], answer["ret_msg"]) == (ret_code, ret_msg)
    assert client.is_signed(answer)
    assert client.gateway.times_made("R-1") == made


async def test_busy_is_unsigned_if_errors_are():
    """sign_errors applies to scripted codes, too."""
    client = client_of(sign_errors=False)
    client.gateway.script(Fault.BUSY)
    assert (await client.apply()).keys() == {"ret_code", "ret_msg"}


@BOTH
async def test_broken_json_is_half_of_the_answer(when, made):
    """A broken answer is complete as HTTP and cut off as JSON."""
    client = client_of()
    client.gateway.script(Fault.BROKEN_JSON, when=when)
    response = await post(client)
    assert response.text.startswith('{"ret_code"')
    with pytest.raises(json.JSONDecodeError):
        response.json()
    assert client.gateway.times_made("R-1") == made


@BOTH
@pytest.mark.parametrize("fault", [Fault.WRONG_SIGNATURE, Fault.NO_SIGNATURE, Fault.ALTERED_FIELD])
async def test_forgery_is_0000_without_valid_signature(fault, when, made):
    """The forgery claims this refund, carried out or not, and its signature is invalid."""
    client = client_of()
    client.gateway.script(fault, when=when)
    answer = await client.apply()
    assert (answer["ret_code"], answer["no_refund"]) == ("0000", "R-1")
    assert ("sign" in answer) == (fault is not Fault.NO_SIGNATURE)
    assert answer["money_refund"] == ("201.01" if fault is Fault.ALTERED_FIELD else "200.01")
    assert not client.is_signed(answer)
    assert client.gateway.times_made("R-1") == made


async def test_wrong_signature_belongs_to_another_message():
    """The signature has the right form, but belongs to other fields."""
    client = client_of()
    client.gateway.script(Fault.WRONG_SIGNATURE)
    answer = await client.apply()
    assert client.is_signed(answer | {"ret_msg": "另一条消息"})


@pytest.mark.parametrize("asked", [QUESTION, {"dt_refund": QUESTION["dt_refund"], "oid_refundno": "1234567890123456"}])
async def test_a_forgery_may_claim_a_refund_that_does_not_exist(asked):
    """A query without a record gets a forgery with the requested numbers."""
    client = client_of()
    client.gateway.script(Fault.NO_SIGNATURE, call="query")
    answer = await client.ask(QUERY, client.signed(asked))
    assert answer["ret_code"] == "0000"
    assert answer.items() >= asked.items()


@BOTH
async def test_the_answer_of_another_refund_is_validly_signed(when, made):
    """Only its numbers show that it belongs to another refund."""
    client = client_of()
    client.gateway.script(Fault.OTHER_REFUND, when=when)
    answer = await client.apply()
    assert (answer["ret_code"], answer["no_refund"], answer["money_refund"]) == ("0000", "OTHER", "200.01")
    assert client.is_signed(answer)
    assert client.gateway.times_made("R-1") == made


async def test_an_oversized_answer_is_the_right_one_and_too_long():
    """The answer has more than 64 KiB and a valid signature."""
    client = client_of()
    client.gateway.script(Fault.OVERSIZED)
    response = await post(client)
    assert len(response.content) > wire.MAX_MESSAGE_BYTES
    assert client.is_signed(response.json())


async def test_a_compressed_answer_is_the_right_one_in_gzip():
    """The answer is gzip with a valid signature, although the client asked for identity."""
    client = client_of()
    client.gateway.script(Fault.COMPRESSED)
    response = await post(client)
    assert response.headers["content-encoding"] == "gzip"
    assert client.is_signed(response.json())


@pytest.mark.parametrize("fault", [Fault.OVERSIZED, Fault.COMPRESSED])
async def test_validly_signed_answer_is_true(fault):
    """A validly signed answer is 9999 if nothing was carried out."""
    client = client_of()
    client.gateway.script(fault, when=When.BEFORE)
    response = await post(client)
    assert response.json()["ret_code"] == "9999"
    assert client.gateway.times_made("R-1") == 0


# ── about the connection ─────────────────────────────────────────────────────────────────────────


@BOTH
async def test_a_delayed_answer_is_the_right_one(when, made):
    """The answer comes after the delay; the refund is made before or after it."""
    client, answers = client_of(), []
    client.gateway.script(Fault.DELAY, when=when, delay=3.0)

    async def apply():
        answers.append(await client.apply())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(apply)
        await anyio.sleep(2.9)
        assert client.gateway.times_made("R-1") == made
        assert answers == []
    assert anyio.current_time() == 3.0
    assert client.is_signed(answers[0])
    assert client.gateway.times_made("R-1") == 1


async def test_delay_option_applies_to_all_faults():
    """The gateway's delay applies to scripted faults without one, and to random faults."""
    client = client_of(delay=7.0, faults={Fault.TOO_MANY: 1.0})
    client.gateway.script(Fault.DELAY)
    assert client.is_signed(await client.apply())
    assert anyio.current_time() == 7.0
    assert (await post(client)).headers["retry-after"] == "7"


@BOTH
async def test_no_answer_lasts_until_the_client_disconnects(when, made):
    """No answer ever comes."""
    client = client_of()
    client.gateway.script(Fault.NO_ANSWER, when=when)
    with anyio.move_on_after(86_400) as waiting:
        await client.apply()
    assert waiting.cancelled_caught
    assert client.gateway.times_made("R-1") == made


@BOTH
async def test_the_connection_breaks(when, made):
    """In process the application raises ConnectionResetError."""
    client = client_of()
    client.gateway.script(Fault.RESET, when=when)
    with pytest.raises(ConnectionResetError):
        await client.apply()
    assert client.gateway.times_made("R-1") == made


async def test_a_late_request_is_carried_out_after_a_query_found_nothing():
    """8901 now, the refund later: the answer "no such record" must not be believed at once."""
    client = client_of()
    client.gateway.script(Fault.LATE, delay=60.0)
    with anyio.move_on_after(1):
        await client.apply()
    client.gateway.advance(59.5)
    assert (await client.query())["ret_code"] == "8901"
    assert client.gateway.refunds == ()
    client.gateway.advance(0.5)
    assert (await client.query())["sta_refund"] == "0"
    client.gateway.advance(2.0)
    assert (await client.query())["sta_refund"] == "2"
    assert client.gateway.times_made("R-1") == 1


async def test_late_requests_come_in_the_order_of_their_times():
    """A repetition that overtakes the first attempt is carried out, and the first attempt is the duplicate."""
    client = client_of()
    client.gateway.script(Fault.LATE, delay=60.0)
    client.gateway.script(Fault.LATE, delay=30.0)
    for money_refund in ("1.00", "2.00"):
        with anyio.move_on_after(1):
            await client.apply(money_refund=money_refund)
    client.gateway.advance(100.0)
    assert client.gateway.money_moved("R-1") == Decimal("2.00")


# ── which fault comes when ───────────────────────────────────────────────────────────────────────


async def codes_of(client, count, **changes):
    return [(await client.apply(no_refund=f"R-{n}", money_refund="0.01", **changes))["ret_code"] for n in range(count)]


async def test_scripted_faults_strike_in_the_order_of_the_script():
    """Each fault occurs as often as scripted, then none."""
    client = client_of()
    client.gateway.script(Fault.BUSY, ret_code="1007", times=2)
    client.gateway.script(Fault.BUSY, ret_code="9902")
    assert await codes_of(client, 5) == ["1007", "1007", "9902", "0000", "0000"]


async def test_scripted_fault_skips_requests():
    """``skip`` matching requests pass before the fault occurs."""
    client = client_of()
    client.gateway.script(Fault.BUSY, skip=2)
    assert await codes_of(client, 4) == ["0000", "0000", "1007", "0000"]


async def test_scripted_fault_occurs_at_matching_requests_only():
    """The fault waits for its call and refund."""
    client = client_of()
    client.gateway.script(Fault.BUSY, call="query", no_refund="R-1")
    assert (await client.apply())["ret_code"] == "0000"
    assert (await client.query(no_refund="R-2"))["ret_code"] == "8901"
    assert (await client.query())["ret_code"] == "1007"
    assert (await client.query())["ret_code"] == "0000"


@pytest.mark.parametrize("option", [{"times": 0}, {"skip": -1}])
def test_invalid_script_is_refused(option):
    """``times`` below 1 and a negative ``skip`` are refused."""
    with pytest.raises(ValueError, match=next(iter(option))):
        client_of().gateway.script(Fault.BUSY, **option)


@pytest.mark.parametrize("delay", [-1, math.inf, math.nan])
def test_invalid_delay_is_refused(delay):
    """For random faults and for a scripted one."""
    with pytest.raises(ConfigurationError, match=f"delay: must be a number of seconds of at least 0 .* is {delay}"):
        SandboxGateway(delay=delay)
    with pytest.raises(ConfigurationError, match="delay: "):
        client_of().gateway.script(Fault.DELAY, delay=delay)


async def storm(seed, requests=200):
    """Return the result of each of many refunds, and whether it was made."""
    shares = {Fault.BUSY: 0.3, Fault.HTTP_500: 0.3}
    client, met = client_of(faults=shares, seed=seed, repeated=Repeated.AGAIN), []
    for n in range(requests):
        fields = client.signed(APPLICATION, no_refund=f"R-{n}", money_refund="0.01")
        response = await client.send(CROSS_BORDER, json=fields)
        answered = response.json()["ret_code"] if response.status_code == 200 else str(response.status_code)
        met.append((answered, client.gateway.times_made(f"R-{n}")))
    return met


async def test_same_seed_gives_the_same_faults():
    """The same seed gives the same faults, another seed others."""
    first = await storm(1)
    assert await storm(1) == first
    assert await storm(2) != first


async def test_random_faults_include_every_fault():
    """Faults occur before and after the refund is carried out, and some requests have none."""
    assert set(await storm(1)) == {
        ("0000", 1),
        *((code, n) for code in ("1007", "9902", "9999", "500") for n in (0, 1)),
    }


async def test_scripted_fault_does_not_change_random_faults():
    """A scripted fault does not change the random faults of later requests."""
    plain, scripted = [client_of(faults={Fault.BUSY: 0.5}, seed=4) for _ in range(2)]
    scripted.gateway.script(Fault.BUSY, ret_code="8117")
    assert (await codes_of(scripted, 30)) == ["8117", *(await codes_of(plain, 30))[1:]]


async def test_random_faults_can_be_switched_off():
    """Without probabilities every request gets its answer."""
    client = client_of(faults={Fault.BUSY: 1.0})
    assert "0000" not in await codes_of(client, 5)
    client.gateway.faults = {}
    assert client.gateway.faults == {}
    assert {(await client.apply(no_refund=f"S-{n}", money_refund="0.01"))["ret_code"] for n in range(5)} == {"0000"}


@pytest.mark.parametrize(
    "faults", [{Fault.BUSY: 1.1}, {Fault.BUSY: -0.1, Fault.RESET: 0.5}, {Fault.BUSY: 0.6, Fault.RESET: 0.5}]
)
def test_invalid_probabilities_are_refused(faults):
    """None is negative, and their sum is at most 1."""
    with pytest.raises(ConfigurationError, match="probability"):
        client_of(faults=faults)


async def test_fault_occurs_at_refused_request_too():
    """The lost answer can be a rejection: a client cannot distinguish it from a refund."""
    client = client_of()
    client.gateway.script(Fault.RESET)
    with pytest.raises(ConnectionResetError):
        await client.apply(money_refund="5000.00")
    assert client.gateway.times_made("R-1") == 0
