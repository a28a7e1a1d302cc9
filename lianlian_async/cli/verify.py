"""``lianlian verify``: check the signature of a message, and find the likely cause if it is invalid."""

import hashlib
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, combinations, islice, product
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, TypeAlias
from urllib.parse import quote, unquote

from rich.text import Text

from lianlian_async.models import DOCUMENTED
from lianlian_async.signing import VerifyingKey, signature_source

from .exit_codes import SIGNATURE_INVALID
from .options import load_merchant, read_message
from .output import Output, printable

Fields: TypeAlias = Mapping[str, str]


class _Key(NamedTuple):
    owner: str
    key: VerifyingKey

    def __str__(self) -> str:
        return f"{self.owner}'s key {self.key.fingerprint}"


_MOST_FIELDS: Final = 30
"""Maximum number of fields that are left out one by one and in pairs, to limit the time."""
_ORDERS: Final[dict[str, Callable[[Iterable[tuple[str, str]]], Iterable[tuple[str, str]]]]] = {
    "": sorted,
    "fields stay in the order of the message": lambda pairs: pairs,
    "fields are sorted case-insensitively": lambda pairs: sorted(pairs, key=lambda pair: pair[0].lower()),
}
_ENCODINGS: Final = {"": "utf-8", "the text is encoded in GBK": "gb18030"}


def _other_fields(fields: Fields) -> Iterator[tuple[str, Fields]]:
    """Yield ``fields`` and common changes of them, each with a description of the change."""
    yield "", fields
    for names in chain.from_iterable(combinations(islice(fields, _MOST_FIELDS), number) for number in (1, 2)):
        left_out = {name: text for name, text in fields.items() if name not in names}
        yield f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} left out", left_out
    documented = {name: text for name, text in fields.items() if name in DOCUMENTED}
    yield "fields that LianLian does not document for refunds are left out", documented
    yield "sign_type=RSA is added", {**fields, "sign_type": "RSA"}
    stripped = {name.strip(): text.strip() for name, text in fields.items()}
    yield "blanks around names and values are removed", stripped
    yield "values are URL-decoded", {name: unquote(text) for name, text in fields.items()}
    yield "values are URL-encoded", {name: quote(text, safe="") for name, text in fields.items()}


def _other_texts(fields: Fields) -> Iterator[tuple[list[str], bytes]]:
    """Yield the texts that may have been signed by mistake, each with descriptions of its changes."""
    for (change, changed), (order, arrange), is_empty_signed, (coding, encoding) in product(
        _other_fields(fields), _ORDERS.items(), (False, True), _ENCODINGS.items()
    ):
        pairs = arrange((name, text) for name, text in changed.items() if text or is_empty_signed)
        changes = (change, order, "empty values are signed too" if is_empty_signed else "", coding)
        text = "&".join(f"{name}={text}" for name, text in pairs)
        yield [each for each in changes if each], text.encode(encoding)


def _cause(fields: Fields, keys: Sequence[_Key], trusted: Sequence[_Key]) -> str:
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
    if signer is None:
        if bits in {one.key.bits for one in keys}:
            return "another key or signature method was used, or sign was changed"
        return f"another key signed it: the signature has {bits} bits, and no known key has that size"
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
    keys = [*(_Key("LianLian", key) for key in loaded.gateway), _Key("merchant", loaded.private.public_key())]
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
