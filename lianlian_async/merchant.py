"""Who we are at LianLian: merchant number, keys and endpoints; from code, environment or TOML, secrets masked."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

import attrs

from . import text_rules
from .errors import ConfigurationError
from .key_files import KeyMaterial, is_key_text, plain_text, unquoted
from .secret import Secret, init_without_locals, without_locals
from .settings import check_type
from .signing import SigningKey, VerifyingKey

__all__ = ["Endpoints", "Keys", "Merchant"]

_PublicKeys: TypeAlias = "tuple[KeyMaterial | VerifyingKey, ...]"


def _shown(value: object) -> str:
    """A wrong setting as a message may show it: not where it may be a key that went into the wrong setting."""
    if not isinstance(value, str):
        return f"of type {type(value).__name__}"
    is_secret = len(value) > 128 or is_key_text(value) or "@" in value  # a URL may hold a password
    return f"{len(value)} characters" if is_secret else repr(value)


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_endpoint(value: str, name: str, *, allow_http: bool = False) -> None:
    try:
        text_rules.url(value)
    except ValueError as error:
        raise ConfigurationError(f"{name}: {error} (is {_shown(value)})") from None
    parts = urlsplit(value)
    if parts.scheme == "http" and not allow_http and not _is_this_machine(parts.hostname or ""):
        raise ConfigurationError(
            f"{name}: must be https; plain http is taken only for this machine itself (is {_shown(value)})"
        )


@init_without_locals
@attrs.frozen
class Endpoints:
    """The two URLs of the gateway (defaults: LianLian's API pages, cross-border product).

    The domestic product applies at ``https://traderapi.lianlianpay.com/refund.htm``. ``allow_http`` lets plain
    http go beyond this machine, for a TLS-terminating proxy of your own.
    """

    apply: str = "https://traderapi.lianlianpay.com/exchangerefund.htm"
    query: str = "https://queryapi.lianlianpay.com/refundquery.htm"
    allow_http: bool = attrs.field(default=False, kw_only=True)

    def __attrs_post_init__(self) -> None:
        check_type("Endpoints.allow_http", self.allow_http, bool)
        _check_endpoint(self.apply, "Endpoints.apply", allow_http=self.allow_http)
        _check_endpoint(self.query, "Endpoints.query", allow_http=self.allow_http)


@attrs.frozen
class Keys:
    """A merchant's keys, read and checked."""

    private: SigningKey
    gateway: tuple[VerifyingKey, ...]


def _hidden(value: KeyMaterial | SigningKey | Secret[KeyMaterial | SigningKey]) -> Secret[KeyMaterial | SigningKey]:
    return value if isinstance(value, Secret) else Secret(value)


def _hidden_password(value: str | bytes | Secret[str | bytes | None] | None) -> Secret[str | bytes | None]:
    return value if isinstance(value, Secret) else Secret(value)


def _hidden_keys(
    value: Iterable[KeyMaterial | VerifyingKey] | KeyMaterial | VerifyingKey | Secret[_PublicKeys],
) -> Secret[_PublicKeys]:
    if isinstance(value, Secret):
        return value
    return Secret((value,) if isinstance(value, str | bytes) or not isinstance(value, Iterable) else tuple(value))


@init_without_locals
@attrs.frozen(kw_only=True)
class Merchant:
    """A merchant's identity and keys. Neither its repr nor ``attrs.asdict`` shows key material.

    Keys are given as PEM, DER, bare base64 (str or bytes), as a path, or loaded already; text and files are
    read once, at the first :meth:`load_keys`, which a session calls in a thread when it opens. During a key
    rotation give both of the gateway's keys.

    Raises :class:`~lianlian_async.ConfigurationError` that names the setting.
    """

    oid_partner: str
    """The merchant number, at most 18 characters."""
    private_key: Secret[KeyMaterial | SigningKey] = attrs.field(repr=False, converter=_hidden)
    gateway_public_keys: Secret[_PublicKeys] = attrs.field(repr=False, converter=_hidden_keys)
    endpoints: Endpoints = attrs.field(factory=Endpoints)
    notify_url: str | None = None
    """The default for requests that name none."""
    private_key_password: Secret[str | bytes | None] = attrs.field(default=None, repr=False, converter=_hidden_password)
    """Opens an encrypted ``private_key``."""
    _names: Mapping[str, str] = attrs.field(factory=dict, alias="names", repr=False, eq=False)
    _loaded: list[Keys] = attrs.field(factory=list, init=False, repr=False, eq=False)
    _loading: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        number: object = self.oid_partner
        if not isinstance(number, str) or not number.isascii() or not number.isalnum() or len(number) > 18:
            raise ConfigurationError(
                f"{self._name('oid_partner')}: must be 1 to 18 letters or digits (is {_shown(number)})"
            )
        check_type("endpoints", self.endpoints, Endpoints)
        if not self.gateway_public_keys.reveal():
            raise ConfigurationError(f"{self._name('gateway_public_keys')}: at least one of LianLian's keys is needed")
        try:
            if self.notify_url is not None:
                text_rules.notify_url(self.notify_url)
        except ValueError as error:
            raise ConfigurationError(f"{self._name('notify_url')}: {error} (is {_shown(self.notify_url)})") from None

    def _name(self, setting: str) -> str:
        """How the user calls a setting: by its own name, or by its environment variable."""
        return self._names.get(setting, setting)

    @without_locals
    def load_keys(self) -> Keys:
        """The keys, read and checked on the first call. Takes up to a tenth of a second: not on an event loop.

        Raises :class:`~lianlian_async.ConfigurationError` that names the key.
        """
        with self._loading:
            if not self._loaded:
                self._loaded.append(self._read_keys())
            return self._loaded[0]

    def _read_keys(self) -> Keys:
        private = self.private_key.reveal()
        if not isinstance(private, SigningKey):
            private = SigningKey.load(private, self.private_key_password.reveal(), name=self._name("private_key"))
        public_name = self._name("gateway_public_keys")
        gateway = tuple(
            key if isinstance(key, VerifyingKey) else VerifyingKey.load(key, name=f"{public_name}[{index}]")
            for index, key in enumerate(self.gateway_public_keys.reveal())
        )
        if private.fingerprint in (key.fingerprint for key in gateway):
            raise ConfigurationError(
                f"{public_name}: holds the merchant's own public key; LianLian's public key is needed here"
            )
        return Keys(private, gateway)

    def __reduce__(self) -> str:
        raise TypeError("a Merchant holds secrets and is not pickled: load it where it is used")

    @classmethod
    @without_locals
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Merchant:
        """The merchant that the environment (``os.environ``) describes.

        ``LIANLIAN_OID_PARTNER``, ``LIANLIAN_PRIVATE_KEY`` and ``LIANLIAN_GATEWAY_PUBLIC_KEYS`` (path or key text;
        several separated by commas) are required; ``LIANLIAN_APPLY_URL``, ``LIANLIAN_QUERY_URL``,
        ``LIANLIAN_NOTIFY_URL`` and ``LIANLIAN_PRIVATE_KEY_PASSWORD`` are optional.
        Raises :class:`~lianlian_async.ConfigurationError` that names the variable.
        """
        variables = os.environ if environ is None else environ
        given = {name: text for name, variable in _VARIABLES.items() if (text := variables.get(variable, ""))}
        for name, text in given.items():
            if isinstance(text, str) and name != "private_key_password":
                given[name] = unquoted(text)
        return cls._from_settings(given, _VARIABLES, folder=None)

    @classmethod
    @without_locals
    def from_toml(cls, path: str | os.PathLike[str]) -> Merchant:
        """The merchant that a TOML file describes, at its top level or in a table ``[lianlian]``.

        Keys: ``oid_partner``, ``private_key``, ``gateway_public_keys`` (text or list), and optionally
        ``apply_url``, ``query_url``, ``notify_url``, ``private_key_password``. Paths are relative to the file.
        Raises :class:`~lianlian_async.ConfigurationError` that names file and setting.
        """
        import tomllib  # only who has such a file pays for the parser

        if not isinstance(path, str | os.PathLike):
            raise ConfigurationError(f"path: must be str or a path, not {type(path).__name__}")
        file = Path(path)
        text = document = problem = None
        try:
            text = plain_text(file.read_bytes(), errors="strict")
            document = tomllib.loads(text)
        except OSError as error:
            problem = error.strerror
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            problem = f"line {line}: is not UTF-8; save the file as UTF-8"
        except ValueError as error:  # a path that cannot be one, or the parser's error, which may quote the file
            problem = "not a usable path" if text is None else _toml_problem(text, str(error))
        if document is None:
            raise ConfigurationError(f"{file}: {problem}")
        table = document.get("lianlian", document)
        if not isinstance(table, dict):
            raise ConfigurationError(f"{file}: lianlian must be a table")
        unknown = sorted(set(table) - set(_VARIABLES))
        if unknown:
            raise ConfigurationError(f"{file}: unknown setting {', '.join(unknown)}")
        return cls._from_settings(table, {name: f"{file}: {name}" for name in _VARIABLES}, folder=file.parent)

    @classmethod
    def _from_settings(cls, given: Mapping[str, Any], names: Mapping[str, str], folder: Path | None) -> Merchant:
        """``names`` tells how the user calls each setting; relative key paths start at ``folder``."""
        missing = [names[name] for name in _REQUIRED if not given.get(name)]
        if missing:
            raise ConfigurationError("missing: " + ", ".join(missing))
        public = given["gateway_public_keys"]
        public_keys = public.split(",") if isinstance(public, str) else public
        texts = {name: [value] for name, value in given.items()} | {"gateway_public_keys": public_keys}
        for name, values in texts.items():
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise ConfigurationError(f"{names[name]}: must be text")

        def key(text: str) -> str:
            text = unquoted(text)
            return text if folder is None or text.startswith("~") or is_key_text(text) else str(folder / text)

        apply_url = given.get("apply_url", _DEFAULT.apply)
        query_url = given.get("query_url", _DEFAULT.query)
        _check_endpoint(apply_url, names["apply_url"])
        _check_endpoint(query_url, names["query_url"])
        return cls(
            oid_partner=given["oid_partner"],
            private_key=key(given["private_key"]),
            gateway_public_keys=[key(text) for text in public_keys if text.strip()],
            endpoints=Endpoints(apply_url, query_url),
            notify_url=given.get("notify_url"),
            private_key_password=given.get("private_key_password"),
            names=names,
        )


def _toml_problem(text: str, message: str) -> str:
    """Return where and probably why ``text`` is no TOML; nothing of it is shown, since any line may hold a secret."""
    lines = text.split("\n")
    at = re.search(r"at line (\d+)", message)
    unbalanced = (number for number, line in enumerate(lines, 1) if line.count('"') % 2 or line.count("'") % 2)
    number = int(at[1]) if at else next(unbalanced, len(lines))
    line = lines[number - 1]
    setting = re.match(r"\s*([a-z_]+)\s*=\s*", line)
    place = f"line {number}" + (f" ({setting[1]})" if setting and setting[1] in _VARIABLES else "")
    if "overwrite" in message:
        return f"{place}: is set twice"
    if "\\" in line:
        return f"{place}: a backslash in double quotes is an escape: put a path into single quotes"
    return f"{place}: is not TOML; text needs plain quotes on both sides, three of them around several lines"


_DEFAULT: Final = Endpoints()
_REQUIRED: Final = ("oid_partner", "private_key", "gateway_public_keys")
_VARIABLES: Final = {
    "oid_partner": "LIANLIAN_OID_PARTNER",
    "private_key": "LIANLIAN_PRIVATE_KEY",
    "private_key_password": "LIANLIAN_PRIVATE_KEY_PASSWORD",
    "gateway_public_keys": "LIANLIAN_GATEWAY_PUBLIC_KEYS",
    "apply_url": "LIANLIAN_APPLY_URL",
    "query_url": "LIANLIAN_QUERY_URL",
    "notify_url": "LIANLIAN_NOTIFY_URL",
}
