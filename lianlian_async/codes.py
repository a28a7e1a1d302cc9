"""The return codes of refund calls and queries: ``ret_code`` → meaning, class and advice.

Source: LianLian's page of return codes, without about 90 codes for cards, SMS and instalments. A code that is not in
the table is *uncertain*: it proves nothing, so the library queries the refund.
"""

from enum import Enum
from typing import Final, NamedTuple


class CodeClass(Enum):
    """What a code proves about the request that it answers."""

    SUCCESS = "success"
    REJECTED = "rejected"
    DUPLICATE = "duplicate"
    IN_PROGRESS = "in progress"
    NOT_FOUND = "not found"
    UNCERTAIN = "uncertain"


class ReturnCode(NamedTuple):
    """One row of the table. :class:`~lianlian_async.RefundRejected` explains the three flags."""

    ret_code: str
    meaning: str
    kind: CodeClass
    advice: str
    is_configuration: bool = False
    may_pass: bool = False
    stops_batch: bool = False


def _rejected(
    code: str,
    meaning: str,
    advice: str = "the gateway will not make this refund; send a corrected one with a new no_refund",
) -> ReturnCode:
    return ReturnCode(code, meaning, CodeClass.REJECTED, advice)


def _configuration(
    code: str, meaning: str, advice: str = "correct the merchant's configuration before sending more"
) -> ReturnCode:
    return ReturnCode(code, meaning, CodeClass.REJECTED, advice, is_configuration=True, stops_batch=True)


def _limit_exceeded(code: str) -> ReturnCode:
    advice = "wait until the limit allows it, or ask LianLian to raise it, then send the same refund again"
    return ReturnCode(code, "amount or count limit exceeded", CodeClass.REJECTED, advice, may_pass=True)


def _balance_too_low(code: str) -> ReturnCode:
    advice = "top up the merchant balance, then send the same refund again"
    return ReturnCode(code, "merchant balance too low", CodeClass.REJECTED, advice, may_pass=True, stops_batch=True)


def _uncertain(code: str, meaning: str) -> ReturnCode:
    return ReturnCode(code, meaning, CodeClass.UNCERTAIN, "query the refund before anything else")


def _exists(code: str, meaning: str, kind: CodeClass) -> ReturnCode:
    advice = "query the refund: it may exist, or the number may belong to another refund"
    return ReturnCode(code, meaning, kind, advice)


CODES: Final[dict[str, ReturnCode]] = {
    row.ret_code: row
    for row in (
        ReturnCode("0000", "accepted", CodeClass.SUCCESS, "sta_refund is the status of the refund"),
        _configuration(
            "1001", "our signature is wrong", "check that LianLian's dashboard has the public key of your private key"
        ),
        _exists("1002", "duplicate order or refund number", CodeClass.DUPLICATE),
        _exists("1003", "already being processed", CodeClass.IN_PROGRESS),
        _rejected(
            "1004",
            "a parameter is invalid",
            "ret_msg names the parameter; send a corrected refund with a new no_refund",
        ),
        _uncertain("1007", "gateway network busy"),
        _configuration("1008", "our IP address is not allowed", "register this machine's outgoing address at LianLian"),
        _configuration("1009", "service suspended for this merchant"),
        _rejected("1012", "request body unreadable"),
        _limit_exceeded("1014"),
        _limit_exceeded("1016"),
        _limit_exceeded("1019"),
        _exists("2005", "already being processed", CodeClass.IN_PROGRESS),
        _rejected("2006", "original transaction closed"),
        _exists("2008", "already being processed", CodeClass.IN_PROGRESS),
        _configuration("3001", "unknown merchant number", "check oid_partner and the endpoint"),
        _rejected("3005", "query spans more than 3 months", "ask LianLian's support about older refunds"),
        _configuration("3010", "merchant lacks the permission", "ask LianLian to enable refunds"),
        _exists("4002", "suspected duplicate", CodeClass.DUPLICATE),
        _rejected("5002", "original transaction not found"),
        _rejected("5003", "refund amount does not fit the original"),
        _configuration("5004", "merchant status abnormal", "ask LianLian's support"),
        _uncertain("5005", "refund failed, try again"),
        _balance_too_low("5006"),
        _rejected(
            "5007",
            "refunds together exceed the order amount",
            "check the earlier refunds of this order: with this one they exceed the order amount",
        ),
        _rejected("5008", "original transaction did not succeed"),
        _configuration("5504", "merchant lacks the permission", "ask LianLian to enable refunds"),
        _uncertain("8006", "currency exchange failed"),
        _uncertain("8117", "gateway's idempotency check failed"),
        ReturnCode("8901", "no such record", CodeClass.NOT_FOUND, "query again later: a new record can appear late"),
        _uncertain("9000", "bank maintenance or end-of-day cutover"),
        _rejected("9002", "request body unreadable"),
        _uncertain("9091", "creating oid_paybill failed"),
        _rejected("9092", "payment number and order number do not match"),
        _rejected("9093", "original transaction not found"),
        _balance_too_low("9104"),
        _rejected("9901", "request body unreadable or risk level too high: LianLian's pages differ"),
        _uncertain("9902", "interface error"),
        _uncertain("9903", "invalid, try again later"),
        _rejected("9910", "risk level too high"),
        _limit_exceeded("9911"),
        _uncertain("9920", "refund failed"),
        _uncertain("9921", "refund query failed"),
        _uncertain("9970", "bank maintenance or end-of-day cutover"),
        _exists("9983", "duplicate order or refund number", CodeClass.DUPLICATE),
        _uncertain("9990", "bank error, try again later"),
        _uncertain("9991", "bank error, contact support"),
        _uncertain("9999", "system error"),
    )
}


def explain(ret_code: str) -> ReturnCode:
    """Return the row of ``ret_code``; a code that is not in the table is *uncertain*."""
    return CODES.get(ret_code) or _uncertain(ret_code, "a code that this library does not know")
