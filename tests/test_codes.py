"""The table of return codes: every listed code in its class; every other code proves nothing."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lianlian_async.codes import CODES, CodeClass, explain

# Written down here from LianLian's pages a second time, so that a slip in either place shows.
CLASSES = {
    CodeClass.SUCCESS: "0000",
    CodeClass.DUPLICATE: "1002 4002 9983",
    CodeClass.IN_PROGRESS: "1003 2005 2008",
    CodeClass.NOT_FOUND: "8901",
    CodeClass.UNCERTAIN: "1007 5005 8006 8117 9000 9902 9903 9920 9921 9970 9990 9991 9999",
    CodeClass.REJECTED: "1001 1004 1008 1009 1012 1014 1016 1019 2006 3001 3005 3010 5002 5003 5004 5006 5007 5008 "
    "5504 9002 9091 9092 9093 9104 9901 9910 9911",
}
OURS_TO_MEND = "1001 1008 1009 3001 3010 5004 5504"
TRANSIENT = "1007 5005 8117 9000 9902 9903 9921 9970 9990 9999"


@pytest.mark.parametrize(("kind", "codes"), CLASSES.items(), ids=lambda value: getattr(value, "name", ""))
def test_each_code_is_of_its_class(kind, codes):
    """The table lists exactly these codes in this class."""
    assert {code for code, row in CODES.items() if row.kind is kind} == set(codes.split())


def test_the_codes_that_are_ours_to_mend():
    """Exactly these rejections lie in the merchant's own set-up."""
    assert {code for code, row in CODES.items() if row.is_configuration} == set(OURS_TO_MEND.split())


def test_the_codes_that_may_pass_by_themselves():
    """Exactly these codes are worth another try."""
    assert {code for code, row in CODES.items() if row.transient} == set(TRANSIENT.split())


def test_every_row_explains_its_code():
    """Each row is found under its own code and has words for the user."""
    for code, row in CODES.items():
        assert explain(code) is row
        assert row.ret_code == code
        assert re.fullmatch("[0-9]{4}", code)
        assert row.meaning
        assert row.advice


@given(st.text().filter(lambda code: code not in CODES))
def test_any_other_code_is_kept_and_uncertain(code):
    """A code that the table does not list is neither a yes nor a no."""
    row = explain(code)
    assert row.ret_code == code
    assert row.kind is CodeClass.UNCERTAIN
    assert not row.is_configuration
    assert not row.transient
    assert "ask" in row.advice
