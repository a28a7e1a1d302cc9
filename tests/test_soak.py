"""A soak through faults, and hostile answers that take little memory: ``tests.programs.soak`` in small."""

from __future__ import annotations

import pytest

from tests.programs import soak

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    """The backend aiohttp runs on asyncio only."""
    return "asyncio"


async def test_every_refund_of_a_soak_is_made_and_handled_once(tmp_path, pytestconfig):
    """Through all faults on both backends, the ledger, the journal and the handler agree in the end."""
    seed = pytestconfig.getoption("seed")
    soaked = await soak.soak(pytestconfig.getoption("minutes"), rate=100.0, seed=seed, folder=tmp_path)
    assert soaked.problems == []
    assert soaked.refunds


def test_hostile_answers_take_little_memory(pytestconfig):
    """Every outcome under attack is unknown, and the peak of the memory is at most 8 MiB higher."""
    assert soak.problems(soak.attack_all(pytestconfig.getoption("deadline"))) == []
