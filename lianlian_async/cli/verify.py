"""``lianlian verify``: check the signature of a message, and find the likely cause if it is invalid."""

import hashlib
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, TypeAlias

from rich.text import Text

from lianlian_async.models import DOCUMENTED
from lianlian_async.signing import VerifyingKey, signature_source

from .exit_codes import SIGNATURE_INVALID
from .options import load_merchant, read_message
from .output import Output, printable

Fields: TypeAlias = Mapping[str, str]


class _KnownKey(NamedTuple):
    owner: str
    key: VerifyingKey

    def __str__(self) -> str:
        return f"{self.owner}'s key {self.key.fingerprint}"


_MOST_FIELDS: Final = 100
"""Maximum number of fields that are left out one by one, to limit the time."""


def _other_fields(fields: Fields) -> Iterator[tuple[str, Fields]]:
    """Yield ``fields`` and common changes of them, each with a description of the change."""
    yield "", fields
    for left_out in islice(fields, _MOST_FIELDS):
        yield f"{left_out} is left out", {name: text for name, text in fields.items() if name != left_out}
    documented = {name: text for name, text in fields.items() if name in DOCUMENTED}
    yield "fields that LianLian does not document for refunds are left out", documented
    yield "sign_type=RSA is added", {**fields, "sign_type": "RSA"}


def _other_texts(fields: Fields) -> Iterator[tuple[list[str], bytes]]:
    """Yield the texts that may have been signed by mistake, each with descriptions of its changes."""
    for (change, changed), is_sorted, is_empty_signed, is_gbk in product(
        _other_fields(fields), (True, False), (False, True), (False, True)
    ):
        pairs = [(name, text) for name, text in changed.items() if text or is_empty_signed]
        text = "&".join(f"{name}={text}" for name, text in (sorted(pairs) if is_sorted else pairs))
        changes = {
            change: change,
            "fields stay in the order of the message": not is_sorted,
            "empty values are signed too": is_empty_signed,
            "the text is encoded in GBK": is_gbk,
        }
        yield [each for each, applies in changes.items() if applies], text.encode("gb18030" if is_gbk else "utf-8")


def _cause(fields: Fields, keys: Sequence[_KnownKey], trusted: Sequence[_KnownKey]) -> str:
    """Return the likely cause of an invalid signature."""
    sign = fields.get("sign", "")
    if not sign:
        return "the message has no signature"
    repaired = "".join(sign.splitlines()).replace(" ", "+")
    try:
        bits = 8 * len(b64decode(repaired, validate=True))
    except ValueError:
        return "sign is not base64"
    recovered = ((one, one.key.signed_digest(repaired)) for one in keys)
    signer, (hash_name, digest) = next(((one, signed) for one, signed in recovered if signed), (None, ("", b"")))
    if signer is None and bits not in {one.key.bits for one in keys}:
        return f"another key signed it: the signature has {bits} bits, and no known key has that size"
    if signer is None:
        return "another key or signature method was used, or sign was changed"
    unsigned = {name: text for name, text in fields.items() if name != "sign"}
    hashed = ((name, hashlib.new(hash_name, text, usedforsecurity=False)) for name, text in _other_texts(unsigned))
    found = [changes for changes, tried in hashed if tried.digest() == digest]
    shown_hash = hash_name.upper().replace("SHA", "SHA-")
    whose = f"right key ({signer})" if signer in trusted else f"{signer} signed it, but LianLian must sign this message"
    problems = [] if hash_name == "md5" else [f"hashed with {shown_hash} instead of MD5"]
    if not found:
        problems.append(f"another text was signed: its {shown_hash} is {digest.hex()}")
    elif fewest := min(found, key=len):
        problems.append(f"another text was signed: the signature matches if {' and '.join(fewest)}")
    if sign != repaired:
        problems.append("sign is damaged: replace its blanks by + and remove its line breaks")
    return ", ".join([whose, *problems])


def verify(output: Output, /, file: BinaryIO, config: Path | None) -> int:
    loaded = load_merchant(config).load_keys()
    fields = read_message(file)
    keys = [*(_KnownKey("LianLian", key) for key in loaded.gateway), _KnownKey("merchant", loaded.private.public_key())]
    # Only LianLian may sign the state of a refund; the merchant may sign every other message.
    trusted = keys[:-1] if fields.keys() & {"ret_code", "sta_refund"} else keys
    source = signature_source(fields)
    signer = next((one for one in trusted if one.key.verify(source, fields.get("sign", ""))), None)
    outcome = "valid" if signer else SIGNATURE_INVALID.word
    reason = f"signed with {signer}" if signer else _cause(fields, keys, trusted)
    output.show(
        {
            "outcome": outcome,
            "reason": reason,
            "signed_by": signer and {"owner": signer.owner, "fingerprint": signer.key.fingerprint},
            "tried": [{"owner": one.owner, "fingerprint": one.key.fingerprint} for one in trusted],
            "source": source.decode(),
        },
        Text(printable(f"{outcome}: {reason}")),
        *(f"tried: {one}, {one.key.bits} bits" for one in trusted),
        f"signature source: {source.decode()}",
    )
    return 0 if signer else SIGNATURE_INVALID.exit_code
