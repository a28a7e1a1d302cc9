"""RSA keys of the tests, generated once per process by ``cryptography``: fast, and independent of our code."""

from __future__ import annotations

from functools import lru_cache

import attrs
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from lianlian_async.signing import SigningKey, VerifyingKey


@attrs.frozen(repr=False)
class Pair:
    """One key pair, as our classes and as the oracle's class."""

    oracle: rsa.RSAPrivateKey
    private: SigningKey
    public: VerifyingKey

    @property
    def private_pem(self) -> str:
        """PKCS#8, unencrypted."""
        return self.oracle.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()

    def locked_pem(self, password: str) -> str:
        """PKCS#8, encrypted."""
        return self.oracle.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(password.encode()),
        ).decode()

    @property
    def public_pem(self) -> str:
        """X.509 SubjectPublicKeyInfo."""
        return (
            self.oracle.public_key()
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
            .decode()
        )


@lru_cache
def pair(owner: str, bits: int = 1024) -> Pair:
    """Return the key pair of ``owner`` ("merchant", "gateway", "stranger" …); it is cached in the process."""
    oracle = rsa.generate_private_key(65537, bits)
    der = oracle.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    private = SigningKey.load(der)
    return Pair(oracle, private, private.public_key())
