"""Nothing that a program shows contains a secret: ``tests/programs/secrets.py``, in small."""

from __future__ import annotations

import logging

import attrs
import pytest
from Crypto.PublicKey import RSA

from lianlian_async import ConfigurationError, SigningKey
from tests.programs import secrets
from tests.programs.secrets import DSN_PASSWORD, KEY, LOCKED, PASSPHRASE, Evidence

PEM = KEY.private_pem
NUMBERS = KEY.oracle.private_numbers()

LEAKS = {
    "PEM": (PEM, "merchant's key, PKCS#8 in base64"),
    "PEM, as repr": (repr(PEM.encode()), "merchant's key, PKCS#8 in base64"),
    "PEM, in JSON": (PEM.replace("\n", "\\r\\n"), "merchant's key, PKCS#8 in base64"),
    "a part of the PEM": (PEM[400:550], "merchant's key, PKCS#8 in base64"),
    "PKCS#1": (RSA.import_key(PEM).export_key("PEM").decode(), "merchant's key, PKCS#1 in base64"),
    "encrypted PEM": (LOCKED, "encrypted key"),
    "the key of an RSA library": (repr(RSA.import_key(PEM)), "merchant's key, d in decimal"),
    "a number in hex": (f"{NUMBERS.p:X}", "merchant's key, p in hex"),
    "a number as bytes": (repr(NUMBERS.q.to_bytes(64)), "merchant's key, q as bytes"),
    "passphrase": (repr([PASSPHRASE]), "passphrase"),
    "DSN": (f"postgresql://me:{DSN_PASSWORD}@db/books", "DSN password"),
}


@attrs.define(slots=False)
class Careless:
    """A value with a secret."""

    word: str = PASSPHRASE


def test_nothing_that_a_program_shows_contains_a_secret(database, tmp_path, pytestconfig):
    """Through every fault and wrong setting, in all that logs, trackers, tracers and commands show."""
    report = secrets.run(database, tmp_path, rounds=pytestconfig.getoption("rounds"))
    kinds = {"log", "repr", "attributes", "asdict", "pickle", "traceback", "event", "span", "metrics"}
    assert report.searched.keys() == kinds | {"HTTP response", "JSON", "command", "file", "table"}
    assert report.found == {}


@pytest.mark.parametrize("leak", LEAKS)
def test_the_search_finds_each_form_of_a_secret(leak):
    """A key in any form, also a part of one, the passphrase and the password of the database are found."""
    text, name = LEAKS[leak]
    evidence = Evidence()
    evidence.add("command", f"before {text} after")
    assert name in evidence.secrets(secrets.wanted())["command"]


def test_the_search_finds_a_leak_of_each_kind():
    """A careless log line, value, event and local variable are found."""

    def fail():
        word = PASSPHRASE
        raise RuntimeError(len(word))

    evidence = Evidence()
    with secrets.everything_logged(evidence):
        logging.getLogger("lianlian_async").debug("the key's passphrase is %s", PASSPHRASE)
    evidence.event(Careless())
    with pytest.raises(RuntimeError) as caught:
        fail()
    evidence.show_error(caught.value)
    kinds = ("log", "repr", "attributes", "asdict", "pickle", "event", "traceback")
    assert evidence.secrets(secrets.wanted()) == {kind: ["passphrase"] for kind in kinds}


def test_the_search_finds_a_leak_in_the_library(monkeypatch):
    """If the library did not clear the variables of its frames, the search would find key and passphrase."""
    evidence = Evidence()
    for leaks in ({}, {"traceback": ["encrypted key", "passphrase"]}):
        with pytest.raises(ConfigurationError) as caught:
            SigningKey.load(LOCKED, PASSPHRASE + "x")
        evidence.show_error(caught.value)
        assert evidence.secrets(secrets.wanted()) == leaks
        monkeypatch.setattr("traceback.clear_frames", lambda frames: None)
