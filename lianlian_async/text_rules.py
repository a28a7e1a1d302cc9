"""Validate strings: identifiers and URLs.

Each check returns the given string, as a plain ``str``, or raises ``ValueError``, whose message is the broken rule; the
caller adds the name of the field.
"""

import re
import unicodedata
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

# Default_Ignorable_Code_Point, which unicodedata lacks: DerivedCoreProperties.txt of Unicode 15.0 (the same in 16.0).
_DEFAULT_IGNORABLE: Final = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
# This includes the Unicode categories Cc, Zl, Zp and Cs.
_INVISIBLE: Final = re.compile(f"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff{_DEFAULT_IGNORABLE}]")
# A host by RFC 3986 §3.2.2 with DNS labels. Without this check, most other hosts would fail only at the first send.
_HOST: Final = re.compile(
    r"(?:^|@)(?:\[[0-9A-F:.]+(?:%\w+)?\]|[A-Z0-9_](?:[A-Z0-9_-]{0,62})(?:\.[A-Z0-9_-]{1,63})*\.?)(?::[0-9]*)?$",
    re.IGNORECASE,
)


def existing(value: object, longest: int) -> str:
    """Check the identifier of an existing object, such as an order, a payment or an earlier refund."""
    if not isinstance(value, str):
        raise ValueError("must be a string")
    value = str.__str__(value)  # str() would return the name of a member of a (str, Enum) class, not its value
    if not value:
        raise ValueError("must not be empty")
    if len(value) > longest:
        raise ValueError(f"must have at most {longest} characters, has {len(value)}")
    if value != value.strip():
        raise ValueError("must not begin or end with white space: a program that trims it would change the value")
    if found := _INVISIBLE.search(value):
        raise ValueError(f"must not contain a control, line separator or invisible character, has {_named(found[0])}")
    return value


def new_number(value: object) -> str:
    """Check the number of a new refund: at most 32 letters, decimal digits and visible ASCII, NFKC-normal."""
    text = existing(value, 32)
    for character in text:
        if not ("!" <= character <= "~" or character.isalpha() or character.isdecimal()):
            raise ValueError(f"must contain only letters, decimal digits and visible ASCII, has {_named(character)}")
    if not unicodedata.is_normalized("NFKC", text):
        raise ValueError(f"must be NFKC-normal: write {unicodedata.normalize('NFKC', text)!r} instead")
    return text


def _named(character: str) -> str:
    return f"U+{ord(character):04X} {unicodedata.name(character, '')}".rstrip()


def url(value: object, longest: int = 2000) -> str:
    """Check an absolute http or https URL."""
    text = existing(value, longest)
    if not text.isascii() or " " in text:
        raise ValueError("must be ASCII without spaces (percent-encode other characters)")
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.port != 0 and _HOST.search(parts.netloc) is not None
        (parts.hostname or "").encode().decode("idna")  # may raise UnicodeError, a ValueError
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("must be an absolute http or https URL")
    return text


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is this machine: a loopback address, or ``localhost``. No name is looked up."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
