"""The sandbox answers like the real gateway, keeps its books, and is an ASGI application."""

import math
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import anyio
import pytest

from lianlian_async import wire
from lianlian_async.errors import ConfigurationError
from lianlian_async.models import RefundRequest, RefundStatus
from lianlian_async.sandbox import Fault, Repeated, SandboxGateway
from tests.support.sandbox_client import APPLICATION, CROSS_BORDER, DOMESTIC, Client

pytestmark = pytest.mark.anyio

FOREIGN = {"money_foreign_refund", "rate_id", "rate", "exchange_bankcode"}


def sandbox(**options):
    return SandboxGateway(**{"default_order": Decimal("1000.00"), "clock": lambda: 1_000_000.0} | options)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────


async def test_the_cross_border_product_answers_as_the_apply_page_says():
    """The fields of the page's sample answer, with its exchange rate, and a signature over all of them."""
    client = Client(sandbox(settle_after=0, started_at=datetime(2013, 6, 26, 23, 0, tzinfo=UTC)))
    answer = await client.apply()
    assert client.is_signed(answer)
    assert answer.pop("sign")
    assert answer == {
        "ret_code": "0000",
        "ret_msg": "交易成功",
        "oid_partner": "201103171000000000",
        "no_refund": "R-1",
        "dt_refund": "20130515094018",
        "oid_refundno": client.gateway.refunds[0].oid_refundno,
        "money_refund": "200.01",
        "money_foreign_refund": "30.03",
        "rate_id": "1",
        "rate": "6.66",
        "exchange_bankcode": "01040000",
        "sta_refund": "2",
        "settle_date": "20130627",
        "sign_type": "RSA",
    }


async def test_domestic_answer_has_no_foreign_currency():
    """A domestic apply answer has no dt_refund either; the query answer and the notification have it."""
    client = Client(sandbox())
    applied, found = await client.apply(DOMESTIC), await client.query()
    notified = wire.decode(client.gateway.notification(client.gateway.refunds[0]))
    for answer in (applied, found, notified):
        assert answer["ret_code"] == "0000"
        assert client.is_signed(answer)
        assert not FOREIGN & answer.keys()
    assert "dt_refund" not in applied
    assert found["dt_refund"] == notified["dt_refund"] == APPLICATION["dt_refund"]


@pytest.mark.parametrize("amount", ["0.1", "1", "88.000", "200.01"])
async def test_an_amount_comes_back_as_it_was_sent(amount):
    """A genuine exchange echoed 0.1; the books hold its value."""
    client = Client(sandbox())
    for answer in (await client.apply(money_refund=amount), await client.query()):
        assert (answer["ret_code"], answer["money_refund"]) == ("0000", amount)
    assert client.gateway.money_moved("R-1") == Decimal(amount)


async def test_every_answer_has_the_date_of_the_gateways_clock():
    """Answers, refusals and pages have a Date header by the gateway's clock, which can be advanced."""
    gateway = sandbox(started_at=datetime(2026, 1, 5, 16, 0, tzinfo=timezone(timedelta(hours=8))))
    client = Client(gateway)
    gateway.script(Fault.HTTP_500, skip=2)
    sent = [
        await client.send(CROSS_BORDER, json=client.signed(APPLICATION)),
        await client.send(CROSS_BORDER, content=b"{"),
        await client.send(CROSS_BORDER, json=client.signed(APPLICATION)),
        await client.send("/elsewhere"),
        await client.send(CROSS_BORDER, method="GET"),
    ]
    assert [response.status_code for response in sent] == [200, 200, 200, 404, 405]
    gateway.advance(90.0)
    sent.append(await client.send(CROSS_BORDER, json=client.signed(APPLICATION)))
    assert sent.pop().headers["date"] == "Mon, 05 Jan 2026 08:01:30 GMT"
    assert {response.headers["date"] for response in sent} == {"Mon, 05 Jan 2026 08:00:00 GMT"}
    assert gateway.time_of_day() == datetime(2026, 1, 5, 8, 1, 30, tzinfo=UTC)


async def test_query_answer_agrees_with_apply_answer():
    """Right after the apply call, the query answer has the same fields."""
    client = Client(sandbox())
    assert await client.apply() == await client.query()


async def test_a_refund_settles_by_the_gateways_clock():
    """With the clock advanced, a query sees 0, 1 and 2, and with 2 the settle date in UTC+8."""
    gateway = sandbox(settle_after=7200.0, started_at=datetime(2026, 1, 1, 15, 0, tzinfo=UTC))
    client = Client(gateway)
    await client.apply()
    seen = []
    for _ in range(3):
        answer = await client.query()
        seen.append((answer["sta_refund"], answer.get("settle_date")))
        gateway.advance(3600.0)
    assert seen == [("0", None), ("1", None), ("2", "20260102")]


async def test_the_gateways_clock_follows_the_given_one():
    """The gateway's time is the injected clock plus ``advance``."""
    seconds = [50.0]
    gateway = sandbox(clock=lambda: seconds[0], settle_after=10.0)
    client = Client(gateway)
    await client.apply()
    seconds[0] += 4.0
    gateway.advance(5.5)
    gateway.advance(0.5)
    gateway.advance(0.0)
    assert gateway.now() == 60.0
    assert (await client.query())["sta_refund"] == "2"
    for seconds in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="must be finite and not negative"):
            gateway.advance(seconds)


async def test_default_time_of_day_is_now():
    """A settle date is today's date in China."""
    client = Client(SandboxGateway(default_order=Decimal("1000.00"), settle_after=0))
    zone = timezone(timedelta(hours=8))
    before = datetime.now(zone)
    answer = await client.apply()
    assert answer["settle_date"] in (f"{before:%Y%m%d}", f"{datetime.now(zone):%Y%m%d}")


async def test_failed_refund_is_reported_as_failed():
    """A failing refund is accepted, then failed without a settle date, and its money returns."""
    gateway = sandbox()
    gateway.fail("R-1")
    client = Client(gateway)
    assert (await client.apply(money_refund="1000.00"))["ret_code"] == "0000"
    assert gateway.money_moved("R-1") == Decimal("1000.00")
    gateway.advance(2.0)
    answer = await client.query()
    assert (answer["sta_refund"], "settle_date" in answer) == ("3", False)
    assert (gateway.money_moved("R-1"), gateway.times_made("R-1")) == (Decimal(0), 1)
    assert (await client.apply(no_refund="R-2", money_refund="1000.00"))["ret_code"] == "0000"


async def test_a_refund_without_record_is_not_found():
    """8901 with its message and no fields of a refund; unsigned, or signed with ``sign_errors``."""
    assert await Client(sandbox()).query() == {"ret_code": "8901", "ret_msg": "没有记录"}
    client = Client(sandbox(sign_errors=True))
    answer = await client.query()
    assert client.is_signed(answer)
    assert answer.keys() == {"ret_code", "ret_msg", "oid_partner", "sign_type", "sign"}
    assert (answer["ret_code"], answer["ret_msg"]) == ("8901", "没有记录")


@pytest.mark.parametrize("sign_errors", [None, True])
async def test_rejected_refund_answer_is_signed_and_repeats_the_refund(sign_errors):
    """The rejection is signed and has the amount as it was sent, like a genuine one."""
    client = Client(sandbox(default_order=None, sign_errors=sign_errors))
    answer = await client.apply(money_refund="0.1")
    assert client.is_signed(answer)
    assert answer.pop("sign")
    assert answer == {
        "ret_code": "5002",
        "ret_msg": "原始交易不存在",
        "oid_partner": client.gateway.oid_partner,
        "no_refund": "R-1",
        "money_refund": "0.1",
        "sign_type": "RSA",
    }


async def test_invalid_parameter_answer_is_unsigned():
    """1004 has code and message only; with ``sign_errors`` it is signed and repeats number and amount."""
    assert (await Client(sandbox()).apply(no_refund="")).keys() == {"ret_code", "ret_msg"}
    client = Client(sandbox(sign_errors=True))
    answer = await client.apply(no_refund="")
    assert client.is_signed(answer)
    assert answer.keys() == {"ret_code", "ret_msg", "oid_partner", "money_refund", "sign_type", "sign"}


async def test_errors_may_come_unsigned():
    """With ``sign_errors=False`` an error has code and message only; 0000 is still signed."""
    client = Client(sandbox(sign_errors=False))
    assert await client.query() == {"ret_code": "8901", "ret_msg": "没有记录"}
    assert await client.apply(money_refund="2000") == {"ret_code": "5003", "ret_msg": "退款金额错误"}
    assert client.is_signed(await client.apply())


# ── orders, merchants, repetitions ───────────────────────────────────────────────────────────────


async def test_an_order_has_the_numbers_it_was_added_with():
    """An added order is refunded by its number and its generated payment number only."""
    gateway = sandbox(default_order=None)
    order = gateway.add_order("O-1", Decimal("400.02"))
    client = Client(gateway)
    assert (await client.apply(no_order="O-2"))["ret_code"] == "5002"
    assert (await client.apply(oid_paybill="2013051613121201"))["ret_code"] == "9092"
    assert (await client.apply(money_refund="400.03"))["ret_code"] == "5003"
    assert (await client.apply(oid_paybill=order.oid_paybill))["ret_code"] == "0000"
    assert (await client.apply(no_refund="R-2", money_refund="200.02"))["ret_code"] == "5007"
    assert order.rest(gateway.now()) == Decimal("200.01")


def test_unknown_effect_of_a_repeated_request_is_refused():
    """A wrong ``repeated`` is not taken for AGAIN, which moves money twice."""
    with pytest.raises(ValueError, match="'rejected' is not a valid Repeated"):
        sandbox(repeated="rejected")


async def test_replayed_answer_equals_the_first_one():
    """Under REPLAY the second application gets the first answer, even after the state has changed."""
    gateway = sandbox(repeated=Repeated.REPLAY)
    client = Client(gateway)
    first = await client.apply()
    gateway.advance(60.0)
    assert await client.apply() == first
    assert (await client.query())["sta_refund"] == "2"
    assert (gateway.money_moved("R-1"), gateway.times_made("R-1")) == (Decimal("200.01"), 1)


async def test_money_may_move_twice():
    """Under AGAIN the books have both refunds."""
    gateway = sandbox(repeated=Repeated.AGAIN)
    client = Client(gateway)
    first, second = await client.apply(), await client.apply()
    assert first["oid_refundno"] != second["oid_refundno"]
    assert (gateway.money_moved("R-1"), gateway.times_made("R-1")) == (Decimal("400.02"), 2)


async def test_gateway_can_carry_out_every_request():
    """Under AGAIN with large orders each request is another refund, even with the same bytes."""
    gateway = sandbox(repeated=Repeated.AGAIN, default_order=Decimal("100000000.00"))
    client = Client(gateway)
    fields = client.signed(APPLICATION)
    answers = [await client.ask(CROSS_BORDER, fields) for _ in range(10)]
    assert {answer["ret_code"] for answer in answers} == {"0000"}
    assert len({answer["oid_refundno"] for answer in answers}) == gateway.times_made("R-1") == 10
    assert gateway.money_moved("R-1") == 10 * Decimal("200.01")


async def test_concurrent_applications_are_carried_out_once():
    """Of many concurrent applications with one number, exactly one is carried out."""
    client, codes = Client(sandbox()), []

    async def apply():
        codes.append((await client.apply())["ret_code"])

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(apply)
    assert sorted(codes) == ["0000", *["1002"] * 9]
    assert client.gateway.times_made("R-1") == 1


# ── audit ────────────────────────────────────────────────────────────────────────────────────────


async def test_the_books_have_every_refund():
    """Records are in order, each with its application and state."""
    gateway = sandbox()
    client = Client(gateway)
    await client.apply()
    gateway.advance(2.0)
    await client.apply(no_refund="R-2", money_refund="1.00")
    now = gateway.now()
    told = [(r.no_refund, r.money_refund, r.status(now)) for r in gateway.refunds]
    assert told == [
        ("R-1", Decimal("200.01"), RefundStatus.SUCCESS),
        ("R-2", Decimal("1.00"), RefundStatus.INITIALIZED),
    ]
    assert (gateway.money_moved("R-3"), gateway.times_made("R-3")) == (Decimal(0), 0)


async def test_requests_with_faults_are_counted():
    """Refused and unreadable requests are counted, too."""
    gateway = sandbox()
    client = Client(gateway)
    await client.apply()
    await client.apply(DOMESTIC)
    await client.send(CROSS_BORDER, content=b"{")
    await client.query(no_refund="R-9")
    assert gateway.requests == {"apply": 3, "query": 1}


# ── set-up ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("domestic", "path"), [(False, "/exchangerefund.htm"), (True, "/refund.htm")])
async def test_a_ready_made_merchant_is_known_to_the_gateway(domestic, path):
    """The merchant's keys fit the gateway, and its endpoints are below the base URL."""
    gateway = sandbox()
    merchant = gateway.merchant("https://sandbox.invalid:8080", domestic=domestic, notify_url="https://shop.example/n")
    assert merchant.endpoints.apply == "https://sandbox.invalid:8080" + path
    assert merchant.endpoints.query == "https://sandbox.invalid:8080/refundquery.htm"
    assert merchant.notify_url == "https://shop.example/n"
    keys = merchant.load_keys()
    client = Client(gateway, key=keys.private, oid_partner=merchant.oid_partner)
    assert client.is_signed(await client.apply(path))
    assert [key.fingerprint for key in keys.gateway] == [gateway.gateway_key.fingerprint]


async def test_a_ready_made_session_talks_to_the_gateway():
    """The session's refund agrees with the books."""
    gateway = sandbox()
    request = RefundRequest(no_refund="R-1", dt_refund="20130515094013", money_refund=Decimal("200.01"), no_order="O-1")
    async with gateway.session() as session:
        applied = await session.apply_refund(request)
        asked = await session.query_refund(applied.query())
    assert applied == asked
    assert applied.money_foreign_refund == Decimal("30.03")
    assert (applied.money_refund, applied.oid_refundno) == (Decimal("200.01"), gateway.refunds[0].oid_refundno)
    assert gateway.requests == {"apply": 1, "query": 1}


async def test_keys_may_be_given(merchant_keys, gateway_keys):
    """Given keys are used instead of generated ones."""
    gateway = sandbox(merchant_key=merchant_keys.private, gateway_key=gateway_keys.private, oid_partner="2013")
    answer = await Client(gateway, key=merchant_keys.private, oid_partner="2013").apply()
    assert answer["ret_code"] == "0000"
    assert Client(gateway).is_signed(answer)
    assert gateway.gateway_key is gateway_keys.private


def test_key_size_must_be_supported_by_lianlian():
    """Other sizes than 1024, 2048 and 4096 are refused."""
    with pytest.raises(ConfigurationError, match="1024, 2048 or 4096"):
        SandboxGateway(bits=512)


# ── ASGI ─────────────────────────────────────────────────────────────────────────────────────────


async def test_server_lifespan_is_answered():
    """The application answers each lifespan event, then returns."""
    events, sent = iter(["lifespan.startup", "lifespan.shutdown"]), []

    async def receive():
        return {"type": next(events)}

    async def send(message):
        sent.append(message["type"])

    await sandbox()({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_incomplete_request_moves_no_money():
    """An incomplete body is not carried out."""
    gateway = sandbox()
    whole = repr(Client(gateway).signed(APPLICATION)).replace("'", '"').encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": CROSS_BORDER,
        "headers": [(b"content-type", b"application/json;charset=utf-8")],
    }
    for cut, made in ((100, 0), (len(whole), 1)):
        messages = iter([{"type": "http.request", "body": whole[:cut], "more_body": True}, {"type": "http.disconnect"}])

        async def receive(messages=messages):
            return next(messages)

        async def send(message):
            assert message["type"].startswith("http.response")

        await gateway(scope, receive, send)
        assert len(gateway.refunds) == made
