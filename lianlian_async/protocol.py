"""Protocol logic without I/O: sign requests, interpret HTTP responses, verify and read notifications.

:meth:`Protocol.read` never raises: every result of an HTTP attempt becomes a :class:`~lianlian_async.exchange.Reply`.
"""

from collections.abc import Mapping
from typing import NamedTuple

from . import errors, wire
from .codes import CodeClass, ReturnCode, explain
from .exchange import Call, Delivery, Exchange, Finding, HttpResponse, NoResponse, Reply
from .identity import NUMBERS, check_identity
from .merchant import Keys, Merchant
from .models import DOCUMENTED, RefundQuery, RefundRecord, RefundRequest
from .signing import signature_source


class Protocol(NamedTuple):
    """LianLian's refund protocol for one merchant. Signing, verifying and reading do RSA operations."""

    merchant: Merchant
    keys: Keys

    def apply_fields(self, request: RefundRequest) -> dict[str, str]:
        """Return the fields of an apply request. Raises ``InvalidRequest`` without a ``notify_url``."""
        fields = {"oid_partner": self.merchant.oid_partner, "sign_type": "RSA", **request.to_dict()}
        notify_url = request.notify_url or self.merchant.notify_url
        if notify_url is None:
            problem = errors.Problem("notify_url", "is required, in the request or in the Merchant", "neither")
            raise errors.InvalidRequest([problem])
        fields["notify_url"] = notify_url
        return fields

    def query_fields(self, query: RefundQuery) -> dict[str, str]:
        """Return the fields of a query."""
        return {"oid_partner": self.merchant.oid_partner, "sign_type": "RSA", **query.to_dict()}

    def seal(self, fields: Mapping[str, str]) -> bytes:
        """Sign ``fields`` and return them with the signature as JSON, ready to send."""
        return wire.encode({**fields, "sign": self.keys.private.sign(signature_source(fields))})

    def signed_fields(self, body: bytes) -> dict[str, str]:
        """Return the fields from which :meth:`seal` made ``body``."""
        fields = wire.decode(body)
        del fields["sign"]
        return fields

    def verify(self, fields: Mapping[str, str]) -> bool:
        """Return whether one of the gateway's keys signed ``fields``."""
        source, signature = signature_source(fields), fields.get("sign", "")
        return any(key.verify(source, signature) for key in self.keys.gateway)

    def read(self, exchange: Exchange, delivery: Delivery) -> Reply:
        """Interpret the result of one HTTP attempt: return a reply about the refund of ``exchange``."""
        if isinstance(delivery, NoResponse):
            return unanswered(exchange, delivery)
        retry_after, verified = _retry_after(delivery.headers), False
        try:
            fields = _message(delivery)
            verified = self._verified(fields)
            row = explain(fields["ret_code"])
            _match(exchange, fields, success=row.kind is CodeClass.SUCCESS)
        except errors.RefundConflict as conflict:
            return Reply(finding=Finding.CONFLICT, error=conflict, verified=verified)
        except errors.LianLianError as error:
            return Reply(finding=Finding.UNCERTAIN, error=error, retry_after=retry_after, verified=verified)
        if row.kind is CodeClass.SUCCESS:
            refund = RefundRecord.from_dict(fields, exchange.asked, last_exchange=exchange.send_count.last_exchange)
            return Reply(finding=Finding.FOUND, refund=refund, verified=True)
        finding, refusal = _refused(exchange, fields, row, verified=verified)
        return Reply(finding=finding, error=refusal, retry_after=retry_after, verified=verified)

    def read_notification(self, body: bytes) -> RefundRecord:
        """Return the refund of a notification that the gateway signed for this merchant.

        It has an ``oid_partner``, and a ``no_refund`` or an ``oid_refundno``; other fields may be missing. Raises
        ``MalformedMessage``, ``SignatureInvalid``, or ``AnswerMismatch`` for another merchant's notification.
        """
        fields = wire.decode(body)
        self._check_signature(fields, "notification")
        if fields.get("oid_partner") != self.merchant.oid_partner:
            raise errors.AnswerMismatch(
                "oid_partner", asked=self.merchant.oid_partner, answered=fields.get("oid_partner")
            )
        refund = RefundRecord.from_dict(fields)
        if refund.ret_code not in (None, "0000"):
            raise errors.MalformedMessage(f"not a refund notification: ret_code is {refund.ret_code}")
        if refund.no_refund is None and refund.oid_refundno is None:
            raise errors.MalformedMessage("the notification has neither no_refund nor oid_refundno")
        for name in ("dt_refund", "money_refund"):
            if name in refund.extra:
                raise errors.MalformedMessage(f"the notification has no usable {name}")
        return refund

    def _verified(self, fields: Mapping[str, str]) -> bool:
        """Return True for a valid signature, False for an unsigned error answer; else raise ``SignatureInvalid``."""
        if fields.get("sign"):
            self._check_signature(fields, f"answer {fields['ret_code']}")
            return True
        if fields["ret_code"] == "0000":
            raise errors.SignatureInvalid("answer 0000 has no signature")
        return False

    def _check_signature(self, fields: Mapping[str, str], subject: str) -> None:
        """Raise ``SignatureInvalid`` if none of the gateway's keys signed ``fields``.

        If the signature is valid without the undocumented fields, the text of the error names those fields.
        """
        if self.verify(fields):
            return
        signed = {name: text for name, text in fields.items() if name in DOCUMENTED}
        cause = ""
        if signed != fields and self.verify(signed):
            others = ", ".join(sorted(repr(name[:32]) for name in fields.keys() - signed.keys())[:8])
            cause = (
                f"; the signature is valid without the undocumented fields {others}. LianLian probably did not sign "
                "them: report this to LianLian's support"
            )
        raise errors.SignatureInvalid(f"{subject} has an invalid signature: no gateway key verifies it{cause}")


# The findings from error codes; any other class of codes is UNCERTAIN. As the answer to an apply request, NOT_FOUND is
# uncertain too, because the request may have made the refund.
_APPLY = {
    CodeClass.REJECTED: Finding.REJECTED,
    CodeClass.DUPLICATE: Finding.EXISTS,
    CodeClass.IN_PROGRESS: Finding.EXISTS,
}
_QUERY = {CodeClass.REJECTED: Finding.REJECTED, CodeClass.NOT_FOUND: Finding.NOT_FOUND}


def unanswered(exchange: Exchange, delivery: NoResponse) -> Reply:
    """Return the reply for an exchange without an HTTP response: *not sent* or *uncertain*."""
    error: errors.LianLianError
    if exchange.call is Call.APPLY and not delivery.may_have_arrived:
        error = errors.RefundNotSent(exchange.asked["no_refund"], attempts=exchange.attempt, last_error=delivery.reason)
    else:
        error = _unavailable(exchange, delivery.reason)
    error.__cause__ = delivery.cause
    return Reply(finding=Finding.UNCERTAIN if delivery.may_have_arrived else Finding.NOT_SENT, error=error)


def _message(answer: HttpResponse) -> dict[str, str]:
    """Return the fields of an answer. Raises ``MalformedMessage`` if the answer violates the protocol."""
    if answer.status != 200:
        raise errors.MalformedMessage(f"HTTP status {answer.status}")
    encoding = answer.headers.get("content-encoding", "identity")
    if encoding.lower() not in ("", "identity") and not _is_charset(encoding):
        raise errors.MalformedMessage(f"the answer is compressed ({encoding[:32]}), but the request asked for identity")
    fields = wire.decode(answer.body)
    if not fields.get("ret_code"):
        raise errors.MalformedMessage("the answer has no ret_code")
    return fields


def _is_charset(name: str) -> bool:
    """Return whether ``name`` is a character set: LianLian's own clients send ``Content-Encoding: UTF-8``."""
    try:
        "".encode(name)
    except (LookupError, ValueError):
        return False
    return True


def _match(exchange: Exchange, fields: Mapping[str, str], *, success: bool) -> None:
    """Raise ``AnswerMismatch`` or ``RefundConflict`` if the answer belongs to another request.

    A success must contain ``oid_partner``, a refund number of the request, and ``money_refund`` if it answers an apply
    request. An error answer may omit them.
    """
    asked = exchange.asked
    if not success:
        check_identity(asked, {name: fields.get(name, "") for name in NUMBERS})
        return
    check_identity(asked, fields)
    names = [name for name in ("no_refund", "oid_refundno") if name in asked]
    if not fields.get("oid_partner"):
        raise errors.AnswerMismatch("oid_partner", asked=asked["oid_partner"], answered=None)
    if not any(fields.get(name) for name in names):
        raise errors.AnswerMismatch(names[0], asked=asked[names[0]], answered=None)
    if exchange.call is Call.APPLY and not fields.get("money_refund"):
        raise errors.AnswerMismatch("money_refund", asked=asked["money_refund"], answered=None)


def _refused(
    exchange: Exchange, fields: Mapping[str, str], row: ReturnCode, *, verified: bool
) -> tuple[Finding, errors.LianLianError]:
    """Return the finding and the error for an answer other than 0000."""
    finding = (_APPLY if exchange.call is Call.APPLY else _QUERY).get(row.kind, Finding.UNCERTAIN)
    ret_code, ret_msg, no_refund = fields["ret_code"], fields.get("ret_msg", ""), exchange.asked.get("no_refund")
    if finding in (Finding.REJECTED, Finding.EXISTS):
        refusal = errors.RefundRejected if exchange.call is Call.APPLY else errors.QueryRejected
        return finding, refusal(ret_code, ret_msg, verified=verified, no_refund=no_refund)
    if finding is Finding.NOT_FOUND:
        number = exchange.asked.get("oid_refundno")
        return finding, errors.RefundNotFound(
            no_refund=no_refund, oid_refundno=number, ret_code=ret_code, ret_msg=ret_msg, verified=verified
        )
    return finding, _unavailable(
        exchange, f"{errors.printable(ret_code)} {errors.printable(ret_msg)} ({row.meaning})", ret_code
    )


def _unavailable(exchange: Exchange, reason: str, ret_code: str | None = None) -> errors.GatewayUnavailable:
    return errors.GatewayUnavailable(
        f"{exchange.call}: {reason}", attempts=exchange.attempt, last_error=reason, ret_code=ret_code
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a Retry-After header; None if it is absent or, for example, a date (RFC 9110 §10.2.3)."""
    value = headers.get("retry-after", "").strip()
    return float(value[:9]) if value.isascii() and value.isdigit() else None
