"""Key files as people have them: read where only one key can be meant, else named with the line that converts them."""

import base64
import codecs
import datetime
import shutil
import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, x25519
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
ONLY_RSA = "LianLian uses RSA only"
REENCRYPT = "openssl pkcs8 -topk8 -v2 aes-256-cbc -in OLD.pem -out NEW.pem"


def certificate(key=PAIR.oracle):
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "LianLian")])
    day = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, day, day + datetime.timedelta(days=1))
    return builder.sign(key, hashes.SHA256())


CERTIFICATE = certificate().public_bytes(Encoding.PEM).decode()


def reason(material, password=None, load=SigningKey.load):
    """Why it cannot be loaded; no line of the material is told."""
    with pytest.raises(ConfigurationError) as caught:
        load(material, password) if load == SigningKey.load else load(material)
    text = material.decode(errors="replace") if isinstance(material, bytes) else material
    assert not [
        line for line in text.splitlines() if len(line) > 20 and "-----" not in line and line in str(caught.value)
    ]
    return str(caught.value)


def value(tag, *contents):
    """One value in DER; contents that are numbers are an object identifier's arcs."""
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


# ── what has one meaning is read ─────────────────────────────────────────────────────────────────

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
def test_a_key_is_read_however_it_was_pasted(dressing, form, tmp_path):
    """As text, bytes, in a file of UTF-8 or UTF-16: what shells, editors and environment files do is undone."""
    text = DRESSINGS[dressing](TEXTS[form])
    utf_16 = [
        mark + text.encode(f"utf-16-{end}") for mark, end in ((codecs.BOM_UTF16_LE, "le"), (codecs.BOM_UTF16_BE, "be"))
    ]
    (tmp_path / "a.key").write_bytes(utf_16[0])
    assert is_key_text(text)
    for material in (text, text.encode(), *utf_16, tmp_path / "a.key"):
        assert SigningKey.load(material, PASSWORD).fingerprint == PAIR.private.fingerprint


def test_a_pem_without_any_line_break_is_read():
    """Removed line breaks leave only one reading, unless the block has headers."""
    assert SigningKey.load(PAIR.private_pem.replace("\n", "")).fingerprint == PAIR.private.fingerprint
    assert "the PEM text is damaged" in reason(TRADITIONAL.replace("\n", ""), PASSWORD)


@pytest.mark.parametrize("before", ["", "subject=CN = LianLian\n\n", "Bag Attributes\n    localKeyID: 01\n"])
def test_a_private_key_behind_a_certificate_is_read(before):
    """Only a private key can be meant where one is needed, wherever it stands in the file."""
    for key, password in ((PAIR.private_pem, None), (PAIR.locked_pem(PASSWORD), PASSWORD), (TRADITIONAL, PASSWORD)):
        for text in (before + CERTIFICATE + before + key, before + key + before + CERTIFICATE):
            assert SigningKey.load(text, password).fingerprint == PAIR.private.fingerprint


def test_a_file_with_a_private_key_holds_no_public_one_for_us():
    """What holds a private key is not LianLian's, be the certificate first or the key encrypted."""
    for key in (PAIR.private_pem, PAIR.locked_pem(PASSWORD), TRADITIONAL):
        assert "this is a private key" in reason(CERTIFICATE + key, load=VerifyingKey.load)
    encrypted = base64.b64decode("".join(PAIR.locked_pem(PASSWORD).splitlines()[1:-1]))
    assert "this is a private key" in reason(encrypted, load=VerifyingKey.load)


def test_several_blocks_have_to_hold_one_key():
    """A certificate with its own public key is one key; two different keys leave open which is meant."""
    text = PAIR.public_pem + CERTIFICATE + CERTIFICATE
    assert VerifyingKey.load(text).fingerprint == PAIR.public.fingerprint
    assert "2 different keys are there; keep the one that is meant" in reason(
        CERTIFICATE + STRANGER.public_pem, load=VerifyingKey.load
    )
    assert "2 different keys are there" in reason(PAIR.private_pem + STRANGER.private_pem)
    assert SigningKey.load(PAIR.private_pem + TRADITIONAL, PASSWORD).fingerprint == PAIR.private.fingerprint


def test_the_path_of_a_key_may_be_quoted(tmp_path):
    """Environment files keep quotes; a control character in a path came from a backslash in double quotes."""
    (tmp_path / "a.pem").write_text(PAIR.private_pem)
    for quote in "'\"":
        assert SigningKey.load(f"{quote}{tmp_path / 'a.pem'}{quote}").bits == 1024
    assert "it holds a control character: write a path with backslashes in single quotes" in reason("C:\temp\new.pem")


@pytest.mark.parametrize("text", ['"', "'", "\"a'", 'a"', '"a","b"', "a", ""])
def test_only_one_pair_of_quotes_is_taken_off(text):
    """Where quotes stand inside, too, their meaning is open."""
    assert unquoted(f" {text} ") == text


# ── what cannot be read is named ─────────────────────────────────────────────────────────────────

EC, ED, DSA = (
    ec.generate_private_key(ec.SECP256R1()),
    ed25519.Ed25519PrivateKey.generate(),
    dsa.generate_private_key(1024),
)


def both(key, form=PrivateFormat.PKCS8):
    """A private key as PEM and as DER."""
    return [key.private_bytes(encoding, form, PLAIN) for encoding in (Encoding.PEM, Encoding.DER)]


def halves(key):
    """A public key as PEM, DER, text and bare base64."""
    pem, der = (
        key.public_key().public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo)
        for encoding in (Encoding.PEM, Encoding.DER)
    )
    return [pem, der, pem.decode(), base64.b64encode(der).decode()]


def pfx():
    return pkcs12.serialize_key_and_certificates(b"shop", PAIR.oracle, certificate(), None, LOCKED)


def request():
    return x509.CertificateSigningRequestBuilder(x509.Name([])).sign(PAIR.oracle, hashes.SHA256())


def p7b(encoding):
    return pkcs7.serialize_certificates([certificate()], encoding)


def openssh(cipher, kind):
    strings = b"".join(len(text).to_bytes(4) + text for text in (cipher, b"bcrypt", b"", kind))
    body = base64.b64encode(b"openssh-key-v1\0" + strings + bytes(90)).decode()
    return f"-----BEGIN OPENSSH PRIVATE KEY-----\n{body}\n-----END OPENSSH PRIVATE KEY-----\n"


FOREIGN = {
    "elliptic curve": ("an elliptic-curve key", [*both(EC), *both(EC, PrivateFormat.TraditionalOpenSSL)]),
    "EC public": ("an elliptic-curve key", [*halves(EC), certificate(EC).public_bytes(Encoding.DER)]),
    "EC parameters": (
        "parameters of an elliptic curve",
        ["-----BEGIN EC PARAMETERS-----\nBggq\n-----END EC PARAMETERS-----"],
    ),
    "Ed25519": ("an Ed25519 key", [*both(ED), *halves(ED)]),
    "X25519": ("an X25519, X448 or Ed448 key", both(x25519.X25519PrivateKey.generate())),
    "DSA": ("a DSA key", [*both(DSA), both(DSA, PrivateFormat.TraditionalOpenSSL)[0], *halves(DSA)]),
    "OpenSSH": ("an OpenSSH key of another kind", [ED.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, PLAIN)]),
    "PGP": ("a PGP key", ["-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nlQ==\n-----END PGP PRIVATE KEY BLOCK-----"]),
}
CONVERTED = {
    "PKCS#12": ("a PKCS#12 file (.p12, .pfx): openssl pkcs12 -in FILE -nocerts -nodes -out merchant.pem", [pfx()]),
    "PKCS#12 in BER": ("a PKCS#12 file", [b"\x30\x80" + pfx()[4:]]),
    "PKCS#7": ("a PKCS#7 file: openssl pkcs7 -print_certs", [p7b(Encoding.PEM), p7b(Encoding.DER)]),
    "JKS": ("a Java keystore (JKS): keytool -importkeystore", [b"\xfe\xed\xfe\xed\0\0\0\2"]),
    "JCEKS": ("a Java keystore (JCEKS): keytool -importkeystore", [b"\xce\xce\xce\xce\0\0\0\2"]),
    "CSR": (
        "a certificate request, which holds no private key; openssl req -in FILE -pubkey",
        [request().public_bytes(Encoding.PEM), request().public_bytes(Encoding.DER)],
    ),
    "old CSR": ("a certificate request", [request().public_bytes(Encoding.PEM).replace(b" CERT", b" NEW CERT")]),
    "SSH public": (
        "an SSH public key: ssh-keygen -e -m PKCS8 -f FILE",
        [
            PAIR.oracle.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
            PAIR.oracle.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
        ],
    ),
    "RFC 4716": ("an SSH public key: ssh-keygen -i -m RFC4716", [b"---- BEGIN SSH2 PUBLIC KEY ----\nAAAA\n"]),
    "PuTTY": ("a PuTTY key: puttygen FILE -O private-openssh", [b"PuTTY-User-Key-File-3: ssh-rsa\n"]),
    ".NET": ("an XML key of .NET", [b"<RSAKeyValue><Modulus>w8eK</Modulus></RSAKeyValue>"]),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_kind_of_key_is_named(kind):
    """No conversion helps: LianLian uses RSA."""
    words, materials = FOREIGN[kind]
    for material in materials:
        assert f": this is {words}; {ONLY_RSA} (a new key pair: openssl genrsa" in reason(material)


@pytest.mark.parametrize("kind", CONVERTED)
@pytest.mark.parametrize("load", [SigningKey.load, VerifyingKey.load])
def test_another_kind_of_file_is_named_with_what_converts_it(kind, load):
    """The file is called by its name, with the command that takes the key out of it."""
    words, materials = CONVERTED[kind]
    for material in materials:
        assert f": this is {words}" in reason(material, load=load)


def encrypted(*algorithm):
    return value(0x30, value(0x30, *algorithm), value(4, bytes(200)))


def pbes2(cipher, prf="1.2.840.113549.2.9"):
    kdf = value(
        0x30, identifier("1.2.840.113549.1.5.12"), value(0x30, value(4, bytes(8)), value(0x30, identifier(prf)))
    )
    return encrypted(
        identifier("1.2.840.113549.1.5.13"), value(0x30, kdf, value(0x30, identifier(cipher), value(4, bytes(16))))
    )


@pytest.mark.parametrize(
    ("key", "cipher"),
    [
        (encrypted(identifier("1.2.840.113549.1.12.1.3"), value(0x30, value(4, bytes(8)))), "PBE-SHA1-3DES"),
        (encrypted(identifier("1.2.840.113549.1.12.1.6"), value(0x30, value(4, bytes(8)))), "PBE-SHA1-RC2-40"),
        (pbes2("1.2.392.200011.61.1.1.1.4"), "Camellia-256"),
        (pbes2("1.2.156.10197.1.104.2"), "SM4"),
        (pbes2("1.3.14.3.2.7"), "DES"),
        (pbes2("2.16.840.1.101.3.4.1.43"), r"2\.16\.840\.1\.101\.3\.4\.1\.43"),
        (pbes2("2.16.840.1.101.3.4.1.42", prf="1.2.840.113549.2.6"), "HMAC-MD5"),
        (TRADITIONAL.replace("AES-256-CBC", "CAMELLIA-256-CBC"), "CAMELLIA-256-CBC"),
    ],
)
@pytest.mark.parametrize("password", [None, PASSWORD])
def test_a_cipher_that_is_not_supported_is_no_wrong_password(key, cipher, password):
    """The cipher is named, with the line that encrypts the key with AES."""
    with pytest.raises(ConfigurationError, match=f"encrypted with {cipher}, which is not supported; .*{REENCRYPT}"):
        SigningKey.load(key, password)


@pytest.mark.parametrize("password", [None, PASSWORD])
def test_a_cipher_that_is_supported_leaves_the_password(password):
    """AES with a password that does not fit, or without one, is a matter of the password."""
    words = "the key is encrypted and needs its password" if password is None else "the password does not open it"
    for key in (pbes2("2.16.840.1.101.3.4.1.42"), TRADITIONAL.replace("\n", " "), openssh(b"aes256-ctr", b"ssh-rsa")):
        assert words in reason(key, password and "wrong")


def test_an_encrypted_key_of_another_kind_is_named_once_it_opens():
    """With the right password it turns out what kind of key it is; with a wrong one that stays unknown."""
    key = ED.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, LOCKED)
    assert "this is an Ed25519 key" in reason(key, PASSWORD)
    assert "the password does not open it" in reason(key, "wrong")
    assert "needs its password" in reason(key)


def test_openssh_keys_that_cannot_be_read_are_told_apart():
    """Another cipher has its command; a damaged key is called that."""
    assert "encrypted with aes128-cbc, which is not supported; convert it in place: ssh-keygen -p -m PEM" in reason(
        openssh(b"aes128-cbc", b"ssh-rsa"), PASSWORD
    )
    assert "the key is damaged" in reason(openssh(b"none", b"ssh-rsa"))
    assert "the PEM text is damaged" in reason(openssh(b"none", b"ssh-rsa").replace("b3Blb", "b3Bl"))
    assert "its BEGIN line cannot be read" in reason("-----BEGIN PRIVATE KEY----\nMII\n")


@pytest.mark.parametrize("password", [5, ["a"], bytearray(b"a")])
def test_a_password_of_another_type_is_refused(password):
    """Only text and bytes open a key."""
    with pytest.raises(ConfigurationError, match="private key: its password must be str or bytes, not "):
        SigningKey.load(PAIR.private_pem, password)


@pytest.mark.parametrize("damage", [b"\x30\x80" * 500, b"\x30\x02\x06\x00", b"\x30\x03\x06\x81\x81", b"\x30\x81" * 3])
def test_what_only_begins_like_a_key_is_refused(damage):
    """Values nested a thousand times, and empty or endless object identifiers, are damage and nothing else."""
    assert "is not a readable RSA key" in reason(damage) or "cut off" in reason(damage)


# ── files made by OpenSSL itself ─────────────────────────────────────────────────────────────────

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the program openssl")


@needs_openssl
@pytest.mark.parametrize(
    ("options", "cipher"),
    [
        (["-v1", "PBE-SHA1-3DES"], "PBE-SHA1-3DES"),
        (["-v2", "aria-256-cbc"], "ARIA-256"),
        (["-v2", "camellia-256-cbc"], "Camellia-256"),
        (["-v2", "aes-256-cbc", "-v2prf", "hmacWithMD5"], "HMAC-MD5"),
        (["-v2", "aes-256-cbc"], None),
        (["-v2", "des3"], None),
        (["-scrypt"], None),
    ],
)
def test_what_openssl_encrypts_is_read_or_its_cipher_named(tmp_path, options, cipher):
    """And the line that the error names makes a key that is read."""
    old, new = tmp_path / "OLD.pem", tmp_path / "NEW.pem"
    secret = f"pass:{PASSWORD}"

    def openssl(*arguments, text=None):
        subprocess.run(["openssl", *map(str, arguments)], input=text, check=True, capture_output=True, text=True)

    openssl("pkcs8", "-topk8", *options, "-passout", secret, "-out", old, text=PAIR.private_pem)
    if cipher is not None:
        assert f"encrypted with {cipher}, which" in reason(old.read_text(), PASSWORD)
        openssl(
            *REENCRYPT.replace("OLD.pem", str(old)).replace("NEW.pem", str(new)).split()[1:],
            "-passin",
            secret,
            "-passout",
            secret,
        )
        old = new
    assert SigningKey.load(old, PASSWORD).fingerprint == PAIR.private.fingerprint
