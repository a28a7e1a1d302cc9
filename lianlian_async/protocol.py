"""The gateway's messages without any input or output: request → signed bytes, delivery → reply, notification → refund.

Reading an answer is total: whatever came back becomes a :class:`~lianlian_async.exchange.Reply`, nothing is raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Final, TypeVar

import attrs

from . import wire
from .codes import CodeClass, ReturnCode, explain
from .errors import (
    AnswerMismatch,
    GatewayUnavailable,
    InvalidRequest,
    LianLianError,
    MalformedMessage,
    Problem,
    QueryRejected,
    RefundConflict,
    RefundNotFound,
    RefundNotSent,
    RefundRejected,
    SignatureInvalid,
    spoken,
)
from .exchange import Call, Delivery, Exchange, Finding, HttpResponse, NoResponse, Reply
from .identity import check_identity
from .merchant import Merchant
from .models import DOCUMENTED, Refund, RefundQuery, RefundRequest
from .signing import SigningKey, VerifyingKey, signature_source

__all__ = ["Protocol", "lost", "rejection"]

Rejection = TypeVar("Rejection", RefundRejected, QueryRejected)


@attrs.frozen
class Protocol:
    """LianLian's refund protocol as one merchant speaks it. :meth:`seal` and :meth:`read` cost an RSA operation."""

    merchant: Merchant
    private_key: SigningKey
    gateway_keys: tuple[VerifyingKey, ...]

    # ── out ──────────────────────────────────────────────────────────────────────────────────────

    def apply_fields(self, request: RefundRequest) -> dict[str, str]:
        """The fields of an apply call; raises ``InvalidRequest`` if nobody names a ``notify_url``."""
        fields = {"oid_partner": self.merchant.oid_partner, "sign_type": "RSA", **request.to_dict()}
        notify_url = request.notify_url or self.merchant.notify_url
        if notify_url is None:
            raise InvalidRequest([Problem("notify_url", "is required, on the request or on the Merchant", "neither")])
        fields["notify_url"] = notify_url
        return fields

    def query_fields(self, query: RefundQuery) -> dict[str, str]:
        """The fields of a query call."""
        return {"oid_partner": self.merchant.oid_partner, "sign_type": "RSA", **query.to_dict()}

    def seal(self, fields: Mapping[str, str]) -> bytes:
        """``fields`` and their signature as the JSON that is sent."""
        return wire.encode({**fields, "sign": self.private_key.sign(signature_source(fields))})

    def signed_fields(self, body: bytes) -> dict[str, str]:
        """The fields that :meth:`seal` made ``body`` of."""
        fields = wire.decode(body)
        del fields["sign"]
        return fields

    # ── in ───────────────────────────────────────────────────────────────────────────────────────

    def verify(self, fields: Mapping[str, str]) -> bool:
        """Whether one of the gateway's keys signed ``fields``."""
        source, signature = signature_source(fields), fields.get("sign", "")
        for key in self.gateway_keys:  # noqa: SIM110 - any() would take as long as reading the JSON
            if key.verify(source, signature):
                return True
        return False

    def read(self, exchange: Exchange, delivery: Delivery) -> Reply:
        """What ``delivery`` teaches about the refund that ``exchange`` asked for."""
        if isinstance(delivery, NoResponse):
            return lost(exchange, delivery)
        retry_after, verified = _retry_after(delivery.headers), False
        try:
            fields = _message(delivery)
            verified = self._verified(fields)
            row = explain(fields["ret_code"])
            _match(exchange, fields, success=row.kind is CodeClass.SUCCESS)
        except RefundConflict as conflict:
            return Reply(finding=Finding.CONFLICT, error=conflict, verified=verified)
        except LianLianError as error:
            return Reply(finding=Finding.UNCERTAIN, error=error, retry_after=retry_after, verified=verified)
        if row.kind is CodeClass.SUCCESS:
            asked = wire.parse_timestamp(exchange.asked["dt_refund"])
            trader = exchange.asked.get("trader_refund")
            refund = Refund.from_dict(fields, asked_dt_refund=asked, asked_trader_refund=trader)
            return Reply(finding=Finding.FOUND, refund=refund, verified=True)
        return _refused(exchange, fields, row, verified=verified, retry_after=retry_after)

    def read_notification(self, body: bytes) -> Refund:
        """The refund that a notification tells of: proved to be the gateway's word, and about this merchant.

        It has a ``no_refund`` or an ``oid_refundno``; all else may be missing. Raises ``MalformedMessage``,
        ``SignatureInvalid`` or, for another merchant's, ``AnswerMismatch``.
        """
        fields = wire.decode(body)
        if not self.verify(fields):
            raise self._unproved(fields, "notification")
        if fields.get("oid_partner") != self.merchant.oid_partner:
            raise AnswerMismatch("oid_partner", asked=self.merchant.oid_partner, answered=fields.get("oid_partner"))
        refund = Refund.from_dict(fields)
        if refund.ret_code not in (None, "0000"):
            raise MalformedMessage(f"tells of no refund: ret_code is {refund.ret_code}")
        if refund.no_refund is None and refund.oid_refundno is None:
            raise MalformedMessage("has neither no_refund nor oid_refundno")
        for name in ("dt_refund", "money_refund"):
            if name in refund.extra:
                raise MalformedMessage(f"has no usable {name}")
        return refund

    def _verified(self, fields: Mapping[str, str]) -> bool:
        """True: signed by the gateway; False: an error answer without signature. Raises for all else."""
        if fields.get("sign"):
            if not self.verify(fields):
                raise self._unproved(fields, f"answer {fields['ret_code']}")
            return True
        if fields["ret_code"] == "0000":
            raise SignatureInvalid("answer 0000 without signature")
        return False

    def _unproved(self, fields: Mapping[str, str], subject: str) -> SignatureInvalid:
        """Return the error for a wrong signature. LianLian leaves a few fields of other answers unsigned: say if so."""
        signed = {name: text for name, text in fields.items() if name in DOCUMENTED}
        cause = ""
        if signed != fields and self.verify(signed):
            others = ", ".join(sorted(repr(name[:32]) for name in fields.keys() - signed.keys())[:8])
            cause = (
                f"; it is valid over the documented fields only, so {others} must be unsigned: tell LianLian's support"
            )
        return SignatureInvalid(f"{subject}: signature of no known gateway key{cause}")


# What an answer code's class teaches: an apply call may have made the refund that it denies …
_APPLY = {
    CodeClass.REJECTED: Finding.REJECTED,
    CodeClass.DUPLICATE: Finding.EXISTS,
    CodeClass.IN_PROGRESS: Finding.EXISTS,
    CodeClass.NOT_FOUND: Finding.UNCERTAIN,
    CodeClass.UNCERTAIN: Finding.UNCERTAIN,
}
# … while a query changes nothing.
_QUERY = {
    CodeClass.REJECTED: Finding.REJECTED,
    CodeClass.DUPLICATE: Finding.UNCERTAIN,
    CodeClass.IN_PROGRESS: Finding.UNCERTAIN,
    CodeClass.NOT_FOUND: Finding.NOT_FOUND,
    CodeClass.UNCERTAIN: Finding.UNCERTAIN,
}


def lost(exchange: Exchange, delivery: NoResponse) -> Reply:
    """The reply where there is no answer."""
    error: LianLianError
    if exchange.call is Call.APPLY and not delivery.may_have_arrived:
        error = RefundNotSent(exchange.asked["no_refund"], attempts=exchange.attempt, last_error=delivery.reason)
    else:
        error = _unavailable(exchange, delivery.reason)
    error.__cause__ = delivery.cause
    return Reply(finding=Finding.UNCERTAIN if delivery.may_have_arrived else Finding.NOT_SENT, error=error)


def _message(answer: HttpResponse) -> dict[str, str]:
    """The fields of an answer that is the protocol's at all."""
    if answer.status != 200:
        raise MalformedMessage(f"HTTP status {answer.status}")
    encoding = answer.headers.get("content-encoding", "identity")
    if encoding.lower() not in ("", "identity") and not _is_charset(encoding):
        raise MalformedMessage(f"compressed ({encoding[:32]}) though identity was asked for")
    fields = wire.decode(answer.body)
    if not fields.get("ret_code"):
        raise MalformedMessage("no ret_code")
    return fields


def _is_charset(name: str) -> bool:
    """Whether ``name`` is a character set: clients of LianLian's send ``Content-Encoding: UTF-8``, uncompressed."""
    try:
        "".encode(name)
    except (LookupError, ValueError):
        return False
    return True


_NUMBERS: Final = ("oid_partner", "no_refund", "oid_refundno")


def _match(exchange: Exchange, fields: Mapping[str, str], *, success: bool) -> None:
    """Refuse the answer to another query. An error answer need not repeat what was asked, a success must."""
    asked = exchange.asked
    if not success:
        check_identity(asked, {name: fields.get(name, "") for name in _NUMBERS})
        return
    check_identity(asked, fields)
    names = [name for name in ("no_refund", "oid_refundno") if name in asked]
    if not fields.get("oid_partner"):
        raise AnswerMismatch("oid_partner", asked=asked["oid_partner"], answered=None)
    if not any(fields.get(name) for name in names):
        raise AnswerMismatch(names[0], asked=asked[names[0]], answered=None)
    if exchange.call is Call.APPLY and not fields.get("money_refund"):
        raise AnswerMismatch("money_refund", asked=asked["money_refund"], answered=None)


def _refused(
    exchange: Exchange, fields: Mapping[str, str], row: ReturnCode, *, verified: bool, retry_after: float | None
) -> Reply:
    finding = (_APPLY if exchange.call is Call.APPLY else _QUERY)[row.kind]
    ret_code, ret_msg = fields["ret_code"], fields.get("ret_msg", "")
    error: LianLianError
    number = exchange.asked.get("no_refund")
    if finding in (Finding.REJECTED, Finding.EXISTS) and exchange.call is Call.APPLY:
        error = rejection(RefundRejected, ret_code, ret_msg, verified=verified, no_refund=number)
    elif finding is Finding.REJECTED:
        error = rejection(QueryRejected, ret_code, ret_msg, verified=verified, no_refund=number)
    elif finding is Finding.NOT_FOUND:
        error = RefundNotFound(
            no_refund=number,
            oid_refundno=exchange.asked.get("oid_refundno"),
            ret_code=ret_code,
            ret_msg=ret_msg,
            verified=verified,
        )
    else:
        error = _unavailable(exchange, f"{spoken(ret_code)} {spoken(ret_msg)} ({row.meaning})", ret_code)
    return Reply(finding=finding, error=error, retry_after=retry_after, verified=verified)


def rejection(
    kind: type[Rejection], ret_code: str, ret_msg: str, *, verified: bool, no_refund: str | None
) -> Rejection:
    """The refusal that a code stands for, with our explanation of it."""
    row = explain(ret_code)
    return kind(
        ret_code,
        ret_msg,
        meaning=row.meaning,
        advice=row.advice,
        is_configuration=row.is_configuration,
        may_pass=row.may_pass,
        stops_batch=row.stops_batch,
        verified=verified,
        no_refund=no_refund,
    )


def _unavailable(exchange: Exchange, reason: str, ret_code: str | None = None) -> GatewayUnavailable:
    return GatewayUnavailable(
        f"{exchange.call}: {reason}", attempts=exchange.attempt, last_error=reason, ret_code=ret_code
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header, in either of its forms (RFC 9110 §10.2.3); None if unusable."""
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        pause = parsedate_to_datetime(value) - parsedate_to_datetime(headers.get("date", ""))
    except (ArithmeticError, LookupError, TypeError, ValueError):  # what the parser raises for odd texts
        return None
    return max(0.0, pause.total_seconds())
