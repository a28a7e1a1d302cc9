"""A database that is killed or loses commits makes no refund twice: ``tests/programs/failover.py``, in small."""

from __future__ import annotations

import pytest

from tests.programs import failover


@pytest.mark.parametrize("scenario", failover.SCENARIOS.values(), ids=failover.SCENARIOS)
def test_a_database_that_is_killed_or_loses_its_last_commits_makes_no_refund_twice(scenario):
    """The gateway carries out whatever it gets; every refund is made by the first of two applications."""
    assert scenario(15) == 0
