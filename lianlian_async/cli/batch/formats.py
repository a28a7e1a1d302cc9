"""Read dates and amounts in the format that the user declares with an option; no format is guessed."""

import re
from collections.abc import Callable
from typing import Final

from lianlian_async import wire

_DATE_PARTS: Final = ("YYYY", "MM", "DD", "hh", "mm", "ss")
_DATE_PART: Final = re.compile("|".join(_DATE_PARTS))
_MONEY_FORM: Final = re.compile(r"(\D*)1(\D?)234(?:(\D)56)?(\D*)")
_AMBIGUOUS: Final = re.compile(r"[1-9][0-9]{0,2}\.[0-9]{3}")
"""``1.234`` may be 1.234 or 1234, because some countries separate thousands with a point."""

_NARROW: Final[dict[int, int | str]] = {
    **{wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)},
    **dict.fromkeys((0xA0, *range(0x2002, 0x200B), 0x202F, 0x205F, 0x3000), " "),
    0xFFE5: "¥",
}
"""Full-width characters and special spaces, each with its normal one. Not NFKC: it would read ² or ① as a digit."""


def _normal(text: str) -> str:
    return text.translate(_NARROW).strip()


def date_reader(form: str) -> Callable[[str], str]:
    """Return a function that converts a date in a format such as ``YYYY/MM/DD hh:mm`` to ``yyyyMMddHHmmss``.

    The function also accepts ``yyyyMMddHHmmss``. Each part except ``YYYY`` may have one digit unless another part is
    directly beside it. Raises ``ValueError`` for an invalid format.
    """
    parts = _DATE_PART.findall(form)
    if len(set(parts)) < len(parts) or not {"YYYY", "MM", "DD"} <= set(parts):
        raise ValueError("must contain YYYY, MM, DD, and optionally hh, mm, ss, each once, such as 'YYYY/MM/DD hh:mm'")

    def digits(part: re.Match[str]) -> str:
        beside = part.string[: part.start()][-1:] + part.string[part.end() :][:1]
        length = "4" if part[0] == "YYYY" else "2" if set(beside) & set("YMDhms") else "1,2"
        return f"(?P<{part[0]}>[0-9]{{{length}}})"

    pattern = re.compile(_DATE_PART.sub(digits, re.escape(_normal(form))))

    def read(text: str) -> str:
        if match := pattern.fullmatch(_normal(text)):
            found = match.groupdict("")
            return "".join(found.get(part, "").rjust(2, "0") for part in _DATE_PARTS)
        if re.fullmatch("[0-9]{14}", text):
            return text
        raise ValueError(f"does not match --date-format {form!r}")

    return read


def money_reader(form: str) -> Callable[[str], str]:
    """Return a function that converts an amount in a format such as ``¥1,234.56`` to its wire form.

    The amount may omit separators, currency sign and decimals. If the format has a minus or parentheses, the amount
    must have all signs of the format: without them, it may be income. Raises ``ValueError`` for an invalid format.
    """
    match = _MONEY_FORM.fullmatch(_normal(form))
    if match is None or match[2] == match[3] or re.search("[百千万亿萬億%‰]", form):
        raise ValueError("must be the number 1,234.56 in the format of the file, such as '¥1,234.56' or '1.234,56'")
    before, group, point, after = (re.escape((part or "").strip()) for part in match.groups())
    group = re.escape(match[2])  # the separator may be a blank
    thousands = rf"[1-9][0-9]{{0,2}}(?:{group}[0-9]{{3}})+|" if group else ""
    decimals = rf"(?:{point}([0-9]{{1,2}}))?" if point else "()"
    may_lack = "" if re.search("[-\u2212\u2013(]", _normal(form)) else "?"
    pattern = re.compile(rf"(?:{before}){may_lack}\s*({thousands}[0-9]+){decimals}\s*(?:{after}){may_lack}")

    def read(text: str) -> str:
        if amount := pattern.fullmatch(_normal(text)):
            return f"{re.sub('[^0-9]', '', amount[1])}.{amount[2] or '':0<2}"
        raise ValueError(f"does not match --money-format {form!r}")

    return read


def _plain(parse: Callable[[str], object], option: str) -> Callable[[str], str]:
    """Return a function that returns a text in wire form; for another, it raises a ``ValueError`` with ``option``."""

    def read(text: str) -> str:
        try:
            if _AMBIGUOUS.fullmatch(text):
                raise ValueError("is ambiguous")
            parse(text)
        except ValueError as error:
            raise ValueError(f"{error}; declare the format, such as {option}") from None
        return text

    return read


plain_date: Final = _plain(wire.parse_timestamp, "--date-format 'YYYY/MM/DD hh:mm'")
plain_money: Final = _plain(wire.parse_money, "--money-format '¥1,234.56' or '1.234,56'")
