"""Refunds and notifications on disturbed sockets agree with the ledger: ``tests.programs.proxy`` in small."""

from __future__ import annotations

from itertools import product

import pytest

from tests.programs import proxy


@pytest.mark.parametrize(
    ("stack", "tls"),
    [
        ("httpx", False),
        ("httpx on trio", True),
        ("aiohttp", True),
        ("httpx client", False),
        ("httpx2 client", True),
        *product(proxy.SERVERS, [False]),
    ],
)
def test_disturbed_exchanges_agree_with_the_ledger(stack, tls, pytestconfig):
    """Every refund is made once, every notification is handled once, and no outcome contradicts the ledger."""
    most, seed = pytestconfig.getoption("scenes"), pytestconfig.getoption("seed")
    report = proxy.run(stack, tls=tls, most=most, seed=seed)
    assert report.problems == {}
    assert report.made_once == sum(report.scenes.values()) + len(report.scenes)  # with a fair exchange of each call
