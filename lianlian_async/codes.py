"""``ret_code`` → meaning, class and advice: the one table of the codes that a refund can meet.

Source: LianLian's page of return codes; the gateway's own Chinese ``ret_msg`` is passed on beside it.
About 90 more codes exist for cards, SMS and instalments. A code that is not listed here is *uncertain*:
it proves nothing, so the refund is asked about.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

import attrs

__all__ = ["CODES", "CodeClass", "ReturnCode", "explain"]


class CodeClass(Enum):
    """What a code says about the request that it answers."""

    SUCCESS = "success"
    REJECTED = "rejected"
    DUPLICATE = "duplicate"
    IN_PROGRESS = "in progress"
    NOT_FOUND = "not found"
    UNCERTAIN = "uncertain"


@attrs.frozen
class ReturnCode:
    """One row of the table.

    ``transient``: the gateway may answer otherwise a moment later. ``is_configuration``: the merchant's set-up is the
    cause. ``may_pass``: the cause may pass, and the same ``no_refund`` may be sent again then. ``stops_batch``: every
    further refund would be rejected too.
    """

    ret_code: str
    meaning: str
    kind: CodeClass
    advice: str
    transient: bool = False
    is_configuration: bool = False
    may_pass: bool = False
    stops_batch: bool = False


_MEND = "mend the merchant's set-up before sending more"
_FINAL = "correct the request; this one will not be made"
_ASK = "ask about the refund before anything else"


def _rejected(code: str, meaning: str, advice: str = _FINAL) -> ReturnCode:
    return ReturnCode(code, meaning, CodeClass.REJECTED, advice)


def _ours(code: str, meaning: str, advice: str = _MEND) -> ReturnCode:
    return ReturnCode(code, meaning, CodeClass.REJECTED, advice, is_configuration=True, stops_batch=True)


def _not_now(code: str, meaning: str, cure: str, *, stops_batch: bool = False) -> ReturnCode:
    advice = f"{cure}, then send the same refund again"
    return ReturnCode(code, meaning, CodeClass.REJECTED, advice, may_pass=True, stops_batch=stops_batch)


def _over_the_limit(code: str) -> ReturnCode:
    return _not_now(code, "amount or count limit exceeded", "wait until the limit has room, or have it raised")


def _no_money(code: str) -> ReturnCode:
    return _not_now(code, "merchant balance too low", "top up the merchant balance", stops_batch=True)


def _busy(code: str, meaning: str) -> ReturnCode:
    return ReturnCode(code, meaning, CodeClass.UNCERTAIN, _ASK, transient=True)


def _unclear(code: str, meaning: str) -> ReturnCode:
    return ReturnCode(code, meaning, CodeClass.UNCERTAIN, _ASK)


def _exists(code: str, meaning: str, kind: CodeClass) -> ReturnCode:
    return ReturnCode(code, meaning, kind, "ask: a record may exist under this number")


CODES: Final[dict[str, ReturnCode]] = {
    row.ret_code: row
    for row in (
        ReturnCode("0000", "handled", CodeClass.SUCCESS, "read sta_refund for the state"),
        _ours("1001", "our signature is wrong", "check the private key against the public key in the dashboard"),
        _exists("1002", "duplicate order or refund number", CodeClass.DUPLICATE),
        _exists("1003", "already being processed", CodeClass.IN_PROGRESS),
        _rejected("1004", "a parameter is invalid", "ret_msg names the parameter"),
        _busy("1007", "gateway network busy"),
        _ours("1008", "our IP address is not allowed", "have this machine's outgoing address registered at LianLian"),
        _ours("1009", "service suspended for this merchant"),
        _rejected("1012", "request body unreadable"),
        _over_the_limit("1014"),
        _over_the_limit("1016"),
        _over_the_limit("1019"),
        _exists("2005", "already being processed", CodeClass.IN_PROGRESS),
        _rejected("2006", "original transaction closed"),
        _exists("2008", "already being processed", CodeClass.IN_PROGRESS),
        _ours("3001", "unknown merchant number", "check oid_partner and the endpoint"),
        _rejected("3005", "query spans more than 3 months", "ask LianLian's support about older refunds"),
        _ours("3010", "merchant lacks the permission", "have refunds enabled at LianLian"),
        _exists("4002", "suspected repetition", CodeClass.DUPLICATE),
        _rejected("5002", "original transaction not found"),
        _rejected("5003", "refund amount does not fit the original"),
        _ours("5004", "merchant status abnormal", "ask LianLian's support"),
        _busy("5005", "refund failed, try again"),
        _no_money("5006"),
        _rejected("5007", "refunds together exceed the order", "compare the order's refunds"),
        _rejected("5008", "original transaction did not succeed"),
        _ours("5504", "merchant lacks the permission", "have refunds enabled at LianLian"),
        _unclear("8006", "currency exchange failed"),
        _busy("8117", "gateway's idempotency check failed"),
        ReturnCode(
            "8901", "no such record", CodeClass.NOT_FOUND, "shortly after applying this proves nothing; ask again later"
        ),
        _busy("9000", "bank maintenance or day cut"),
        _rejected("9002", "request body unreadable"),
        _unclear("9091", "creating oid_paybill failed"),
        _rejected("9092", "payment number and order number do not match"),
        _rejected("9093", "original transaction not found"),
        _no_money("9104"),
        _rejected("9901", "request body unreadable (an older page: risk level too high)"),
        _busy("9902", "interface error"),
        _busy("9903", "invalid, try later"),
        _rejected("9910", "risk level too high"),
        _over_the_limit("9911"),
        _unclear("9920", "refund failed"),
        _busy("9921", "refund query failed"),
        _busy("9970", "bank maintenance or day cut"),
        _exists("9983", "duplicate order or refund number", CodeClass.DUPLICATE),
        _busy("9990", "bank error, try later"),
        _unclear("9991", "bank error, contact support"),
        _busy("9999", "system error"),
    )
}


def explain(ret_code: str) -> ReturnCode:
    """The row of ``ret_code``; an unlisted code is kept as it is and *uncertain*."""
    return CODES.get(ret_code) or _unclear(ret_code, "a code this library does not know")
