"""Damaged input of every parser: ``tests.programs.fuzz`` in small."""

from __future__ import annotations

import pytest

from tests.programs import fuzz


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_only_documented_errors_leave_a_parser(name, pytestconfig):
    """Neither another exception nor an endless loop comes of mutated input."""
    inputs, seed = pytestconfig.getoption("inputs"), pytestconfig.getoption("seed")
    count, found = fuzz.fuzz(name, inputs=inputs, seconds=60.0, seed=seed)
    assert found == {}
    assert count == inputs


def test_an_error_that_is_not_documented_is_a_finding():
    """The same input is no finding if the target documents the error."""
    assert fuzz.finding(fuzz.TARGETS["wire"], b"[]") is None
    undocumented = fuzz.Target(fuzz.wire_values, (), list)
    assert isinstance(fuzz.finding(undocumented, b"[]"), fuzz.MalformedMessage)
