"""Requests, queries and refunds: invalid requests are refused, and no received field is lost."""

import copy
import pickle
import unicodedata
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from types import MappingProxyType

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lianlian_async import text_rules, wire
from lianlian_async.errors import InvalidRequest
from lianlian_async.models import Refund, RefundQuery, RefundRecord, RefundRequest, RefundStatus
from tests.support.strategies import invisible, moments

NOW = datetime(2017, 8, 1, 14, 57, 14, tzinfo=UTC)
MINIMAL = {"no_refund": "R-1", "dt_refund": NOW, "money_refund": Decimal("200.01"), "no_order": "O-1"}
SAMPLE = {
    "ret_code": "0000",
    "ret_msg": "交易成功",
    "oid_partner": "201103171000000000",
    "no_refund": "2013051500001",
    "dt_refund": "20130515094018",
    "oid_refundno": "2013051613121201",
    "money_refund": "200.01",
    "money_foreign_refund": "30.03",
    "rate_id": "1",
    "rate": "6.66",
    "exchange_bankcode": "01040000",
    "sta_refund": "2",
    "settle_date": "20130627",
    "sign_type": "RSA",
    "sign": "ZPZULntRpJwF",
}

numbers = st.text(st.characters(categories=["L", "Nd"]) | st.characters(min_codepoint=0x21, max_codepoint=0x7E)).map(
    lambda text: unicodedata.normalize("NFKC", text)[:32]
)
numbers = numbers.filter(
    lambda text: (
        text
        and all(letter.isalpha() or letter.isdecimal() or "!" <= letter <= "~" for letter in text)
        and not set(text) & invisible
        and unicodedata.is_normalized("NFKC", text)
    )
)
"""Valid numbers of new refunds."""
identifiers = st.text(
    st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters=invisible), min_size=1
)
identifiers = identifiers.filter(lambda text: text == text.strip())
"""Valid numbers of existing orders."""
urls = st.from_regex(r"https?://[a-z]{1,20}\.example(:[1-9][0-9]{0,3})?(/[!-~]{0,30})?", fullmatch=True)
requests = st.fixed_dictionaries(
    {
        "no_refund": numbers,
        "dt_refund": moments,
        "money_refund": st.decimals(Decimal("0.01"), Decimal(100_000_000), places=2),
        "no_order": identifiers.map(lambda s: s[:32].strip()),
    },
    optional={
        "dt_order": st.none() | moments,
        "oid_paybill": st.none() | identifiers.map(lambda s: s[:32].strip()),
        "notify_url": st.none() | urls,
        "trader_refund": st.none() | identifiers.map(lambda s: s[:18].strip()),
    },
).map(lambda fields: RefundRequest(**fields))
queries = st.builds(
    RefundQuery, no_refund=identifiers.map(lambda s: s[:32].strip()), dt_refund=moments, oid_refundno=st.none()
) | st.builds(RefundQuery, dt_refund=moments, oid_refundno=identifiers.map(lambda s: s[:16].strip()))


def problems_of(make):
    with pytest.raises(InvalidRequest) as caught:
        make()
    return {problem.field: problem for problem in caught.value.problems}


# ── requests ─────────────────────────────────────────────────────────────────────────────────────


def test_a_request_has_its_wire_form():
    """Every field is a string as documented, in China Standard Time; absent fields are omitted."""
    request = RefundRequest(
        **MINIMAL,
        dt_order=datetime(2017, 8, 1, tzinfo=UTC),
        oid_paybill="2011030900001098",
        notify_url="https://shop.example/refund",
    )
    assert request.to_dict() == {
        "no_refund": "R-1",
        "dt_refund": "20170801225714",
        "money_refund": "200.01",
        "no_order": "O-1",
        "dt_order": "20170801080000",
        "oid_paybill": "2011030900001098",
        "notify_url": "https://shop.example/refund",
    }
    assert set(RefundRequest(**MINIMAL).to_dict()) == set(MINIMAL)


@given(requests | queries)
def test_request_round_trip(request):
    """A request or query is equal after its wire form, pickling and copying."""
    assert type(request).from_dict(request.to_dict()) == request
    assert pickle.loads(pickle.dumps(request)) == request
    assert copy.deepcopy(request) == copy.copy(request) == request
    assert hash(copy.deepcopy(request)) == hash(request)


@given(requests)
def test_every_request_can_be_signed_and_sent(request):
    """Every valid request can be encoded, within the documented field lengths."""
    fields = wire.decode(wire.encode(request.to_dict()))
    longest = {
        "no_refund": 32,
        "dt_refund": 14,
        "money_refund": 12,
        "no_order": 32,
        "dt_order": 14,
        "oid_paybill": 32,
        "notify_url": 128,
        "trader_refund": 18,
    }
    assert all(0 < len(text) <= longest[name] for name, text in fields.items())


@given(requests)
def test_query_of_a_request(request):
    """The query has the refund's number, dt_refund and trader_refund."""
    asked = {"no_refund": request.no_refund, "dt_refund": request.dt_refund, "trader_refund": request.trader_refund}
    assert request.query() == RefundQuery(**asked)


@attrs.frozen(kw_only=True)
class OwnRequest(RefundRequest):
    """A user's subclass with fields that LianLian does not know."""

    order_id: int = 0
    tags: list[str] = attrs.field(factory=list)


def test_a_field_of_a_subclass_is_not_sent_or_recorded():
    """LianLian would reject it, and a journal's entry with it could not be read again."""
    request = OwnRequest(**MINIMAL, order_id=5)
    assert request.to_dict() == RefundRequest(**MINIMAL).to_dict()
    assert RefundRequest.from_record(request.to_dict()) == RefundRequest(**MINIMAL)
    assert OwnRequest.from_dict({**request.to_dict(), "order_id": 5}) == request
    assert (attrs.evolve(request, order_id=6).order_id, pickle.loads(pickle.dumps(request))) == (6, request)


def test_all_broken_rules_are_reported_together():
    """One error contains the wire name, the rule and the value of each broken rule."""
    found = problems_of(
        lambda: RefundRequest(
            no_refund="",
            dt_refund=NOW.replace(tzinfo=None),
            money_refund=200.01,
            dt_order="yesterday",
            notify_url="shop",
        )
    )
    assert set(found) == {"no_refund", "dt_refund", "money_refund", "dt_order", "notify_url", "no_order"}
    assert str(found["no_refund"]) == "no_refund: must not be empty (got '')"
    assert "naive" in found["dt_refund"].rule
    assert found["money_refund"].value == "200.01"
    assert found["dt_order"].value == "'yesterday'"
    assert found["no_order"].rule == "no_order or oid_paybill is required"


def test_order_or_payment_number_is_required():
    """One or both of the numbers are accepted; a request without any is refused."""
    rest = {name: value for name, value in MINIMAL.items() if name != "no_order"}
    assert RefundRequest(**rest, oid_paybill="P-1").no_order is None
    assert RefundRequest(**MINIMAL, oid_paybill="P-1").to_dict().keys() > {"no_order", "oid_paybill"}
    assert set(problems_of(lambda: RefundRequest(**rest))) == {"no_order"}
    assert set(problems_of(lambda: RefundRequest(**rest, no_order=None, oid_paybill=None))) == {"no_order"}


def the_request(**fields):
    return RefundRequest(**MINIMAL | fields)


def the_query(**fields):
    return RefundQuery(**{"no_refund": "R-1", "dt_refund": NOW} | fields)


@pytest.mark.parametrize(
    ("make", "field", "longest"),
    [
        (the_request, "no_refund", 32),
        (the_request, "no_order", 32),
        (the_request, "oid_paybill", 32),
        (the_request, "trader_refund", 18),
        (the_query, "no_refund", 32),
        (the_query, "oid_refundno", 16),
        (the_query, "trader_refund", 18),
    ],
)
def test_rules_of_identifiers(make, field, longest):
    """Too long, empty and unprintable text, spaces at the ends, and other types are refused."""
    for text in ("x", "x" * longest, "退" * longest, "é", "!a&b=c~", "x\u0967", "ア"):
        assert getattr(make(**{field: text}), field) == text
    for text, rule in (
        ("x" * (longest + 1), f"at most {longest} characters, has {longest + 1}"),
        ("", "must not be empty"),
        (" x", "begin or end with white space"),
        ("x\u3000", "begin or end with white space"),
        ("a\nb", "control"),
        ("a\x00b", "control"),
        ("a\x85b", "control"),
        ("a\ud800b", "U+D800"),
        ("a\u2028b", "U+2028 LINE SEPARATOR"),
        ("R1\u200b", "U+200B ZERO WIDTH SPACE"),
        ("R\ufeff1", "U+FEFF"),
        ("R1\u202e", "U+202E RIGHT-TO-LEFT OVERRIDE"),
        ("R\u00ad1", "U+00AD SOFT HYPHEN"),
        ("R1\ufe0f", "U+FE0F"),
        ("R1\u3164", "U+3164 HANGUL FILLER"),
        (5, "must be a string"),
        (b"x", "must be a string"),
    ):
        assert rule in problems_of(lambda text=text: make(**{field: text}))[field].rule


@given(st.sampled_from(sorted(invisible)), st.sampled_from([(the_request, "no_refund"), (the_request, "no_order")]))
def test_invisible_characters_are_refused(character, place):
    """`R1` and `R1` with an invisible character would be two refunds."""
    make, field = place
    assert f"U+{ord(character):04X}" in problems_of(lambda: make(**{field: f"R{character}1"}))[field].rule


ORDERS = ["订单（2026）01", "ORD 1", "e\u0301", "①", "a\u00a0b", "R\u2800", "№ 5", "\U0001f600"]


@pytest.mark.parametrize("text", ORDERS)
def test_an_order_that_exists_stays_refundable(text):
    """Numbers of existing orders, payments and refunds cannot be changed, so only new refund numbers are restricted."""
    assert the_request(no_order=text, oid_paybill=text).to_dict()["no_order"] == text
    assert the_query(no_refund=text).no_refund == text
    assert set(problems_of(lambda: the_request(no_refund=text))) == {"no_refund"}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("R 1", "has U+0020 SPACE"),
        ("R\u00a01", "has U+00A0 NO-BREAK SPACE"),
        ("R\u28001", "has U+2800 BRAILLE PATTERN BLANK"),
        ("re\u0301", "has U+0301 COMBINING ACUTE ACCENT"),
        ("R（1）", "has U+FF08 FULLWIDTH LEFT PARENTHESIS"),
        ("Ｒ１", "NFKC-normal: write 'R1'"),
        ("ﬁ", "NFKC-normal: write 'fi'"),
        ("\u1112\u1161\u11ab", "NFKC-normal: write '한'"),
        ("²", "has U+00B2 SUPERSCRIPT TWO"),
    ],
)
def test_new_number_is_unambiguous(text, rule):
    """Only normalized letters and digits, and visible ASCII, are accepted."""
    assert rule in problems_of(lambda: the_request(no_refund=text))["no_refund"].rule


@pytest.mark.parametrize("number", ["R1\u200b", "R 1", "x" * 40, "re\u0301"])
def test_record_is_not_checked_again(number):
    """A journal's entry with a number of an older release is read, queried and written unchanged."""
    written = {"no_refund": number, "dt_refund": "20170801225714", "money_refund": "200.01", "no_order": number}
    read = RefundRequest.from_record(written)
    assert read.to_dict() == written
    assert (read.dt_refund, read.money_refund) == (NOW, Decimal("200.01"))
    assert read.query().to_dict() == {"no_refund": number, "dt_refund": "20170801225714"}
    assert RefundQuery.from_record(read.query().to_dict()) == read.query()
    assert Refund.from_dict({"no_refund": number}, written).query() == read.query()
    with pytest.raises(InvalidRequest):
        RefundRequest.from_dict(written)


@given(requests)
def test_a_record_is_the_request_that_was_written(request):
    """For valid content, from_record and from_dict are equal."""
    assert RefundRequest.from_record(request.to_dict()) == RefundRequest.from_dict(request.to_dict()) == request


def test_a_damaged_record_is_refused():
    """A record without the fields of a refund is refused."""
    for damage, field in (
        ({"money_refund": "much"}, "money_refund"),
        ({"dt_refund": "today"}, "dt_refund"),
        ({"no_order": None}, "no_order"),
        ({"unheard_of": "x"}, "unheard_of"),
    ):
        written = {"no_refund": "R", "dt_refund": "20170801225714", "money_refund": "1.00", "no_order": "O", **damage}
        assert set(problems_of(lambda written=written: RefundRequest.from_record(written))) == {field}
    assert set(problems_of(lambda: RefundQuery.from_record({"no_refund": "R"}))) == {"dt_refund"}


@pytest.mark.parametrize(
    "url",
    [
        "https://shop.example/lianlian/refund",
        "http://shop.example",
        "http://www.lianlianpay.com/help/notify",
        "HTTPS://shop.example:8443/a?b=c%20d",
        "https://[2001:db8::1]/",
        "https://shop.example/" + "x" * 107,
    ],
)
def test_usable_notify_url_is_unchanged(url):
    """An absolute http or https URL of at most 128 characters is kept."""
    assert text_rules.url(url, 128) == text_rules.url(url) == url
    assert RefundRequest(**MINIMAL, notify_url=url).notify_url == url


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("https://shop.example/" + "x" * 108, "at most 128 characters"),
        ("https://shop.example/退款", "must be ASCII"),
        ("https://shop.example/a b", "must be ASCII without spaces"),
        ("shop.example/refund", "absolute http or https"),
        ("//shop.example/refund", "absolute http or https"),
        ("ftp://shop.example/refund", "absolute http or https"),
        ("https:///refund", "absolute http or https"),
        ("https://:443/refund", "absolute http or https"),
        ("https://shop.example:0/", "absolute http or https"),
        ("https://shop.example:65536/", "absolute http or https"),
        ("https://shop.example:port/", "absolute http or https"),
        ("https://[::1/", "absolute http or https"),
        ("https://shop.example/\n", "begin or end with white space"),
        ("https://shop\t.example/", "control"),
        ("", "must not be empty"),
        (b"https://shop.example", "must be a string"),
    ],
)
def test_unusable_notify_url_is_refused(url, rule):
    """A URL that LianLian could not call is refused before the refund is sent."""
    assert rule in problems_of(lambda: RefundRequest(**MINIMAL, notify_url=url))["notify_url"].rule


def test_other_urls_may_be_longer():
    """The limit of 128 characters is only for notify_url."""
    assert text_rules.url("https://shop.example/" + "x" * 500)
    with pytest.raises(ValueError, match="at most 2000 characters"):
        text_rules.url("https://shop.example/" + "x" * 2000)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x" * 78, "'" + "x" * 78 + "'"),
        ("x" * 79, "'" + "x" * 76 + "..."),
        ("x" * 5000, "'" + "x" * 76 + "..."),
        (10**5000, "<int>"),
        ([1, 2], "[1, 2]"),
    ],
    ids=["80 characters", "81 characters", "long text", "number", "list"],
)
def test_a_problem_shows_its_value_shortened(value, shown):
    """An error shows at most 80 characters of a wrong value."""
    assert problems_of(lambda: RefundRequest(**MINIMAL | {"money_refund": value}))["money_refund"].value == shown


def test_the_money_keeps_two_decimals_and_the_time_its_zone():
    """A request holds the exact amount, and the second in China Standard Time, in any input form."""
    tokyo = timezone(timedelta(hours=9))
    request = RefundRequest(**MINIMAL | {"money_refund": 5, "dt_refund": NOW.astimezone(tokyo)})
    assert str(request.money_refund) == "5.00"
    assert request.dt_refund == NOW
    assert request.dt_refund.isoformat() == "2017-08-01T22:57:14+08:00"
    assert request == RefundRequest(**MINIMAL | {"money_refund": "5.0", "dt_refund": "20170801225714"})


@pytest.mark.parametrize("cls", [RefundRequest, RefundQuery])
def test_missing_and_unknown_keys_are_named_together(cls):
    """The error names every wrong key of the mapping."""
    found = problems_of(lambda: cls.from_dict({"no_refund": "R-1", "sign_type ": "RSA", 5: "x" * 500}))
    assert found["dt_refund"].rule == "is required"
    assert found["sign_type "].rule == found["5"].rule == f"is not a field of {cls.__name__}"
    assert len(found["5"].value) <= 80


@pytest.mark.parametrize("cls", [RefundRequest, RefundQuery])
def test_missing_and_unknown_fields_are_an_invalid_request(cls):
    """One error names all missing and unknown fields, also for keyword arguments."""
    assert problems_of(cls)["dt_refund"].rule == "is required"
    found = problems_of(lambda: cls(no_refund="R-1", money="10.00"))
    assert found["dt_refund"].rule == "is required"
    assert found["money"].rule == f"is not a field of {cls.__name__}"


@pytest.mark.parametrize("make", [lambda fields: RefundRequest(**fields), RefundRequest.from_dict])
def test_missing_unknown_and_invalid_fields_are_reported_together(make):
    """One error names every problem of a request, of whatever kind."""
    found = problems_of(lambda: make({"no_refund": "R" * 33, "money_refund": 1.5, "self": "1"}))
    assert [(name, problem.rule.partition(":")[0], problem.value) for name, problem in found.items()] == [
        ("self", "is not a field of RefundRequest", "'1'"),
        ("no_refund", "must have at most 32 characters, has 33", repr("R" * 33)),
        ("dt_refund", "is required", "nothing"),
        ("money_refund", "must be a Decimal, an int or a str", "1.5"),
        ("no_order", "no_order or oid_paybill is required", "neither"),
    ]


def test_from_dict_of_a_subclass_reports_unknown_and_missing_fields():
    """A subclass has its own ``__init__``, which would raise ``TypeError``."""
    found = problems_of(lambda: OwnRequest.from_dict({"no_refund": "R-1", "money": "1.00"}))
    assert set(found) == {"money", "dt_refund", "money_refund", "no_order"}


@pytest.mark.parametrize("data", ["R-1", None, 5, ["R-1"]])
@pytest.mark.parametrize(
    "read", [RefundRequest.from_dict, RefundQuery.from_dict, RefundRequest.from_record, Refund.from_dict]
)
def test_other_types_are_an_invalid_request(read, data):
    """The error names the expected and the given type."""
    problem = problems_of(lambda: read(data))["data"]
    assert problem.rule == "must be a Mapping"
    assert problem.value == f"{data!r} of type {type(data).__name__}"


@pytest.mark.parametrize("name", ["no_refund", "dt_refund", "money_refund"])
def test_the_identity_is_required(name):
    """Number, time and amount are required."""
    data = {key: value for key, value in MINIMAL.items() if key != name}
    assert set(problems_of(lambda: RefundRequest.from_dict(data))) == {name}


def test_a_query_needs_a_number_and_reports_all_problems():
    """A query needs one of the two numbers; every broken rule is reported."""
    assert RefundQuery(dt_refund=NOW, oid_refundno="2013051613121201").to_dict() == {
        "dt_refund": "20170801225714",
        "oid_refundno": "2013051613121201",
    }
    assert set(problems_of(lambda: RefundQuery(dt_refund=NOW))) == {"no_refund"}
    assert set(problems_of(lambda: RefundQuery(dt_refund=None))) == {"no_refund", "dt_refund"}


@pytest.mark.parametrize(
    "value", [RefundRequest(**MINIMAL), RefundQuery(no_refund="R", dt_refund=NOW), Refund.from_dict(SAMPLE)]
)
def test_values_are_frozen(value):
    """No field can be changed or added."""
    for name in ("no_refund", "anything"):
        with pytest.raises(AttributeError):
            setattr(value, name, "other")
    with pytest.raises((AttributeError, TypeError)):
        object.__setattr__(value, "anything", "other")


# ── status ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "status", "is_final"),
    [
        ("0", RefundStatus.INITIALIZED, False),
        ("1", RefundStatus.PROCESSING, False),
        ("2", RefundStatus.SUCCESS, True),
        ("3", RefundStatus.FAILED, True),
    ],
)
def test_the_documented_states(text, status, is_final):
    """Each documented status is found by its text, equals its text, and knows whether it is final."""
    assert RefundStatus(text) is status
    assert status == text == str(status)
    assert status.is_final is is_final


@given(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text not in "0123"))
def test_an_unknown_state_is_kept(text):
    """A new status of LianLian is kept, equals its text, is not final, and survives pickling."""
    status = RefundStatus(text)
    assert isinstance(status, RefundStatus)
    assert status == text == status.value == str(status)
    assert hash(status) == hash(text)
    assert status.name == "UNKNOWN"
    assert not status.is_final
    assert status not in RefundStatus.__members__.values()
    for twin in (pickle.loads(pickle.dumps(status)), copy.copy(status), copy.deepcopy(status)):
        assert twin == status
        assert isinstance(twin, RefundStatus)
        assert not twin.is_final


def test_an_unknown_state_leaves_the_known_ones_alone():
    """Unknown values add no member to the enumeration."""
    RefundStatus("9")
    assert [status.value for status in RefundStatus] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("value", [2, None, b"2"])
def test_a_state_is_text(value):
    """Other types are refused."""
    with pytest.raises(ValueError, match="not a valid RefundStatus"):
        RefundStatus(value)


# ── refunds ──────────────────────────────────────────────────────────────────────────────────────


def test_every_documented_field_is_read():
    """The documented sample answer is read into typed fields."""
    refund = Refund.from_dict(SAMPLE)
    assert refund.ret_code == "0000"
    assert refund.ret_msg == "交易成功"
    assert refund.oid_partner == "201103171000000000"
    assert refund.no_refund == "2013051500001"
    assert refund.dt_refund == datetime(2013, 5, 15, 1, 40, 18, tzinfo=UTC)
    assert refund.oid_refundno == "2013051613121201"
    assert refund.money_refund == Decimal("200.01")
    assert refund.money_foreign_refund == Decimal("30.03")
    assert refund.rate_id == "1"
    assert refund.rate == Decimal("6.66")
    assert refund.exchange_bankcode == "01040000"
    assert refund.sta_refund is RefundStatus.SUCCESS
    assert refund.settle_date == date(2013, 6, 27)
    assert refund.is_final
    assert refund.extra == {}
    assert refund.raw == refund.to_dict() == SAMPLE


def test_absent_and_empty_fields_are_none():
    """An absent or empty field is None, and a refund without status is not final."""
    refund = RefundRecord.from_dict({"no_refund": "R-1", "settle_date": "", "sta_refund": "", "rate": ""})
    assert attrs.asdict(refund, filter=lambda field, value: field.eq and value is not None) == {"no_refund": "R-1"}
    assert refund.extra == {}
    assert not refund.is_final


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dt_refund", "yesterday"),
        ("money_refund", "200.013"),
        ("money_refund", "0.00"),
        ("money_foreign_refund", "USD 3"),
        ("rate", "1e1"),
        ("settle_date", "20130631"),
    ],
)
def test_malformed_field_hides_no_other(name, text):
    """Its text is kept in ``extra``; all other fields are read."""
    refund = RefundRecord.from_dict(SAMPLE | {name: text})
    assert getattr(refund, name) is None
    assert refund.extra == {name: text}
    assert refund.sta_refund is RefundStatus.SUCCESS
    assert refund.raw[name] == text


def test_unknown_fields_are_kept():
    """A new field of LianLian is in ``extra``, even an empty one; the signature is only in ``raw``."""
    refund = Refund.from_dict(SAMPLE | {"memo": "x", "blank": "", "sta_refund": "7"})
    assert refund.extra == {"memo": "x", "blank": ""}
    assert refund.sta_refund == "7"
    assert not refund.is_final
    assert refund.raw["sign"] == SAMPLE["sign"]


@given(
    st.dictionaries(st.sampled_from([*SAMPLE, "extra", "raw", "trader_refund", "memo"]), st.text())
    | st.dictionaries(st.text(), st.text())
)
def test_any_mapping_of_strings_is_a_refund_and_nothing_is_lost(data):
    """No answer raises; the received mapping is returned, also after JSON and pickling."""
    refund = RefundRecord.from_dict(data)
    assert isinstance(refund, Refund) is (refund.no_refund is not None and refund.money_refund is not None)
    assert refund.to_dict() == data
    assert RefundRecord.from_dict(refund.to_dict()) == refund
    for twin in (pickle.loads(pickle.dumps(refund)), copy.deepcopy(refund), copy.copy(refund)):
        assert twin == refund
        assert hash(twin) == hash(refund)
        assert (twin.extra, twin.raw, twin.trader_refund) == (refund.extra, data, refund.trader_refund)


def test_a_refund_made_by_hand_survives_pickling():
    """A refund that was constructed in a test is equal after pickling."""
    refund = Refund(no_refund="R-1", sta_refund=RefundStatus("7"), money_refund=Decimal("1.00"), extra={"a": "b"})
    for twin in (pickle.loads(pickle.dumps(refund)), copy.deepcopy(refund), attrs.evolve(refund)):
        assert twin == refund
        assert twin.extra == {"a": "b"}


@pytest.mark.parametrize("value", [0, 2, 200.01, 20170801, True, Decimal("200.01"), b"2", ["2"]], ids=repr)
@pytest.mark.parametrize("name", ["no_refund", "money_refund", "sta_refund", "settle_date", "rate", "memo"])
@pytest.mark.parametrize("read", [Refund.from_dict, RefundRecord.from_dict])
def test_a_value_of_a_record_that_is_not_a_string_is_refused(read, name, value):
    """A number in JSON from another program, such as a status, is neither ignored nor a TypeError."""
    problem = problems_of(lambda: read(SAMPLE | {name: value}))[name]
    assert problem.rule == "must be a str"
    assert read(SAMPLE | {name: None}, SAMPLE) == read(SAMPLE | {name: ""}, SAMPLE)


def test_the_received_mapping_is_read_only_and_a_copy():
    """Neither the refund's mappings nor the received one can be changed through the refund."""
    data = dict(SAMPLE, memo="x")
    refund = Refund.from_dict(data)
    data.clear()
    refund.to_dict().clear()
    assert refund.raw["no_refund"] == SAMPLE["no_refund"]
    for twin in (refund, pickle.loads(pickle.dumps(refund)), RefundRecord(raw={"a": "b"}, extra={"a": "b"})):
        assert isinstance(twin.raw, MappingProxyType)
        assert isinstance(twin.extra, MappingProxyType)


def test_two_records_of_one_refund_are_equal_whatever_their_signature():
    """Equality compares the refund, not the message."""
    assert Refund.from_dict(SAMPLE) == Refund.from_dict(SAMPLE | {"sign": "other", "memo": "x"})
    assert Refund.from_dict(SAMPLE) != Refund.from_dict(SAMPLE | {"sta_refund": "3"})


def test_a_refund_shows_no_signature():
    """The repr shows the refund without its signature."""
    assert "ZPZU" not in repr(Refund.from_dict(SAMPLE))
    assert "2013051500001" in repr(Refund.from_dict(SAMPLE))


def test_query_of_a_refund():
    """The query has the merchant's number, or LianLian's number if there is no other."""
    assert Refund.from_dict(SAMPLE).query() == RefundQuery(no_refund="2013051500001", dt_refund="20130515094018")
    alone = RefundRecord.from_dict({"oid_refundno": "2013051613121201", "dt_refund": "20130515094018"})
    assert alone.query() == RefundQuery(oid_refundno="2013051613121201", dt_refund="20130515094018")


def test_the_request_supplies_what_a_record_lacks():
    """``raw`` shows the record as received, and its own values come first."""
    data = {"ret_code": "0000", "dt_refund": "", "money_refund": "200.010"}
    asked = {**MINIMAL, "money_refund": "200.01", "dt_refund": "20170801225714", "trader_refund": "T"}
    refund = Refund.from_dict(data, asked)
    assert (refund.no_refund, refund.dt_refund, refund.trader_refund) == (MINIMAL["no_refund"], NOW, "T")
    assert (refund.to_dict(), refund.ret_code, refund.extra) == (data, "0000", {})
    assert refund.identity() == {name: text for name, text in asked.items() if name != "no_order"}
    assert Refund.from_dict(SAMPLE, asked).no_refund == SAMPLE["no_refund"]


def test_an_amount_that_equals_the_request_s_is_read():
    """``check_identity`` compares by value, so every amount that it accepts must be readable."""
    refund = RefundRecord.from_dict(SAMPLE | {"money_refund": "0000000088.0000"})
    assert (refund.money_refund, refund.extra) == (Decimal("88.00"), {})


def test_a_refund_has_number_and_amount():
    """A record without them is not a Refund."""
    assert type(RefundRecord.from_dict(SAMPLE)) is Refund
    assert type(RefundRecord.from_dict({"no_refund": "R-1"})) is RefundRecord
    assert set(problems_of(lambda: Refund.from_dict({"money_refund": "x"}))) == {"no_refund", "money_refund"}


def test_query_of_a_refund_without_dt_refund():
    """Answers of the domestic product have no dt_refund; the query uses the request's."""
    data = {name: text for name, text in SAMPLE.items() if name != "dt_refund"}
    asked = {"dt_refund": "20170801225714"}
    assert Refund.from_dict(data, asked).query().dt_refund == NOW
    assert Refund.from_dict(SAMPLE, asked).query().dt_refund != NOW
    assert set(problems_of(Refund.from_dict(data).query)) == {"dt_refund"}
    assert set(problems_of(RefundRecord.from_dict({}, asked).query)) == {"no_refund"}
