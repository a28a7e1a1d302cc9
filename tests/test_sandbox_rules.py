"""The sandbox refuses requests that the gateway's pages do not allow, and names the rule."""

import json
from decimal import Decimal

import httpx
import pytest

from lianlian_async.sandbox import SandboxGateway
from tests.support.sandbox_client import APPLICATION, CROSS_BORDER, JSON, QUERY, Client

pytestmark = pytest.mark.anyio


@pytest.fixture
def client():
    return Client(SandboxGateway(default_order=Decimal("1000.00")))


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"no_refund": None}, "no_refund"),
        ({"no_refund": ""}, "no_refund"),
        ({"no_refund": "R" * 33}, "no_refund"),
        ({"dt_refund": None}, "dt_refund"),
        ({"dt_refund": "20130231000000"}, "dt_refund"),
        ({"dt_refund": "2013-05-15"}, "dt_refund"),
        ({"money_refund": None}, "money_refund"),
        ({"money_refund": "200."}, "money_refund"),
        ({"money_refund": "200.011"}, "money_refund"),
        ({"money_refund": "1.00000000000"}, "money_refund"),
        ({"trader_refund": "2" * 19}, "trader_refund"),
        ({"money_refund": "-1.00"}, "money_refund"),
        ({"money_refund": "0.00"}, "money_refund"),
        ({"money_refund": "100000000.01"}, "money_refund"),
        ({"notify_url": None}, "notify_url"),
        ({"notify_url": "shop.example/refund"}, "notify_url"),
        ({"notify_url": "https://shop.example/" + "x" * 108}, "notify_url"),
        ({"no_order": "O" * 33}, "no_order"),
        ({"dt_order": "yesterday"}, "dt_order"),
        ({"oid_paybill": "P" * 33}, "oid_paybill"),
        ({"no_order": None}, "no_order"),
        ({"sign_type": None}, "sign_type"),
        ({"sign_type": None, "sign_type ": "RSA"}, "sign_type"),
        ({"sign_type": "MD5"}, "sign_type"),
        ({"oid_partner": None}, "oid_partner"),
        ({"oid_partner": "2" * 19}, "oid_partner"),
    ],
)
async def test_invalid_application_names_the_field(client, changes, parameter):
    """1004 names the invalid parameter, and nothing is carried out."""
    answer = await client.apply(**changes)
    assert (answer["ret_code"], answer["ret_msg"]) == ("1004", f"商户请求参数校验错误[{parameter}]")
    assert client.gateway.refunds == ()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"no_refund": "R" * 32, "no_order": "O" * 32},
        {"no_order": None, "dt_order": None, "oid_paybill": "P" * 32},
        {"no_order": "", "dt_order": "", "oid_paybill": "P-1"},
        {"money_refund": "0.01"},
        {"money_refund": "0.1"},
        {"money_refund": "200"},
        {"money_refund": "200.010"},
        {"money_refund": "1.0000000000"},
        {"trader_refund": "201304121000001004"},
        {"money_refund": "1000.00"},
        {"notify_url": "http://shop.example/" + "x" * 108},
        {"a_field_that_no_page_knows": "is signed like any other"},
    ],
)
async def test_an_application_within_the_rules_is_carried_out(client, changes):
    """A value that just satisfies a rule is accepted."""
    answer = await client.apply(**changes)
    assert answer["ret_code"] == "0000"
    assert client.is_signed(answer)


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"dt_refund": None}, "dt_refund"),
        ({"dt_refund": "2013051509401"}, "dt_refund"),
        ({"no_refund": "R" * 33}, "no_refund"),
        ({"oid_refundno": "1" * 17}, "oid_refundno"),
        ({"trader_refund": "2" * 19}, "trader_refund"),
        ({"no_refund": None}, "no_refund"),
        ({"no_refund": "", "oid_refundno": ""}, "no_refund"),
    ],
)
async def test_invalid_query_names_the_field(client, changes, parameter):
    """1004 names the invalid parameter of a query."""
    await client.apply()
    answer = await client.query(**changes)
    assert (answer["ret_code"], answer["ret_msg"]) == ("1004", f"商户请求参数校验错误[{parameter}]")


async def test_largest_amount_is_accepted():
    """The largest refund is one hundred million yuan."""
    client = Client(SandboxGateway(default_order=Decimal(100_000_000)))
    assert (await client.apply(money_refund="100000000.00"))["ret_code"] == "0000"


@pytest.mark.parametrize("path", [CROSS_BORDER, QUERY])
async def test_a_request_without_signature_is_refused(client, path):
    """A missing sign is a missing parameter."""
    fields = client.signed(APPLICATION)
    del fields["sign"]
    answer = await client.ask(path, fields)
    assert answer["ret_msg"] == "商户请求参数校验错误[sign]"


@pytest.mark.parametrize(
    "change",
    [
        {"money_refund": "300.00"},
        {"added": "after signing"},
        {"sign": "bm8gc2lnbmF0dXJl"},
        {"sign": "签名"},
    ],
)
async def test_request_changed_after_signing_is_refused(client, change):
    """1001 for any change after signing, including unknown fields."""
    answer = await client.ask(CROSS_BORDER, client.signed(APPLICATION) | change)
    assert answer["ret_code"] == "1001"
    assert client.gateway.refunds == ()


async def test_a_request_signed_by_another_key_is_refused(client, stranger_keys):
    """1001 for a known merchant number with another key."""
    impostor = Client(client.gateway, key=stranger_keys.private)
    assert (await impostor.apply())["ret_code"] == "1001"


async def test_an_unknown_merchant_is_refused(client, stranger_keys):
    """3001 for an unknown merchant number."""
    stranger = Client(client.gateway, key=stranger_keys.private, oid_partner="201304121000001004")
    assert (await stranger.apply())["ret_code"] == "3001"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"no_refund": "R-1", "no_refund": "R-2"}',
        b'{"money_refund": 200.01}',
        b'{"money_refund": ' + b"2" * 5000 + b"}",
        b'{"no_refund": true}',
        '{"no_refund": "退款"}'.encode("gb18030"),
    ],
)
async def test_body_must_be_a_flat_object_of_strings(client, body):
    """9002 for anything but JSON in UTF-8 with string values."""
    response = await client.send(CROSS_BORDER, content=body)
    assert response.json()["ret_code"] == "9002"


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/jsonp", "application/json;charset=gbk"])
async def test_content_type_must_be_json(client, content_type):
    """9002 for a content type that the pages do not allow."""
    response = await client.send(CROSS_BORDER, json=client.signed(APPLICATION), content_type=content_type)
    assert response.json()["ret_code"] == "9002"


async def test_the_content_type_may_be_spelled_in_any_case(client):
    """Case and a blank after the semicolon do not matter."""
    body = json.dumps(client.signed(APPLICATION))
    response = await client.send(CROSS_BORDER, content=body, content_type="Application/JSON; charset=UTF-8")
    assert response.json()["ret_code"] == "0000"


@pytest.mark.parametrize("content_type", ["application/json", 'application/json;charset="utf-8"'])
async def test_requests_of_the_vendors_clients_are_accepted(client, content_type):
    """A missing charset, or one in Content-Encoding, is accepted."""
    headers = {"content-type": content_type, "content-encoding": "UTF-8"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=client.gateway), base_url="http://sandbox") as http:
        response = await http.post(CROSS_BORDER, json=client.signed(APPLICATION), headers=headers)
    assert response.json()["ret_code"] == "0000"


async def test_null_counts_as_absent(client):
    """The signature leaves out nulls, so an optional field may be null."""
    fields = client.signed(APPLICATION) | {"oid_paybill": None}
    assert (await client.ask(CROSS_BORDER, fields))["ret_code"] == "0000"


async def test_only_the_three_calls_exist(client):
    """404 for any other path, 405 for any method except POST."""
    assert (await client.send("/payrefund.htm", content_type=JSON)).status_code == 404
    response = await client.send(CROSS_BORDER, method="GET")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert client.gateway.requests.total() == 0
