"""Key files of merchants: they are read, or the error names their kind and the command that converts them."""

import base64
import codecs
import datetime
import shutil
import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat, PublicFormat, pkcs7, pkcs12

from lianlian_async.errors import ConfigurationError
from lianlian_async.key_files import is_key_text, unquoted
from lianlian_async.signing import SigningKey, VerifyingKey
from tests.support import keypairs

PAIR = keypairs.pair("merchant")
STRANGER = keypairs.pair("stranger")
PLAIN = serialization.NoEncryption()
PASSWORD = "correct horse"
LOCKED = serialization.BestAvailableEncryption(PASSWORD.encode())
TRADITIONAL = PAIR.oracle.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, LOCKED).decode()
REENCRYPT = "openssl pkcs8 -topk8 -v2 aes-256-cbc -in OLD.pem -out NEW.pem"


def certificate(key=PAIR.oracle):
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "LianLian")])
    day = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, day, day + datetime.timedelta(days=1))
    return builder.sign(key, hashes.SHA256())


CERTIFICATE = certificate().public_bytes(Encoding.PEM).decode()


def reason(material, password=None, load=SigningKey.load):
    """Return why the material cannot be loaded, and check that the message shows no line of it."""
    with pytest.raises(ConfigurationError) as caught:
        load(material, password) if load == SigningKey.load else load(material)
    text = material.decode(errors="replace") if isinstance(material, bytes) else material
    assert not [
        line for line in text.splitlines() if len(line) > 20 and "-----" not in line and line in str(caught.value)
    ]
    return str(caught.value)


def value(tag, *contents):
    """Return one DER value; numbers as contents are the arcs of an object identifier."""
    content = b"".join(contents)
    length = len(content).to_bytes(2)
    return bytes([tag]) + (bytes([len(content)]) if len(content) < 128 else b"\x82" + length) + content


def identifier(dotted):
    first, second, *arcs = map(int, dotted.split("."))
    content = b""
    for arc in (40 * first + second, *arcs):
        digits = [arc & 0x7F]
        while arc := arc >> 7:
            digits.insert(0, arc & 0x7F | 0x80)
        content += bytes(digits)
    return value(6, content)


# ── readable forms ──────────────────────────────────────────────────────────────────────────────

DRESSINGS = {
    "literal \\n": lambda text: text.replace("\n", "\\n"),
    "literal \\r\\n": lambda text: text.replace("\n", "\\r\\n"),
    "blanks for line breaks": lambda text: text.replace("\n", " "),
    "tabs": lambda text: text.replace("\n", "\t"),
    "indented": lambda text: text.replace("\n", "\n    "),
    "double quotes": lambda text: f'"{text}"',
    "single quotes": lambda text: f" '{text}'\n",
    "quotes and literal \\n": lambda text: '"' + text.replace("\n", "\\n") + '"',
    "BOM": lambda text: "\ufeff" + text,
    "BOM and quotes": lambda text: '\ufeff"' + text + '"',
    "CR LF": lambda text: text.replace("\n", "\r\n"),
    "CR": lambda text: text.replace("\n", "\r"),
}
TEXTS = {
    "PEM": PAIR.private_pem,
    "traditional PEM, encrypted": TRADITIONAL,
    "base64 in lines": base64.encodebytes(base64.b64decode("".join(PAIR.private_pem.splitlines()[1:-1]))).decode(),
    "OpenSSH": PAIR.oracle.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, PLAIN).decode(),
}


@pytest.mark.parametrize("dressing", DRESSINGS)
@pytest.mark.parametrize("form", TEXTS)
def test_key_is_read_after_copy_and_paste(dressing, form, tmp_path):
    """Changes by shells, editors and environment files are undone, in text, bytes, and files of UTF-8 or UTF-16."""
    text = DRESSINGS[dressing](TEXTS[form])
    utf_16 = [
        mark + text.encode(f"utf-16-{end}") for mark, end in ((codecs.BOM_UTF16_LE, "le"), (codecs.BOM_UTF16_BE, "be"))
    ]
    (tmp_path / "a.key").write_bytes(utf_16[0])
    assert is_key_text(text)
    for material in (text, text.encode(), *utf_16, tmp_path / "a.key"):
        assert SigningKey.load(material, PASSWORD).fingerprint == PAIR.private.fingerprint


def test_a_pem_without_any_line_break_is_read():
    """PEM without line breaks is read, unless the block has headers."""
    assert SigningKey.load(PAIR.private_pem.replace("\n", "")).fingerprint == PAIR.private.fingerprint
    assert "the PEM text is damaged" in reason(TRADITIONAL.replace("\n", ""), PASSWORD)


@pytest.mark.parametrize("before", ["", "subject=CN = LianLian\n\n", "Bag Attributes\n    localKeyID: 01\n"])
def test_a_private_key_behind_a_certificate_is_read(before):
    """A file with a private key may also contain a certificate before or after it."""
    for key, password in ((PAIR.private_pem, None), (PAIR.locked_pem(PASSWORD), PASSWORD), (TRADITIONAL, PASSWORD)):
        for text in (before + CERTIFICATE + before + key, before + key + before + CERTIFICATE):
            assert SigningKey.load(text, password).fingerprint == PAIR.private.fingerprint


def test_file_with_a_private_key_is_refused_as_public_key():
    """The file is refused even if a certificate comes first or the key is encrypted."""
    for key in (PAIR.private_pem, PAIR.locked_pem(PASSWORD), TRADITIONAL):
        assert "this is a private key" in reason(CERTIFICATE + key, load=VerifyingKey.load)
    encrypted = base64.b64decode("".join(PAIR.locked_pem(PASSWORD).splitlines()[1:-1]))
    assert "this is a private key" in reason(encrypted, load=VerifyingKey.load)


def test_several_blocks_have_to_hold_one_key():
    """A certificate and its own public key are one key; two different keys are refused."""
    text = PAIR.public_pem + CERTIFICATE + CERTIFICATE
    assert VerifyingKey.load(text).fingerprint == PAIR.public.fingerprint
    assert "contains 2 different keys; keep only the one that you use" in reason(
        CERTIFICATE + STRANGER.public_pem, load=VerifyingKey.load
    )
    assert "contains 2 different keys" in reason(PAIR.private_pem + STRANGER.private_pem)
    assert SigningKey.load(PAIR.private_pem + TRADITIONAL, PASSWORD).fingerprint == PAIR.private.fingerprint


def test_the_path_of_a_key_may_be_quoted(tmp_path):
    """Environment files keep quotes. A control character in a path comes from a backslash in double quotes."""
    (tmp_path / "a.pem").write_text(PAIR.private_pem)
    for quote in "'\"":
        assert SigningKey.load(f"{quote}{tmp_path / 'a.pem'}{quote}").bits == 1024
    assert "it contains a control character, perhaps from a backslash: write / or two backslashes" in reason(
        "C:\temp\new.pem"
    )


@pytest.mark.parametrize("text", ['"', "'", "\"a'", 'a"', '"a","b"', "a", ""])
def test_only_one_pair_of_quotes_is_removed(text):
    """Text with further quotes inside is left unchanged."""
    assert unquoted(f" {text} ") == text


# ── unreadable forms ─────────────────────────────────────────────────────────────────────────────

TRADITIONAL_FORM = PrivateFormat.TraditionalOpenSSL
EC, ED = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()


def both(key, form=PrivateFormat.PKCS8):
    """Return a private key as PEM and as DER."""
    return [key.private_bytes(encoding, form, PLAIN) for encoding in (Encoding.PEM, Encoding.DER)]


def halves(key):
    """Return a public key as PEM, DER, text and bare base64."""
    pem, der = (
        key.public_key().public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo)
        for encoding in (Encoding.PEM, Encoding.DER)
    )
    return [pem, der, pem.decode(), base64.b64encode(der).decode()]


def pfx():
    return pkcs12.serialize_key_and_certificates(b"shop", PAIR.oracle, certificate(), None, LOCKED)


def p7b(encoding):
    return pkcs7.serialize_certificates([certificate()], encoding)


FOREIGN = {
    "an elliptic-curve key. LianLian uses RSA only": [
        *both(EC),
        *both(EC, TRADITIONAL_FORM),
        *both(ec.generate_private_key(ec.SECP384R1()), TRADITIONAL_FORM),
    ],
    "an elliptic-curve key. ": [*halves(EC), certificate(EC).public_bytes(Encoding.DER)],
    "an Ed25519 key. LianLian uses RSA only": [*both(ED), *halves(ED)],
    "a PKCS#12 file (.p12, .pfx): openssl pkcs12 -in FILE -nocerts -nodes -out merchant.pem": [
        pfx(),
        b"\x30\x80" + pfx()[4:],
    ],  # DER and BER
    "a PKCS#7 file: openssl pkcs7 -print_certs": [p7b(Encoding.PEM), p7b(Encoding.DER)],
    "a Java keystore (JKS): keytool -importkeystore": [b"\xfe\xed\xfe\xed\0\0\0\2"],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_kind_of_key_is_named(kind):
    """The error names the kind and what to do: LianLian uses RSA only, and a key is exported from a keystore."""
    for material in FOREIGN[kind]:
        assert f": this is {kind}" in reason(material)


@pytest.mark.parametrize("kind", [kind for kind in FOREIGN if "file" in kind or "keystore" in kind])
def test_another_kind_of_file_is_named_where_a_public_key_is_expected(kind):
    for material in FOREIGN[kind]:
        assert f": this is {kind}" in reason(material, load=VerifyingKey.load)


def encrypted(*algorithm):
    return value(0x30, value(0x30, *algorithm), value(4, bytes(200)))


def pbes2(cipher):
    prf = identifier("1.2.840.113549.2.9")
    kdf = value(0x30, identifier("1.2.840.113549.1.5.12"), value(0x30, value(4, bytes(8)), value(0x30, prf)))
    return encrypted(
        identifier("1.2.840.113549.1.5.13"), value(0x30, kdf, value(0x30, identifier(cipher), value(4, bytes(16))))
    )


@pytest.mark.parametrize(
    "key",
    [
        encrypted(identifier("1.2.840.113549.1.12.1.3"), value(0x30, value(4, bytes(8)))),  # PBE-SHA1-3DES
        encrypted(identifier("1.2.840.113549.1.12.1.6"), value(0x30, value(4, bytes(8)))),  # PBE-SHA1-RC2-40
        pbes2("1.2.392.200011.61.1.1.1.4"),  # Camellia-256
        pbes2("1.2.156.10197.1.104.2"),  # SM4
        pbes2("1.3.14.3.2.7"),  # DES
        pbes2("2.16.840.1.101.3.4.1.43"),  # AES-256 in OFB mode
        TRADITIONAL.replace("AES-256-CBC", "CAMELLIA-256-CBC"),
    ],
)
@pytest.mark.parametrize("password", [None, PASSWORD])
def test_unsupported_cipher_is_not_called_a_wrong_password(key, password):
    """The message has the command that encrypts the key with AES."""
    with pytest.raises(ConfigurationError, match=f"encrypted with a cipher that is not supported; .*{REENCRYPT}"):
        SigningKey.load(key, password)


@pytest.mark.parametrize("password", [None, PASSWORD])
def test_supported_cipher_needs_the_right_password(password):
    """For a key that is encrypted with AES, the message is about the password."""
    words = "the key is encrypted: give its password" if password is None else "the password is wrong"
    for key in (pbes2("2.16.840.1.101.3.4.1.42"), TRADITIONAL.replace("\n", " ")):
        assert words in reason(key, password and "wrong")


def test_encrypted_key_of_another_kind():
    """If the encrypted key may be of another kind, the message does not claim that the password is wrong."""
    key = ED.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, LOCKED)
    assert "the password is wrong, or the key is not an RSA key" in reason(key, PASSWORD)
    assert "give its password" in reason(key)


@pytest.mark.parametrize(
    "key",
    [
        ED.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, PLAIN),
        "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEA\n-----END OPENSSH PRIVATE KEY-----\n",
    ],
)
def test_unreadable_openssh_keys(key):
    """The error has the command that converts RSA keys."""
    assert "cannot read this OpenSSH key" in reason(key)
    assert "ssh-keygen -p -m PEM" in reason(key, PASSWORD)


def test_damaged_begin_line():
    """The error names the BEGIN line."""
    assert "its BEGIN line cannot be read" in reason("-----BEGIN PRIVATE KEY----\nMII\n")


@pytest.mark.parametrize("password", [5, ["a"], bytearray(b"a")])
def test_a_password_of_another_type_is_refused(password):
    """Only text and bytes open a key."""
    with pytest.raises(ConfigurationError, match="private key: its password must be str or bytes, not "):
        SigningKey.load(PAIR.private_pem, password)


@pytest.mark.parametrize("damage", [b"\x30\x80" * 500, b"\x30\x02\x06\x00", b"\x30\x03\x06\x81\x81", b"\x30\x81" * 3])
def test_damaged_der_is_refused(damage):
    """Bytes that only begin like a key are refused as damaged."""
    assert "is not a readable RSA key" in reason(damage) or "cut off" in reason(damage)


# ── files made by OpenSSL itself ─────────────────────────────────────────────────────────────────

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the program openssl")


@needs_openssl
@pytest.mark.parametrize(
    ("options", "supported"),
    [
        (["-v1", "PBE-SHA1-3DES"], False),
        (["-v2", "aria-256-cbc"], False),
        (["-v2", "camellia-256-cbc"], False),
        (["-v2", "aes-256-cbc"], True),
        (["-v2", "des3"], True),
        (["-scrypt"], True),
    ],
)
def test_keys_that_openssl_encrypts(tmp_path, options, supported):
    """A supported cipher is read; for another one, the command in the error makes a key that is read."""
    old, new = tmp_path / "OLD.pem", tmp_path / "NEW.pem"
    secret = f"pass:{PASSWORD}"

    def openssl(*arguments, text=None):
        subprocess.run(["openssl", *map(str, arguments)], input=text, check=True, capture_output=True, text=True)

    openssl("pkcs8", "-topk8", *options, "-passout", secret, "-out", old, text=PAIR.private_pem)
    if not supported:
        assert "encrypted with a cipher that is not supported" in reason(old.read_text(), PASSWORD)
        openssl(
            *REENCRYPT.replace("OLD.pem", str(old)).replace("NEW.pem", str(new)).split()[1:],
            "-passin",
            secret,
            "-passout",
            secret,
        )
        old = new
    assert SigningKey.load(old, PASSWORD).fingerprint == PAIR.private.fingerprint


@needs_openssl
@pytest.mark.parametrize(("encoding", "options"), [(Encoding.PEM, ""), (Encoding.DER, "-inform DER")])
def test_the_command_for_a_pkcs7_file_extracts_its_certificate(tmp_path, encoding, options):
    """The error has a command for PEM, and the option that the command needs for a binary file."""
    old, new = tmp_path / "old.p7b", tmp_path / "gateway.pem"
    old.write_bytes(p7b(encoding))
    advice = reason(p7b(encoding), load=VerifyingKey.load)
    command = advice[advice.index("openssl pkcs7") : advice.index(" extracts")]
    assert options in advice
    words = command.replace("FILE", str(old)).replace("gateway.pem", str(new)).split()
    subprocess.run([*words, *options.split()], check=True, capture_output=True)
    assert VerifyingKey.load(new).fingerprint == PAIR.private.fingerprint
