"""Services of two workers that share a journal act on every notification once: ``tests.programs.services`` in small."""

from __future__ import annotations

import pytest

from tests.programs import services

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    """psycopg, uvicorn and aiohttp run on asyncio only."""
    return "asyncio"


@pytest.mark.parametrize("service", services.SERVICES)
async def test_each_refund_is_handled_once_though_a_worker_is_killed(service, database, pytestconfig):
    """Through all faults, and with one worker killed midway, none is missed, and no forgery is acknowledged."""
    refunds, seed = (pytestconfig.getoption(name) for name in ("notified", "seed"))
    report = await services.notify_and_kill(service, database, refunds=refunds, seed=seed)
    assert report.problems == {}
    assert report.handled == refunds
    assert report.forgeries
