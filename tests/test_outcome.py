"""Why a refund is unknown, in words to count by."""

import pytest

from lianlian_async.errors import (
    AnswerMismatch,
    GatewayUnavailable,
    LianLianError,
    MalformedMessage,
    QueryRejected,
    RefundNotFound,
    RefundNotSent,
    RefundRejected,
    SignatureInvalid,
)
from lianlian_async.outcome import unknown_reason


def lost(reason, ret_code=None):
    return GatewayUnavailable(f"apply: {reason}", attempts=1, last_error=reason, ret_code=ret_code)


def rejected(kind, code):
    return kind(code, "不行", verified=True, no_refund="R-1")


NOT_FOUND = RefundNotFound(no_refund="R-1", oid_refundno=None, ret_code="8901", ret_msg="无记录", verified=True)


@pytest.mark.parametrize(
    ("apply_error", "query_error", "reason"),
    [
        (SignatureInvalid("answer 0000: invalid signature"), None, "signature invalid"),
        (lost("no answer within 14.8 s"), SignatureInvalid("…"), "signature invalid"),
        (SignatureInvalid("…"), lost("the deadline is over"), "signature invalid"),
        (lost("no answer within 14.8 s"), lost("no answer within 3.7 s"), "no answer in time"),
        (lost("the deadline is over"), None, "no answer in time"),
        (lost("nothing could be sent within 3.7 s"), None, "no answer in time"),
        (lost("ReadTimeout"), None, "no answer in time"),
        (lost("ReadError: [Errno 104] Connection reset by peer"), None, "network error (ReadError)"),
        (lost("a middleware raised KeyError: 'R-1'"), None, "a middleware raised KeyError"),
        (lost("1007 网络忙 (gateway network busy)", "1007"), None, "1007 gateway network busy"),
        (lost("ReadError: reset"), NOT_FOUND, "network error (ReadError); not found yet"),
        (None, NOT_FOUND, "not found yet"),
        (rejected(RefundRejected, "5007"), NOT_FOUND, "5007 refunds together exceed the order amount; not found yet"),
        (lost("ReadError"), rejected(QueryRejected, "1008"), "1008 our IP address is not allowed"),
        (RefundNotSent("R-1", attempts=4, last_error="ConnectError: refused"), None, "network error (ConnectError)"),
        (MalformedMessage("HTTP status 502"), None, "HTTP status 502"),
        (MalformedMessage("not JSON: at 17"), None, "unreadable answer"),
        (AnswerMismatch("no_refund", asked="R-1", answered="R-2"), None, "message for another request"),
        (None, LianLianError("the query service proves nothing: it did not …"), "the query service proves nothing"),
        (None, None, "no answer yet"),
    ],
)
def test_the_reason_has_no_details(apply_error, query_error, reason):
    """Refunds that are unknown for the same cause have the same reason."""
    assert unknown_reason(apply_error, query_error) == reason
