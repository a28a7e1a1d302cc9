"""``lianlian verify``: check the signature of a message, and find the likely cause if it is invalid."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, TypeAlias
from urllib.parse import unquote

import click

from lianlian_async.models import DOCUMENTED
from lianlian_async.signing import VerifyingKey, signature_source

from .exit_codes import SIGNATURE_INVALID
from .options import config_option, file_argument, load_merchant, read_message
from .output import Output, json_option, pass_output

Fields: TypeAlias = Mapping[str, str]


class _Key(NamedTuple):
    owner: str
    key: VerifyingKey

    def __str__(self) -> str:
        return f"{self.owner}'s key {self.key.fingerprint}"


# ── common mistakes: the signature is valid if … ─────────────────────────────────────────────────


def _without(*names: str) -> Callable[[Fields], Fields]:
    return lambda fields: {name: text for name, text in fields.items() if name not in names}


def _join(pairs: Iterable[tuple[str, str]]) -> bytes:
    return "&".join(f"{name}={text}" for name, text in pairs if name != "sign").encode()


def _not_empty(fields: Fields) -> list[tuple[str, str]]:
    return [(name, text) for name, text in fields.items() if text]


_OTHER_FIELDS: Final[dict[str, Callable[[Fields], Fields]]] = {
    "blanks in sign are replaced by + (lost by URL decoding)": lambda fields: {
        **fields,
        "sign": fields["sign"].replace(" ", "+"),
    },
    "line breaks in sign are removed": lambda fields: {**fields, "sign": "".join(fields["sign"].splitlines())},
    "ret_msg is left out": _without("ret_msg"),
    "ret_code and ret_msg are left out": _without("ret_code", "ret_msg"),
    "fields that LianLian does not document for refunds are left out": lambda fields: {
        name: text for name, text in fields.items() if name in DOCUMENTED
    },
    "sign_type is left out": _without("sign_type", "sign_type "),
    "sign_type=RSA is added": lambda fields: {**fields, "sign_type": "RSA"},
    "blanks around names and values are removed": lambda fields: {
        name.strip(): text.strip() for name, text in fields.items()
    },
    "values are URL-decoded": lambda fields: {
        name: text if name == "sign" else unquote(text) for name, text in fields.items()
    },
}
_OTHER_SOURCES: Final[dict[str, Callable[[Fields], bytes]]] = {
    "empty values are signed too": lambda fields: _join(sorted(fields.items())),
    "fields stay in the order of the message": lambda fields: _join(_not_empty(fields)),
    "fields are sorted case-insensitively": lambda fields: _join(
        sorted(_not_empty(fields), key=lambda pair: pair[0].lower())
    ),
    "the text is encoded in GBK": lambda fields: signature_source(fields).decode().encode("gbk", "replace"),
}


def _signer(keys: Iterable[_Key], source: bytes, signature: str) -> _Key | None:
    return next((one for one in keys if one.key.verify(source, signature)), None)


def _cause(fields: Fields, keys: Sequence[_Key]) -> str:
    """Return the likely cause of an invalid signature."""
    if not fields.get("sign"):
        return "the message has no signature"
    if signer := _signer(keys, signature_source(fields), fields["sign"]):
        return f"it is signed with {signer}, but this message must be signed by LianLian"
    for condition, change in _OTHER_FIELDS.items():
        changed = change(fields)
        if signer := _signer(keys, signature_source(changed), changed["sign"]):
            return f"it fits {signer} only if {condition}"
    for condition, source in _OTHER_SOURCES.items():
        if signer := _signer(keys, source(fields), fields["sign"]):
            return f"it fits {signer} only if {condition}"
    try:
        bits = 8 * len(b64decode(fields["sign"], validate=True))
    except ValueError:
        return "sign is not base64"
    if bits not in {one.key.bits for one in keys}:
        return f"it was made with a key of {bits} bits, and no known key has that size"
    return "another key signed it, or a field was changed after signing"


# ── the command ──────────────────────────────────────────────────────────────────────────────────


@click.command
@file_argument(required=True)
@config_option
@json_option
@pass_output
def verify(output: Output, file: BinaryIO, config: Path | None) -> None:
    """Check the signature of a message.

    FILE is a response, a notification or a request as JSON (- is stdin). A response or notification must be signed
    with one of LianLian's keys, a request with the merchant's key. If no key fits, the command tries common mistakes
    and names the mistake that explains the signature.
    """
    loaded = load_merchant(config).load_keys()
    fields = read_message(file)
    keys = [*(_Key("LianLian", key) for key in loaded.gateway), _Key("merchant", loaded.private.public_key())]
    # Only LianLian may sign the state of a refund; the merchant may sign every other message.
    trusted = keys[:-1] if fields.keys() & {"ret_code", "sta_refund"} else keys
    source = signature_source(fields)
    signer = _signer(trusted, source, fields.get("sign", ""))
    outcome = "valid" if signer else SIGNATURE_INVALID.word
    reason = f"signed with {signer}" if signer else _cause(fields, keys)
    output.show(
        {
            "outcome": outcome,
            "reason": reason,
            "signed_by": signer and {"owner": signer.owner, "fingerprint": signer.key.fingerprint},
            "tried": [{"owner": one.owner, "fingerprint": one.key.fingerprint} for one in trusted],
            "source": source.decode(),
        },
        f"{outcome}: {reason}",
        *(f"tried: {one}, {one.key.bits} bits" for one in trusted),
        f"signature source: {source.decode()}",
    )
    if not signer:
        click.get_current_context().exit(SIGNATURE_INVALID.exit_code)
