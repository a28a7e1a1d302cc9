"""Find the keys in a string, bytes or a file. If there is none, the error says why.

This module does not decrypt keys: it returns DER or PEM, which pycryptodome reads. No message shows key material.
"""

import codecs
import os
import re
from base64 import b64decode
from pathlib import Path
from typing import Final, TypeAlias

from .errors import ConfigurationError

KeyMaterial: TypeAlias = str | bytes | os.PathLike[str]
"""A key as PEM, DER or bare base64 (str or bytes), or the path of a file that contains one."""

_BLOCK: Final = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----(.*?)(-----END \1-----|(?=-----BEGIN )|\Z)", re.DOTALL)
_DEK_INFO: Final = re.compile(
    r"\s*Proc-Type:\s*4,\s*ENCRYPTED\s+DEK-Info:\s*([\w-]{1,40}),\s*([0-9A-F]+)\s+(.*)", re.DOTALL | re.IGNORECASE
)
_BASE64: Final = re.compile(r"M[A-I][A-Za-z0-9+/]{38,}={0,2}")  # base64 of a DER SEQUENCE
_FILE_SUFFIX: Final = re.compile(r"[^\n]*\.[A-Za-z0-9]{1,8}")

PRIVATE_KEY_GIVEN: Final = "this is a private key; use LianLian's public key here"

_ONLY_RSA: Final = "LianLian uses RSA only (a new key pair: openssl genrsa -out merchant.pem 2048)"
_FROM_PFX: Final = (
    "openssl pkcs12 -in FILE -nocerts -nodes -out merchant.pem extracts a private key, "
    "openssl pkcs12 -in FILE -clcerts -nokeys -out gateway.pem a certificate"
)
_FROM_JKS: Final = (
    f"keytool -importkeystore -srckeystore FILE -destkeystore FILE.p12 -deststoretype PKCS12, then {_FROM_PFX}"
)
_OTHER_KINDS: Final = {  # object identifiers in DER (oid-base.com)
    b"\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02": (
        "a PKCS#7 file: openssl pkcs7 -print_certs -in FILE -out gateway.pem extracts the certificates "
        "(binary FILE: add -inform DER)"
    ),
    b"\x2a\x86\x48\x86\xf7\x0d\x01\x07\x01": f"a PKCS#12 file (.p12, .pfx): {_FROM_PFX}",
    b"\x2a\x86\x48\xce\x3d": f"an elliptic-curve key. {_ONLY_RSA}",
    b"\x2b\x81\x04\x00": f"an elliptic-curve key. {_ONLY_RSA}",
    b"\x06\x03\x2b\x65\x70": f"an Ed25519 key. {_ONLY_RSA}",
}
_UNSUPPORTED_CIPHER: Final = (
    "the key is encrypted with a cipher that is not supported; encrypt it with AES: "
    "openssl pkcs8 -topk8 -v2 aes-256-cbc -in OLD.pem -out NEW.pem "
    "(OpenSSL 3: add -provider legacy -provider default for RC2, RC4 and DES)"
)
# What pycryptodome decrypts: PBES1 with DES or RC2; PBES2 with 3DES, or AES in CBC or GCM mode; PEM with DEK-Info.
_SUPPORTED: Final = re.compile(
    rb"\x2a\x86\x48\x86\xf7\x0d\x01\x05[\x03\x06\x0a\x0b]|\x2a\x86\x48\x86\xf7\x0d\x03\x07"
    rb"|\x60\x86\x48\x01\x65\x03\x04\x01[\x02\x06\x16\x1a\x2a\x2e]"
    rb"|(?i:DEK-Info: (?:DES-CBC|DES-EDE3-CBC|AES-(?:128|192|256)-CBC|id-aes256-GCM),)"
)
# The beginning of an EncryptedPrivateKeyInfo (RFC 5208) with an encryption scheme of PKCS#5 or PKCS#12.
_ENCRYPTED: Final = re.compile(
    rb"\x30.{1,4}\x30.{1,4}\x06[\x09\x0a]\x2a\x86\x48\x86\xf7\x0d\x01(\x05|\x0c\x01)", re.DOTALL
)


def unquoted(text: str) -> str:
    """Return ``text`` without surrounding white space and one pair of quotes (``docker --env-file`` keeps quotes)."""
    text = text.strip()
    inner = text[1:-1]
    return inner.strip() if len(text) > 1 and text[0] == text[-1] in "\"'" and text[0] not in inner else text


def plain_text(content: bytes, errors: str = "replace") -> str:
    """Decode UTF-8, or UTF-16 with a byte order mark."""
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf_16 else "utf-8-sig", errors)


def _key_text(text: str) -> str:
    """Remove what editors, shells and environment files add to key text: BOM, quotes, escaped line breaks."""
    return unquoted(text.removeprefix("\ufeff")).replace("\\r", "").replace("\\n", "\n")


def is_key_text(text: str) -> bool:
    """Return whether ``text`` is a key, possibly damaged, and not a path."""
    text = _key_text(text)
    return "-----BEGIN" in text or _der(text) is not None


def read_keys(material: KeyMaterial, name: str, *, private: bool) -> list[bytes]:
    """Return the private keys in ``material``; if it contains none, return every key.

    Each key is DER, or PEM if DER cannot express it (PEM with encryption headers, OpenSSH). With ``private`` False, a
    private key in PEM is an error. Raises :class:`ConfigurationError`, whose message calls the key ``name``.
    """
    content = _read(material, name)
    if content.startswith(b"\x30"):
        return [content]
    found = _find(content, private=private)
    if isinstance(found, str):
        raise ConfigurationError(f"{name}: {found}")
    return found


def _find(content: bytes, *, private: bool) -> list[bytes] | str:
    """Return the keys, or a message that says why there are none."""
    if content.startswith(b"\xfe\xed\xfe\xed"):
        return f"this is a Java keystore (JKS): {_FROM_JKS}"
    text = _key_text(plain_text(content))
    if not text:
        return "is empty"
    if "-----BEGIN" not in text:
        der = _der(text)
        return "is not a PEM, DER or bare base64 key" if der is None else [der]
    blocks = _BLOCK.findall(text)
    private_blocks = [block for block in blocks if block[0].endswith("PRIVATE KEY")]
    if private_blocks and not private:
        return PRIVATE_KEY_GIVEN
    found = []
    for label, body, end in private_blocks or blocks:
        if not end:
            return "the PEM text is cut off: its END line is missing or damaged"
        key = _block(label, body)
        if key is None:
            return "the PEM text is damaged, or is not a key"
        found.append(key)
    return found or "the PEM text is damaged: its BEGIN line cannot be read"


def _block(label: str, body: str) -> bytes | None:
    """Return one PEM block as DER, or as PEM with its base64 in one line; None if it is damaged."""
    if headers := _DEK_INFO.fullmatch(body):
        cipher, vector, body = headers.groups()
        return _pem(label, f"Proc-Type: 4,ENCRYPTED\nDEK-Info: {cipher},{vector}\n\n", body)
    return _pem(label, "", body) if label == "OPENSSH PRIVATE KEY" else _der(body)


def _pem(label: str, headers: str, body: str) -> bytes:
    return f"-----BEGIN {label}-----\n{headers}{''.join(body.split())}\n-----END {label}-----".encode()


def _der(text: str) -> bytes | None:
    """Decode base64 ``text`` to DER, even if it is truncated; return None if it is not base64 of DER.

    Short text may be a file name. So truncated text is decoded only if it has at least 64 digits, and its header
    announces a value of 128 bytes or more.
    """
    packed = "".join(text.split())
    if not _BASE64.fullmatch(packed):
        return None
    digits = packed.rstrip("=")
    digits = digits[: len(digits) - (len(digits) % 4 == 1)]  # one left-over digit encodes nothing
    der = b64decode(digits + "=" * (-len(digits) % 4))
    return der if (packed[1] == "I" and len(packed) >= 64) or _announced_length(der) == len(der) else None


def _read(material: KeyMaterial, name: str) -> bytes:
    """Return ``material`` if it is bytes or key text, else the content of the file."""
    match material:
        case bytes():
            return material
        case str() if is_key_text(material):
            return material.encode(errors="replace")
        case str():
            path = Path(unquoted(material))
            # Key text contains no dot, so only text with a file suffix is safe to show.
            is_path = _FILE_SUFFIX.fullmatch(unquoted(material))
            shown = repr(material) if is_path else f"a text of {len(material)} characters"
        case os.PathLike():
            path = Path(material)
            shown = repr(str(path)) if not is_key_text(str(path)) else "key text given as a path"
        case _:
            raise ConfigurationError(f"{name}: must be str, bytes or a path, not {type(material).__name__}")
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        reason = error.strerror
    except (ValueError, RuntimeError):  # an invalid character, or ~name for an unknown user
        reason = "not a usable path"
    if re.search(r"[\t\n\r\b\f]", str(path)):
        reason = "it contains a control character, perhaps from a backslash: write / or two backslashes"
    # Raised outside the except clause: its context would be the OSError, which quotes the path (perhaps key text).
    raise ConfigurationError(f"{name}: {shown} is not a PEM, DER or base64 key, and not a readable file ({reason})")


def diagnose(encoded: bytes, *, private: bool, has_password: bool) -> str:
    """Return a message that says why pycryptodome cannot read ``encoded``, a result of :func:`read_keys`."""
    locked = "the key is encrypted: give its password"
    if not _SUPPORTED.search(encoded):
        locked = _UNSUPPORTED_CIPHER
    elif has_password:
        locked = "the password is wrong, or the key is not an RSA key"
    if encoded.startswith(b"-----BEGIN OPENSSH"):
        return f"cannot read this OpenSSH key. {_ONLY_RSA}; convert an RSA key: ssh-keygen -p -m PEM -f FILE"
    if encoded.startswith(b"-----BEGIN"):
        return locked
    announced = _announced_length(encoded)
    if announced > len(encoded):
        return f"the key is cut off: it has {len(encoded)} of {announced} bytes"
    if announced < len(encoded) and encoded[1] != 0x80:  # the length of a PKCS#12 file may be indefinite
        return f"{len(encoded) - announced} bytes after the key do not belong to it: remove them"
    if _ENCRYPTED.match(encoded):
        return locked if private else PRIVATE_KEY_GIVEN
    kind = next((kind for identifier, kind in _OTHER_KINDS.items() if identifier in encoded), None)
    return f"this is {kind}" if kind else "is not a readable RSA key: it is of another kind, or damaged"


def _announced_length(der: bytes) -> int:
    """Return the length of the outermost DER value, header included, according to this header."""
    if len(der) < 2:
        return 2
    if der[1] < 0x80:
        return 2 + der[1]
    width = min(der[1] & 0x7F, 4)  # a damaged key may announce more: messages would show key bytes as a length
    return 2 + width + int.from_bytes(der[2 : 2 + width])
