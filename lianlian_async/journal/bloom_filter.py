"""The numbers on record, in so little memory that it answers "certainly not" or "maybe", and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

__all__ = ["BloomFilter"]

_BITS: Final = 24
_PLACES: Final = 1 << _BITS
"""2 MiB: with a million numbers one answer in a hundred is a vain "maybe", with five million one in five."""


class BloomFilter:
    """A Bloom filter with two places for each number. One thread adds; any may ask meanwhile."""

    __slots__ = ("_bits",)

    def __init__(self) -> None:
        self._bits = bytearray(_PLACES // 8)

    def add(self, numbers: Iterable[str]) -> None:
        """Remember ``numbers``: there is no forgetting."""
        bits = self._bits
        for number in numbers:
            code = hash(number)
            one, other = code % _PLACES, (code >> _BITS) % _PLACES
            bits[one >> 3] |= 1 << (one & 7)
            bits[other >> 3] |= 1 << (other & 7)

    def may_hold(self, number: str) -> bool:
        """False only for a number that was never added."""
        bits, code = self._bits, hash(number)
        one, other = code % _PLACES, (code >> _BITS) % _PLACES
        return bool(bits[one >> 3] >> (one & 7) & bits[other >> 3] >> (other & 7) & 1)
