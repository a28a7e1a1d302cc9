"""RSA and certificates by OpenSSL through ``cryptography``: for the server, and for the peers that use it."""

from __future__ import annotations

import base64
import datetime
import ipaddress
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

_PADDING, _MD5 = padding.PKCS1v15(), hashes.MD5()


def write_keys(folder: Path, bits: int) -> None:
    """Make the merchant's and the gateway's key pair (both of ``bits``), and a certificate for 127.0.0.1."""
    for name in ("merchant", "gateway"):
        key = rsa.generate_private_key(65537, bits)
        (folder / f"{name}.pem").write_bytes(_private_pem(key))
        (folder / f"{name}.pub.pem").write_bytes(
            key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
    key = rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "benchmark")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "tls.key").write_bytes(_private_pem(key))
    (folder / "tls.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _private_pem(key: rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def signer(path: Path) -> Callable[[bytes], str]:
    """Return a function that signs with the private key at ``path``."""
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise TypeError(path)
    return lambda source: base64.b64encode(key.sign(source, _PADDING, _MD5)).decode()


def verifier(path: Path) -> Callable[[bytes, str], bool]:
    """Return a function that verifies with the public key at ``path``."""
    key = serialization.load_pem_public_key(path.read_bytes())
    if not isinstance(key, rsa.RSAPublicKey):
        raise TypeError(path)

    def verify(source: bytes, signature: str) -> bool:
        try:
            key.verify(base64.b64decode(signature), source, _PADDING, _MD5)
        except (InvalidSignature, ValueError):
            return False
        return True

    return verify
