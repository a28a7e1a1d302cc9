"""Signatures and keys: compared with ``cryptography``; no output contains key text."""

import base64
import copy
import datetime
import logging
import math
import pickle
import threading
import traceback
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat, PublicFormat
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lianlian_async import signing
from lianlian_async.errors import ConfigurationError
from lianlian_async.key_files import is_key_text
from lianlian_async.signing import SigningKey, VerifyingKey, signature_source
from tests.support import keypairs
from tests.support.strategies import texts

PLAIN = serialization.NoEncryption()
PASSWORD = "密码 pässword"
LOCKED = serialization.BestAvailableEncryption(PASSWORD.encode())

PAIR = keypairs.pair("merchant")


def private(encoding, form, protection=PLAIN):
    return PAIR.oracle.private_bytes(encoding, form, protection)


def public(encoding, form=PublicFormat.SubjectPublicKeyInfo):
    return PAIR.oracle.public_key().public_bytes(encoding, form)


def certificate(encoding):
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "LianLian")])
    day = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder(name, name, PAIR.oracle.public_key(), 1, day, day + datetime.timedelta(days=1))
    return builder.sign(PAIR.oracle, hashes.SHA256()).public_bytes(encoding)


def bare(der):
    return base64.b64encode(der)


def wrapped(der):
    return base64.encodebytes(der)  # lines of 76


PRIVATE_DER = private(Encoding.DER, PrivateFormat.PKCS8)
PRIVATE_PEM = private(Encoding.PEM, PrivateFormat.PKCS8)
PUBLIC_DER = public(Encoding.DER)
PUBLIC_PEM = public(Encoding.PEM)

PRIVATE_FORMS = {
    "PKCS#8 PEM": PRIVATE_PEM,
    "PKCS#8 DER": PRIVATE_DER,
    "PKCS#8 bare base64": bare(PRIVATE_DER),
    "PKCS#8 base64 in lines": wrapped(PRIVATE_DER),
    "PKCS#1 PEM": private(Encoding.PEM, PrivateFormat.TraditionalOpenSSL),
    "PKCS#1 DER": private(Encoding.DER, PrivateFormat.TraditionalOpenSSL),
    "PKCS#1 bare base64": bare(private(Encoding.DER, PrivateFormat.TraditionalOpenSSL)),
    "OpenSSH": private(Encoding.PEM, PrivateFormat.OpenSSH),
}
LOCKED_FORMS = {
    "PKCS#8 PEM": private(Encoding.PEM, PrivateFormat.PKCS8, LOCKED),
    "PKCS#8 DER": private(Encoding.DER, PrivateFormat.PKCS8, LOCKED),
    "PKCS#8 bare base64": bare(private(Encoding.DER, PrivateFormat.PKCS8, LOCKED)),
    "traditional PEM": private(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, LOCKED),
}
PUBLIC_FORMS = {
    "SPKI PEM": PUBLIC_PEM,
    "SPKI DER": PUBLIC_DER,
    "SPKI bare base64": bare(PUBLIC_DER),
    "SPKI base64 in lines": wrapped(PUBLIC_DER),
    "PKCS#1 PEM": public(Encoding.PEM, PublicFormat.PKCS1),
    "PKCS#1 DER": public(Encoding.DER, PublicFormat.PKCS1),
    "X.509 PEM": certificate(Encoding.PEM),
    "X.509 DER": certificate(Encoding.DER),
    "X.509 bare base64": bare(certificate(Encoding.DER)),
}


def dressings(content, folder):
    """Return every form in which a user may pass the key ``content``."""
    file = folder / "lianlian.key"
    file.write_bytes(content)
    yield content
    yield file
    yield str(file)
    if content.isascii():
        text = content.decode()
        yield from (text, text.replace("\n", "\r\n"), f" \n{text}\n ", "\ufeff" + text)
        yield from (text.encode(), b"\xef\xbb\xbf" + content)
    if content.startswith(b"-----BEGIN"):
        yield b"Bag Attributes\n    friendlyName: shop\nKey Attributes: <No Attributes>\n" + content
        yield content + b"and what openssl x509 -text puts behind\n"


def assert_shows_nothing(error, *secrets):
    """Check that neither the error nor its chain contains eight consecutive characters of key text."""
    seen = [error]
    while seen[-1].__cause__ or seen[-1].__context__:
        seen.append(seen[-1].__cause__ or seen[-1].__context__)
    shown = "".join(traceback.format_exception(error))
    shown += "".join(str(part) + repr(part) + repr(part.args) + repr(vars(part)) for part in seen)
    for secret in secrets:
        runs = {secret[at : at + 8] for at in range(len(secret) - 7)}
        assert not [run for run in runs if run in shown]


def body_of(content):
    """Return the secret text of a key, without the PEM header and footer."""
    text = content if content.isascii() else bare(content)
    return "".join(line for line in text.decode().splitlines() if "-----" not in line and ":" not in line)


# ── signatures ───────────────────────────────────────────────────────────────────────────────────


def test_signature_source():
    """All fields with a value except ``sign`` are included, also unknown ones, ret_code and ret_msg, in plain order."""
    fields = {
        "sign_type": "RSA",
        "ret_msg": "交易成功",
        "sign": "not this",
        "ret_code": "0000",
        "money_refund": "0",
        "settle_date": "",
        "rate": None,
        "Unknown": "a&b=c d%20",
        "no_refund": " ",
    }
    expected = "Unknown=a&b=c d%20&money_refund=0&no_refund= &ret_code=0000&ret_msg=交易成功&sign_type=RSA"
    assert signature_source(fields) == expected.encode()


def test_signature_source_without_fields():
    """A message without signed fields has an empty source."""
    assert signature_source({}) == signature_source({"sign": "x", "a": "", "b": None}) == b""


@given(st.dictionaries(texts, texts), st.randoms())
def test_the_order_of_fields_does_not_matter(fields, random):
    """The same fields in any order have the same source."""
    shuffled = list(fields.items())
    random.shuffle(shuffled)
    assert signature_source(dict(shuffled)) == signature_source(fields)


@pytest.fixture(params=["pycryptodome", "openssl"])
def backend(request, monkeypatch):
    """Select the signing backend for all keys that are loaded in this test."""
    monkeypatch.setattr(signing, "BACKEND", request.param)
    return request.param


@pytest.fixture
def private_key(backend):
    return SigningKey.load(PRIVATE_PEM)


@pytest.mark.parametrize("bits", [1024, 2048, 4096])
def test_the_oracle_and_we_accept_each_others_signatures(bits, backend):
    """For each key size of LianLian, both implementations make the same signature and accept it."""
    pair = keypairs.pair("merchant", bits)
    private_key, public_key = SigningKey.load(pair.private_pem), VerifyingKey.load(pair.public_pem)
    source = "no_refund=R-1&ret_msg=交易成功".encode()
    ours = private_key.sign(source)
    theirs = pair.oracle.sign(source, padding.PKCS1v15(), hashes.MD5())
    pair.oracle.public_key().verify(base64.b64decode(ours), source, padding.PKCS1v15(), hashes.MD5())
    assert public_key.verify(source, base64.b64encode(theirs).decode())
    assert base64.b64decode(ours) == theirs
    assert private_key.bits == public_key.bits == bits


@settings(max_examples=25)
@given(st.binary())
def test_signatures_are_deterministic(private_key, source):
    """Every signature equals the oracle's, in one line of base64, each time."""
    theirs = PAIR.oracle.sign(source, padding.PKCS1v15(), hashes.MD5())
    assert private_key.sign(source) == private_key.sign(source) == base64.b64encode(theirs).decode()


@settings(max_examples=50)
@given(st.integers(0, 1023))
def test_a_flipped_bit_makes_a_signature_invalid(private_key, bit):
    """Every other signature is refused."""
    signature = bytearray(base64.b64decode(private_key.sign(b"a=b")))
    signature[bit // 8] ^= 1 << bit % 8
    assert not private_key.public_key().verify(b"a=b", base64.b64encode(signature).decode())


@given(st.text(st.characters()) | st.binary().map(lambda raw: base64.b64encode(raw).decode()))
@example("")
@example("签名")
@example("\ud800")
@example("====")
@example("A")
def test_unreadable_signature_is_invalid(private_key, text):
    """Text that is not a signature is not valid, and raises nothing."""
    assert private_key.public_key().verify(b"a=b", text) is False


def test_a_signature_is_one_line_of_base64_exactly(private_key):
    """White space and other alphabets are refused."""
    right = private_key.sign(b"a=b")
    assert private_key.public_key().verify(b"a=b", right)
    for text in (right + "\n", " " + right, right[:64] + "\n" + right[64:], right.rstrip("="), right + "AAAA"):
        assert not private_key.public_key().verify(b"a=b", text)


def test_another_digest_or_padding_is_invalid(private_key):
    """The protocol uses only MD5 with PKCS#1 v1.5."""
    for signature in (
        PAIR.oracle.sign(b"a=b", padding.PKCS1v15(), hashes.SHA256()),
        PAIR.oracle.sign(b"a=b", padding.PSS(padding.MGF1(hashes.MD5()), 16), hashes.MD5()),
    ):
        assert not private_key.public_key().verify(b"a=b", base64.b64encode(signature).decode())


def test_one_key_serves_many_threads(private_key):
    """Threads may share a key."""
    results = []

    def work(number):
        source = f"no_refund={number}".encode()
        results.append(all(private_key.public_key().verify(source, private_key.sign(source)) for _ in range(20)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8


def test_both_backends_make_the_same_signatures(monkeypatch):
    """Both backends make the same signatures and accept each other's."""
    signatures = {}
    keys = {}
    for backend in ("pycryptodome", "openssl"):
        monkeypatch.setattr(signing, "BACKEND", backend)
        keys[backend] = SigningKey.load(PRIVATE_PEM)
        signatures[backend] = keys[backend].sign(b"a=b")
    assert signatures["pycryptodome"] == signatures["openssl"]
    assert keys["pycryptodome"].public_key().verify(b"a=b", signatures["openssl"])
    assert keys["openssl"].public_key().verify(b"a=b", signatures["pycryptodome"])


# ── keys in every form ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", PRIVATE_FORMS)
def test_a_private_key_is_loaded_in_every_form(form, tmp_path):
    """Text, bytes and files of every encoding, with a BOM or text around, all give the same key."""
    loaded = [SigningKey.load(material) for material in dressings(PRIVATE_FORMS[form], tmp_path)]
    assert {key.fingerprint for key in loaded} == {PAIR.private.fingerprint}
    assert {key.sign(b"a=b") for key in loaded} == {PAIR.private.sign(b"a=b")}


@pytest.mark.parametrize("form", PUBLIC_FORMS)
def test_a_public_key_is_loaded_in_every_form(form, tmp_path):
    """Text, bytes and files of every encoding, with a BOM or text around, all give the same key."""
    signature = PAIR.private.sign(b"a=b")
    loaded = [VerifyingKey.load(material) for material in dressings(PUBLIC_FORMS[form], tmp_path)]
    assert {key.fingerprint for key in loaded} == {PAIR.public.fingerprint}
    assert all(key.verify(b"a=b", signature) for key in loaded)


@pytest.mark.parametrize("form", LOCKED_FORMS)
@pytest.mark.parametrize("password", [PASSWORD, PASSWORD.encode()], ids=["str", "bytes"])
def test_an_encrypted_key_opens_with_its_password(form, password, tmp_path):
    """A password is encoded as UTF-8, as by OpenSSL."""
    for material in dressings(LOCKED_FORMS[form], tmp_path):
        assert SigningKey.load(material, password).fingerprint == PAIR.private.fingerprint


@pytest.mark.parametrize("form", LOCKED_FORMS)
@pytest.mark.parametrize(
    ("password", "reason"),
    [
        (None, "give its password"),
        ("wrong", "the password is wrong"),
        ("", "the password is wrong"),
        ("\udcff", "the password is wrong"),
    ],
)
def test_wrong_and_missing_passwords(form, password, reason):
    """The errors for a missing and a wrong password differ, and show no password."""
    with pytest.raises(ConfigurationError, match=reason) as caught:
        SigningKey.load(LOCKED_FORMS[form], password)
    assert_shows_nothing(caught.value, body_of(LOCKED_FORMS[form]))


def test_unneeded_password_is_ignored():
    """A key without encryption is loaded with any password."""
    assert SigningKey.load(PRIVATE_PEM, "unused").fingerprint == PAIR.private.fingerprint


def test_path_may_begin_with_a_tilde(tmp_path, monkeypatch):
    """~ is the user's home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "shop.pem").write_bytes(PRIVATE_PEM)
    assert SigningKey.load("~/shop.pem").fingerprint == SigningKey.load(Path("~/shop.pem")).fingerprint


def test_the_fingerprint_is_that_of_the_public_half():
    """Both halves have SHA-256 of the SubjectPublicKeyInfo, as the oracle encodes it."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(PUBLIC_DER)
    expected = "SHA256:" + digest.finalize().hex()
    assert PAIR.private.fingerprint == PAIR.public.fingerprint == PAIR.private.public_key().fingerprint == expected
    assert keypairs.pair("stranger").public.fingerprint != expected


# ── keys as we write them ────────────────────────────────────────────────────────────────────────


def test_the_oracle_reads_the_keys_we_write():
    """PEM, with and without a password, and bare base64 are read by the independent implementation."""
    numbers = PAIR.oracle.private_numbers()
    plain = serialization.load_pem_private_key(PAIR.private.to_pem().encode(), None)
    locked = serialization.load_pem_private_key(PAIR.private.to_pem(PASSWORD).encode(), PASSWORD.encode())
    assert plain.private_numbers() == locked.private_numbers() == numbers
    for key in (
        serialization.load_pem_public_key(PAIR.public.to_pem().encode()),
        serialization.load_der_public_key(base64.b64decode(PAIR.public.to_base64())),
    ):
        assert key.public_numbers() == numbers.public_numbers


def test_exported_forms():
    """PEM files end with a line break, and the dashboard's form is a single line."""
    assert PAIR.private.to_pem().startswith("-----BEGIN PRIVATE KEY-----\n")
    assert PAIR.private.to_pem("x").startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    assert PAIR.public.to_pem().startswith("-----BEGIN PUBLIC KEY-----\n")
    assert all(text.endswith("-----\n") for text in (PAIR.private.to_pem(), PAIR.public.to_pem()))
    assert PAIR.public.to_base64() == bare(PUBLIC_DER).decode()


def test_key_exported_with_a_password_needs_it():
    """The encrypted form opens only with its password."""
    text = PAIR.private.to_pem(PASSWORD)
    assert SigningKey.load(text, PASSWORD).fingerprint == PAIR.private.fingerprint
    for password in (None, "wrong"):
        with pytest.raises(ConfigurationError, match="password"):
            SigningKey.load(text, password)


def test_empty_password_is_refused():
    """A private key is never exported with an empty password."""
    with pytest.raises(ConfigurationError, match="password: must not be empty"):
        PAIR.private.to_pem("")


def test_a_key_is_generated_with_2048_bits_by_default():
    """Without a size, the key has 2048 bits."""
    assert SigningKey.generate().bits == 2048


def test_a_generated_key_signs():
    """A new key has the requested size, and its signatures verify only with its own public half."""
    key = SigningKey.generate(1024)
    assert key.bits == 1024
    assert key.public_key().verify(b"a=b", key.sign(b"a=b"))
    assert not PAIR.public.verify(b"a=b", key.sign(b"a=b"))


@pytest.mark.parametrize("bits", [0, 512, 1023, 1025, 2049, 3072, 4097, 8192, "2048", 2048.0])
def test_unsupported_sizes_are_not_generated(bits):
    """Sizes other than 1024, 2048 and 4096 are refused."""
    with pytest.raises(ConfigurationError, match=f"1024, 2048 or 4096 bits, not {bits}"):
        SigningKey.generate(bits)


# ── keys that are not usable ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", PUBLIC_FORMS)
def test_public_key_in_place_of_the_private_one(form):
    """The error says that this is a public key."""
    with pytest.raises(ConfigurationError, match="private key: this is a public key") as caught:
        SigningKey.load(PUBLIC_FORMS[form])
    assert_shows_nothing(caught.value, body_of(PUBLIC_FORMS[form]))


@pytest.mark.parametrize("form", PRIVATE_FORMS)
def test_private_key_in_place_of_a_public_one(form):
    """The error says that this is a private key, and does not show it."""
    with pytest.raises(ConfigurationError, match="public key: this is a private key") as caught:
        VerifyingKey.load(PRIVATE_FORMS[form])
    assert_shows_nothing(caught.value, body_of(PRIVATE_FORMS[form]))


ALL_FORMS = [*PRIVATE_FORMS.values(), *LOCKED_FORMS.values(), *PUBLIC_FORMS.values()]


@settings(max_examples=150)
@given(st.sampled_from(ALL_FORMS), st.integers(0, 2000), st.booleans())
def test_cut_off_key_is_refused(content, length, as_text):
    """The error shows nothing of the key."""
    whole = content.rstrip(b"\n=") if content.isascii() else content  # padding and the last line break say nothing
    cut = whole[: length % len(whole)]
    material = cut.decode() if as_text and cut.isascii() else cut
    for load in (lambda: SigningKey.load(material, PASSWORD), lambda: VerifyingKey.load(material)):
        with pytest.raises(ConfigurationError) as caught:
            load()
        assert_shows_nothing(caught.value, body_of(content))


@settings(max_examples=150)
@given(st.sampled_from(ALL_FORMS), st.integers(0, 2000), st.booleans())
def test_key_without_its_beginning_is_refused(content, length, as_text):
    """The error shows nothing of the key."""
    cut = content[length % len(content) :]
    material = cut.decode() if as_text and cut.isascii() else cut
    try:
        VerifyingKey.load(material)
    except ConfigurationError as error:
        assert_shows_nothing(error, body_of(content))


@settings(max_examples=60)
@given(
    st.sampled_from([PRIVATE_DER, PRIVATE_FORMS["PKCS#1 DER"], PUBLIC_DER, PUBLIC_FORMS["PKCS#1 DER"]]),
    st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_a_damaged_key_is_refused_or_works(backend, content, damage):
    """A private key with changed bytes is refused unless it still signs; no other error is raised."""
    damaged = bytearray(content)
    for at, byte in damage:
        damaged[at % len(damaged)] = byte
    for load in (SigningKey.load, VerifyingKey.load):
        try:
            key = load(bytes(damaged))
        except ConfigurationError as error:
            assert_shows_nothing(error, body_of(content))
        else:
            assert isinstance(key, VerifyingKey) or key.public_key().verify(b"a=b", key.sign(b"a=b"))


def der(*numbers):
    """A SEQUENCE of INTEGERs."""

    def value(tag, content):
        length = len(content).to_bytes(math.ceil(len(content).bit_length() / 8))
        head = bytes([len(content)]) if len(content) < 128 else bytes([0x80 | len(length)]) + length
        return bytes([tag]) + head + content

    return value(0x30, b"".join(value(2, number.to_bytes(number.bit_length() // 8 + 1)) for number in numbers))


def test_inconsistent_private_key_is_refused():
    """A damaged private key is refused when it is loaded, not at the first signature."""
    numbers = PAIR.oracle.private_numbers()
    n, e, d, p, q = numbers.public_numbers.n, numbers.public_numbers.e, numbers.d, numbers.p, numbers.q
    rest = (numbers.dmp1, numbers.dmq1, numbers.iqmp)
    assert SigningKey.load(der(0, n, e, d, p, q, *rest)).fingerprint == PAIR.private.fingerprint
    with pytest.raises(ConfigurationError, match="not a readable RSA key"):
        SigningKey.load(der(0, n, e, d ^ 4, p, q, *rest))
    with pytest.raises(ConfigurationError, match="not a readable RSA key"):
        SigningKey.load(der(0, n + 2, e, d, p, q, *rest))
    with pytest.raises(ConfigurationError, match="not a readable RSA key"):
        SigningKey.load(der(0, n, e, d, 1, n, *rest))
    with pytest.raises(ConfigurationError, match="not a readable RSA key"):
        SigningKey.load(der(0, n, e, d, p, 0, *rest))


@pytest.mark.parametrize("exponent", [4, 65536])
def test_a_public_key_with_an_even_exponent_is_refused(exponent, backend):
    """No RSA key has one: the key is damaged, with either backend."""
    with pytest.raises(ConfigurationError, match="not a readable RSA key"):
        VerifyingKey.load(der(PAIR.oracle.private_numbers().public_numbers.n, exponent))


def test_a_key_that_is_too_short_is_refused():
    """512 bits are too few; the error lists the accepted sizes."""
    p, q = 2**255 + 95, 2**256 - 189  # two primes
    n, e, d = p * q, 65537, pow(65537, -1, math.lcm(p - 1, q - 1))
    private_key = der(0, n, e, d, p, q, d % (p - 1), d % (q - 1), pow(q, -1, p))
    for load in (lambda: SigningKey.load(private_key), lambda: VerifyingKey.load(der(n, e))):
        with pytest.raises(ConfigurationError, match=r"512 bits are too few; LianLian accepts 1024, 2048 or 4096"):
            load()


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
@pytest.mark.parametrize("encoding", [Encoding.PEM, Encoding.DER])
def test_an_elliptic_curve_key_is_refused(form, encoding):
    """LianLian uses RSA only; the error names the other kind of key."""
    content = ec.generate_private_key(ec.SECP256R1()).private_bytes(encoding, form, PLAIN)
    with pytest.raises(ConfigurationError, match=r"elliptic-curve|not a readable RSA key") as caught:
        SigningKey.load(content)
    assert_shows_nothing(caught.value, body_of(content))


def test_errors_of_damaged_keys():
    """A cut, a damaged line, extra bytes and an empty file have different errors."""
    lines = PRIVATE_PEM.decode().splitlines()
    for material, reason in (
        ("\n".join(lines[:-1]), "cut off: its END line is missing"),
        ("\n".join([*lines[:-1], "-----END PUBLIC KEY-----"]), "its END line is missing or damaged"),
        ("\n".join([lines[0], *lines[2:]]), "the PEM text is damaged"),
        ("\n".join([*lines[:3], *lines[4:]]), "the key is cut off: it has [0-9]+ of [0-9]+ bytes"),
        (bare(PRIVATE_DER[:400]), f"the key is cut off: it has 400 of {len(PRIVATE_DER)} bytes"),
        (bare(PRIVATE_DER)[:401], f"the key is cut off: it has 300 of {len(PRIVATE_DER)} bytes"),
        (PRIVATE_DER + b"abc", "3 bytes after the key do not belong to it"),
        (b"0", "the key is cut off: it has 1 of 2 bytes"),
        (b"0\x05", "the key is cut off: it has 2 of 7 bytes"),
        (b"0\x05abc", "the key is cut off: it has 5 of 7 bytes"),
        (b"0\x80abc", "is not a readable RSA key"),
        (b"0\x8f" + b"\xff" * 20, r"the key is cut off: it has 22 of [0-9]{1,10} bytes"),
        (b"0\x03abc", "is not a readable RSA key"),
        (b"", "private key: is empty"),
        (b"\xef\xbb\xbf \n", "private key: is empty"),
        (b"\xff\xfe", "private key: is empty"),
        (b"\xff\xff", "is not a PEM, DER or bare base64 key"),
        ("ssh-dss", "a text of 7 characters is not a PEM, DER or base64 key"),
    ):
        with pytest.raises(ConfigurationError, match=reason) as caught:
            SigningKey.load(material)
        assert_shows_nothing(caught.value, body_of(PRIVATE_PEM))


def test_unreadable_file_is_named(tmp_path):
    """A missing file, a directory and an unknown home are reported, with the path if it is safe to show."""
    missing = tmp_path / "missing.pem"
    for material, reason in (
        (missing, r"missing\.pem'.*not a readable file"),
        (str(missing), r"missing\.pem'.*not a readable file"),
        (tmp_path, "not a readable file"),
        ("~no-such-user/shop.pem", r"shop\.pem'.*not a usable path"),
        ("shop\0.pem", r"pem'.*not a usable path"),
        ("", "a text of 0 characters"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            SigningKey.load(material)


def test_file_without_a_key_is_refused(tmp_path):
    """A readable file without a key is not a key."""
    file = tmp_path / "notes.txt"
    file.write_text("remember the milk")
    with pytest.raises(ConfigurationError, match="merchant: is not a PEM, DER or bare base64 key"):
        SigningKey.load(file, name="merchant")


def test_key_text_given_as_a_path_is_not_shown():
    """If a Path holds the key itself, the error does not show it."""
    for content in (bare(PRIVATE_DER), PRIVATE_PEM):
        with pytest.raises(ConfigurationError, match="key text given as a path") as caught:
            SigningKey.load(Path(content.decode()))
        assert_shows_nothing(caught.value, body_of(content))


@pytest.mark.parametrize("material", [None, 5, 1.5, ["a"], object()], ids=lambda value: type(value).__name__)
def test_other_types_are_refused(material):
    """Only text, bytes and paths can hold a key; the error names the type."""
    with pytest.raises(ConfigurationError, match=f"must be str, bytes or a path, not {type(material).__name__}"):
        VerifyingKey.load(material)


def test_is_key_text():
    """Whole and damaged keys are key text; file names are not."""
    assert all(is_key_text(content.decode()) for content in ALL_FORMS if content.isascii())
    assert is_key_text("\ufeff" + bare(PRIVATE_DER).decode())
    assert not any(map(is_key_text, ("", "MIIB", "keys/MIIB.pem", "/run/secrets/lianlian", "C:\\keys\\shop.key")))


# ── nothing shows a key ──────────────────────────────────────────────────────────────────────────


def test_a_key_shows_its_size_and_fingerprint_only(caplog):
    """repr, str, format and a log record show kind, size and fingerprint."""
    for key, kind in ((PAIR.private, "SigningKey"), (PAIR.public, "VerifyingKey")):
        expected = f"<{kind} RSA 1024 {PAIR.public.fingerprint}>"
        with caplog.at_level(logging.INFO):
            logging.getLogger("test").info("loaded %s %r", key, key)
        assert repr(key) == str(key) == f"{key}" == expected
        assert caplog.messages[-1] == f"loaded {expected} {expected}"


def test_a_private_key_is_neither_pickled_nor_copied():
    """A private key stays in its process."""
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="a private key cannot be pickled"):
            duplicate(PAIR.private)


def test_a_public_key_survives_pickling():
    """A public key may be sent to another process."""
    for key in (pickle.loads(pickle.dumps(PAIR.public)), copy.deepcopy(PAIR.public), copy.copy(PAIR.public)):
        assert key.fingerprint == PAIR.public.fingerprint
        assert key.verify(b"a=b", PAIR.private.sign(b"a=b"))


def test_oracle_refuses_wrong_signatures():
    """The oracle refuses wrong signatures, so its acceptance is evidence."""
    with pytest.raises(InvalidSignature):
        PAIR.oracle.public_key().verify(b"\0" * 128, b"a=b", padding.PKCS1v15(), hashes.MD5())
