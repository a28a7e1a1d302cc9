"""Key material as merchants hold it: find the key in a text or a file, or say what the text or file is instead.

Nothing here decrypts or computes: ``signing`` gets DER or PEM that pycryptodome reads. No message shows any part of the
material.
"""

from __future__ import annotations

import codecs
import os
import re
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

from .errors import ConfigurationError

__all__ = ["PRIVATE_KEY_GIVEN", "KeyMaterial", "diagnose", "is_key_text", "plain_text", "read_keys", "unquoted"]

KeyMaterial: TypeAlias = "str | bytes | os.PathLike[str]"
"""A key as PEM, DER or bare base64 text (str or bytes), or the path of a file that holds one of them."""

_BLOCK: Final = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----(.*?)(-----END \1-----|(?=-----BEGIN )|\Z)", re.DOTALL)
_DEK_INFO: Final = re.compile(
    r"\s*Proc-Type:\s*4,\s*ENCRYPTED\s+DEK-Info:\s*([\w-]{1,40}),\s*([0-9A-F]+)\s+(.*)", re.DOTALL | re.IGNORECASE
)
_BASE64: Final = re.compile(r"M[A-I][A-Za-z0-9+/]{38,}={0,2}")  # of a DER SEQUENCE
_SSH_PUBLIC: Final = re.compile(r"(ssh|ecdsa|sk)-\S+ AAAA")
_FILE_SUFFIX: Final = re.compile(r"[^\n]*\.[A-Za-z0-9]{1,8}")

_ONLY_RSA: Final = "LianLian uses RSA only (a new key pair: openssl genrsa -out merchant.pem 2048)"
_FROM_PFX: Final = (
    "openssl pkcs12 -in FILE -nocerts -nodes -out merchant.pem takes out a private key, "
    "openssl pkcs12 -in FILE -clcerts -nokeys -out gateway.pem a certificate"
)
_FROM_JKS: Final = (
    f"keytool -importkeystore -srckeystore FILE -destkeystore FILE.p12 -deststoretype PKCS12, then {_FROM_PFX}"
)
_FROM_PKCS7: Final = "openssl pkcs7 -print_certs -in FILE -out gateway.pem takes out the certificates"
_FROM_SSH: Final = "convert it in place: ssh-keygen -p -m PEM -f FILE"
_REENCRYPT: Final = (
    "openssl pkcs8 -topk8 -v2 aes-256-cbc -in OLD.pem -out NEW.pem "
    "(OpenSSL 3: add -provider legacy -provider default for RC2, RC4 and DES)"
)
_REQUEST: Final = (
    "a certificate request, which holds no private key; openssl req -in FILE -pubkey -noout shows its public key"
)
PRIVATE_KEY_GIVEN: Final = "this is a private key; LianLian's public key is needed here (keep private keys out of it)"

_FOREIGN_FILES: Final = (
    (b"\xfe\xed\xfe\xed", f"a Java keystore (JKS): {_FROM_JKS}"),
    (b"\xce\xce\xce\xce", f"a Java keystore (JCEKS): {_FROM_JKS}"),
    (b"PuTTY-User-Key-File", "a PuTTY key: puttygen FILE -O private-openssh -o merchant.pem converts an RSA key"),
    (b"---- BEGIN SSH2", "an SSH public key: ssh-keygen -i -m RFC4716 -f FILE | ssh-keygen -e -m PKCS8 -f /dev/stdin"),
    (b"<RSAKeyValue", "an XML key of .NET: export it there with RSA.ExportPkcs8PrivateKeyPem()"),
)
_FOREIGN_BLOCKS: Final = {
    "EC PRIVATE KEY": f"an elliptic-curve key; {_ONLY_RSA}",
    "EC PARAMETERS": f"parameters of an elliptic curve; {_ONLY_RSA}",
    "DSA PRIVATE KEY": f"a DSA key; {_ONLY_RSA}",
    "CERTIFICATE REQUEST": _REQUEST,
    "NEW CERTIFICATE REQUEST": _REQUEST,
    "PKCS7": f"a PKCS#7 file: {_FROM_PKCS7}",
    "PGP PRIVATE KEY BLOCK": f"a PGP key; {_ONLY_RSA}",
    "PGP PUBLIC KEY BLOCK": f"a PGP key; {_ONLY_RSA}",
}
_PBE: Final = ("1.2.840.113549.1.5.", "1.2.840.113549.1.12.1.")
_ALGORITHMS: Final = {  # object identifiers, first match by prefix
    "1.2.840.10045.": f"an elliptic-curve key; {_ONLY_RSA}",
    "1.3.132.0.": f"an elliptic-curve key; {_ONLY_RSA}",
    "1.3.101.112": f"an Ed25519 key; {_ONLY_RSA}",
    "1.3.101.": f"an X25519, X448 or Ed448 key; {_ONLY_RSA}",
    "1.2.840.10040.4.": f"a DSA key; {_ONLY_RSA}",
    "1.2.840.113549.1.7.2": f"a PKCS#7 file: {_FROM_PKCS7}",
    "1.2.840.113549.1.7.": f"a PKCS#12 file (.p12, .pfx): {_FROM_PFX}",
}
_READABLE_PEM_CIPHERS: Final = {"DES-CBC", "DES-EDE3-CBC", "AES-128-CBC", "AES-192-CBC", "AES-256-CBC", "ID-AES256-GCM"}
_READABLE: Final = {
    *(f"1.2.840.113549.1.5.{number}" for number in (3, 6, 10, 11, 12, 13)),  # PBES1, PBKDF2, PBES2
    "1.3.6.1.4.1.11591.4.11",  # scrypt
    *(f"1.2.840.113549.2.{number}" for number in range(7, 14)),  # HMAC with SHA-1 and SHA-2
    *(f"2.16.840.1.101.3.4.2.{number}" for number in range(13, 17)),  # HMAC with SHA-3
    "1.2.840.113549.3.7",  # 3DES
    *(f"2.16.840.1.101.3.4.1.{number}" for number in (2, 6, 22, 26, 42, 46)),  # AES in CBC and GCM
}
_UNREADABLE: Final = {
    **{
        f"1.2.840.113549.1.12.1.{number}": f"PBE-SHA1-{cipher}"
        for number, cipher in enumerate(("RC4-128", "RC4-40", "3DES", "2DES", "RC2-128", "RC2-40"), 1)
    },
    "1.2.840.113549.3.2": "RC2",
    "1.3.14.3.2.7": "DES",
    "1.2.392.200011.61.1.1.1.4": "Camellia-256",
    "1.2.410.200046.1.1.12": "ARIA-256",
    "1.2.156.10197.1.104.2": "SM4",
    "1.2.840.113549.2.6": "HMAC-MD5",
}


# ── finding the key ──────────────────────────────────────────────────────────────────────────────


def unquoted(text: str) -> str:
    """Return ``text`` without white space around it, nor one pair of quotes, as ``docker --env-file`` keeps them."""
    text = text.strip()
    inner = text[1:-1]
    return inner.strip() if len(text) > 1 and text[0] == text[-1] in "\"'" and text[0] not in inner else text


def plain_text(content: bytes, errors: str = "replace") -> str:
    """Decode UTF-8, or UTF-16 with a byte order mark."""
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf_16 else "utf-8-sig", errors)


def _key_text(text: str) -> str:
    """Undo what editors, shells and environment files do to key text: BOM, quotes, escaped line breaks."""
    return unquoted(text.removeprefix("\ufeff")).replace("\\r", "").replace("\\n", "\n")


def is_key_text(text: str) -> bool:
    """Return whether ``text`` is a key itself (whole or damaged), not the path of one."""
    text = _key_text(text)
    return "-----BEGIN" in text or _SSH_PUBLIC.match(text) is not None or _der(text) is not None


def read_keys(material: KeyMaterial, name: str, *, private: bool) -> list[bytes]:
    """Return the keys in ``material`` that may be meant, as DER, or as PEM where DER cannot say it.

    These are the private keys, where there are any; else everything. Raises :class:`ConfigurationError` about ``name``.
    """
    content = material.encode(errors="replace") if isinstance(material, str) and is_key_text(material) else None
    content = _read(material, name) if content is None else content
    if content.startswith(b"\x30"):
        return [content]
    found = _find(content, private=private)
    if isinstance(found, str):
        raise ConfigurationError(f"{name}: {found}")
    return found


def _find(content: bytes, *, private: bool) -> list[bytes] | str:
    """Return the keys, or why there are none."""
    for beginning, what in _FOREIGN_FILES:
        if content.startswith(beginning):
            return f"this is {what}"
    text = _key_text(plain_text(content))
    if not text:
        return "is empty"
    if _SSH_PUBLIC.match(text):
        return "this is an SSH public key: ssh-keygen -e -m PKCS8 -f FILE converts an RSA key"
    if "-----BEGIN" not in text:
        der = _der(text)
        return "is no PEM, DER or bare base64 key" if der is None else [der]
    blocks = _BLOCK.findall(text)
    private_blocks = [block for block in blocks if block[0].endswith("PRIVATE KEY")]
    if private_blocks and not private:
        return PRIVATE_KEY_GIVEN
    found = []
    for label, body, end in private_blocks or blocks:
        key = _block(label, body) if end else "the PEM text is cut off: its END line is missing or damaged"
        if isinstance(key, str):
            return key
        found.append(key)
    return found or "the PEM text is damaged: its BEGIN line cannot be read"


def _block(label: str, body: str) -> bytes | str:
    """Return one block of PEM, whatever became of its line breaks, as DER or PEM; or why it holds no key."""
    if label in _FOREIGN_BLOCKS:
        return f"this is {_FOREIGN_BLOCKS[label]}"
    if headers := _DEK_INFO.fullmatch(body):
        cipher, vector, body = headers.groups()
        if cipher.upper() not in _READABLE_PEM_CIPHERS:
            return f"the key is encrypted with {cipher}, which is not supported; encrypt it with AES: {_REENCRYPT}"
        return _pem(label, f"Proc-Type: 4,ENCRYPTED\nDEK-Info: {cipher},{vector}\n\n", body)
    if label == "OPENSSH PRIVATE KEY":
        return _pem(label, "", body)
    return _der(body) or "the PEM text is damaged"


def _pem(label: str, headers: str, body: str) -> bytes:
    return f"-----BEGIN {label}-----\n{headers}{''.join(body.split())}\n-----END {label}-----".encode()


def _der(text: str) -> bytes | None:
    """Return the DER in base64, also where it is cut off; None if ``text`` is something else.

    Less than 64 digits may well be the name of a file, so they have to be a whole value.
    """
    packed = "".join(text.split())
    if not _BASE64.fullmatch(packed):
        return None
    digits = packed.rstrip("=")
    digits = digits[: len(digits) - (len(digits) % 4 == 1)]  # one left-over digit says nothing
    der = b64decode(digits + "=" * (-len(digits) % 4))
    return der if (packed[1] == "I" and len(packed) >= 64) or _announced_length(der) == len(der) else None


def _read(material: KeyMaterial, name: str) -> bytes:
    """Return the bytes given, or those of the file that is meant."""
    match material:
        case bytes():
            return material
        case str():
            # Key text has no dot, so only what ends like a file name is safe to show.
            path = Path(unquoted(material))
            shown = (
                repr(material)
                if _FILE_SUFFIX.fullmatch(unquoted(material))
                else f"a text of {len(material)} characters"
            )
        case os.PathLike():
            path = Path(material)
            shown = repr(str(path)) if not is_key_text(str(path)) else "key text that was taken for a path"
        case _:
            raise ConfigurationError(f"{name}: must be str, bytes or a path, not {type(material).__name__}")
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        reason = error.strerror
    except (ValueError, RuntimeError):  # a character no path can hold, the home of an unknown user
        reason = "not a usable path"
    if re.search(r"[\t\n\r\b\f]", str(path)):
        reason = "it holds a control character: write a path with backslashes in single quotes"
    # Raised out here: the foreign error quotes the "path", which may be a damaged key.
    raise ConfigurationError(f"{name}: {shown} is no PEM, DER or base64 key, and no readable file ({reason})")


# ── saying what is wrong ─────────────────────────────────────────────────────────────────────────


def diagnose(encoded: bytes, *, private: bool, has_password: bool, opened: str | None) -> str:
    """Return why an encoding from :func:`read_keys` is no RSA key.

    ``opened`` is the object identifier of the algorithm that an encrypted key turned out to be of.
    """
    locked = "the password does not open it" if has_password else "the key is encrypted and needs its password"
    if encoded.startswith(b"-----BEGIN"):
        return _diagnose_openssh(encoded, locked) if b"OPENSSH" in encoded[:40] else locked
    announced = _announced_length(encoded)
    if announced > len(encoded):
        return f"the key is cut off: {len(encoded)} of {announced} bytes are there"
    if announced < len(encoded) and encoded[1] != 0x80:  # the length of a PKCS#12 file may be indefinite
        return f"the key is followed by {len(encoded) - announced} bytes that do not belong to it"
    identifiers = [opened] if opened else list(_identifiers(encoded))
    if identifiers and identifiers[0].startswith(_PBE):
        if not private:
            return PRIVATE_KEY_GIVEN
        unreadable = [identifier for identifier in identifiers if identifier not in _READABLE]
        if not unreadable:
            return locked
        cipher = _UNREADABLE.get(unreadable[-1], unreadable[-1])
        return f"the key is encrypted with {cipher}, which is not supported; encrypt it with AES: {_REENCRYPT}"
    for prefix, what in _ALGORITHMS.items():
        if any(identifier.startswith(prefix) for identifier in identifiers):
            return f"this is {what}"
    if re.match(rb"\x30.{1,5}?\x30.{1,4}?\x02\x01\x00\x30", encoded, re.DOTALL):
        return f"this is {_REQUEST}"
    return "is not a readable RSA key: it is of another kind, or damaged"


def _diagnose_openssh(encoded: bytes, locked: str) -> str:
    try:
        content = b64decode(encoded.splitlines()[1])
    except ValueError:
        return "the PEM text is damaged"
    cipher = content[19 : 19 + int.from_bytes(content[15:19])][:40].decode(errors="replace")
    if b"ssh-rsa" not in content:
        return f"this is an OpenSSH key of another kind; {_ONLY_RSA}"
    if cipher == "none":
        return "the key is damaged"
    return (
        locked if cipher == "aes256-ctr" else f"the key is encrypted with {cipher}, which is not supported; {_FROM_SSH}"
    )


def _announced_length(der: bytes) -> int:
    """Return how long the outermost DER value says it is, its header included."""
    if len(der) < 2:
        return 2
    if der[1] < 0x80:
        return 2 + der[1]
    width = min(der[1] & 0x7F, 4)  # no key needs more, and no more of a damaged one may show
    return 2 + width + int.from_bytes(der[2 : 2 + width])


def _identifiers(der: bytes, depth: int = 8) -> Iterator[str]:
    """Yield the object identifiers in ``der``, in their order, as dotted numbers."""
    at = 0
    while at + 2 <= len(der):
        tag, long = der[at], der[at + 1] & 0x80
        end = len(der) if der[at + 1] == 0x80 else at + _announced_length(der[at : at + 6])
        content = der[at + 2 + (min(der[at + 1] & 0x7F, 4) if long else 0) : end]
        if tag == 6:
            yield _dotted(content)
        elif tag & 0x20 and depth:
            yield from _identifiers(content, depth - 1)
        at = end


def _dotted(content: bytes) -> str:
    """Return an object identifier as numbers with dots between them (X.690 §8.19)."""
    arcs, arc = list[int](), 0
    for byte in content[:16]:
        arc = arc << 7 | byte & 0x7F
        if byte < 0x80:
            arcs.append(arc)
            arc = 0
    first = min(arcs[0] // 40, 2) if arcs else 0
    return ".".join(map(str, [first, *(arcs[:1] and [arcs[0] - 40 * first]), *arcs[1:]]))
