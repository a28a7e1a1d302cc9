"""From the exported file to the reconciled statement: ``tests.programs.operator_day`` in small."""

from __future__ import annotations

from tests.programs import operator_day


def test_an_export_is_mended_sent_despite_kills_and_reconciled(tmp_path, pytestconfig):
    """The check names each damaged line and no other; each refund is made once and is in the statement."""
    lines, seed = (pytestconfig.getoption(name) for name in ("lines", "seed"))
    report = operator_day.operator_day(tmp_path, lines=lines, seed=seed)
    repeated = lines // 50
    refunds = report.lines - repeated
    assert report.hints == ["--date-format", "--money-format"]
    assert (report.false_alarms, report.contradictions) == ([], {})
    assert report.damaged >= len(operator_day.DAMAGE)
    assert 0 < report.finished_at_kills[0] < report.finished_at_kills[1] < refunds
    assert report.outcomes == {"made": refunds, "repeated": repeated}
    assert {name: found for name, found in report.reconciled.items() if found} == {"agrees": refunds}
