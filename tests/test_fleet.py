"""Workers that are killed or suspended at random make every refund once (``tests/programs/fleet.py``, in small)."""

from __future__ import annotations

from lianlian_async.sandbox import Repeated
from tests.programs import fleet


def test_workers_that_are_killed_or_suspended_make_every_refund_once(database, pytestconfig):
    """Through every fault at 5 %, the shared journal and the gateway's books are equal, whatever that carries out."""
    kills, seed = (pytestconfig.getoption(name) for name in ("kills", "seed"))
    contradictions = fleet.kill_workers(
        database, refunds=24, kills=kills, workers=2, seed=seed, repeated=Repeated.AGAIN
    )
    assert contradictions == {}
