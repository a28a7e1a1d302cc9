"""Errors of the package contain no key, passphrase or password: in no frame, argument or chained error."""

import json
import traceback
from pathlib import Path

import anyio
import attrs
import click
import pytest

from lianlian_async.cli.commands import keygen
from lianlian_async.cli.options import Place
from lianlian_async.contrib.procrastinate import RefundQueue
from lianlian_async.errors import ConfigurationError, JournalError
from lianlian_async.journal.postgres import PostgresJournal
from lianlian_async.merchant import Endpoints, Merchant
from lianlian_async.secret import Secret, without_locals
from lianlian_async.signing import SigningKey, VerifyingKey
from tests.support import keypairs
from tests.support.leaks import leaks

OURS = keypairs.pair("merchant")
THEIRS = keypairs.pair("gateway")
PASSWORD = "correct horse battery"
LOCKED = OURS.locked_pem(PASSWORD)
NUMBER = "201103171000000000"


def body(pem):
    """Return a part of a key's text that occurs in every copy of the key, also with other line breaks."""
    return pem.splitlines()[3]


def damaged(pem):
    """Return the key without its second line."""
    lines = pem.splitlines(keepends=True)
    return "".join([*lines[:2], *lines[3:]])


def merchant(**changed):
    settings = {"oid_partner": NUMBER, "private_key": OURS.private_pem, "gateway_public_keys": [THEIRS.public_pem]}
    return Merchant(**settings | changed)


def environment(**changed):
    settings = {"oid_partner": NUMBER, "private_key": OURS.private_pem, "gateway_public_keys": THEIRS.public_pem}
    return {f"LIANLIAN_{name.upper()}": text for name, text in (settings | changed).items()}


def written(folder, name, content):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def toml(folder, **changed):
    settings = {"oid_partner": NUMBER, "private_key": OURS.private_pem, "gateway_public_keys": THEIRS.public_pem}
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in (settings | changed).items()]
    return written(folder, "lianlian.toml", "".join(lines))


WAYS = {
    "text, wrong password": lambda _: SigningKey.load(LOCKED, PASSWORD + "x"),
    "bytes, wrong password": lambda _: SigningKey.load(LOCKED.encode(), (PASSWORD + "x").encode()),
    "file, wrong password": lambda folder: SigningKey.load(written(folder, "a.pem", LOCKED), PASSWORD + "x"),
    "no password": lambda _: SigningKey.load(LOCKED),
    "a password of another type": lambda _: SigningKey.load(LOCKED, [PASSWORD]),
    "text, damaged": lambda _: SigningKey.load(damaged(OURS.private_pem), PASSWORD),
    "bytes, damaged": lambda _: SigningKey.load(damaged(OURS.private_pem).encode(), PASSWORD),
    "file, damaged": lambda folder: SigningKey.load(written(folder, "a.pem", damaged(OURS.private_pem)), PASSWORD),
    "text, cut off": lambda _: SigningKey.load(OURS.private_pem[:500], PASSWORD),
    "a path that is a key": lambda _: SigningKey.load(Path(OURS.private_pem)),
    "a private key as the public one": lambda _: VerifyingKey.load(OURS.private_pem),
    "a list": lambda _: VerifyingKey.load([OURS.private_pem]),
    "merchant, wrong number": lambda _: merchant(oid_partner="2011 03", private_key_password=PASSWORD),
    "merchant, the key as its number": lambda _: merchant(oid_partner=OURS.private_pem),
    "merchant, another setting": lambda _: merchant(private_keys=OURS.private_pem),
    "merchant, endpoints": lambda _: merchant(endpoints=OURS.private_pem),
    "merchant, wrong password": lambda _: merchant(private_key=LOCKED, private_key_password=PASSWORD + "x").load_keys(),
    "merchant, damaged": lambda _: merchant(private_key=damaged(OURS.private_pem)).load_keys(),
    "merchant, swapped": lambda _: merchant(gateway_public_keys=[OURS.private_pem]).load_keys(),
    "endpoints": lambda _: Endpoints(OURS.private_pem),
    "environment, damaged": lambda _: Merchant.from_env(
        environment(private_key=damaged(OURS.private_pem), private_key_password=PASSWORD)
    ).load_keys(),
    "environment, wrong number": lambda _: Merchant.from_env(environment(oid_partner="x y")),
    "environment, wrong URL": lambda _: Merchant.from_env(environment(apply_url=OURS.private_pem)),
    "TOML, wrong number": lambda folder: Merchant.from_toml(toml(folder, oid_partner="x y")),
    "TOML, wrong type": lambda folder: Merchant.from_toml(toml(folder, private_key_password=[PASSWORD])),
    "TOML, unknown setting": lambda folder: Merchant.from_toml(toml(folder, private_keys=PASSWORD)),
    "TOML, line breaks": lambda folder: Merchant.from_toml(
        written(folder, "a.toml", f'private_key_password = "{PASSWORD}"\nprivate_key = "{OURS.private_pem}"')
    ),
    "TOML, not UTF-8": lambda folder: Merchant.from_toml(
        written(folder, "a.toml", OURS.private_pem.encode() + b"\xff")
    ),
    "TOML, a damaged key": lambda folder: Merchant.from_toml(
        toml(folder, private_key=damaged(OURS.private_pem), private_key_password=PASSWORD)
    ).load_keys(),
}


@pytest.mark.parametrize("way", WAYS)
def test_errors_of_loading_hold_no_secret(way, tmp_path):
    """Frames, arguments and chain of the error hold neither key nor password."""
    with pytest.raises((ConfigurationError, TypeError)) as caught:
        WAYS[way](tmp_path)
    found = [
        place for secret in (PASSWORD, body(OURS.private_pem), body(LOCKED)) for place in leaks(caught.value, secret)
    ]
    assert found == []


def test_traceback_keeps_its_lines():
    """The traceback still tells where in the package the error was raised."""
    with pytest.raises(ConfigurationError) as caught:
        SigningKey.load(LOCKED, "wrong")
    assert {"load", "_load"} <= {frame.name for frame in traceback.extract_tb(caught.value.__traceback__)}


def test_the_search_for_leaks_finds_them():
    """A parser's frames and its error hold the given text, and the search finds it."""
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads(f'"{PASSWORD}')
    assert any("decode" in place for place in leaks(caught.value, PASSWORD))
    assert any("JSONDecodeError" in place for place in leaks(caught.value, PASSWORD))
    outer = ExceptionGroup("", [ValueError()])
    outer.exceptions[0].__context__ = caught.value
    assert leaks(outer, PASSWORD)
    assert leaks(ValueError(merchant_like := attrs.make_class("Plain", ["key"])({"a": PASSWORD})), PASSWORD)
    assert leaks(ValueError([PASSWORD.encode()]), PASSWORD)
    assert not leaks(ValueError(merchant_like), "another")


def test_frames_of_the_caller_keep_their_variables():
    """An error that the caller was handling before keeps its local variables."""

    def failed():
        clue = "precious"
        raise KeyError(len(clue))

    def load_while_handling():
        try:
            failed()
        except KeyError:
            SigningKey.load(LOCKED, "wrong")

    with pytest.raises(ConfigurationError) as caught:
        load_while_handling()
    earlier = caught.value.__context__
    assert isinstance(earlier, KeyError)
    assert earlier.__traceback__.tb_next.tb_frame.f_locals == {"clue": "precious"}


def test_suppressed_context_is_removed():
    """An error raised ``from None`` has no context, whose text may quote a secret; an explicit cause is kept."""

    @without_locals
    def unwanted():
        try:
            raise KeyError(PASSWORD)
        except KeyError:
            raise ValueError from None

    @without_locals
    def wanted():
        try:
            raise KeyError(5)
        except KeyError as error:
            raise ValueError from error

    for function, cause in ((unwanted, type(None)), (wanted, KeyError)):
        with pytest.raises(ValueError) as caught:
            function()
        assert type(caught.value.__context__) is type(caught.value.__cause__) is cause


# ── what holds secrets ───────────────────────────────────────────────────────────────────────────


def test_a_secret_shows_nothing_and_compares_by_value():
    """Neither repr nor vars shows the value; equal values are equal secrets."""
    secret = Secret(PASSWORD)
    assert repr(secret) == str(secret) == f"{secret}" == "<Secret>"
    assert not hasattr(secret, "__dict__")
    assert secret == Secret(PASSWORD) != Secret("other")
    assert secret != PASSWORD
    assert hash(secret) == hash(Secret(PASSWORD))
    assert secret.reveal() == PASSWORD


def test_a_merchant_as_a_dict_or_tuple_shows_no_secret():
    """attrs.asdict and attrs.astuple, before and after the keys are loaded, hold the keys but show none."""
    holder = merchant(private_key=LOCKED, private_key_password=PASSWORD, gateway_public_keys=[THEIRS.public_pem])
    for _ in range(2):
        for shown in (attrs.asdict(holder), attrs.astuple(holder), attrs.asdict(holder, recurse=False)):
            assert not leaks(ValueError(shown), PASSWORD)
            assert not leaks(ValueError(shown), body(LOCKED))
            assert not leaks(ValueError(shown), body(THEIRS.public_pem))
        holder.load_keys()
    assert attrs.evolve(holder, notify_url=None) == holder
    assert attrs.evolve(holder, private_key_password="other") != holder
    assert attrs.evolve(holder).load_keys().private.fingerprint == OURS.private.fingerprint


# ── databases and the command ────────────────────────────────────────────────────────────────────

DSN = "postgresql://clerk:correct-horse@127.0.0.1:1/books"


@pytest.mark.parametrize(
    "dsn", ["correct-horse", "postgresql://clerk:correct-horse@[::1/books", "password=correct-horse b"]
)
def test_unreadable_dsn_is_in_no_frame(dsn):
    """An unreadable DSN is neither in a frame nor in the chain of the error."""
    with pytest.raises(ConfigurationError) as caught:
        PostgresJournal(dsn)
    assert leaks(caught.value, "correct-horse") == []


@pytest.mark.parametrize("setting", ["rescue_after", "slice_size"])
def test_an_invalid_setting_of_a_queue_leaves_no_password(setting):
    """The DSN, which is another argument, is in no frame of the error."""
    with pytest.raises(ConfigurationError, match=setting) as caught:
        RefundQueue(DSN, **{setting: 0})
    assert leaks(caught.value, "correct-horse") == []


def test_unreachable_database_leaves_no_password():
    """The DSN is neither in our frames nor in the driver's frames."""

    async def main():
        async with PostgresJournal(DSN):
            pass

    with pytest.raises(JournalError, match="journal lianlian in books at 127") as caught:
        anyio.run(main)
    assert leaks(caught.value, "correct-horse") == []
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("place", [Place(), Place(only_dsn=True)])
@pytest.mark.parametrize("dsn", [DSN, "postgresql://clerk:correct-horse@[::1/books", "mysql://correct-horse"])
def test_password_on_the_command_line_is_in_no_frame(place, dsn):
    """The command refuses a password as an argument, and no frame contains it."""
    option = click.Option(["--dsn"])
    context = click.Context(click.Command("x"))
    context.set_parameter_source("dsn", click.core.ParameterSource.COMMANDLINE)
    with pytest.raises(click.BadParameter) as caught:
        place.convert(dsn, option, context)
    assert leaks(caught.value, "correct-horse") == []


def test_unwritable_key_pair_leaves_no_password(tmp_path, monkeypatch):
    """The command fails after it has generated the key; the error contains neither the key nor the password."""
    monkeypatch.setenv("LIANLIAN_PRIVATE_KEY_PASSWORD", PASSWORD)
    arguments = ["--bits", "1024", "--out", str(tmp_path / "no" / "a.pem"), "--encrypt"]
    with pytest.raises(ConfigurationError) as caught:
        # click caches the help option in the command: use the names that the group gives it.
        keygen.main(arguments, standalone_mode=False, help_option_names=["-h", "--help"])
    assert leaks(caught.value, PASSWORD) == []
    assert leaks(caught.value, "BEGIN ENCRYPTED PRIVATE KEY") == []
