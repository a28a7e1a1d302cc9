"""RSA keys and signatures, and the text that is signed.

The protocol prescribes MD5withRSA: RSASSA-PKCS1-v1_5 with MD5, encoded as one line of base64. MD5 is not collision
resistant: use it only for this protocol. Only this module imports pycryptodome and cryptography (OpenSSL, extra
``fast``). A 2048-bit signature can take milliseconds: do not sign or load keys on an event loop.
"""

import os
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Final, Self, TypeAlias

from Crypto.Hash import MD5, SHA256
from Crypto.PublicKey import RSA
from Crypto.Signature import pkcs1_15

from .errors import ConfigurationError
from .key_files import PRIVATE_KEY_GIVEN, KeyMaterial, diagnose, read_keys
from .secret import without_locals

BACKEND = os.environ.get("LIANLIAN_SIGNING_BACKEND") or ("openssl" if find_spec("cryptography") else "pycryptodome")
"""The signing backend: ``pycryptodome``, or ``openssl`` (extra ``fast``), which is several times faster.

The default is OpenSSL if ``cryptography`` is installed; the environment variable ``LIANLIAN_SIGNING_BACKEND`` overrides
it. Without this variable, pycryptodome is used if OpenSSL refuses MD5 or a key (FIPS mode).
"""

_Scheme: TypeAlias = tuple[Callable[[bytes], bytes], Callable[[bytes, bytes], object], type[Exception]]
"""Signs a source; checks a source and a signature; and the exception that the check raises if they do not match."""

_PKCS1: Final = re.compile(rb"\x00\x01\xff{8,}\x00(.+)", re.DOTALL)
_DIGEST_INFO: Final = {  # the bytes before the digest (RFC 8017 §9.2, note 1), by the hash's name in hashlib
    "md5": bytes.fromhex("3020300c06082a864886f70d020505000410"),
    "sha1": bytes.fromhex("3021300906052b0e03021a05000414"),
    "sha256": bytes.fromhex("3031300d060960864801650304020105000420"),
    "sha512": bytes.fromhex("3051300d060960864801650304020305000440"),
}


def signature_source(fields: Mapping[str, str | None]) -> bytes:
    """Return the text to sign: ``key=value`` for each field, sorted by key, joined by ``&``.

    ``sign`` and empty fields are omitted. Values are not URL-encoded. Unknown fields, and ``ret_code`` and ``ret_msg``
    of an answer, are included (LianLian's signature page; verified with genuine signatures).
    """
    # LianLian's own Java code sorts case-insensitively; the order is the same, because every known key is lower case.
    return "&".join([f"{key}={value}" for key, value in sorted(fields.items()) if value and key != "sign"]).encode()


def _pycryptodome(rsa: RSA.RsaKey) -> _Scheme:
    scheme = pkcs1_15.new(rsa)
    return (
        lambda source: scheme.sign(MD5.new(source)),
        lambda source, signature: scheme.verify(MD5.new(source), signature),
        ValueError,
    )


def _openssl(rsa: RSA.RsaKey) -> _Scheme:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import padding

    how = padding.PKCS1v15(), hashes.MD5()
    # Any: the types of the package also allow keys of other kinds.
    public: Any = serialization.load_der_public_key(rsa.public_key().export_key("DER"))
    with suppress(InvalidSignature):
        public.verify(b"", b"", *how)  # in FIPS mode, OpenSSL refuses MD5 only at its first use
    private: Any = None
    if rsa.has_private():
        private = serialization.load_der_private_key(rsa.export_key("DER", pkcs=8), None)
        private.sign(b"", *how)
    return (
        lambda source: bytes(private.sign(source, *how)),
        lambda source, signature: public.verify(signature, source, *how),
        InvalidSignature,
    )


def _scheme(rsa: RSA.RsaKey) -> _Scheme:
    """Return how to sign and verify (see ``BACKEND``)."""
    if BACKEND == "pycryptodome":
        return _pycryptodome(rsa)
    if BACKEND != "openssl":
        raise ConfigurationError(f"LIANLIAN_SIGNING_BACKEND: must be pycryptodome or openssl, is {BACKEND!r}")
    if not find_spec("cryptography"):
        raise ConfigurationError("LIANLIAN_SIGNING_BACKEND: openssl needs pip install 'lianlian-async[fast]'")
    try:
        return _openssl(rsa)
    except Exception as error:  # the exception type depends on OpenSSL's version and configuration
        if os.environ.get("LIANLIAN_SIGNING_BACKEND"):
            raise ConfigurationError(
                "LIANLIAN_SIGNING_BACKEND: OpenSSL refuses MD5 or this key (FIPS mode?): set it to pycryptodome"
            ) from error
        return _pycryptodome(rsa)


class _Key:
    """The common part of private and public keys. The repr shows only size and fingerprint."""

    __slots__ = ("_check", "_invalid", "_rsa", "_sign", "bits", "fingerprint")

    def __init__(self, rsa: RSA.RsaKey) -> None:
        self._rsa = rsa
        self._sign, self._check, self._invalid = _scheme(rsa)
        self.bits: int = rsa.size_in_bits()
        """Bits of the modulus."""
        spki = rsa.public_key().export_key("DER")
        self.fingerprint: str = "SHA256:" + SHA256.new(spki).hexdigest()
        """SHA-256 of the public key (SubjectPublicKeyInfo); a private key has the fingerprint of its public key."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} RSA {self.bits} {self.fingerprint}>"


class SigningKey(_Key):
    """The merchant's private key."""

    __slots__ = ("_public_key",)
    _public_key: "VerifyingKey"

    @classmethod
    @without_locals
    def load(cls, material: KeyMaterial, password: str | bytes | None = None, *, name: str = "private key") -> Self:
        """Return the key in ``material`` (PEM, DER, bare base64 or a path); ``password`` decrypts it.

        Loading may read a file, and takes milliseconds: call this before the event loop runs, or in a thread. Raises
        :class:`ConfigurationError` if there is no usable key; the message calls the key ``name``.
        """
        rsa = _load(material, password, name, private=True)
        if not rsa.has_private():
            raise ConfigurationError(
                f"{name}: this is a public key; use the merchant's private key here (are the two settings swapped?)"
            )
        return cls(rsa)

    @classmethod
    def generate(cls, bits: int = 2048) -> Self:
        """Return a new key of ``bits`` (1024, 2048 or 4096). This can take seconds: do not call it on an event loop."""
        if not isinstance(bits, int) or bits not in (1024, 2048, 4096):
            raise ConfigurationError(f"bits: the gateway accepts keys of 1024, 2048 or 4096 bits, not {bits}")
        return cls(RSA.generate(bits))

    def sign(self, source: bytes) -> str:
        """Return the signature of ``source`` in one line of base64; it is deterministic."""
        return b64encode(self._sign(source)).decode()

    def public_key(self) -> "VerifyingKey":
        """Return the public key, which you upload in LianLian's dashboard."""
        if not hasattr(self, "_public_key"):  # created once: with OpenSSL it takes as long as a signature
            self._public_key = VerifyingKey(self._rsa.public_key())
        return self._public_key

    def to_pem(self, password: str | None = None) -> str:
        """Return the private key as PKCS#8 PEM, encrypted if a ``password`` is given. Store it with file mode 0600."""
        if password == "":
            raise ConfigurationError("password: must not be empty")
        protection = None if password is None else "PBKDF2WithHMAC-SHA512AndAES256-CBC"
        pem = self._rsa.export_key("PEM", passphrase=_encoded(password), pkcs=8, protection=protection)
        return pem.decode() + "\n"

    def __reduce__(self) -> str:
        raise TypeError("a private key cannot be pickled: load it where it is used")


class VerifyingKey(_Key):
    """LianLian's public key, which verifies its messages, or the merchant's, which LianLian's dashboard needs."""

    __slots__ = ()

    @classmethod
    @without_locals
    def load(cls, material: KeyMaterial, *, name: str = "public key") -> Self:
        """Return the key in ``material`` (PEM, DER, bare base64 or a path). Errors: see :meth:`SigningKey.load`."""
        rsa = _load(material, None, name, private=False)
        if rsa.has_private():
            raise ConfigurationError(f"{name}: {PRIVATE_KEY_GIVEN}")
        return cls(rsa)

    def verify(self, source: bytes, signature: str) -> bool:
        """Return whether ``signature`` is this key's signature of ``source``; False if it is not base64."""
        try:
            self._check(source, b64decode(signature, validate=True))
        except (ValueError, self._invalid):  # ValueError: not base64, or not ASCII
            return False
        return True

    def signed_digest(self, signature: str) -> tuple[str, bytes] | None:
        """Return the hash (its name in hashlib) and the digest that were signed; None: another key, or an unknown hash.

        For diagnosis only. Raises ``ValueError`` if ``signature`` is not base64.
        """
        number = int.from_bytes(b64decode(signature, validate=True))
        content = pow(number, self._rsa.e, self._rsa.n).to_bytes((self.bits + 7) // 8)
        if found := _PKCS1.fullmatch(content):
            for name, prefix in _DIGEST_INFO.items():
                if found[1].startswith(prefix):
                    return name, found[1].removeprefix(prefix)
        return None

    def to_base64(self) -> str:
        """Return the key as one line of base64 (X.509 SubjectPublicKeyInfo), as LianLian's dashboard expects it."""
        return b64encode(self._rsa.export_key("DER")).decode()

    def to_pem(self) -> str:
        """Return the key as PEM (X.509 SubjectPublicKeyInfo)."""
        return self._rsa.export_key("PEM").decode() + "\n"

    def __reduce__(self) -> tuple[object, ...]:
        return VerifyingKey.load, (self._rsa.export_key("DER"),)


# Error messages about a key show no part of its material.
def _load(material: KeyMaterial, password: str | bytes | None, name: str, *, private: bool) -> RSA.RsaKey:
    if not isinstance(password, str | bytes | None):
        raise ConfigurationError(f"{name}: its password must be str or bytes, not {type(password).__name__}")
    found = {}
    for encoded in read_keys(material, name, private=private):
        # Older releases of pycryptodome refuse a password that a key does not need: try again without it.
        rsa = _imported(encoded, _encoded(password)) or _imported(encoded, None)
        if rsa is None:
            why = diagnose(encoded, private=private, has_password=password is not None)
            raise ConfigurationError(f"{name}: {why}")
        found[rsa.n, rsa.e] = rsa
    if len(found) > 1:
        raise ConfigurationError(f"{name}: contains {len(found)} different keys; keep only the one that you use")
    [rsa] = found.values()
    if rsa.size_in_bits() < 1024:
        raise ConfigurationError(f"{name}: {rsa.size_in_bits()} bits are too few; LianLian accepts 1024, 2048 or 4096")
    return rsa


def _imported(encoded: bytes, password: bytes | None) -> RSA.RsaKey | None:
    """Return the key, or None instead of an error: the text of pycryptodome's error may quote the key."""
    try:
        rsa = RSA.import_key(encoded, passphrase=password)  # also checks that the key's numbers are consistent
    except (ValueError, IndexError, TypeError, ZeroDivisionError):
        return None
    return rsa if rsa.e % 2 else None  # a key with an even exponent is damaged; pycryptodome accepts it


def _encoded(password: str | bytes | None) -> bytes | None:
    """Return a password encoded as UTF-8, as OpenSSL reads it from a UTF-8 terminal (pycryptodome: Latin-1)."""
    return password.encode(errors="surrogateescape") if isinstance(password, str) else password
