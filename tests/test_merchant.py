"""The merchant's settings: from code, environment and TOML, with errors that name the setting and show no key."""

import copy
import json
import pickle
import re
import threading
import traceback
from urllib.parse import urlsplit

import attrs
import pytest

from lianlian_async.errors import ConfigurationError
from lianlian_async.merchant import Endpoints, Merchant
from tests.support import keypairs

OURS = keypairs.pair("merchant")
THEIRS = keypairs.pair("gateway")
NEXT = keypairs.pair("the gateway's next key")
NUMBER = "201103171000000000"
ENVIRONMENT = {
    "LIANLIAN_OID_PARTNER": NUMBER,
    "LIANLIAN_PRIVATE_KEY": OURS.private_pem,
    "LIANLIAN_GATEWAY_PUBLIC_KEYS": THEIRS.public.to_base64(),
}


def made(**changed):
    return Merchant(
        **{"oid_partner": NUMBER, "private_key": OURS.private_pem, "gateway_public_keys": [THEIRS.public_pem]} | changed
    )


def message_of(make):
    """Return the message of the ConfigurationError; check that the error shows no key text."""
    with pytest.raises(ConfigurationError) as caught:
        make()
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value.__context__)
    for pair in (OURS, THEIRS):
        body = "".join(pair.private_pem.splitlines()[1:-1]) + pair.public.to_base64()
        assert not [at for at in range(len(body) - 15) if body[at : at + 16] in shown]
    return str(caught.value)


def write_toml(folder, **settings):
    """Write a TOML file with these settings; JSON strings and lists are valid TOML."""
    file = folder / "lianlian.toml"
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()), "utf-8")
    return file


# ── from code ────────────────────────────────────────────────────────────────────────────────────


def test_all_forms_of_keys(tmp_path):
    """Text, bytes, paths and loaded keys give the same keys."""
    (tmp_path / "ours.pem").write_text(OURS.private_pem)
    (tmp_path / "theirs.pem").write_text(THEIRS.public_pem)
    for private, public in (
        (OURS.private_pem, THEIRS.public_pem),
        (OURS.private_pem.encode(), THEIRS.public.to_base64().encode()),
        (tmp_path / "ours.pem", tmp_path / "theirs.pem"),
        (str(tmp_path / "ours.pem"), str(tmp_path / "theirs.pem")),
        (OURS.private, THEIRS.public),
    ):
        for several in (public, [public], (public,), iter([public])):
            keys = made(private_key=private, gateway_public_keys=several).load_keys()
            assert keys.private.fingerprint == OURS.private.fingerprint
            assert [key.fingerprint for key in keys.gateway] == [THEIRS.public.fingerprint]


def test_both_keys_of_a_rotation_are_kept_in_order():
    """During a rotation the gateway's keys are all loaded, in the order given."""
    keys = made(gateway_public_keys=[THEIRS.public_pem, NEXT.public]).load_keys()
    assert [key.fingerprint for key in keys.gateway] == [THEIRS.public.fingerprint, NEXT.public.fingerprint]


def test_an_encrypted_private_key_opens_with_the_password():
    """The password is used for the private key."""
    locked = OURS.locked_pem("pässword")
    keys = made(private_key=locked, private_key_password="pässword").load_keys()
    assert keys.private.fingerprint == OURS.private.fingerprint
    wrong = made(private_key=locked, private_key_password="secret")
    assert message_of(wrong.load_keys) == "private_key: the password is wrong, or the key is not an RSA key"


def test_the_defaults_are_those_of_lianlians_pages():
    """Without further settings the cross-border product's endpoints are called, and no notify_url is set."""
    assert made().endpoints.apply == "https://traderapi.lianlianpay.com/exchangerefund.htm"
    assert made().endpoints.query == "https://queryapi.lianlianpay.com/refundquery.htm"
    assert made().notify_url is None


def test_keys_are_read_once(tmp_path):
    """Key files are read by the first load, not when the merchant is made."""
    file = tmp_path / "ours.pem"
    merchant = made(private_key=file)
    file.write_text(OURS.private_pem)
    keys = merchant.load_keys()
    file.unlink()
    assert merchant.load_keys() is keys


def test_failed_load_is_repeated(tmp_path):
    """After the file is corrected, the same merchant loads it."""
    file = tmp_path / "ours.pem"
    merchant = made(private_key=file)
    assert message_of(merchant.load_keys).startswith("private_key: ")
    file.write_text(OURS.private_pem)
    assert merchant.load_keys().private.fingerprint == OURS.private.fingerprint


def test_many_threads_load_the_same_keys():
    """Threads that load at the same time get the same keys."""
    merchant = made()
    loaded = []
    start = threading.Barrier(8)

    def load():
        start.wait()
        loaded.append(merchant.load_keys())

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 8
    assert len({id(keys) for keys in loaded}) == 1


@pytest.mark.parametrize(
    "number", ["", "1" * 19, "2011 0317", "退款", "２０１１", "٢٠١١", "2011-03", None, 201103171000000000, b"2011"]
)
def test_unusable_merchant_number_is_refused(number):
    """A merchant number has 1 to 18 ASCII letters or digits, as a string."""
    assert "oid_partner: must be 1 to 18 ASCII letters or digits" in message_of(lambda: made(oid_partner=number))


def test_error_shows_the_merchant_number():
    """A wrong number is shown; for another type, only the type."""
    assert message_of(lambda: made(oid_partner="2011 03")).endswith("(is '2011 03')")
    assert message_of(lambda: made(oid_partner=2011)).endswith("(is of type int)")


@pytest.mark.parametrize("setting", ["oid_partner", "notify_url"])
@pytest.mark.parametrize("key", [OURS.private_pem, OURS.private.to_pem(), THEIRS.public.to_base64()])
def test_a_key_in_the_wrong_setting_is_not_shown(setting, key):
    """If two settings are swapped, the error does not show the key."""
    assert f"{len(key)} characters" in message_of(lambda: made(**{setting: key}))
    assert f"{len(key)} characters" in message_of(lambda: Endpoints(apply=key))


@pytest.mark.parametrize(
    ("value", "shown"),
    [("x" * 128, repr("x" * 128)), ("x" * 129, "129 characters"), ("MI" + "A" * 98, "100 characters")],
    ids=["short", "long", "part of a key"],
)
def test_error_shows_a_value_that_is_no_key(value, shown):
    """A wrong value is shown, unless it is long or looks like part of a key."""
    assert message_of(lambda: made(oid_partner=value)).endswith(f"(is {shown})")


def test_at_least_one_gateway_key_is_needed():
    """Without a key of LianLian no answer can be verified."""
    assert message_of(lambda: made(gateway_public_keys=[])) == (
        "gateway_public_keys: at least one key of LianLian is needed"
    )


@pytest.mark.parametrize("value", [None, 5, OURS.private], ids=["None", "int", "a SigningKey"])
def test_other_types_of_keys_are_refused(value):
    """The error names the setting when the keys are loaded."""
    kind = type(value).__name__
    assert message_of(made(gateway_public_keys=value).load_keys) == (
        f"gateway_public_keys[0]: must be str, bytes or a path, not {kind}"
    )


def test_swapped_keys_are_refused():
    """A private key in place of a gateway key, and the reverse, are refused; each error names its setting."""
    assert message_of(made(private_key=OURS.public_pem).load_keys).startswith("private_key: this is a public key")
    both = [THEIRS.public_pem, OURS.private_pem]
    assert message_of(made(gateway_public_keys=both).load_keys).startswith(
        "gateway_public_keys[1]: this is a private key"
    )


def test_own_public_key_is_refused_as_gateway_key():
    """Otherwise our own signatures would be believed as the gateway's."""
    merchant = made(gateway_public_keys=[THEIRS.public, OURS.public])
    assert "gateway_public_keys: contains the merchant's own public key" in message_of(merchant.load_keys)


@pytest.mark.parametrize("url", ["shop", "ftp://shop.example", "https://shop.example/" + "x" * 108, 5])
def test_unusable_notify_url_is_refused(url):
    """The default notify_url has the same rules as the notify_url of a request."""
    assert message_of(lambda: made(notify_url=url)).startswith("notify_url: must ")


def test_nothing_shows_the_secrets():
    """Neither repr nor str shows a key or the password; pickling and copying are refused."""
    merchant = made(private_key=OURS.locked_pem("tr0ub4dor"), private_key_password="tr0ub4dor")
    for shown in (repr(merchant), str(merchant), repr(merchant.load_keys()), repr([merchant])):
        assert "tr0ub4dor" not in shown
        assert "BEGIN" not in shown
        assert "MII" not in shown
    assert repr(merchant) == f"Merchant(oid_partner='{NUMBER}', endpoints={Endpoints()!r}, notify_url=None)"
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="a Merchant holds secrets and cannot be pickled"):
            duplicate(merchant)


def test_a_merchant_is_frozen_and_evolves():
    """Settings do not change during a session; an evolved merchant loads its own keys."""
    merchant = made()
    with pytest.raises(AttributeError):
        merchant.oid_partner = "other"
    other = attrs.evolve(merchant, private_key=NEXT.private)
    assert merchant.load_keys().private.fingerprint == OURS.private.fingerprint
    assert other.load_keys().private.fingerprint == NEXT.private.fingerprint
    assert merchant == made() != other  # whether the keys are loaded yet makes no difference
    assert hash(merchant) == hash(made())


@pytest.mark.parametrize(
    "url",
    [
        "https://host",
        "https://HOST.example.:443/",
        "https://xn--fsq.example/",
        "https://my_host/",
        "https://a-b.c-d/?q#f",
        "https://192.0.2.1/",
        "https://[2001:db8::1]:8443/",
        "https://[fe80::1%eth0]/",
        "https://" + "b" * 63 + "/",
    ],
)
def test_usable_hosts(url):
    """Names, addresses, ports and the encoded form of Chinese names are accepted."""
    assert urlsplit(Endpoints(url, url).query).hostname == urlsplit(url).hostname


@pytest.mark.parametrize(
    ("spelling", "normal"),
    [
        ("HTTPS://Host.Example/Refund.htm", "https://host.example/Refund.htm"),
        ("https://host/refund.htm?", "https://host/refund.htm"),
        ("https://host/refund.htm#", "https://host/refund.htm"),
        ("https://host/refund.htm#part", "https://host/refund.htm"),
        ("https://host:443/?b=1&a=2", "https://host/?b=1&a=2"),
        ("https://host:", "https://host/"),
        ("https://host:80/", "https://host:80/"),
        ("http://localhost:80", "http://localhost/"),
        ("http://[::1]:80/", "http://[::1]/"),
        ("https://[2001:DB8::1]:0443/", "https://[2001:db8::1]/"),
        ("https://[fe80::1%Eth0]:8443/", "https://[fe80::1%Eth0]:8443/"),
    ],
)
def test_spellings_of_an_endpoint_are_one(spelling, normal):
    """Equivalent URLs are one endpoint, for journals and receipts too."""
    assert Endpoints(spelling, spelling) == Endpoints(normal, normal)
    assert Endpoints(spelling).apply == normal


@pytest.mark.parametrize("value", [{"apply": "https://host/"}, ("https://host/",), "https://host/", None])
def test_endpoints_of_another_type_are_refused(value):
    """A mapping, a pair or a URL is refused."""
    words = f"endpoints: must be of type Endpoints, not {type(value).__name__}"
    assert message_of(lambda: made(endpoints=value)) == words


def test_a_password_in_a_url_is_not_shown():
    """A URL that contains a user name or a password is refused, because logs and journals show the endpoints."""
    for url in (
        "http://clerk:hunter2@gateway.example/",
        "https://clerk@gateway.example/",
        "http://localhost@evil.example/",
    ):
        told = message_of(lambda url=url: Endpoints(url))
        assert told == f"Endpoints.apply: must not contain a user name or password (is {len(url)} characters)"


# ── endpoints ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000/refund.htm",
        "http://127.8.9.1/",
        "http://[::1]:8000/",
        "http://localhost/",
        "HTTP://LOCALHOST/",
    ],
)
def test_plain_http_is_allowed_for_this_machine(url):
    """A sandbox on this machine needs no TLS."""
    assert Endpoints(url, url).apply == url.lower()


@pytest.mark.parametrize(
    "url",
    [
        "http://traderapi.lianlianpay.com/refund.htm",
        "http://localhost.evil.example/",
        "http://127.0.0.1.evil.example/",
        "http://127.evil.example/",
        "http://[::1234]/",
        "http://10.0.0.1/",
    ],
)
@pytest.mark.parametrize("setting", ["apply", "query"])
def test_plain_http_to_other_machines_is_refused(url, setting):
    """Other machines, also those whose names begin like this one's, need https."""
    assert f"Endpoints.{setting}: must be https" in message_of(lambda: Endpoints(**{setting: url}))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "traderapi.lianlianpay.com",
        "ftp://host/",
        "https://",
        "https://[::1",
        "https://host:99999/",
        "https://host:443:443/",
        "https://[::1]x/",
        "https://[v1.a]/",
        "https://a..b/",
        "https://../",
        "https://-host/",
        "https://h%zz/",
        "https://h\\x/",
        "https://" + "b" * 64 + "/",
        "https://xn--a/",
        "https://xn--/",
        "https://host/\n",
        "https://host/a b",
        None,
        5,
        b"https://host/",
    ],
)
def test_an_endpoint_is_an_absolute_url(url):
    """A URL that httpx cannot call is refused with the name of the setting."""
    assert message_of(lambda: Endpoints(apply=url)).startswith("Endpoints.apply: must ")
    assert message_of(lambda: Endpoints(query=url)).startswith("Endpoints.query: must ")


# ── from the environment ─────────────────────────────────────────────────────────────────────────


def test_the_environment_describes_a_merchant(monkeypatch):
    """Without an argument, the process's own variables are read."""
    for name, text in ENVIRONMENT.items():
        monkeypatch.setenv(name, text)
    for name in ("APPLY_URL", "QUERY_URL", "NOTIFY_URL", "PRIVATE_KEY_PASSWORD"):
        monkeypatch.delenv(f"LIANLIAN_{name}", raising=False)
    merchant = Merchant.from_env()
    assert merchant.oid_partner == NUMBER
    assert merchant.endpoints == Endpoints()
    assert merchant.notify_url is None
    keys = merchant.load_keys()
    assert keys.private.fingerprint == OURS.private.fingerprint
    assert [key.fingerprint for key in keys.gateway] == [THEIRS.public.fingerprint]


def test_every_variable_is_read(tmp_path):
    """Paths, several keys, URLs, and a password with spaces around it are read."""
    (tmp_path / "ours.pem").write_text(OURS.locked_pem(" pass word "))
    (tmp_path / "theirs.pem").write_text(THEIRS.public_pem)
    merchant = Merchant.from_env(
        {
            "LIANLIAN_OID_PARTNER": f" {NUMBER}\n",
            "LIANLIAN_PRIVATE_KEY": f"{tmp_path / 'ours.pem'}\n",
            "LIANLIAN_PRIVATE_KEY_PASSWORD": " pass word ",
            "LIANLIAN_GATEWAY_PUBLIC_KEYS": f"{tmp_path / 'theirs.pem'}, {NEXT.public_pem},",
            "LIANLIAN_APPLY_URL": "https://traderapi.lianlianpay.com/refund.htm",
            "LIANLIAN_QUERY_URL": "http://localhost:8000/query",
            "LIANLIAN_NOTIFY_URL": "https://shop.example/refund",
        }
    )
    assert merchant.oid_partner == NUMBER
    assert merchant.endpoints.apply == "https://traderapi.lianlianpay.com/refund.htm"
    assert merchant.endpoints.query == "http://localhost:8000/query"
    assert merchant.notify_url == "https://shop.example/refund"
    keys = merchant.load_keys()
    assert keys.private.fingerprint == OURS.private.fingerprint
    assert [key.fingerprint for key in keys.gateway] == [THEIRS.public.fingerprint, NEXT.public.fingerprint]


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_around_a_variable_are_removed(quote, tmp_path):
    """Docker's environment files keep quotes; quotes around a password may be part of it."""
    (tmp_path / "theirs.pem").write_text(THEIRS.public_pem)
    environ = ENVIRONMENT | {
        "LIANLIAN_PRIVATE_KEY": OURS.locked_pem('"x"').replace("\n", "\\n"),
        "LIANLIAN_GATEWAY_PUBLIC_KEYS": f"{tmp_path / 'theirs.pem'},{NEXT.public_pem}",
    }
    environ = {name: f"{quote}{text}{quote}" for name, text in environ.items()} | {
        "LIANLIAN_PRIVATE_KEY_PASSWORD": '"x"'
    }
    merchant = Merchant.from_env(environ)
    assert merchant.oid_partner == NUMBER
    assert [key.fingerprint for key in merchant.load_keys().gateway] == [
        THEIRS.public.fingerprint,
        NEXT.public.fingerprint,
    ]


def test_variable_of_another_type_is_refused():
    """A caller's mapping may hold any type."""
    assert message_of(lambda: Merchant.from_env(ENVIRONMENT | {"LIANLIAN_OID_PARTNER": 5})) == (
        "LIANLIAN_OID_PARTNER: must be a string"
    )


@pytest.mark.parametrize("variable", ENVIRONMENT)
@pytest.mark.parametrize("text", [None, "", " \n"])
def test_a_missing_variable_is_named(variable, text):
    """The error names a required variable that is absent or blank."""
    environ = {name: value for name, value in ENVIRONMENT.items() if name != variable}
    if text is not None:
        environ[variable] = text
    assert message_of(lambda: Merchant.from_env(environ)) == f"required, but missing: {variable}"


def test_all_missing_variables_are_named_together():
    """One error names all of them."""
    assert message_of(lambda: Merchant.from_env({})) == "required, but missing: " + ", ".join(ENVIRONMENT)


@pytest.mark.parametrize(
    ("variable", "text", "rule"),
    [
        ("LIANLIAN_OID_PARTNER", "2011 0317", ": must be 1 to 18 ASCII letters or digits"),
        ("LIANLIAN_PRIVATE_KEY", THEIRS.public_pem, ": this is a public key"),
        ("LIANLIAN_PRIVATE_KEY", OURS.private_pem[:300], ": the PEM text is cut off"),
        ("LIANLIAN_PRIVATE_KEY", "missing.pem", ": 'missing.pem' is not a PEM"),
        ("LIANLIAN_GATEWAY_PUBLIC_KEYS", " , ", ": at least one"),
        ("LIANLIAN_GATEWAY_PUBLIC_KEYS", THEIRS.public_pem + "," + OURS.private_pem, "[1]: this is a private key"),
        ("LIANLIAN_GATEWAY_PUBLIC_KEYS", OURS.public_pem, ": contains the merchant's own public key"),
        ("LIANLIAN_APPLY_URL", "traderapi.lianlianpay.com", ": must be an absolute http or https URL"),
        ("LIANLIAN_APPLY_URL", "http://traderapi.lianlianpay.com/", ": must be https"),
        ("LIANLIAN_QUERY_URL", "https://", ": must be an absolute http or https URL"),
        ("LIANLIAN_QUERY_URL", OURS.private_pem, ": must not contain a control"),
        ("LIANLIAN_NOTIFY_URL", "shop", ": must be an absolute http or https URL"),
    ],
)
def test_an_unusable_variable_is_named(variable, text, rule):
    """The error names the environment variable, not the argument."""
    message = message_of(lambda: Merchant.from_env(ENVIRONMENT | {variable: text}).load_keys())
    assert message.startswith(variable + rule)


# ── from TOML ────────────────────────────────────────────────────────────────────────────────────

SETTINGS = {
    "oid_partner": NUMBER,
    "private_key": OURS.private_pem,
    "gateway_public_keys": [THEIRS.public.to_base64(), NEXT.public_pem],
}


def test_a_toml_file_describes_a_merchant(tmp_path):
    """All settings are read from the top level of the file, keys as text."""
    file = write_toml(
        tmp_path,
        **SETTINGS,
        apply_url="https://traderapi.lianlianpay.com/refund.htm",
        query_url="https://[::1]/query",
        notify_url="https://shop.example/refund",
    )
    for path in (file, str(file)):
        merchant = Merchant.from_toml(path)
        assert merchant.oid_partner == NUMBER
        assert merchant.endpoints == Endpoints("https://traderapi.lianlianpay.com/refund.htm", "https://[::1]/query")
        assert merchant.notify_url == "https://shop.example/refund"
        keys = merchant.load_keys()
        assert keys.private.fingerprint == OURS.private.fingerprint
        assert [key.fingerprint for key in keys.gateway] == [THEIRS.public.fingerprint, NEXT.public.fingerprint]


def test_a_toml_table_may_hold_the_settings(tmp_path):
    """In a file of several programs, only the table [lianlian] is read."""
    file = write_toml(tmp_path, **SETTINGS)
    file.write_text("[other]\nunknown = 1\n[lianlian]\n" + file.read_text("utf-8"), "utf-8")
    assert Merchant.from_toml(file).oid_partner == NUMBER


def test_paths_in_toml_start_at_the_file(tmp_path, monkeypatch):
    """Relative paths start at the file's folder; absolute ones, and those with ~, do not."""
    (tmp_path / "conf" / "keys").mkdir(parents=True)
    (tmp_path / "conf" / "keys" / "ours.pem").write_text(OURS.locked_pem("x"))
    (tmp_path / "theirs.pem").write_text(THEIRS.public_pem)
    (tmp_path / "next.pem").write_text(NEXT.public_pem)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for public in (
        ["../theirs.pem", "~/next.pem"],
        [str(tmp_path / "theirs.pem"), "../next.pem"],
        "../theirs.pem, ../next.pem",
    ):
        file = write_toml(
            tmp_path / "conf",
            oid_partner=NUMBER,
            private_key="keys/ours.pem",
            private_key_password="x",
            gateway_public_keys=public,
        )
        keys = Merchant.from_toml(file).load_keys()
        assert keys.private.fingerprint == OURS.private.fingerprint
        assert [key.fingerprint for key in keys.gateway] == [THEIRS.public.fingerprint, NEXT.public.fingerprint]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"oid_partner": 201103171000000000}, "oid_partner: must be a string"),
        ({"oid_partner": "2011 03"}, "oid_partner: must be 1 to 18 ASCII letters or digits"),
        ({"private_key": ["a"]}, "private_key: must be a string"),
        ({"private_key": "missing.pem"}, "private_key: '"),
        ({"private_key": OURS.private_pem[:300]}, "private_key: the PEM text is cut off"),
        ({"private_key_password": 5}, "private_key_password: must be a string"),
        ({"gateway_public_keys": 5}, "gateway_public_keys: must be a string or a list of strings"),
        ({"gateway_public_keys": ["a", 5]}, "gateway_public_keys: must be a string"),
        ({"gateway_public_keys": [" "]}, "gateway_public_keys: at least one"),
        ({"gateway_public_keys": OURS.public_pem}, "gateway_public_keys: contains the merchant's own"),
        ({"apply_url": ""}, "apply_url: must not be empty"),
        ({"apply_url": 5}, "apply_url: must be a string"),
        ({"query_url": "http://example.com/"}, "query_url: must be https"),
        ({"notify_url": "shop"}, "notify_url: must be an absolute"),
    ],
)
def test_an_unusable_setting_is_named_with_its_file(changed, words, tmp_path):
    """The error names the file and the setting in it."""
    file = write_toml(tmp_path, **SETTINGS | changed)
    assert message_of(lambda: Merchant.from_toml(file).load_keys()).startswith(f"{file}: {words}")


def test_missing_settings_are_named_together(tmp_path):
    """Absent and empty settings are all named, with their file."""
    file = write_toml(tmp_path, private_key="", gateway_public_keys=[])
    names = ("oid_partner", "private_key", "gateway_public_keys")
    assert message_of(lambda: Merchant.from_toml(file)) == "required, but missing: " + ", ".join(
        f"{file}: {name}" for name in names
    )


def test_unknown_settings_are_named(tmp_path):
    """A misspelt setting is an error."""
    file = write_toml(tmp_path, **SETTINGS, notify_ulr="https://shop.example", verify="true")
    assert message_of(lambda: Merchant.from_toml(file)) == (
        f"{file}: unknown setting notify_ulr, verify; known: oid_partner, private_key, gateway_public_keys, "
        "private_key_password, apply_url, query_url, notify_url"
    )


def not_toml(place):
    return (
        f"is not TOML, or sets a name twice{place}; put strings in straight quotes, paths with backslashes in single "
        "quotes, several lines in three quotes"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f"a = {'[' * 2000}".encode(), not_toml("")),
        (b"lianlian = 5", "lianlian must be a table: write [lianlian] above the settings"),
        (b'# keys\nprivate_key = "' + OURS.private_pem.encode() + b'"', not_toml(" (at …)")),
        (b"private_key = " + OURS.private_pem.encode(), not_toml(" (at …)")),
        (b'oid_partner = "1"\nprivate_key_password = "hunter2\n', not_toml(" (at …)")),
        (b'hunter2 = "x', not_toml(" (at …)")),
        (b'\nprivate_key = "C:\\keys\\hunter2.pem"', not_toml(" (at …)")),
        (b'oid_partner = "1"\noid_partner = "2"', not_toml(" (at …)")),
        (b'\nnotify_url = "\xff"', "is not UTF-8 (at line 2); save the file as UTF-8"),
    ],
)
def test_damaged_toml_file_is_named_and_not_quoted(content, words, tmp_path):
    """The error names line and likely cause, and quotes no line, since any may hold a secret."""
    file = tmp_path / "lianlian.toml"
    file.write_bytes(content)
    message = message_of(lambda: Merchant.from_toml(file))
    assert re.sub(r"\(at (line \d+, column \d+|end of document)\)", "(at …)", message) == f"{file}: {words}"
    assert "hunter2" not in message


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_toml_file_of_windows_programs(tmp_path, encoding, newline):
    """A byte order mark, CR LF, and a path with backslashes in single quotes are read."""
    file = write_toml(tmp_path, **SETTINGS, private_key_password="pässword")
    file.write_bytes(file.read_text("utf-8").replace("\n", newline).encode(encoding))
    merchant = Merchant.from_toml(file)
    assert merchant.oid_partner == NUMBER
    assert merchant.private_key_password.reveal() == "pässword"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (None, "path: must be of type str | os.PathLike, not NoneType"),
        (5, "path: must be"),
        ("a\0b.toml", "a\0b.toml: is not"),
    ],
)
def test_unusable_path_is_refused(path, words):
    """The error names the argument or the path."""
    assert message_of(lambda: Merchant.from_toml(path)).startswith(words)


def test_unreadable_file_is_named(tmp_path):
    """A missing file and a directory are named with the system's reason."""
    missing = tmp_path / "missing.toml"
    assert message_of(lambda: Merchant.from_toml(missing)) == f"{missing}: cannot be read (No such file or directory)"
    assert message_of(lambda: Merchant.from_toml(tmp_path)).startswith(f"{tmp_path}: ")
