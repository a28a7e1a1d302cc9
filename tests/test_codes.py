"""The table of return codes: every listed code in its class; every other code proves nothing."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lianlian_async.codes import CODES, CodeClass, explain

# Copied from LianLian's pages independently of the table: a mistake in one of the two fails a test.
CLASSES = {
    CodeClass.SUCCESS: "0000",
    CodeClass.DUPLICATE: "1002 4002 9983",
    CodeClass.IN_PROGRESS: "1003 2005 2008",
    CodeClass.NOT_FOUND: "8901",
    CodeClass.UNCERTAIN: "1007 5005 8006 8117 9000 9091 9902 9903 9920 9921 9970 9990 9991 9999",
    CodeClass.REJECTED: "1001 1004 1008 1009 1012 1014 1016 1019 2006 3001 3005 3010 5002 5003 5004 5006 5007 5008 "
    "5504 9002 9092 9093 9104 9901 9910 9911",
}
CONFIGURATION = "1001 1008 1009 3001 3010 5004 5504"
MAY_PASS = "1014 1016 1019 5006 9104 9911"
STOPS_BATCH = CONFIGURATION + " 5006 9104"


@pytest.mark.parametrize(("kind", "codes"), CLASSES.items(), ids=lambda value: getattr(value, "name", ""))
def test_each_code_has_its_class(kind, codes):
    """The table lists exactly these codes in this class."""
    assert {code for code, row in CODES.items() if row.kind is kind} == set(codes.split())


def test_configuration_codes():
    """Exactly these rejections are caused by the merchant's configuration."""
    assert {code for code, row in CODES.items() if row.is_configuration} == set(CONFIGURATION.split())


def test_rejections_that_may_pass():
    """Exactly these are not final, and their advice is to send the same refund again later."""
    assert {code for code, row in CODES.items() if row.may_pass} == set(MAY_PASS.split())
    assert all(("send the same refund again" in row.advice) is row.may_pass for row in CODES.values())
    assert not [row.advice for row in CODES.values() if "new number" in row.advice]


def test_rejections_that_stop_a_batch():
    """Exactly these stop a batch: the merchant's configuration and its balance."""
    assert {code for code, row in CODES.items() if row.stops_batch} == set(STOPS_BATCH.split())


def test_duplicate_may_be_an_order_or_a_refund():
    """The known number may be an order's number: the meaning says so."""
    assert CODES["1002"].meaning == CODES["9983"].meaning == "duplicate order or refund number"


def test_every_row_explains_its_code():
    """Each row has its own code as key, a meaning and an advice."""
    for code, row in CODES.items():
        assert explain(code) is row
        assert row.ret_code == code
        assert re.fullmatch("[0-9]{4}", code)
        assert row.meaning
        assert row.advice


@given(st.text().filter(lambda code: code not in CODES))
def test_unknown_code_is_kept_and_uncertain(code):
    """A code that is not in the table proves neither success nor failure."""
    row = explain(code)
    assert row.ret_code == code
    assert row.kind is CodeClass.UNCERTAIN
    assert not row.is_configuration
    assert not row.may_pass
    assert not row.stops_batch
    assert "query" in row.advice
