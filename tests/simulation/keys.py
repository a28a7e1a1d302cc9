"""Keys with stub signatures: real RSA would take most of a simulation's time."""

from __future__ import annotations

from base64 import b64encode
from functools import lru_cache
from hashlib import blake2b

from lianlian_async.signing import SigningKey, VerifyingKey


def while_signing() -> None:
    """Do nothing: a simulation patches this hook, which is called during each signature, to run event loops."""


class _StubVerifyingKey(VerifyingKey):
    __slots__ = ()

    def verify(self, source: bytes, signature: str) -> bool:
        return signature == _signature(source, _fingerprint(self))


@lru_cache
def _fingerprint(key: VerifyingKey | SigningKey) -> bytes:
    return key.fingerprint[-32:].encode()


class _StubSigningKey(SigningKey):
    __slots__ = ()

    def sign(self, source: bytes) -> str:
        while_signing()
        return _signature(source, _fingerprint(self))

    def public_key(self) -> VerifyingKey:
        return _verifying_key(self)


@lru_cache
def _verifying_key(key: _StubSigningKey) -> VerifyingKey:
    return _StubVerifyingKey(key._rsa.public_key())


def _signature(source: bytes, fingerprint: bytes) -> str:
    return b64encode(blake2b(source, digest_size=24, key=fingerprint).digest()).decode()


@lru_cache
def signing_key(owner: str, *, real: bool) -> SigningKey:
    """Return the key of ``owner``, one for each process: a stub, or real RSA if ``real``."""
    if real:
        return SigningKey.generate(1024)
    return _StubSigningKey(signing_key(owner, real=True)._rsa)
