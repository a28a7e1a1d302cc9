"""The merchant: number, keys and endpoints, from code, environment variables or a TOML file. The repr hides secrets."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Self, TypeAlias
from urllib.parse import urlsplit

import attrs

from . import text_rules
from .errors import ConfigurationError
from .key_files import KeyMaterial, is_key_text, plain_text, unquoted
from .secret import Secret, init_without_locals, without_locals
from .settings import check_type
from .signing import SigningKey, VerifyingKey

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_PublicKeys: TypeAlias = tuple[KeyMaterial | VerifyingKey, ...]


def _shown(value: object) -> str:
    """Return the description of a wrong value for a message: only its type or length if it may be a secret."""
    if not isinstance(value, str):
        return f"of type {type(value).__name__}"
    is_secret = len(value) > 128 or is_key_text(value) or "@" in value  # a URL may hold a password
    return f"{len(value)} characters" if is_secret else repr(value)


def _endpoint(value: str, name: str) -> str:
    """Check and normalize a URL (RFC 3986 §6.2): journals and the receipts of batches compare it as text."""
    try:
        text_rules.url(value)
    except ValueError as error:
        raise ConfigurationError(f"{name}: {error} (is {_shown(value)})") from None
    parts = urlsplit(value)
    if "@" in parts.netloc:
        raise ConfigurationError(f"{name}: must not contain a user name or password (is {_shown(value)})")
    host = parts.hostname or ""
    if parts.scheme == "http" and not text_rules.is_loopback(host):
        raise ConfigurationError(f"{name}: must be https; http is allowed only for this machine (is {_shown(value)})")
    netloc = f"[{host}]" if ":" in host else host
    if parts.port not in (None, _DEFAULT_PORTS[parts.scheme]):
        netloc += f":{parts.port}"
    return parts._replace(netloc=netloc, path=parts.path or "/", fragment="").geturl()


@init_without_locals
@attrs.frozen
class Endpoints:
    """The two URLs of the gateway. The defaults are those of the cross-border product on LianLian's API pages.

    For the domestic product, ``apply`` is ``https://traderapi.lianlianpay.com/refund.htm``. An http URL is allowed only
    for this machine. No URL may contain a user name or password. Equivalent spellings of a URL (case of the host,
    ``:443``, an empty query) are stored as one.
    """

    apply: str = "https://traderapi.lianlianpay.com/exchangerefund.htm"
    query: str = "https://queryapi.lianlianpay.com/refundquery.htm"

    def __attrs_post_init__(self) -> None:
        for name in ("apply", "query"):
            object.__setattr__(self, name, _endpoint(getattr(self, name), f"Endpoints.{name}"))


@attrs.frozen
class Keys:
    """The loaded keys of a merchant."""

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
    """A merchant's identity and keys. Neither the repr nor ``attrs.asdict`` shows key material.

    A key is PEM, DER or bare base64 (str or bytes), a path, or a loaded key. A session or endpoint calls
    :meth:`load_keys` in a thread when it opens: a wrong key raises an error only then. During a key rotation, give both
    keys of the gateway. Raises :class:`~lianlian_async.ConfigurationError` with the name of the wrong setting.
    """

    oid_partner: str
    """The merchant number: 1 to 18 ASCII letters or digits."""
    private_key: Secret[KeyMaterial | SigningKey] = attrs.field(repr=False, converter=_hidden)
    gateway_public_keys: Secret[_PublicKeys] = attrs.field(repr=False, converter=_hidden_keys)
    endpoints: Endpoints = attrs.field(factory=Endpoints)
    notify_url: str | None = None
    """The default for requests without a ``notify_url``."""
    private_key_password: Secret[str | bytes | None] = attrs.field(default=None, repr=False, converter=_hidden_password)
    """The password of an encrypted ``private_key``."""
    _name: Callable[[str], str] = attrs.field(default=str, alias="name", repr=False, eq=False)
    """Returns the name of a setting in the user's source: an argument, an environment variable or a TOML key."""
    _loaded: list[Keys] = attrs.field(factory=list, init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        number: object = self.oid_partner
        if not isinstance(number, str) or not number.isascii() or not number.isalnum() or len(number) > 18:
            raise ConfigurationError(
                f"{self._name('oid_partner')}: must be 1 to 18 ASCII letters or digits (is {_shown(number)})"
            )
        object.__setattr__(self, "oid_partner", str.__str__(number))  # see text_rules.existing
        check_type("endpoints", self.endpoints, Endpoints)
        if not self.gateway_public_keys.reveal():
            raise ConfigurationError(f"{self._name('gateway_public_keys')}: at least one key of LianLian is needed")
        try:
            if self.notify_url is not None:
                object.__setattr__(self, "notify_url", text_rules.url(self.notify_url, 128))
        except ValueError as error:
            raise ConfigurationError(f"{self._name('notify_url')}: {error} (is {_shown(self.notify_url)})") from None

    @without_locals
    def load_keys(self) -> Keys:
        """Return the keys; the first call reads them, which can take 0.1 s: do not call it on an event loop.

        Raises :class:`~lianlian_async.ConfigurationError` with the name of the unusable key.
        """
        if not self._loaded:
            self._loaded.append(self._read_keys())
        return self._loaded[0]  # the same ones for all threads, even if several read them

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
                f"{public_name}: contains the merchant's own public key; use LianLian's public key here"
            )
        return Keys(private, gateway)

    def __reduce__(self) -> str:
        raise TypeError("a Merchant holds secrets and cannot be pickled: load it where it is used")

    @classmethod
    @without_locals
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Return the merchant from environment variables (default: ``os.environ``).

        Required: ``LIANLIAN_OID_PARTNER``, ``LIANLIAN_PRIVATE_KEY`` (path or key text) and
        ``LIANLIAN_GATEWAY_PUBLIC_KEYS`` (the same, several separated by commas). Optional: ``LIANLIAN_APPLY_URL``,
        ``LIANLIAN_QUERY_URL``, ``LIANLIAN_NOTIFY_URL`` and ``LIANLIAN_PRIVATE_KEY_PASSWORD``.
        Raises :class:`~lianlian_async.ConfigurationError` with the name of the missing or wrong variable.
        """
        variables = os.environ if environ is None else environ
        given = {name: text for name in _SETTINGS if (text := variables.get(_variable(name)))}
        for name, text in given.items():
            if isinstance(text, str) and name != "private_key_password":
                given[name] = unquoted(text)
        return cls._from_settings(given, _variable, folder=None)

    @classmethod
    @without_locals
    def from_toml(cls, path: str | os.PathLike[str]) -> Self:
        """Return the merchant from a TOML file: from its table ``[lianlian]`` if it has one, else from its top level.

        Settings: ``oid_partner``, ``private_key``, ``gateway_public_keys`` (a string or a list), and optionally
        ``apply_url``, ``query_url``, ``notify_url`` and ``private_key_password``. Paths are relative to the file.
        Raises :class:`~lianlian_async.ConfigurationError` with the names of the file and of the wrong setting.
        """
        import tomllib  # imported here, because most programs do not need it

        check_type("path", path, str | os.PathLike)
        file = Path(path)
        try:
            document = tomllib.loads(plain_text(file.read_bytes(), errors="strict"))
        except OSError as error:
            raise ConfigurationError(f"{file}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise ConfigurationError(f"{file}: is not UTF-8 (at line {line}); save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            place = re.search(r" \(at [a-z0-9, ]+\)$", str(error))  # the rest may quote the file, and with it a secret
            raise ConfigurationError(
                f"{file}: is not TOML, or sets a name twice{place[0] if place else ''}; "
                "put strings in straight quotes, paths with backslashes in single quotes, several lines in three quotes"
            ) from None
        table = document.get("lianlian", document)
        if not isinstance(table, dict):
            raise ConfigurationError(f"{file}: lianlian must be a table: write [lianlian] above the settings")
        unknown = sorted(set(table) - set(_SETTINGS))
        if unknown:
            raise ConfigurationError(f"{file}: unknown setting {', '.join(unknown)}; known: {', '.join(_SETTINGS)}")
        return cls._from_settings(table, lambda name: f"{file}: {name}", folder=file.parent)

    @classmethod
    def _from_settings(cls, given: Mapping[str, Any], name: Callable[[str], str], folder: Path | None) -> Self:
        """Return the merchant. Key paths are relative to ``folder``; ``name`` returns a setting's name in messages."""
        missing = [name(setting) for setting in _REQUIRED if not given.get(setting)]
        if missing:
            raise ConfigurationError("required, but missing: " + ", ".join(missing))

        public = given["gateway_public_keys"]
        public_keys = public.split(",") if isinstance(public, str) else public
        texts = {setting: [value] for setting, value in given.items()} | {"gateway_public_keys": public_keys}
        for setting, values in texts.items():
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                several = " or a list of strings" if setting == "gateway_public_keys" else ""
                raise ConfigurationError(f"{name(setting)}: must be a string{several}")

        def key(text: str) -> str:
            text = unquoted(text)
            return text if folder is None or text.startswith("~") or is_key_text(text) else str(folder / text)

        # Endpoints checks the URLs too, but names its own arguments.
        apply_url = _endpoint(given.get("apply_url", _DEFAULT.apply), name("apply_url"))
        query_url = _endpoint(given.get("query_url", _DEFAULT.query), name("query_url"))
        return cls(
            oid_partner=given["oid_partner"],
            private_key=key(given["private_key"]),
            gateway_public_keys=[key(text) for text in public_keys if text.strip()],
            endpoints=Endpoints(apply_url, query_url),
            notify_url=given.get("notify_url"),
            private_key_password=given.get("private_key_password"),
            name=name,
        )


def _variable(name: str) -> str:
    return f"LIANLIAN_{name.upper()}"


_DEFAULT: Final = Endpoints()
_REQUIRED: Final = ("oid_partner", "private_key", "gateway_public_keys")
_SETTINGS: Final = (*_REQUIRED, "private_key_password", "apply_url", "query_url", "notify_url")
