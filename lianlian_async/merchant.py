"""Who we are at LianLian: merchant number, keys and endpoints; from code, environment or TOML, secrets masked."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import attrs

from . import text_rules
from .errors import ConfigurationError
from .signing import KeyMaterial, SigningKey, VerifyingKey, is_key_text

__all__ = ["Endpoints", "Keys", "Merchant"]


def _shown(value: object) -> str:
    """A wrong setting as a message may show it: not where it may be a key that went into the wrong setting."""
    if not isinstance(value, str):
        return f"of type {type(value).__name__}"
    return f"{len(value)} characters" if len(value) > 128 or is_key_text(value) else repr(value)


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
        _check_endpoint(self.apply, "Endpoints.apply", allow_http=self.allow_http)
        _check_endpoint(self.query, "Endpoints.query", allow_http=self.allow_http)


@attrs.frozen
class Keys:
    """A merchant's keys, read and checked."""

    private: SigningKey
    gateway: tuple[VerifyingKey, ...]


def _several(
    value: Iterable[KeyMaterial | VerifyingKey] | KeyMaterial | VerifyingKey,
) -> tuple[KeyMaterial | VerifyingKey, ...]:
    return (value,) if isinstance(value, str | bytes) or not isinstance(value, Iterable) else tuple(value)


@attrs.frozen(kw_only=True)
class Merchant:
    """A merchant's identity and keys. Its repr shows no key material.

    Keys are given as PEM, DER, bare base64 (str or bytes), as a path, or loaded already; text and files are
    read once, at the first :meth:`load_keys`, which a session calls in a thread when it opens. During a key
    rotation give both of the gateway's keys.

    Raises :class:`~lianlian_async.ConfigurationError` that names the setting.
    """

    oid_partner: str
    """The merchant number, at most 18 characters."""
    private_key: KeyMaterial | SigningKey = attrs.field(repr=False)
    gateway_public_keys: tuple[KeyMaterial | VerifyingKey, ...] = attrs.field(repr=False, converter=_several)
    endpoints: Endpoints = attrs.field(factory=Endpoints)
    notify_url: str | None = None
    """The default for requests that name none."""
    private_key_password: str | bytes | None = attrs.field(default=None, repr=False)
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
        if not self.gateway_public_keys:
            raise ConfigurationError(f"{self._name('gateway_public_keys')}: at least one of LianLian's keys is needed")
        try:
            if self.notify_url is not None:
                text_rules.notify_url(self.notify_url)
        except ValueError as error:
            raise ConfigurationError(f"{self._name('notify_url')}: {error} (is {_shown(self.notify_url)})") from None

    def _name(self, setting: str) -> str:
        """How the user calls a setting: by its own name, or by its environment variable."""
        return self._names.get(setting, setting)

    def load_keys(self) -> Keys:
        """The keys, read and checked on the first call. Takes up to a tenth of a second: not on an event loop.

        Raises :class:`~lianlian_async.ConfigurationError` that names the key.
        """
        with self._loading:
            if not self._loaded:
                self._loaded.append(self._read_keys())
            return self._loaded[0]

    def _read_keys(self) -> Keys:
        private = self.private_key
        if not isinstance(private, SigningKey):
            private = SigningKey.load(private, self.private_key_password, name=self._name("private_key"))
        public_name = self._name("gateway_public_keys")
        gateway = tuple(
            key if isinstance(key, VerifyingKey) else VerifyingKey.load(key, name=f"{public_name}[{index}]")
            for index, key in enumerate(self.gateway_public_keys)
        )
        if private.fingerprint in (key.fingerprint for key in gateway):
            raise ConfigurationError(
                f"{public_name}: holds the merchant's own public key; LianLian's public key is needed here"
            )
        return Keys(private, gateway)

    def __reduce__(self) -> str:
        raise TypeError("a Merchant holds secrets and is not pickled: load it where it is used")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Merchant:
        """The merchant that the environment (``os.environ``) describes.

        ``LIANLIAN_OID_PARTNER``, ``LIANLIAN_PRIVATE_KEY`` and ``LIANLIAN_GATEWAY_PUBLIC_KEYS`` (path or key text;
        several separated by commas) are required; ``LIANLIAN_APPLY_URL``, ``LIANLIAN_QUERY_URL``,
        ``LIANLIAN_NOTIFY_URL`` and ``LIANLIAN_PRIVATE_KEY_PASSWORD`` are optional.
        Raises :class:`~lianlian_async.ConfigurationError` that names the variable.
        """
        variables = os.environ if environ is None else environ
        given = {name: text for name, variable in _VARIABLES.items() if (text := variables.get(variable, ""))}
        given = {name: text if name == "private_key_password" else text.strip() for name, text in given.items()}
        return cls._from_settings(given, _VARIABLES, folder=None)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Merchant:
        """The merchant that a TOML file describes, at its top level or in a table ``[lianlian]``.

        Keys: ``oid_partner``, ``private_key``, ``gateway_public_keys`` (text or list), and optionally
        ``apply_url``, ``query_url``, ``notify_url``, ``private_key_password``. Paths are relative to the file.
        Raises :class:`~lianlian_async.ConfigurationError` that names file and setting.
        """
        import tomllib  # only who has such a file pays for the parser

        file = Path(path)
        try:
            document = tomllib.loads(file.read_text("utf-8"))
        except OSError as error:
            raise ConfigurationError(f"{file}: {error.strerror}") from None
        except ValueError:
            document = None
        if document is None:  # raised out here, lest it drag along the parser's error, which quotes the file
            raise ConfigurationError(f"{file}: is not TOML in UTF-8")
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
            text = text.strip()
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
