"""Workers that are killed at random make every refund once (``tests/fleet.py``, in small)."""

from __future__ import annotations

import fleet


def test_workers_that_are_killed_make_every_refund_once(database, pytestconfig):
    """Through every fault at 5 %, the shared journal and the gateway's books are equal in the end."""
    kills, seed = (pytestconfig.getoption(name) for name in ("kills", "seed"))
    assert fleet.kill_workers(database, refunds=40, kills=kills, workers=3, seed=seed) == {}
