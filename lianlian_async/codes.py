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

    kind: CodeClass
    advice: str
    is_configuration: bool = False
    may_pass: bool = False
    stops_batch: bool = False
    ret_code: str = ""
    meaning: str = ""


_ACCEPTED: Final = ReturnCode(CodeClass.SUCCESS, "sta_refund is the status of the refund")
_REJECTED: Final = ReturnCode(
    CodeClass.REJECTED, "the gateway will not make this refund; send a corrected one with a new no_refund"
)
_CONFIGURATION: Final = _REJECTED._replace(
    advice="correct the merchant's configuration before sending more", is_configuration=True, stops_batch=True
)
_LIMIT: Final = _REJECTED._replace(
    advice="wait until the limit allows it, or ask LianLian to raise it, then send the same refund again", may_pass=True
)
_BALANCE: Final = _REJECTED._replace(
    advice="top up the merchant balance, then send the same refund again", may_pass=True, stops_batch=True
)
_EXISTS: Final = "query the refund: it may exist, or the number may belong to another refund"
_DUPLICATE: Final = ReturnCode(CodeClass.DUPLICATE, _EXISTS)
_IN_PROGRESS: Final = ReturnCode(CodeClass.IN_PROGRESS, _EXISTS)
_NOT_FOUND: Final = ReturnCode(CodeClass.NOT_FOUND, "query again later: a new record can appear late")
_UNCERTAIN: Final = ReturnCode(CodeClass.UNCERTAIN, "query the refund before anything else")

_TABLE: Final[dict[str, tuple[ReturnCode, str]]] = {
    "0000": (_ACCEPTED, "accepted"),
    "1001": (
        _CONFIGURATION._replace(advice="check that LianLian's dashboard has the public key of your private key"),
        "our signature is wrong",
    ),
    "1002": (_DUPLICATE, "duplicate order or refund number"),
    "1003": (_IN_PROGRESS, "already being processed"),
    "1004": (
        _REJECTED._replace(advice="ret_msg names the parameter; send a corrected refund with a new no_refund"),
        "a parameter is invalid",
    ),
    "1007": (_UNCERTAIN, "gateway network busy"),
    "1008": (
        _CONFIGURATION._replace(advice="register this machine's outgoing address at LianLian"),
        "our IP address is not allowed",
    ),
    "1009": (_CONFIGURATION, "service suspended for this merchant"),
    "1012": (_REJECTED, "request body unreadable"),
    "1014": (_LIMIT, "amount or count limit exceeded"),
    "1016": (_LIMIT, "amount or count limit exceeded"),
    "1019": (_LIMIT, "amount or count limit exceeded"),
    "2005": (_IN_PROGRESS, "already being processed"),
    "2006": (_REJECTED, "original transaction closed"),
    "2008": (_IN_PROGRESS, "already being processed"),
    "3001": (_CONFIGURATION._replace(advice="check oid_partner and the endpoint"), "unknown merchant number"),
    "3005": (_REJECTED._replace(advice="ask LianLian's support about older refunds"), "query spans more than 3 months"),
    "3010": (_CONFIGURATION._replace(advice="ask LianLian to enable refunds"), "merchant lacks the permission"),
    "4002": (_DUPLICATE, "suspected duplicate"),
    "5002": (_REJECTED, "original transaction not found"),
    "5003": (_REJECTED, "refund amount does not fit the original"),
    "5004": (_CONFIGURATION._replace(advice="ask LianLian's support"), "merchant status abnormal"),
    "5005": (_UNCERTAIN, "refund failed, try again"),
    "5006": (_BALANCE, "merchant balance too low"),
    "5007": (
        _REJECTED._replace(
            advice="check the earlier refunds of this order: with this refund they exceed the order amount"
        ),
        "refunds together exceed the order amount",
    ),
    "5008": (_REJECTED, "original transaction did not succeed"),
    "5504": (_CONFIGURATION._replace(advice="ask LianLian to enable refunds"), "merchant lacks the permission"),
    "8006": (_UNCERTAIN, "currency exchange failed"),
    "8117": (_UNCERTAIN, "gateway's idempotency check failed"),
    "8901": (_NOT_FOUND, "no such record"),
    "9000": (_UNCERTAIN, "bank maintenance or end-of-day cutover"),
    "9002": (_REJECTED, "request body unreadable"),
    "9091": (_UNCERTAIN, "creating oid_paybill failed"),
    "9092": (_REJECTED, "payment number and order number do not match"),
    "9093": (_REJECTED, "original transaction not found"),
    "9104": (_BALANCE, "merchant balance too low"),
    "9901": (_REJECTED, "request body unreadable or risk level too high: LianLian's pages differ"),
    "9902": (_UNCERTAIN, "interface error"),
    "9903": (_UNCERTAIN, "invalid, try again later"),
    "9910": (_REJECTED, "risk level too high"),
    "9911": (_LIMIT, "amount or count limit exceeded"),
    "9920": (_UNCERTAIN, "refund failed"),
    "9921": (_UNCERTAIN, "refund query failed"),
    "9970": (_UNCERTAIN, "bank maintenance or end-of-day cutover"),
    "9983": (_DUPLICATE, "duplicate order or refund number"),
    "9990": (_UNCERTAIN, "bank error, try again later"),
    "9991": (_UNCERTAIN, "bank error, contact support"),
    "9999": (_UNCERTAIN, "system error"),
}
CODES: Final = {code: row._replace(ret_code=code, meaning=meaning) for code, (row, meaning) in _TABLE.items()}


def explain(ret_code: str) -> ReturnCode:
    """Return the row of ``ret_code``; a code that is not in the table is *uncertain*."""
    unknown = _UNCERTAIN._replace(ret_code=ret_code, meaning="a code that this library does not know")
    return CODES.get(ret_code, unknown)
