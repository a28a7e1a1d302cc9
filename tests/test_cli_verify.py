"""``lianlian verify``: which key signed a message, and why a signature is invalid."""

import json
from base64 import b64encode
from hashlib import md5

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding

from lianlian_async.signing import signature_source
from tests.support.command import run

ANSWER = {
    "ret_code": "0000",
    "ret_msg": "交易成功",
    "no_refund": "R-1",
    "oid_partner": "201103171000000000",
    "sta_refund": "2",
    "sign_type": "RSA",
}
REQUEST = {"oid_partner": "201103171000000000", "no_refund": "R-1", "dt_refund": "20130515094018", "sign_type": "RSA"}


@pytest.fixture
def env(merchant_keys, gateway_keys):
    """A merchant who trusts the gateway's key."""
    return {
        "LIANLIAN_OID_PARTNER": "201103171000000000",
        "LIANLIAN_PRIVATE_KEY": merchant_keys.private_pem,
        "LIANLIAN_GATEWAY_PUBLIC_KEYS": gateway_keys.public_pem,
    }


def verify(env, fields, *options):
    """Run the command on a message."""
    return run("verify", "-", *options, env=env, stdin=json.dumps(fields, ensure_ascii=False))


def signed(pair, fields, **changes):
    """Return ``fields`` with the signature of ``fields`` and ``changes``."""
    return {**fields, "sign": pair.private.sign(signature_source({**fields, **changes}))}


@pytest.mark.parametrize("left_out", [(), ("ret_code", "ret_msg")])
def test_message_signed_by_lianlian_is_valid(env, gateway_keys, left_out):
    """The output names LianLian's key that signed the message."""
    fields = {name: text for name, text in ANSWER.items() if name not in left_out}
    ended = verify(env, signed(gateway_keys, fields))
    assert ended.exit_code == 0
    assert ended.stdout.startswith(f"valid: signed with LianLian's key {gateway_keys.public.fingerprint}\n")


def test_request_signed_by_the_merchant_is_valid(env, merchant_keys):
    """The merchant can sign a request; JSON names the signer."""
    ended = verify(env, signed(merchant_keys, REQUEST), "--json")
    assert ended.exit_code == 0
    assert ended.json["outcome"] == "valid"
    assert ended.json["signed_by"] == {"owner": "merchant", "fingerprint": merchant_keys.public.fingerprint}
    assert ended.json["source"] == signature_source(REQUEST).decode()


def test_response_signed_by_the_merchant_is_invalid(env, merchant_keys):
    """Only LianLian can sign the state of a refund."""
    ended = verify(env, signed(merchant_keys, ANSWER))
    assert ended.exit_code == 5
    assert "signed it, but LianLian must sign this message\n" in ended.stdout


def test_invalid_message_shows_source_and_tried_keys(env, gateway_keys, merchant_keys):
    """The source string and the fingerprints are shown; the signature is not."""
    fields = signed(gateway_keys, ANSWER, no_refund="R-2")
    ended = verify(env, fields, "--json")
    assert ended.exit_code == 5
    assert ended.json["outcome"] == "signature invalid"
    digest = md5(signature_source({**ANSWER, "no_refund": "R-2"})).hexdigest()
    key = f"right key (LianLian's key {gateway_keys.public.fingerprint})"
    assert ended.json["reason"] == f"{key}, another text was signed: its MD5 is {digest}"
    assert ended.json["signed_by"] is None
    assert ended.json["tried"] == [{"owner": "LianLian", "fingerprint": gateway_keys.public.fingerprint}]
    assert ended.json["source"] == signature_source(ANSWER).decode()
    people = verify(env, fields)
    assert signature_source(ANSWER).decode() in people.stdout
    assert fields["sign"] not in people.stdout


def with_a_plus(pair):
    """Return a message whose signature contains +."""
    candidates = (signed(pair, {**ANSWER, "no_refund": f"R-{number}"}) for number in range(100))
    return next(fields for fields in candidates if "+" in fields["sign"])


MISTAKES = {
    "replace its blanks by +": lambda pair: (fields := with_a_plus(pair)) | {"sign": fields["sign"].replace("+", " ")},
    "remove its line breaks": lambda pair: (
        (fields := signed(pair, ANSWER)) | {"sign": fields["sign"][:76] + "\r\n" + fields["sign"][76:]}
    ),
    "another text was signed: the signature matches if ret_msg is left out": lambda pair: signed(
        pair, ANSWER, ret_msg=""
    ),
    "fields that LianLian does not document for refunds are left out": lambda pair: {
        **signed(pair, ANSWER),
        "bank_name": "x",
        "card_no": "y",
        "agreement_list": "z",
    },
    "sign_type is left out": lambda pair: signed(pair, ANSWER, sign_type=""),
    "sign_type=RSA is added": lambda pair: signed(pair, {**ANSWER, "sign_type": ""}, sign_type="RSA"),
    "empty values are signed too": lambda pair: {
        **ANSWER,
        "rate": "",
        "sign": pair.private.sign(
            signature_source(ANSWER).replace(b"&ret_code=", b"&rate=&ret_code="),
        ),
    },
    "fields stay in the order of the message": lambda pair: {
        **ANSWER,
        "sign": pair.private.sign("&".join(f"{name}={text}" for name, text in ANSWER.items()).encode()),
    },
    "if the text is encoded in GBK": lambda pair: {
        **ANSWER,
        "sign": pair.private.sign(signature_source(ANSWER).decode().encode("gbk")),
    },
    "if sign_type is left out and the text is encoded in GBK": lambda pair: {
        **ANSWER,
        "sign": pair.private.sign(signature_source({**ANSWER, "sign_type": ""}).decode().encode("gbk")),
    },
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_common_mistake_is_named(env, gateway_keys, mistake):
    """The command names the mistake that explains the signature, which remains invalid."""
    ended = verify(env, MISTAKES[mistake](gateway_keys))
    assert ended.exit_code == 5
    assert f"right key (LianLian's key {gateway_keys.public.fingerprint}), " in ended.stdout
    assert mistake in ended.stdout


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        (hashes.SHA1(), "SHA-1"),
        (hashes.SHA256(), "SHA-256"),
        (hashes.SHA512(), "SHA-512"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_hash_is_named(env, merchant_keys, algorithm, name):
    """A signature with another hash is invalid; it is recognized even if the text is different, too."""
    for text, problem in (
        (REQUEST, ""),
        ({**REQUEST, "sign_type": ""}, ", another text was signed: the signature matches if sign_type is left"),
    ):
        signature = merchant_keys.oracle.sign(signature_source(text), padding.PKCS1v15(), algorithm)
        ended = verify(env, {**REQUEST, "sign": b64encode(signature).decode()}, "--json")
        assert ended.exit_code == 5
        key = f"right key (merchant's key {merchant_keys.public.fingerprint})"
        assert ended.json["reason"].startswith(f"{key}, hashed with {name} instead of MD5{problem}")


def test_hash_that_is_not_known_counts_as_another_key(env, merchant_keys):
    signature = merchant_keys.oracle.sign(signature_source(REQUEST), padding.PKCS1v15(), hashes.SHA3_256())
    ended = verify(env, {**REQUEST, "sign": b64encode(signature).decode()}, "--json")
    assert ended.json["reason"] == "another key or signature method was used, or sign was changed"


def test_other_key_is_named(env, stranger_keys):
    """A signature of a key that is not configured is recognized as such, not as a changed text."""
    ended = verify(env, signed(stranger_keys, ANSWER), "--json")
    assert ended.exit_code == 5
    assert ended.json["reason"] == "another key or signature method was used, or sign was changed"


@pytest.mark.parametrize(
    ("sign", "reason"),
    [
        ("", "the message has no signature"),
        ("no base64!", "sign is not base64"),
        (
            b64encode(bytes(256)).decode(),
            "another key signed it: the signature has 2048 bits, and no known key has that size",
        ),
    ],
)
def test_malformed_signature_is_named(env, sign, reason):
    """A missing, an unreadable and a too long signature have different causes."""
    ended = verify(env, {**ANSWER, "sign": sign})
    assert ended.exit_code == 5
    assert reason in ended.stdout


def test_control_characters_of_a_message_are_escaped(env, gateway_keys):
    """Control characters of a message are escaped in the output."""
    ended = verify(env, signed(gateway_keys, {**ANSWER, "news": "\x1b]0;title\x07"}))
    assert "\x1b" not in ended.stdout
    assert "\\x1b]0;title\\x07" in ended.stdout


def test_genuine_messages_are_valid(vectors):
    """Messages signed by the genuine gateway and the vendor's test merchant are valid."""
    env = {
        "LIANLIAN_OID_PARTNER": "201408071000001541",
        "LIANLIAN_PRIVATE_KEY": vectors["keys"]["test_merchant_private"],
        "LIANLIAN_GATEWAY_PUBLIC_KEYS": vectors["keys"]["gateway_public"],
    }
    assert [verify(env, vector["fields"]).exit_code for vector in vectors["vectors"]] == [0] * len(vectors["vectors"])


def test_genuine_message_with_a_change_has_the_right_key_and_another_text(vectors, vector):
    """The digest that the genuine gateway signed is recovered from its signature."""
    env = {
        "LIANLIAN_OID_PARTNER": "201408071000001541",
        "LIANLIAN_PRIVATE_KEY": vectors["keys"]["test_merchant_private"],
        "LIANLIAN_GATEWAY_PUBLIC_KEYS": vectors["keys"]["gateway_public"],
    }
    digest = md5(vector["source"].encode()).hexdigest()
    changed = verify(env, vector["fields"] | {"oid_partner": "1"}, "--json").json["reason"]
    assert changed.startswith("right key (")
    assert changed.endswith(f", another text was signed: its MD5 is {digest}")
    added = verify(env, vector["fields"] | {"added_by_a_proxy": "1"}, "--json").json["reason"]
    assert added.endswith(", another text was signed: the signature matches if added_by_a_proxy is left out")
