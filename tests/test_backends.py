"""Both signing backends compute the same, and the environment chooses between them."""

import os
import subprocess
import sys
from functools import cache, partial

import pytest
from cryptography.hazmat.primitives import hashes
from hypothesis import given
from hypothesis import strategies as st

from lianlian_async import signing
from lianlian_async.signing import SigningKey, VerifyingKey
from tests.support import keypairs

BACKENDS = ("pycryptodome", "openssl")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Select the signing backend for all keys that are created in this test."""
    monkeypatch.setattr(signing, "BACKEND", request.param)
    return request.param


@cache
def keys_of(backend):
    """Return the keys of one pair, loaded by ``backend``."""
    pair = keypairs.pair("merchant")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signing, "BACKEND", backend)
        return SigningKey.load(pair.private_pem), VerifyingKey.load(pair.public_pem)


@given(source=st.binary(max_size=300))
def test_both_backends_make_the_same_signature(source):
    """Both backends make the same signature, and each verifies it."""
    signing_keys, verifying_keys = zip(*map(keys_of, BACKENDS), strict=True)
    (signature,) = {key.sign(source) for key in signing_keys}
    assert all(key.verify(source, signature) for key in verifying_keys)


@pytest.mark.parametrize("bits", [1024, 2048])
def test_a_private_key_signs_what_its_public_half_verifies(backend, bits):
    """Generated, exported and loaded keys work alike on this backend."""
    private = SigningKey.load(SigningKey.generate(bits).to_pem())
    assert private.public_key().verify(b"source", private.sign(b"source"))
    assert private.bits == private.public_key().bits == bits


@pytest.mark.parametrize("signature", ["", "AAAA", "not base64", "é", "A" * 172, "=" * 172])
def test_wrong_signature_is_false(backend, signature):
    """Verification returns False for any value of `sign`."""
    assert VerifyingKey.load(keypairs.pair("gateway").public_pem).verify(b"source", signature) is False


def test_another_source_is_refused(backend):
    """A signature is valid only for its own source."""
    pair = keypairs.pair("gateway")
    signature = SigningKey.load(pair.private_pem).sign(b"source")
    assert not VerifyingKey.load(pair.public_pem).verify(b"Source", signature)


def backend_of_a_new_process(wanted: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", "from lianlian_async import signing; print(signing.BACKEND)"],
        env=os.environ | {"LIANLIAN_SIGNING_BACKEND": wanted},
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout.strip()


@pytest.mark.parametrize(("wanted", "chosen"), [("", "openssl"), *zip(BACKENDS, BACKENDS, strict=True)])
def test_the_environment_chooses(wanted, chosen):
    """OpenSSL is the default if it is installed; the environment variable overrides it."""
    assert backend_of_a_new_process(wanted) == chosen


def test_an_unknown_backend_is_named(monkeypatch):
    """The error names the variable and the choices when the first key is loaded."""
    monkeypatch.setattr(signing, "BACKEND", "opensssl")
    with pytest.raises(signing.ConfigurationError, match="LIANLIAN_SIGNING_BACKEND: must be pycryptodome or openssl"):
        VerifyingKey.load(keypairs.pair("gateway").public_pem)


def test_openssl_needs_the_extra(monkeypatch):
    """Without cryptography, the error says what to install."""
    monkeypatch.setattr(signing, "BACKEND", "openssl")
    monkeypatch.setattr(signing, "find_spec", lambda name: None)
    with pytest.raises(signing.ConfigurationError, match=r"lianlian-async\[fast\]"):
        VerifyingKey.load(keypairs.pair("gateway").public_pem)


def signature_where_openssl_refuses(tmp_path, wanted: str) -> subprocess.CompletedProcess[str]:
    """Sign in a new process whose OpenSSL is in FIPS mode and so refuses MD5."""
    configuration = tmp_path / "openssl.cnf"
    configuration.write_text(
        "openssl_conf = init\n[init]\nalg_section = algorithms\n[algorithms]\ndefault_properties = fips=yes\n"
    )
    key = tmp_path / "key.pem"
    key.write_text(keypairs.pair("merchant").private_pem)
    program = (
        "import sys; from lianlian_async.signing import SigningKey; print(SigningKey.load(sys.argv[1]).sign(b'x'))"
    )
    environment = os.environ | {"OPENSSL_CONF": str(configuration), "LIANLIAN_SIGNING_BACKEND": wanted}
    return subprocess.run(
        [sys.executable, "-c", program, str(key)], env=environment, capture_output=True, text=True, timeout=60
    )


def test_pycryptodome_replaces_an_openssl_without_md5(tmp_path):
    """In FIPS mode refunds are signed, unless the user chose OpenSSL."""
    expected = keypairs.pair("merchant").private.sign(b"x")
    assert signature_where_openssl_refuses(tmp_path, "").stdout.strip() == expected
    ended = signature_where_openssl_refuses(tmp_path, "openssl")
    assert "ConfigurationError: LIANLIAN_SIGNING_BACKEND: OpenSSL refuses MD5" in ended.stderr


@pytest.mark.parametrize("half", ["private", "public"])
def test_openssl_that_refuses_md5_is_noticed_at_loading(monkeypatch, half):
    """Pycryptodome replaces it; if the user chose OpenSSL, loading raises an error."""
    pair = keypairs.pair("merchant")
    signature = pair.private.sign(b"x")

    def load():
        return (
            SigningKey.load(pair.private_pem).public_key() if half == "private" else VerifyingKey.load(pair.public_pem)
        )

    monkeypatch.setattr(signing, "BACKEND", "openssl")
    monkeypatch.setattr(
        hashes, "MD5", partial(hashes.BLAKE2s, 32)
    )  # which OpenSSL refuses for RSA: UnsupportedAlgorithm
    monkeypatch.setenv("LIANLIAN_SIGNING_BACKEND", "")
    assert load().verify(b"x", signature)
    monkeypatch.setenv("LIANLIAN_SIGNING_BACKEND", "openssl")
    with pytest.raises(signing.ConfigurationError, match="OpenSSL refuses MD5 or this key"):
        load()
