"""The sans-IO protocol: outgoing fields and signatures; strict reading of any HTTP response without an exception."""

from __future__ import annotations

import gzip
import json

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lianlian_async import (
    AnswerMismatch,
    GatewayUnavailable,
    InvalidRequest,
    LianLianError,
    MalformedMessage,
    Merchant,
    QueryRejected,
    RefundConflict,
    RefundNotFound,
    RefundNotSent,
    RefundQuery,
    RefundRejected,
    RefundStatus,
    SignatureInvalid,
    wire,
)
from lianlian_async.codes import CODES, CodeClass
from lianlian_async.errors import Problem
from lianlian_async.exchange import Call, Finding, HttpResponse, NoResponse, Reply
from lianlian_async.identity import check_identity, check_request, has_whole_identity
from lianlian_async.merchant import Keys
from lianlian_async.protocol import Protocol
from lianlian_async.signing import signature_source
from tests.support import exchanges, keypairs
from tests.support.notices import notification
from tests.support.parties import EPOCH, OID_PARTNER, as_json, made, refund_request, sealed

MERCHANT, GATEWAY, STRANGER = keypairs.pair("merchant"), keypairs.pair("gateway"), keypairs.pair("stranger")
PROTOCOL = Protocol(
    Merchant(
        oid_partner=OID_PARTNER,
        private_key=MERCHANT.private,
        gateway_public_keys=[GATEWAY.public],
        notify_url="https://shop.example/lianlian/refund",
    ),
    Keys(MERCHANT.private, (GATEWAY.public,)),
)
JSON = {"content-type": "application/json;charset=utf-8"}


def exchange(call, fields=None):
    fields = (
        fields
        or {
            Call.APPLY: PROTOCOL.apply_fields(refund_request()),
            Call.QUERY: PROTOCOL.query_fields(refund_request().query()),
        }[call]
    )
    return exchanges.exchange(call, asked=fields)


APPLY, QUERY = exchange(Call.APPLY), exchange(Call.QUERY)
both_calls = pytest.mark.parametrize("asking", [APPLY, QUERY], ids=["apply", "query"])


def read(asking, fields, *, status=200, headers=JSON, protocol=PROTOCOL):
    body = fields if isinstance(fields, bytes) else as_json(fields)
    return protocol.read(asking, HttpResponse(status, headers, body))


def assert_uncertain(reply, error, *, verified=False):
    assert (reply.finding, reply.verified) == (Finding.UNCERTAIN, verified)
    assert reply.refund is None
    assert type(reply.error) is error


# ── out ──────────────────────────────────────────────────────────────────────────────────────────


def test_fields_of_an_apply_call():
    """An apply call has the documented fields in wire form, with the merchant's number and default notify_url."""
    assert APPLY.asked == {
        "oid_partner": OID_PARTNER,
        "sign_type": "RSA",
        "no_refund": "R-1",
        "dt_refund": "20260105160000",
        "money_refund": "10.00",
        "no_order": "O-1",
        "dt_order": "20260102160000",
        "notify_url": "https://shop.example/lianlian/refund",
    }


def test_notify_url_of_the_request_overrides_the_merchants():
    """The gateway gets the request's own notify_url."""
    request = refund_request(notify_url="https://shop.example/other")
    assert PROTOCOL.apply_fields(request)["notify_url"] == "https://shop.example/other"


def test_notify_url_is_required():
    """If neither request nor merchant has a notify_url, InvalidRequest is raised before anything is signed."""
    protocol = PROTOCOL._replace(merchant=attrs.evolve(PROTOCOL.merchant, notify_url=None))
    with pytest.raises(InvalidRequest) as caught:
        protocol.apply_fields(refund_request())
    problem = Problem("notify_url", "is required, in the request or in the Merchant", "neither")
    assert caught.value.problems == (problem,)


def test_fields_of_a_query_call():
    """A query call has the documented fields."""
    asked = PROTOCOL.query_fields(RefundQuery(oid_refundno="2013051613121201", dt_refund=EPOCH))
    assert asked == {
        "oid_partner": OID_PARTNER,
        "sign_type": "RSA",
        "dt_refund": "20260105160000",
        "oid_refundno": "2013051613121201",
    }


@both_calls
def test_merchant_signs_all_fields(asking):
    """The sealed bytes are the fields and a signature that the merchant's public key verifies."""
    sent = wire.decode(PROTOCOL.seal(asking.asked))
    signature = sent.pop("sign")
    assert sent == asking.asked
    assert MERCHANT.public.verify(signature_source(sent), signature)


# ── in: success ──────────────────────────────────────────────────────────────────────────────────


@both_calls
def test_signed_matching_answer_is_the_refund(asking):
    """A validly signed 0000 that matches the request is FOUND, with every field typed."""
    fields = made(asking.asked, extra_field="kept")
    reply = read(asking, fields)
    assert (reply.finding, reply.verified) == (Finding.FOUND, True)
    assert reply.error is None
    assert reply.refund.no_refund == "R-1"
    assert reply.refund.sta_refund is RefundStatus.INITIALIZED
    assert reply.refund.extra == {"extra_field": "kept"}
    assert reply.refund.raw == fields


def test_the_request_supplies_the_dt_refund_that_an_answer_lacks():
    """Answers of the domestic product have no dt_refund; ``raw`` shows the answer."""
    refund = read(APPLY, made(APPLY.asked, dt_refund=None)).refund
    assert (refund.dt_refund, "dt_refund" in refund.raw) == (refund_request().dt_refund, False)
    assert refund.query() == refund_request().query()


@pytest.mark.parametrize("text", ["10.00", "10.0", "10", "10.000"])
def test_money_is_compared_by_value(text):
    """10.0 and 10.00 are the same amount."""
    assert read(APPLY, made(APPLY.asked, money_refund=text)).finding is Finding.FOUND


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("oid_partner", "201304121000001004"),
        ("oid_partner", ""),
        ("oid_partner", None),
        ("no_refund", "R-2"),
        ("no_refund", "r-1"),
        ("no_refund", ""),
        ("no_refund", None),
    ],
)
@both_calls
def test_signed_success_about_another_refund_is_uncertain(asking, field, text):
    """A signed answer with another merchant or refund, or without any, is UNCERTAIN."""
    reply = read(asking, made(asking.asked, **{field: text}))
    assert_uncertain(reply, AnswerMismatch, verified=True)
    assert reply.error.field == field
    assert (reply.error.asked, reply.error.answered) == (asking.asked[field], text or None)


@pytest.mark.parametrize("text", ["", "ten", None, "1E+1"])
def test_signed_apply_success_needs_a_readable_amount(text):
    """The success of an apply call must repeat the amount."""
    reply = read(APPLY, made(APPLY.asked, money_refund=text))
    assert_uncertain(reply, AnswerMismatch, verified=True)
    assert (reply.error.field, reply.error.asked) == ("money_refund", "10.00")
    assert reply.error.answered == (text or None)


@pytest.mark.parametrize("text", ["10.01", "11.00", "1.00", "10.001"])
def test_a_signed_success_with_another_amount_is_a_conflict(text):
    """The gateway uses the number for another refund: the error contains the gateway's record."""
    reply = read(APPLY, made(APPLY.asked, money_refund=text))
    assert (reply.finding, reply.refund, reply.verified) == (Finding.CONFLICT, None, True)
    assert (reply.error.field, reply.error.ours, reply.error.theirs) == ("money_refund", "10.00", text)
    assert reply.error.no_refund == APPLY.asked["no_refund"]
    assert reply.error.record["money_refund"] == text


@both_calls
def test_a_signed_success_with_another_time_is_a_conflict(asking):
    """A gateway that repeats its first answer to a reused number has not made the second refund."""
    reply = read(asking, made(asking.asked, dt_refund="20260105160001"))
    assert (reply.finding, reply.error.field) == (Finding.CONFLICT, "dt_refund")
    assert reply.error.no_refund == asking.asked["no_refund"]


@both_calls
@pytest.mark.parametrize("text", ["yesterday", "20260199000000"])
def test_signed_success_with_an_unreadable_time_is_uncertain(asking, text):
    """An unreadable dt_refund proves neither this refund nor another one."""
    reply = read(asking, made(asking.asked, dt_refund=text))
    assert_uncertain(reply, AnswerMismatch, verified=True)
    assert reply.error.field == "dt_refund"
    assert (reply.error.asked, reply.error.answered) == (asking.asked["dt_refund"], text)


@pytest.mark.parametrize("text", ["10.01", None])
def test_query_accepts_any_amount(text):
    """A query has no amount, so the answer may have any amount."""
    assert read(QUERY, made(QUERY.asked, money_refund=text)).finding is Finding.FOUND


@pytest.mark.parametrize("trader", [None, "201304121000001004"])
def test_later_query_repeats_trader_refund(trader):
    """trader_refund is in both calls, and in a query that is made from the answer."""
    request = refund_request(trader_refund=trader)
    apply, query = PROTOCOL.apply_fields(request), PROTOCOL.query_fields(request.query())
    assert apply.get("trader_refund") == query.get("trader_refund") == trader
    asking = exchange(Call.APPLY, apply)
    assert read(asking, made(asking.asked)).refund.query() == request.query()


def test_query_by_oid_refundno():
    """The answer must repeat oid_refundno; it may have any no_refund."""
    asking = exchange(Call.QUERY, PROTOCOL.query_fields(RefundQuery(oid_refundno="2013051613121201", dt_refund=EPOCH)))
    assert read(asking, made(asking.asked)).finding is Finding.FOUND
    assert_uncertain(read(asking, made(asking.asked, oid_refundno="2013051613121202")), AnswerMismatch, verified=True)
    assert_uncertain(read(asking, made(asking.asked, oid_refundno=None)), AnswerMismatch, verified=True)
    missing = read(asking, {"ret_code": "8901"}).error
    assert (missing.no_refund, missing.oid_refundno) == (None, "2013051613121201")


def test_query_by_both_numbers():
    """The answer must repeat one of the two numbers, and contradict neither."""
    query = RefundQuery(no_refund="R-1", oid_refundno="2013051613121201", dt_refund=EPOCH)
    asking = exchange(Call.QUERY, PROTOCOL.query_fields(query))
    assert read(asking, made(asking.asked, no_refund=None)).finding is Finding.FOUND
    assert read(asking, made(asking.asked, oid_refundno="")).finding is Finding.FOUND
    assert_uncertain(read(asking, made(asking.asked, oid_refundno="2013051613121202")), AnswerMismatch, verified=True)
    assert_uncertain(read(asking, made(asking.asked, no_refund=None, oid_refundno=None)), AnswerMismatch, verified=True)


@pytest.mark.parametrize(
    ("asked", "recorded", "named"),
    [("R-1", None, "R-1"), (None, "R-2", "R-2"), (None, None, "2013051613121201"), (None, "", "2013051613121201")],
)
def test_a_conflict_names_our_number_or_the_recorded_one(asked, recorded, named):
    """Our no_refund is named first, then the record's, then the oid_refundno of the query."""
    query = RefundQuery(no_refund=asked, oid_refundno="2013051613121201", dt_refund=EPOCH)
    asking = exchange(Call.QUERY, PROTOCOL.query_fields(query))
    reply = read(asking, made(asking.asked, no_refund=recorded, dt_refund="20260105160001"))
    assert reply.finding is Finding.CONFLICT
    assert reply.error.no_refund == named


def test_a_conflict_without_any_number_names_none():
    """Only dt_refund is on both sides."""
    with pytest.raises(RefundConflict) as caught:
        check_identity({"dt_refund": "20260105160000"}, {"dt_refund": "20260105160001"})
    assert caught.value.no_refund == ""


@pytest.mark.parametrize("missing", ["no_refund", "dt_refund", "money_refund"])
def test_a_whole_identity_has_all_three_fields(missing):
    """An empty field counts as missing."""
    assert has_whole_identity(APPLY.asked)
    assert not has_whole_identity({**APPLY.asked, missing: ""})
    assert not has_whole_identity({name: text for name, text in APPLY.asked.items() if name != missing})


@pytest.mark.parametrize(
    ("ours", "theirs", "field", "values"),
    [
        ({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "5", "c": "6"}, "b", ("2", "5")),
        ({"a": "1", "b": "2"}, {"a": "1"}, "b", ("2", "nothing")),
        ({"a": "1"}, {"a": "1", "b": "2"}, "b", ("nothing", "2")),
    ],
)
def test_request_conflict_names_the_first_different_field(ours, theirs, field, values):
    """The value of an absent field is "nothing"."""
    with pytest.raises(RefundConflict) as caught:
        check_request("R-1", ours, theirs)
    conflict = caught.value
    assert (conflict.no_refund, conflict.field, conflict.record) == ("R-1", field, None)
    assert (conflict.ours, conflict.theirs) == values


def test_equal_requests_have_no_conflict():
    """The order of the fields does not matter, and ``notify_url`` may differ."""
    check_request("R-1", {"a": "1", "b": "2", "notify_url": "https://a"}, {"b": "2", "a": "1"})


# ── in: signatures ───────────────────────────────────────────────────────────────────────────────


@both_calls
@pytest.mark.parametrize("ret_code", sorted(CODES))
def test_no_answer_with_a_wrong_signature_is_believed(asking, ret_code):
    """An answer with a signature of another key proves nothing, whatever its code."""
    fields = {**made(asking.asked), "ret_code": ret_code}
    assert_uncertain(read(asking, sealed(fields, STRANGER.private)), SignatureInvalid)


@both_calls
@pytest.mark.parametrize("signature", ["", None, "AAAA", "not base64!", "é"])
def test_a_success_without_a_usable_signature_is_not_believed(asking, signature):
    """A 0000 must be signed."""
    fields = {**made(asking.asked), "sign": signature}
    assert_uncertain(
        read(asking, as_json({name: text for name, text in fields.items() if text is not None})), SignatureInvalid
    )


@both_calls
@pytest.mark.parametrize(
    ("unsigned", "said"),
    [
        ({"bank_name": "x"}, "valid without the undocumented fields 'bank_name'"),
        ({"card_no": "6", "agreement_list": "[]"}, "without the undocumented fields 'agreement_list', 'card_no'"),
        ({"rate": "1.0"}, "invalid signature: no gateway key verifies it"),
    ],
)
def test_unsigned_field_is_named_in_the_error(asking, unsigned, said):
    """If only undocumented fields are not signed, the error names them, and the answer is not believed."""
    reply = read(asking, {**made(asking.asked), **unsigned})
    assert_uncertain(reply, SignatureInvalid)
    advice = "LianLian probably did not sign them: report this to LianLian's support"
    assert str(reply.error).endswith((said, f"{said}. {advice}"))


def test_an_undocumented_field_does_not_explain_the_signature_of_another_key():
    """The error names unsigned fields only if the signature is valid without them."""
    reply = read(APPLY, {**made(APPLY.asked, STRANGER.private), "bank_name": "x"})
    assert_uncertain(reply, SignatureInvalid)
    assert str(reply.error) == "answer 0000 has an invalid signature: no gateway key verifies it"


def test_at_most_eight_undocumented_fields_are_named_in_part():
    """The error stays short, whatever the answer contains."""
    names = [f"{letter}" * 40 for letter in "abcdefghij"]
    reply = read(APPLY, {**made(APPLY.asked), **dict.fromkeys(names, "x")})
    listed = ", ".join(repr(name[:32]) for name in names[:8])
    assert f"without the undocumented fields {listed}. LianLian" in str(reply.error)


def test_both_keys_of_a_rotation_are_known():
    """During a rotation, answers with a signature of either key are believed, and of no other key."""
    rotating = PROTOCOL._replace(keys=Keys(MERCHANT.private, (STRANGER.public, GATEWAY.public)))
    fields = {name: text for name, text in made(APPLY.asked).items() if name not in ("sign", "sign_type")}
    for key, known in (
        (GATEWAY.private, Finding.FOUND),
        (STRANGER.private, Finding.FOUND),
        (MERCHANT.private, Finding.UNCERTAIN),
    ):
        assert read(APPLY, sealed(fields, key), protocol=rotating).finding is known


@both_calls
def test_no_flipped_bit_of_a_success_is_believed(asking):
    """A single flipped bit in a signed success makes it uncertain, unless its fields are the same."""
    fields = made(asking.asked)
    body = as_json(fields)
    believed = 0
    for position in range(len(body)):
        for bit in range(8):
            flipped = bytearray(body)
            flipped[position] ^= 1 << bit
            reply = read(asking, bytes(flipped))
            if reply.finding is Finding.FOUND:
                believed += 1
                # base64 has spare bits: the same signature may be spelled in several ways.
                assert {**reply.refund.raw, "sign": ""} == {**fields, "sign": ""}
            else:
                assert reply.finding is not Finding.NOT_SENT
    assert believed < 8


# ── in: every code ───────────────────────────────────────────────────────────────────────────────

TAUGHT = {
    # class: the finding of an apply call, the finding of a query
    CodeClass.REJECTED: (Finding.REJECTED, Finding.REJECTED),
    CodeClass.DUPLICATE: (Finding.EXISTS, Finding.UNCERTAIN),
    CodeClass.IN_PROGRESS: (Finding.EXISTS, Finding.UNCERTAIN),
    CodeClass.NOT_FOUND: (Finding.UNCERTAIN, Finding.NOT_FOUND),
    CodeClass.UNCERTAIN: (Finding.UNCERTAIN, Finding.UNCERTAIN),
}
ERRORS = {
    Finding.REJECTED: (RefundRejected, QueryRejected),
    Finding.NOT_FOUND: (None, RefundNotFound),
    Finding.EXISTS: (RefundRejected, None),
    Finding.UNCERTAIN: (GatewayUnavailable, GatewayUnavailable),
}


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@both_calls
@pytest.mark.parametrize("ret_code", [*sorted(set(CODES) - {"0000"}), "7777", "0", "00000"])
def test_every_code_leads_to_the_finding_of_its_class(asking, ret_code, signed):
    """Each known and unknown error code has the finding of the table for its call, signed or not."""
    call = (Call.APPLY, Call.QUERY).index(asking.call)
    kind = CODES[ret_code].kind if ret_code in CODES else CodeClass.UNCERTAIN
    answer = {"ret_code": ret_code, "ret_msg": "原因"}
    reply = read(asking, sealed(answer) if signed else answer)
    assert reply.finding is TAUGHT[kind][call]
    assert reply.refund is None
    assert reply.verified is signed
    assert type(reply.error) is ERRORS[reply.finding][call]
    assert reply.error.ret_code == ret_code
    assert "原因" in str(reply.error)
    if reply.finding in (Finding.REJECTED, Finding.NOT_FOUND):
        assert reply.error.verified is signed
        assert reply.error.ret_msg == "原因"
        assert reply.error.no_refund == "R-1"
    if reply.finding is Finding.REJECTED:
        row = CODES[ret_code]
        assert reply.error.meaning == row.meaning
        assert reply.error.is_configuration is row.is_configuration
        assert (reply.error.may_pass, reply.error.stops_batch) == (row.may_pass, row.stops_batch)


def test_rejection_without_ret_msg():
    """An answer with only a code is read by its code."""
    reply = read(APPLY, {"ret_code": "5007"})
    assert reply.finding is Finding.REJECTED
    assert reply.error.ret_msg == ""


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@both_calls
@pytest.mark.parametrize(("field", "text"), [("no_refund", "R-2"), ("oid_partner", "201304121000001004")])
def test_refusal_of_another_refund_is_uncertain(asking, field, text, signed):
    """An error answer that names another merchant or refund proves nothing."""
    answer = {"ret_code": "5007", "ret_msg": "", field: text}
    assert_uncertain(read(asking, sealed(answer) if signed else answer), AnswerMismatch, verified=signed)


def test_empty_field_is_like_an_absent_one():
    """An error answer with empty identity fields is not about another refund: the signature omits them, too."""
    answer = {"ret_code": "8901", "ret_msg": "没有记录", "no_refund": "", "oid_partner": ""}
    assert read(QUERY, sealed(answer)).finding is Finding.NOT_FOUND


# ── in: malformed answers ────────────────────────────────────────────────────────────────────────


@both_calls
@pytest.mark.parametrize("status", [100, 201, 204, 302, 400, 401, 404, 429, 500, 502, 503, 504])
def test_only_status_200_is_an_answer(asking, status):
    """A valid answer under another HTTP status proves nothing: it may come from a proxy."""
    assert_uncertain(read(asking, made(asking.asked), status=status), MalformedMessage)
    assert_uncertain(read(asking, {"ret_code": "5007"}, status=status), MalformedMessage)


@both_calls
@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "deflate", "identity, gzip", "zip", "hex", "a\0b"])
def test_a_compressed_body_is_refused(asking, encoding):
    """Compression was not requested, and nothing is decompressed: a small body could become a large one."""
    body = gzip.compress(as_json(made(asking.asked)))
    reply = read(asking, body, headers={"content-encoding": encoding})
    assert_uncertain(reply, MalformedMessage)
    assert f"compressed ({encoding})" in str(reply.error)


@pytest.mark.parametrize("encoding", ["", "identity", "Identity", "UTF-8", "utf8", "GBK"])
def test_identity_is_no_compression(encoding):
    """A server may name identity or the character set, as LianLian's own clients do."""
    assert read(APPLY, made(APPLY.asked), headers={"content-encoding": encoding}).finding is Finding.FOUND


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b'"0000"',
        b"null",
        b"{}",
        b'{"ret_code":""}',
        b'{"ret_code":null}',
        b'{"ret_code":["0000"]}',
        b'{"ret_code":"0000","ret_code":"0000"}',
        b'{"ret_code":"0000"',
        b'{"ret_code":"\xff"}',
        b'{"ret_code":"\\ud800"}',
        b"[" * 60_000,
        b'{"ret_code":"5007"}' + b" " * wire.MAX_MESSAGE_BYTES,
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
@both_calls
def test_malformed_answers(asking, body):
    """Anything but a flat JSON object of strings with a ret_code proves nothing."""
    assert_uncertain(read(asking, body), MalformedMessage)


# ── in: no answer at all ─────────────────────────────────────────────────────────────────────────


def test_apply_call_that_was_not_sent():
    """An apply call that was not sent is RefundNotSent, with its cause."""
    cause = OSError("refused")
    reply = PROTOCOL.read(attrs.evolve(APPLY, attempt=3), NoResponse("ConnectError: refused", False, cause))
    assert reply.finding is Finding.NOT_SENT
    assert type(reply.error) is RefundNotSent
    assert (reply.error.no_refund, reply.error.attempts) == ("R-1", 3)
    assert reply.error.last_error == "ConnectError: refused"
    assert reply.error.__cause__ is cause


@pytest.mark.parametrize(
    ("asking", "may_have_arrived", "known"),
    [
        (APPLY, True, Finding.UNCERTAIN),
        (QUERY, True, Finding.UNCERTAIN),
        (QUERY, False, Finding.NOT_SENT),
    ],
)
def test_other_lost_calls(asking, may_have_arrived, known):
    """An apply call that may have arrived, and every query, ends in GatewayUnavailable."""
    reply = PROTOCOL.read(attrs.evolve(asking, attempt=2), NoResponse("ReadTimeout", may_have_arrived))
    assert reply.finding is known
    assert type(reply.error) is GatewayUnavailable
    assert reply.error.attempts == 2
    assert reply.error.last_error == "ReadTimeout"
    assert reply.error.ret_code is None


# ── Retry-After ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": " 120 "}, 120.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "9" * 400}, 999_999_999.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "1.5"}, None),
        ({"retry-after": "٣"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Mon, 05 Jan 2026 08:01:30 GMT"}, None),
    ],
)
@both_calls
def test_retry_after_is_read_in_seconds(asking, headers, seconds):
    """Anything but whole seconds is ignored."""
    for reply in (
        read(asking, b"busy", status=503, headers=headers),
        read(asking, {"ret_code": "9999"}, headers=headers),
    ):
        assert reply.finding is Finding.UNCERTAIN
        assert reply.retry_after == seconds


# ── totality ─────────────────────────────────────────────────────────────────────────────────────


def assert_lawful(asking, fields, reply):
    """Check that ``reply`` is consistent, and FOUND only with a valid signature and the right identity."""
    assert isinstance(reply, Reply)
    if reply.finding is not Finding.FOUND:
        assert isinstance(reply.error, LianLianError)
        assert str(reply.error)
        return
    raw = reply.refund.raw
    assert GATEWAY.public.verify(signature_source(raw), raw["sign"])
    assert raw["ret_code"] == "0000"
    assert raw["oid_partner"] == asking.asked["oid_partner"]
    assert raw["no_refund"] == asking.asked["no_refund"]
    if asking.call is Call.APPLY:
        assert wire.parse_money(raw["money_refund"]) == wire.parse_money(asking.asked["money_refund"])
    if fields is not None:
        assert raw == fields


headers_of_any_kind = st.dictionaries(
    st.sampled_from(["content-encoding", "retry-after", "date", "content-type", "x"]), st.text(max_size=20), max_size=4
)


@settings(max_examples=300)
@given(
    asking=st.sampled_from([APPLY, QUERY]),
    status=st.integers(100, 599) | st.just(200),
    headers=headers_of_any_kind,
    body=st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
    ),
)
def test_reading_never_raises(asking, status, headers, body):
    """Any status, headers and body give a reply; nothing unsigned gives a refund."""
    reply = PROTOCOL.read(asking, HttpResponse(status, headers, body))
    assert_lawful(asking, None, reply)
    assert reply.finding is not Finding.FOUND


def test_a_refused_notification_is_named_in_its_error():
    """The error names the message, and both merchants of another merchant's notification."""
    with pytest.raises(SignatureInvalid, match=r"^notification has an invalid signature"):
        PROTOCOL.read_notification(notification(key=STRANGER.private))
    with pytest.raises(AnswerMismatch) as caught:
        PROTOCOL.read_notification(notification(oid_partner="201601010000000002"))
    assert (caught.value.asked, caught.value.answered) == (OID_PARTNER, "201601010000000002")
    assert "oid_partner" in str(caught.value)


def test_changed_byte_of_a_notification():
    """A notification with one changed byte is refused, unless its signed content is the same."""
    genuine = notification(ret_code="0000", ret_msg="交易成功", rate="", extra="\\ 退款")
    signed, believed = signature_source(wire.decode(genuine)), 0
    for place in range(len(genuine)):
        for value in range(256):
            try:
                refund = PROTOCOL.read_notification(genuine[:place] + bytes([value]) + genuine[place + 1 :])
            except LianLianError:
                continue
            believed += 1
            assert signature_source(refund.raw) == signed
    assert believed > len(genuine)  # itself each time, and where a change is none: blanks, the empty field's name


NAMES = [*made(APPLY.asked), "settle_date", "rate", "unknown"]
texts = st.sampled_from(
    ["", "0000", "5007", "8901", "R-1", "R-2", OID_PARTNER, "10.00", "10.0", "1E1", "2", "9", "RSA", "20260105", "&a=b"]
) | st.text(max_size=12)
alterations = st.lists(st.tuples(st.sampled_from(NAMES), texts | st.none()), max_size=4)


@settings(max_examples=500)
@given(
    asking=st.sampled_from([APPLY, QUERY]),
    before=alterations,
    after=alterations,
    signer=st.sampled_from([GATEWAY.private, STRANGER.private]),
)
def test_nearly_right_answers(asking, before, after, signer):
    """A signed answer with fields changed, added or removed, before or after signing, is FOUND only if it is proved."""

    def altered(fields, changes):
        fields = {**fields, **dict(changes)}
        return {name: text for name, text in fields.items() if text is not None}

    unsigned = altered({n: t for n, t in made(asking.asked).items() if n not in ("sign", "sign_type")}, before)
    fields = altered(sealed(unsigned, signer), after)
    reply = read(asking, fields)
    assert_lawful(asking, fields, reply)
    if signer is STRANGER.private and fields.get("sign"):
        assert reply.finding is Finding.UNCERTAIN
