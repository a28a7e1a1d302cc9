"""``RefundOutcomeUnknown.to_dict`` and ``from_dict``: an unknown refund stored as JSON, outside Python."""

import json
import math

import anyio
import pytest

from lianlian_async import ConfigurationError, InvalidRequest, RefundOutcomeUnknown
from lianlian_async.sandbox import Fault, When
from tests.support.parties import boot_clock, refund_request, sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

REFUSED = {"ret_code": "5006", "ret_msg": "余额不足", "verified": True, "no_refund": "R-1"}
WRONG = {
    "version": (2, "version: must be 1"),
    "body": ('{"no_refund":"R-2"}', "body: must be the signed form of the request"),
    "oid_partner": ("201103171000000001", "body: must be the signed form of the request"),
    "attempts": (True, "attempts: must be of type int"),
    "ask_again_at": ("2026-01-05T08:00:00", "ask_again_at: must be a time with a UTC offset"),
    "moment": ({"wall": 5, "boot": "x", "more": 1}, "moment.more: is not a known field"),
    "refused": ([], "refused: must be an object"),
    "request": ({"no_refund": "R-1"}, "money_refund: is required"),
    "more": (1, "more: is not a known field"),
}


async def stored_unknown(gateway):
    """Return the JSON of a refund whose request was lost, while "no such record" is not yet believed."""
    gateway.script(Fault.RESET, call="apply", when=When.BEFORE)
    async with gateway.session(clock=boot_clock, deadline=5) as session:
        with pytest.raises(RefundOutcomeUnknown) as caught:
            await session.apply_refund(refund_request())
    stored = json.dumps(caught.value.to_dict())
    read = RefundOutcomeUnknown.from_dict(json.loads(stored))
    assert vars(read) == {name: value for name, value in vars(caught.value).items() if name != "last_exchange"}
    assert str(read) == str(caught.value)
    return stored


async def test_an_unknown_refund_is_resolved_from_its_json():
    """The stored form has all that ``resolve`` needs: after the grace it sends the same request again."""
    gateway = sandbox()
    stored = await stored_unknown(gateway)
    await anyio.sleep(900)
    async with gateway.session(clock=boot_clock) as session:
        refund = await session.resolve(RefundOutcomeUnknown.from_dict(json.loads(stored)))
    assert (refund.no_refund, gateway.times_made("R-1")) == ("R-1", 1)


async def test_an_unknown_refund_of_another_endpoint_is_not_resolved():
    """A rehearsal on a sandbox must not send refunds in production."""
    form = json.loads(await stored_unknown(sandbox())) | {"apply_url": "https://sandbox.example/apply"}
    gateway = sandbox()
    async with gateway.session(clock=boot_clock) as session:
        with pytest.raises(
            ConfigurationError, match=r"at https://sandbox\.example/apply, .* same merchant and endpoint"
        ):
            await session.resolve(RefundOutcomeUnknown.from_dict(form))
    assert not gateway.requests


@pytest.mark.parametrize("changes", [{"refused": REFUSED}, {"body": ""}], ids=["refused", "no body"])
async def test_what_may_be_absent_is_kept(changes):
    """A rejection, and an error without signed bytes, are equal after reading."""
    form = json.loads(await stored_unknown(sandbox())) | changes
    form["moment"] |= {"gateway": None, "boot": 5}  # another language may drop .0
    assert RefundOutcomeUnknown.from_dict(form).to_dict() == form


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_form_is_refused(name):
    """The error names the field; a missing field is named, too."""
    form = json.loads(await stored_unknown(sandbox()))
    value, told = WRONG[name]
    with pytest.raises(InvalidRequest) as caught:
        RefundOutcomeUnknown.from_dict(form | {name: value})
    assert told in str(caught.value)
    form.pop(name, form.pop("reason"))
    with pytest.raises(InvalidRequest, match=r"is required|must be 1"):
        RefundOutcomeUnknown.from_dict(form)


@pytest.mark.parametrize("place", ["no_refund", "no_order", "refused", "body"])
@pytest.mark.parametrize("value", [5, ["R-1"], "R\0", "R\ud800"], ids=ascii)
async def test_only_text_that_a_journal_can_store_is_read(place, value):
    """A journal writes many refunds at once: other text would make the writes of all of them fail."""
    form = json.loads(await stored_unknown(sandbox())) | {"body": ""}
    part = {"refused": REFUSED | {"ret_msg": value}}.get(place, value)
    form |= {place: part} if place in form else {"request": form["request"] | {place: value}}
    with pytest.raises(InvalidRequest, match=r": must (be a str|not contain NUL or a lone surrogate)"):
        RefundOutcomeUnknown.from_dict(form)


async def test_an_unknown_field_is_named_in_text_that_can_be_encoded():
    """The error may be logged or sent to a client."""
    form = json.loads(await stored_unknown(sandbox()))
    with pytest.raises(InvalidRequest, match=r"^\?: is not a known field"):
        RefundOutcomeUnknown.from_dict(form | {"\ud800": 1})


async def test_any_text_of_an_exception_is_read():
    """A caller's transport may raise an exception with any text; the refund must not be lost because of it."""
    form = json.loads(await stored_unknown(sandbox())) | {"last_error": "OSError: R\0\ud800", "reason": "R\0\ud800"}
    assert RefundOutcomeUnknown.from_dict(form).to_dict() == form
    with pytest.raises(InvalidRequest, match="reason: must be of type str"):
        RefundOutcomeUnknown.from_dict(form | {"reason": 5})


async def test_null_is_no_value_of_a_required_field():
    """An optional field of the request may be null."""
    form = json.loads(await stored_unknown(sandbox())) | {"body": ""}
    form["request"] |= {"notify_url": None}
    assert RefundOutcomeUnknown.from_dict(form).request.notify_url is None
    form["request"] |= {"no_refund": None}
    with pytest.raises(InvalidRequest, match="no_refund: is required"):
        RefundOutcomeUnknown.from_dict(form)


@pytest.mark.parametrize("form", [None, [], "{}", {}])
def test_another_type_is_refused(form):
    """Only an object with a known version is read."""
    with pytest.raises(InvalidRequest, match="version: must be 1"):
        RefundOutcomeUnknown.from_dict(form)


@pytest.mark.parametrize("boot", [math.nan, math.inf, -math.inf, 10**400], ids=str)
async def test_a_boot_time_is_a_finite_number(boot):
    """Python's JSON has NaN, infinity, and integers of any size."""
    form = json.loads(await stored_unknown(sandbox()))
    form["moment"]["boot"] = boot
    with pytest.raises(InvalidRequest, match=r"moment\.boot: must be a number below 1e\+09"):
        RefundOutcomeUnknown.from_dict(form)


async def test_a_body_that_is_not_json_is_refused():
    """It cannot be the signed form of the request."""
    form = json.loads(await stored_unknown(sandbox()))
    with pytest.raises(InvalidRequest, match="body: must be the signed form"):
        RefundOutcomeUnknown.from_dict(form | {"body": "garbage"})
