"""Wire formats: strict JSON, exact amounts, timestamps in China Standard Time."""

import json
import string
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Clamped, Context, Decimal, Inexact, InvalidOperation, Rounded, Subnormal, localcontext
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lianlian_async import wire
from lianlian_async.errors import MalformedMessage
from tests.support.strategies import moments, texts

texts_with_surrogates = st.text(st.characters())
messages = st.dictionaries(texts, texts).filter(lambda fields: "\0" not in "".join((*fields, *fields.values())))
CST = wire.CHINA_STANDARD_TIME


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────


@given(messages)
def test_round_trip_of_fields(fields):
    """Encoded strings are decoded again, in the same order."""
    assert list(wire.decode(wire.encode(fields)).items()) == list(fields.items())


@given(messages)
def test_another_json_implementation_reads_the_same(fields):
    """Another implementation decodes our JSON; we decode its escaped JSON of the same fields."""
    assert json.loads(wire.encode(fields)) == fields
    assert wire.decode(json.dumps(fields, indent=1).encode()) == fields


def test_the_encoding_is_compact_utf8_in_the_order_given():
    """No blanks, no escapes for Chinese, no sorting."""
    assert wire.encode({"b": "退款", "a": "1"}) == '{"b":"退款","a":"1"}'.encode()


def test_a_read_only_mapping_is_encoded():
    """Every mapping is accepted, such as a refund's read-only one."""
    assert wire.encode(MappingProxyType({"a": "1"})) == b'{"a":"1"}'


@given(st.binary() | texts_with_surrogates.map(lambda text: text.encode(errors="surrogatepass")))
def test_any_bytes_are_a_message_or_malformed(body):
    """Every input gives a dict of strings or MalformedMessage."""
    try:
        fields = wire.decode(body)
    except MalformedMessage:
        return
    assert all(isinstance(part, str) for pair in fields.items() for part in pair)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts_with_surrogates,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(string.printable), json_values, max_size=4), st.booleans())
def test_any_json_object_is_encodable_strings_or_malformed(message, ascii_only):
    """What is decoded can be encoded again: no lone surrogate gets through, whether escaped or raw."""
    try:
        fields = wire.decode(json.dumps(message, ensure_ascii=ascii_only).encode(errors="surrogatepass"))
    except MalformedMessage:
        return
    assert wire.decode(wire.encode(fields)) == fields
    assert fields.keys() == {key for key, value in message.items() if value is not None}


@pytest.mark.parametrize("number", ["200.01", "200.10", "1", "-0", "1e2", "1E-400", "123456789012345678901234567890"])
def test_a_number_keeps_its_literal_text(number):
    """A number is read as its literal text, because the signature covers that text."""
    assert wire.decode(f'{{"money_refund": {number}}}'.encode()) == {"money_refund": number}


def test_a_number_of_any_length_is_text():
    """Python's limit on the digits of an integer does not matter."""
    assert wire.decode(b'{"a":' + b"9" * 10_000 + b"}") == {"a": "9" * 10_000}


def test_null_is_like_an_absent_field():
    """A field whose value is null is dropped."""
    assert wire.decode(b'{"a": null, "b": "", "c": "null"}') == {"b": "", "c": "null"}


def test_surrounding_white_space_is_accepted():
    """White space before and after the object is allowed."""
    assert wire.decode(b' \r\n\t{"a":"b"}\n') == {"a": "b"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not JSON"),
        (b"<html>busy</html>", "not JSON"),
        (b'{"a":"b"', "not JSON"),
        (b'{"a":"b"}{}', "not JSON: Extra data at character 9"),
        (b'{"a":"\n"}', "not JSON"),
        (b'\xef\xbb\xbf{"a":"b"}', "not JSON"),
        (b'{"a":"\xff"}', "not UTF-8"),
        (b'{"a":"\xed\xa0\x80"}', "not UTF-8"),
        ('{"a":"b"}'.encode("utf-16"), "not UTF-8"),
        (b"[]", "not a JSON object"),
        (b'"a"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"1", "not a JSON object"),
        (b'{"a":true}', "the value of 'a' is not a string"),
        (b'{"a":"b","c":[]}', "the value of 'c' is not a string"),
        (b'{"a":{}}', "the value of 'a' is not a string"),
        (b'{"a":NaN}', "NaN is not a JSON value"),
        (b'{"a":Infinity}', "Infinity is not a JSON value"),
        (b'{"a":-Infinity}', "-Infinity is not a JSON value"),
        (b'{"a":"1","a":"1"}', "duplicate key"),
        (b'{"a":"1","\\u0061":"2"}', "duplicate key"),
        (b'{"a":null,"a":"2"}', "duplicate key"),
        (b'{"a":"\\ud800"}', "lone surrogate"),
        (b'{"a":"1\\u0000"}', "a string contains NUL"),
        (b'{"\\u0000":"a"}', "a string contains NUL"),
        (b'{"\\udfff":"a"}', "lone surrogate"),
        (b'{"a":"\\udc00\\ud800"}', "lone surrogate"),
        (b'{"a":"\\ud83d","b":"\\ude00"}', "lone surrogate"),
        pytest.param(b"[" * 60_000, "nested too deeply", id="sixty thousand lists"),
        pytest.param(b'{"a":' * 12_000, "nested too deeply", id="twelve thousand objects"),
    ],
)
def test_malformed_messages(body, reason):
    """Anything but a flat object of strings with unique keys is refused, and the error states the reason."""
    with pytest.raises(MalformedMessage, match=reason):
        wire.decode(body)


def test_a_pair_of_surrogates_is_one_character():
    """An escaped surrogate pair is read as one character."""
    assert wire.decode(b'{"\\ud83d\\ude00":"\\ud83d\\ude00"}') == {"😀": "😀"}


def test_the_size_limit_is_64_kibibytes():
    """A message of exactly 64 KiB is read, one byte more is not."""
    overhead = len(wire.encode({"a": ""}))
    text = "x" * (wire.MAX_MESSAGE_BYTES - overhead)
    assert wire.decode(wire.encode({"a": text})) == {"a": text}
    with pytest.raises(MalformedMessage, match="longer than 65536 bytes"):
        wire.decode(wire.encode({"a": text + "x"}))


@pytest.mark.parametrize("body", [b'{"k": ["secret value"]}', b'{"k": "secret value", "k": 1}', b'{"k": "secret value'])
def test_a_malformed_message_shows_no_values(body):
    """The error does not quote the message."""
    with pytest.raises(MalformedMessage) as caught:
        wire.decode(body)
    assert "secret" not in str(caught.value)


def test_a_long_key_is_shortened():
    """An error quotes only the beginning of a key."""
    with pytest.raises(MalformedMessage) as caught:
        wire.decode(json.dumps({"k" * 5000: True}).encode())
    assert len(str(caught.value)) < 100


# ── money ────────────────────────────────────────────────────────────────────────────────────────

amounts = st.decimals(Decimal("0.01"), Decimal("100000000.00"), places=2)


@given(amounts)
def test_round_trip_of_amounts(amount):
    """From 0.01 to 100,000,000.00 every fen is kept, and the text is at most 12 characters long with two decimals."""
    text = wire.format_money(wire.parse_money(amount))
    assert wire.parse_money(text) == amount
    assert len(text) <= 12
    assert text[-3] == "."


@given(amounts)
def test_the_callers_decimal_context_does_not_matter(amount):
    """Even with one digit of precision and every trap set, an amount stays exact."""
    expected = f"{amount:.2f}"
    traps = [Inexact, Rounded, Clamped, InvalidOperation, Subnormal]
    with localcontext(Context(prec=1, Emin=-1, Emax=1, traps=traps)):
        assert wire.format_money(wire.parse_money(amount)) == expected
        assert wire.format_money(wire.parse_money(expected)) == expected
    assert wire.parse_decimal(expected) == amount


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1.00"),
        (100_000_000, "100000000.00"),
        ("200.01", "200.01"),
        ("200.1", "200.10"),
        ("007", "7.00"),
        (Decimal("0.01"), "0.01"),
        (Decimal("1E+3"), "1000.00"),
        (Decimal("2.5"), "2.50"),
        (Decimal("200.0100"), "200.01"),
        (Decimal("1.000"), "1.00"),
        ("88.000", "88.00"),
        ("0.1", "0.10"),
        ("0.1000", "0.10"),
    ],
)
def test_amounts_are_written_with_two_decimals(value, text):
    """Decimals, integers and plain digits are taken, and always written with two decimals."""
    amount = wire.parse_money(value)
    assert wire.format_money(amount) == str(amount) == text


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (200.01, "a float cannot represent"),
        (200.0, "a float cannot represent"),
        (float("nan"), "a float cannot represent"),
        (True, "a float cannot represent"),
        (None, "must be a Decimal"),
        (b"1.00", "must be a Decimal"),
        (Decimal("NaN"), "finite"),
        (Decimal("sNaN"), "finite"),
        (Decimal("Infinity"), "finite"),
        (Decimal("-Infinity"), "finite"),
        (Decimal("1.001"), "at most 2 decimals"),
        (Decimal("200.010" + "0" * 50 + "1"), "at most 2 decimals"),
        (Decimal("0.001"), "between 0.01"),
        (Decimal("1E-1000000"), "between 0.01"),
        (Decimal("0.00"), "between 0.01"),
        (Decimal(-1), "between 0.01"),
        (Decimal("100000000.01"), "between 0.01"),
        (Decimal("1E+1000000"), "between 0.01"),
        (0, "between 0.01"),
        (-1, "between 0.01"),
        (100_000_001, "between 0.01"),
        pytest.param(10**5000, "between 0.01", id="a number of 5001 digits"),
        ("0.00", "between 0.01"),
        ("100000000.01", "between 0.01"),
        ("", "must be digits"),
        ("1.234", "must be digits"),
        ("1.0001", "must be digits"),
        ("1,000.00", "must be digits"),
        ("1e2", "must be digits"),
        ("+1.00", "must be digits"),
        ("-1.00", "must be digits"),
        (" 1.00", "must be digits"),
        ("1.00\n", "must be digits"),
        ("1.", "must be digits"),
        (".50", "must be digits"),
        ("１.00", "must be digits"),
        ("NaN", "must be digits"),
        ("1_0", "must be digits"),
    ],
)
def test_an_amount_that_breaks_a_rule_is_refused(value, rule):
    """Amounts that need rounding, have a wrong form or are out of range are refused."""
    with pytest.raises(ValueError, match=rule):
        wire.parse_money(value)


@given(st.decimals(allow_nan=True, allow_infinity=True) | st.integers() | st.floats() | st.text())
def test_any_value_is_an_exact_amount_or_refused(value):
    """Any value is either converted exactly or refused with ValueError."""
    try:
        amount = wire.parse_money(value)
    except ValueError:
        return
    assert amount == Decimal(value)
    assert Decimal("0.01") <= amount <= Decimal(100_000_000)


@given(st.decimals(-(10**20), 10**20, places=8))
def test_a_rate_keeps_every_digit(number):
    """A plain decimal number, negative or not, is read exactly, its trailing zeros included."""
    assert f"{wire.parse_decimal(f'{number:f}'):f}" == f"{number:f}"


@pytest.mark.parametrize("text", ["", "abc", "1e5", "NaN", "Infinity", "1.", ".5", "+1", "1" * 31, "6.66\n", "６"])
def test_other_forms_of_numbers_are_refused(text):
    """Exponents, NaN, white space and non-ASCII digits are refused."""
    with pytest.raises(ValueError, match="must be a decimal number"):
        wire.parse_decimal(text)


# ── time ─────────────────────────────────────────────────────────────────────────────────────────


@given(moments)
def test_a_moment_in_any_zone_is_the_same_moment(moment):
    """Half-hour zones, daylight saving and ``fold`` are converted to the same second."""
    parsed = wire.parse_timestamp(moment)
    assert parsed.timestamp() == moment.replace(microsecond=0).timestamp()
    assert parsed.utcoffset() == timedelta(hours=8)
    assert wire.parse_timestamp(wire.format_timestamp(moment)) == parsed
    assert len(wire.format_timestamp(parsed)) == 14


def test_a_timestamp_is_china_standard_time():
    """The gateway's clock is eight hours ahead of UTC, and fractions of a second are cut off."""
    moment = datetime(2017, 8, 1, 16, 0, 0, 999_999, tzinfo=UTC)
    assert wire.format_timestamp(moment) == "20170802000000"
    assert wire.parse_timestamp(moment) == wire.parse_timestamp("20170802000000")
    assert wire.parse_timestamp(moment).microsecond == 0


@pytest.mark.parametrize("fold", [0, 1])
def test_repeated_hour_of_daylight_saving(fold):
    """In an hour that the clocks repeat, ``fold`` says which pass is meant."""

    class Falling(tzinfo):
        """A zone whose clocks go back at 02:00: with ``fold`` 1, a time from 01:00 to 02:00 is an hour later."""

        def utcoffset(self, moment):
            return timedelta(hours=1 - (moment.fold if moment else 0))

        def dst(self, moment):
            return timedelta(hours=1 - (moment.fold if moment else 0))

    moment = datetime(2026, 10, 25, 1, 30, tzinfo=Falling(), fold=fold)
    assert wire.format_timestamp(moment) == ("20261025083000", "20261025093000")[fold]


def test_a_naive_datetime_shows_the_cure():
    """A datetime without a zone is refused with the two ways to give it one."""
    with pytest.raises(ValueError, match=r"datetime\.now\(timezone\.utc\) or value\.astimezone\(\)"):
        wire.parse_timestamp(datetime.fromisoformat("2026-01-01"))


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("20170230000000", "is not a valid date and time"),
        ("20171301000000", "is not a valid date and time"),
        ("20170801240000", "is not a valid date and time"),
        ("20170801225760", "is not a valid date and time"),
        ("00000101000000", "is not a valid date and time"),
        ("09991231235959", "four digits"),
        ("2017080122571", "14 digits"),
        ("201708012257140", "14 digits"),
        ("2017080122571４", "14 digits"),
        ("2017-08-01T22:", "14 digits"),
        ("", "14 digits"),
        (20170801225714, "14 digits"),
        (date(2017, 8, 1), "14 digits"),
        (None, "14 digits"),
        (datetime.max.replace(tzinfo=UTC), "is out of range in China Standard Time"),
        (datetime.min.replace(tzinfo=timezone(timedelta(hours=14))), "is out of range in China Standard Time"),
        (datetime.min.replace(tzinfo=UTC), "four digits"),
    ],
)
def test_unusable_moments_are_refused(value, rule):
    """Invalid dates, other types, and years that 14 digits cannot represent are refused."""
    with pytest.raises(ValueError, match=rule):
        wire.parse_timestamp(value)


def test_first_and_last_second():
    """The earliest and the latest moment with 14 digits are read and written."""
    assert wire.format_timestamp(wire.parse_timestamp("10000101000000")) == "10000101000000"
    last = datetime.max.replace(tzinfo=CST)
    assert wire.format_timestamp(wire.parse_timestamp(last)) == "99991231235959"


@given(st.dates(date(1000, 1, 1)))
def test_a_settlement_date_is_eight_digits(day):
    """Every date that eight digits write is read as that date."""
    assert wire.parse_date(day.strftime("%Y%m%d")) == day


@pytest.mark.parametrize("text", ["", "2013062", "201306270", "20130631", "00000101", "2013-6-7", "２0130627"])
def test_unusable_dates_are_refused(text):
    """Text that is not a valid date in eight digits is refused."""
    with pytest.raises(ValueError):
        wire.parse_date(text)
