"""Which numbers are on record: "certainly not", or "maybe"."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lianlian_async.journal.bloom_filter import BloomFilter


@given(st.lists(st.text()))
def test_what_was_added_is_never_denied(added):
    """Every number that was added may be there, whatever was added besides."""
    numbers = BloomFilter()
    numbers.add(added)
    assert all(numbers.may_hold(number) for number in added)


def test_most_of_what_was_not_added_is_denied():
    """Among a hundred thousand numbers, hardly one of those that were never added is taken for one of them."""
    numbers = BloomFilter()
    numbers.add(f"R-{number}" for number in range(100_000))
    assert sum(numbers.may_hold(f"S-{number}") for number in range(10_000)) < 100


def test_an_empty_set_denies_everything():
    """Where nothing was added, nothing may be there."""
    assert not BloomFilter().may_hold("R-1")
