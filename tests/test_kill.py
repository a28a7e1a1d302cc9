"""A batch that is killed at random moments and run again makes every refund once: ``tests.programs.kill`` in small."""

from __future__ import annotations

import pytest

from lianlian_async.sandbox import Repeated
from tests.programs import kill


@pytest.mark.parametrize("repeated", Repeated, ids=lambda repeated: repeated.value)
def test_a_batch_that_is_killed_and_run_again_makes_every_refund_once(repeated, tmp_path, pytestconfig):
    """Through every fault at 5 %, the journal and the gateway's books are equal in the end."""
    refunds, kills, seed = (pytestconfig.getoption(name) for name in ("refunds", "kills", "seed"))
    report = kill.kill_and_run_again(tmp_path, refunds=refunds, kills=kills, seed=seed, repeated=repeated)
    assert report.contradictions == {}
    assert report.states["rejected"] == refunds // 10
    assert sum(report.states.values()) == refunds
