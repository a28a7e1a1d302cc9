"""RSA signatures as the gateway makes and checks them, and the keys in every form that merchants hold.

The scheme is fixed by the protocol: MD5withRSA, that is RSASSA-PKCS1-v1_5 over MD5, in one line of base64.
MD5 is weak against collisions; nothing but this protocol should use it. This is the only importer of
pycryptodome, and of cryptography (OpenSSL) with the extra ``fast``. Nothing here may run on an event loop
unmeasured: a 2048-bit signature costs up to milliseconds.
"""

from __future__ import annotations

import os
import re
from base64 import b64decode, b64encode
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from Crypto.Hash import MD5, SHA256
from Crypto.PublicKey import RSA
from Crypto.Signature import pkcs1_15

from .errors import ConfigurationError

__all__ = ["BACKEND", "KeyMaterial", "SigningKey", "VerifyingKey", "signature_source"]

KeyMaterial: TypeAlias = "str | bytes | os.PathLike[str]"
"""A key as PEM, DER or bare base64 text (str or bytes), or the path of a file that holds one of them."""

BACKEND = os.environ.get("LIANLIAN_SIGNING_BACKEND") or ("openssl" if find_spec("cryptography") else "pycryptodome")
"""What computes the signatures: ``pycryptodome``, or ``openssl`` with the extra ``fast``, four to five times faster.

OpenSSL is taken where it is installed; the environment variable ``LIANLIAN_SIGNING_BACKEND`` can choose.
"""

_SMALLEST_KEY_BITS: Final = 1024  # the pages name 1024, 2048 and 4096
# A DER key is a SEQUENCE of more than 127 bytes (MI…); anything shorter may well be the name of a file.
_BARE_BASE64: Final = re.compile(rb"MI[A-Za-z0-9+/]{62,}={0,2}")
_ARMOUR: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)
_PBES2: Final = bytes.fromhex("06092a864886f70d01050d")  # the object identifier of an encrypted PKCS#8 key
_FILE_SUFFIX: Final = re.compile(r"[^\n]*\.[A-Za-z0-9]{1,8}")


def signature_source(fields: Mapping[str, str | None]) -> bytes:
    """What is signed: every field but ``sign`` and empty ones, as ``key=value``, sorted by key, joined by ``&``.

    The fields are taken as sent or received: nothing is URL-encoded, unknown fields count too, and so do
    ``ret_code`` and ``ret_msg`` of an answer (LianLian's signature page; proved by genuine signatures).
    """
    # Plain ascending order. LianLian's own Java code ignores case, but every known key is lower case.
    return "&".join([f"{key}={value}" for key, value in sorted(fields.items()) if value and key != "sign"]).encode()


class _Scheme(Protocol):
    """One key's signatures, as bytes."""

    def sign(self, source: bytes) -> bytes: ...

    def verify(self, source: bytes, signature: bytes) -> bool: ...


class _PyCryptodome:
    """The scheme in Python and a little C: always there."""

    def __init__(self, rsa: RSA.RsaKey) -> None:
        self._scheme = pkcs1_15.new(rsa)

    def sign(self, source: bytes) -> bytes:
        return self._scheme.sign(MD5.new(source))

    def verify(self, source: bytes, signature: bytes) -> bool:
        try:
            self._scheme.verify(MD5.new(source), signature)
        except ValueError:
            return False
        return True


class _OpenSsl:
    """The scheme in OpenSSL, by way of the package cryptography."""

    def __init__(self, rsa: RSA.RsaKey) -> None:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import padding

        encoded = rsa.export_key("DER", pkcs=8)
        key: Any  # RSA by construction; the package's own types also allow for other kinds
        if rsa.has_private():
            key = serialization.load_der_private_key(encoded, None)
            self._sign = key.sign
            key = key.public_key()
        else:
            key = serialization.load_der_public_key(encoded)
        self._verify = key.verify
        self._how = (padding.PKCS1v15(), hashes.MD5())
        self._invalid = InvalidSignature

    def sign(self, source: bytes) -> bytes:
        return bytes(self._sign(source, *self._how))

    def verify(self, source: bytes, signature: bytes) -> bool:
        try:
            self._verify(signature, source, *self._how)
        except self._invalid:
            return False
        return True


def _scheme(rsa: RSA.RsaKey) -> _Scheme:
    match BACKEND:
        case "pycryptodome":
            return _PyCryptodome(rsa)
        case "openssl" if find_spec("cryptography"):
            return _OpenSsl(rsa)
        case "openssl":
            raise ConfigurationError("LIANLIAN_SIGNING_BACKEND: openssl needs pip install 'lianlian-async[fast]'")
        case _:
            raise ConfigurationError(f"LIANLIAN_SIGNING_BACKEND: must be pycryptodome or openssl, is {BACKEND!r}")


class _Key:
    """What both halves share. The repr shows size and fingerprint, and nothing else."""

    __slots__ = ("_rsa", "_scheme", "bits", "fingerprint")

    def __init__(self, rsa: RSA.RsaKey) -> None:
        self._rsa = rsa
        self._scheme = _scheme(rsa)
        self.bits: int = rsa.size_in_bits()
        """The size of the modulus."""
        spki = rsa.public_key().export_key("DER")
        self.fingerprint: str = "SHA256:" + SHA256.new(spki).hexdigest()
        """SHA-256 of the public half (SubjectPublicKeyInfo): the same for both halves of a pair."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} RSA {self.bits} {self.fingerprint}>"


class SigningKey(_Key):
    """The merchant's private key."""

    __slots__ = ()

    @classmethod
    def load(
        cls, material: KeyMaterial, password: str | bytes | None = None, *, name: str = "private key"
    ) -> SigningKey:
        """The key in ``material`` (PEM, DER, bare base64 or a path); ``password`` opens an encrypted one.

        Reads a file and takes milliseconds: call it before the event loop runs, or in a thread.
        Raises :class:`ConfigurationError`, which speaks of the key as ``name``.
        """
        rsa = _load(material, password, name)
        if not rsa.has_private():
            raise ConfigurationError(f"{name}: this is a public key; the merchant's private key is needed here")
        return cls(rsa)

    @classmethod
    def generate(cls, bits: int = 2048) -> SigningKey:
        """A fresh key of ``bits`` (1024, 2048 or 4096). Takes a second or more: not on an event loop."""
        if bits not in (1024, 2048, 4096):
            raise ConfigurationError(f"bits: the gateway takes keys of 1024, 2048 or 4096 bits, not {bits}")
        return cls(RSA.generate(bits))

    def sign(self, source: bytes) -> str:
        """The signature of ``source`` in one line of base64. Deterministic: same source, same signature."""
        return b64encode(self._scheme.sign(source)).decode()

    def public_key(self) -> VerifyingKey:
        """The other half, which LianLian's dashboard asks for."""
        return VerifyingKey(self._rsa.public_key())

    def to_pem(self, password: str | None = None) -> str:
        """The private key as PKCS#8 PEM, encrypted if a ``password`` is given. Write it to mode 0600 only."""
        if password is None:
            return self._rsa.export_key("PEM", pkcs=8).decode() + "\n"
        if not password:
            raise ConfigurationError("password: must not be empty")
        return (
            self._rsa.export_key(
                "PEM", passphrase=_encoded(password), pkcs=8, protection="PBKDF2WithHMAC-SHA512AndAES256-CBC"
            ).decode()
            + "\n"
        )

    def __reduce__(self) -> str:
        raise TypeError("a private key is not pickled: load it where it is used")


class VerifyingKey(_Key):
    """A public key: LianLian's, to verify answers; or the merchant's, to hand to LianLian."""

    __slots__ = ()

    @classmethod
    def load(cls, material: KeyMaterial, *, name: str = "public key") -> VerifyingKey:
        """The key in ``material`` (PEM, DER, bare base64 or a path). Errors as :meth:`SigningKey.load`."""
        rsa = _load(material, None, name)
        if rsa.has_private():
            raise ConfigurationError(
                f"{name}: this is a private key; LianLian's public key is needed here (keep private keys out of it)"
            )
        return cls(rsa)

    def verify(self, source: bytes, signature: str) -> bool:
        """Whether ``signature`` (base64) is this key's over ``source``. False for anything unreadable."""
        try:
            received = b64decode(signature, validate=True)
        except ValueError:  # not base64, or not ASCII
            return False
        return self._scheme.verify(source, received)

    def to_base64(self) -> str:
        """Bare base64 (X.509 SubjectPublicKeyInfo) in one line: the form LianLian's dashboard takes."""
        return b64encode(self._rsa.export_key("DER")).decode()

    def to_pem(self) -> str:
        """The key as PEM (X.509 SubjectPublicKeyInfo)."""
        return self._rsa.export_key("PEM").decode() + "\n"

    def __reduce__(self) -> tuple[object, ...]:
        return VerifyingKey.load, (self._rsa.export_key("DER"),)


# ── loading: no message below may show any part of the material ──────────────────────────────────


def _load(material: KeyMaterial, password: str | bytes | None, name: str) -> RSA.RsaKey:
    encoded = _to_pem_or_der(_read(material, name), name)
    # Older pycryptodomes refuse a password that a key does not need: hence the second try without.
    rsa = _imported(encoded, _encoded(password)) or _imported(encoded, None)
    if rsa is None:
        raise ConfigurationError(f"{name}: {_diagnose(encoded, password)}")
    if rsa.size_in_bits() < _SMALLEST_KEY_BITS:
        raise ConfigurationError(f"{name}: {rsa.size_in_bits()} bits are too few; LianLian takes 1024, 2048 or 4096")
    return rsa


def _imported(encoded: bytes, password: bytes | None) -> RSA.RsaKey | None:
    """The key, or None: no foreign error may hang on ours as its context, since nobody promises what it quotes."""
    try:
        rsa = RSA.import_key(encoded, passphrase=password)  # checks too that the key's numbers belong together
    except (ValueError, IndexError, TypeError, ZeroDivisionError):
        return None
    return rsa if rsa.e % 2 else None  # only OpenSSL notices that a damaged key's exponent is even, and raises


def _encoded(password: str | bytes | None) -> bytes | None:
    """A password in UTF-8, as OpenSSL takes it from a terminal (pycryptodome alone would take Latin-1)."""
    return password.encode(errors="surrogateescape") if isinstance(password, str) else password


def is_key_text(text: str) -> bool:
    """Whether ``text`` is a key itself (whole or damaged), not the path of one."""
    return "-----BEGIN" in text or _bare_base64(text.removeprefix("\ufeff").encode(errors="replace")) is not None


def _read(material: KeyMaterial, name: str) -> bytes:
    """The bytes of the key itself: those given, or those of the file that is meant."""
    match material:
        case bytes():
            return material
        case str() if is_key_text(material):
            return material.encode(errors="replace")
        case str():
            # Key text has no dot, so only what ends like a file name is safe to show.
            path = Path(material)
            shown = repr(material) if _FILE_SUFFIX.fullmatch(material) else f"a text of {len(material)} characters"
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
    # Raised out here: the foreign error quotes the "path", which may be a damaged key.
    raise ConfigurationError(f"{name}: {shown} is no PEM, DER or base64 key, and no readable file ({reason})")


def _bare_base64(text: bytes) -> bytes | None:
    """The DER inside of bare base64, whole or cut off, or None if ``text`` is something else."""
    packed = b"".join(text.split())
    if not _BARE_BASE64.fullmatch(packed):
        return None
    digits = packed.rstrip(b"=")
    digits = digits[: len(digits) - (len(digits) % 4 == 1)]  # one left-over digit says nothing
    return b64decode(digits + b"=" * (-len(digits) % 4))


def _to_pem_or_der(content: bytes, name: str) -> bytes:
    start = content.find(b"-----BEGIN")
    if start >= 0:  # openssl writes "Bag Attributes" and text around the armour; the first block is meant
        block = _ARMOUR.match(content, start)
        return block[0] if block else content[start:]
    if content.startswith(b"\x30"):
        return content
    content = content.removeprefix(b"\xef\xbb\xbf").strip()
    if not content:
        raise ConfigurationError(f"{name}: is empty")
    der = _bare_base64(content)
    if der is None:
        raise ConfigurationError(f"{name}: is no PEM, DER or bare base64 key")
    return der


def _diagnose(encoded: bytes, password: str | bytes | None) -> str:
    """Why an encoding that looked like a key could not be read."""
    locked = "the key is encrypted and needs its password" if password is None else "the password does not open it"
    if encoded.startswith(b"-----BEGIN"):
        if not _ARMOUR.match(encoded):
            return "the PEM text is cut off: its END line is missing or damaged"
        if b"ENCRYPTED" in encoded[:200]:
            return locked
        if b"EC PRIVATE" in encoded[:40]:
            return "this is an elliptic-curve key; LianLian uses RSA"
        der = _bare_base64(b"".join(encoded.splitlines()[1:-1]))
        if der is None:
            return "the PEM text is damaged"
        encoded = der
    announced = _announced_length(encoded)
    if announced > len(encoded):
        return f"the key is cut off: {len(encoded)} of {announced} bytes are there"
    if announced < len(encoded):
        return f"the key is followed by {len(encoded) - announced} bytes that do not belong to it"
    return locked if _PBES2 in encoded[:40] else "is not a readable RSA key: it is of another kind, or damaged"


def _announced_length(der: bytes) -> int:
    """How long the outermost DER value says it is, its header included."""
    if len(der) < 2:
        return 2
    if der[1] < 0x80:
        return 2 + der[1]
    width = min(der[1] & 0x7F, 4)  # no key needs more, and no more of a damaged one may show
    return 2 + width + int.from_bytes(der[2 : 2 + width])
