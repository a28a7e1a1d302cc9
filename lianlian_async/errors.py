"""Every error that this library raises about a refund, as one tree.

LianLianError
├── ConfigurationError      a key or setting is unusable (also a ValueError)
├── InvalidRequest          a field breaks the gateway's rules (also a ValueError)
├── RefundNotSent           apply only: no request of the call arrived; it is safe to send the refund again
├── RefundRejected          apply only: the gateway rejected the refund; ``may_pass``: the cause is temporary
├── RefundNotFound          query only: the gateway has no such record at this moment
├── QueryRejected           query only: the gateway rejected the query; proves nothing about the refund
├── RefundOutcomeUnknown    the refund may have been made; contains everything needed to query it again
├── GatewayUnavailable      query only: no usable answer in time
├── RefundNotFinal          waiting only: the refund was made, but its status can still change
├── RefundConflict          the same no_refund has other content or another outcome
├── SignatureInvalid        an answer or notification is not validly signed by LianLian
├── AnswerMismatch          a message belongs, or may belong, to another request or merchant
├── MalformedMessage        a message violates the protocol: HTTP status not 200, not JSON, too big …
├── JournalError            the journal failed; a refund that is not recorded is not sent
└── BatchStopped            a batch or worker stopped: further refunds would probably fail for the same cause

Every error can be pickled, so a worker process can return it. No error contains key material. ``last_exchange``
identifies the HTTP exchange for LianLian's support; None: no exchange of this call caused the error.
Wrong use of a session (closed, or from another event loop) is a bug in the program: it raises ``RuntimeError``.
"""

import copyreg
from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from .codes import ReturnCode, explain

if TYPE_CHECKING:
    from .models import RefundQuery, RefundRecord, RefundRequest


def printable(text: str) -> str:
    """Return at most 100 characters of the gateway's ``text`` for a message or a log; unprintable ones become ``?``."""
    return "".join(character if character.isprintable() else "?" for character in text[:100])


class LastExchange(NamedTuple):
    """An HTTP exchange with the gateway, to quote in a support ticket. It contains no secret.

    ``at``: its start (wall clock, UTC). ``status``: None without a response. ``headers``: date, proxies, request ids.
    """

    at: datetime
    seconds: float
    status: int | None
    headers: Mapping[str, str]

    def __str__(self) -> str:
        status = "no response" if self.status is None else f"HTTP {self.status}"
        quoted = "".join(f"; {name}: {value}" for name, value in self.headers.items())
        return f"{status} after {self.seconds:.3f} s, sent at {self.at.isoformat(timespec='milliseconds')}{quoted}"


class LianLianError(Exception):
    """The base class: ``except LianLianError`` catches every error of this library about a refund."""

    last_exchange: LastExchange | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        newobj = copyreg.__newobj__  # type: ignore[attr-defined]  # typeshed lacks it
        return newobj, (type(self), *self.args), self.__dict__.copy()


class ConfigurationError(LianLianError, ValueError):
    """A key or setting is unusable. The message says which one and why. It shows no key text."""


def misconfigured(error: LianLianError | None) -> ConfigurationError | None:
    """Return a copy of the ``ConfigurationError`` that caused ``error``, or None. Such an error prevents every send."""
    cause = None if error is None else error.__cause__
    return ConfigurationError(*cause.args) if isinstance(cause, ConfigurationError) else None


class Problem(NamedTuple):
    """One broken rule: the name of the field or argument, the rule, and the given value (shortened)."""

    field: str
    rule: str
    value: str

    def __str__(self) -> str:
        return f"{self.field}: {self.rule} (got {self.value})"


class InvalidRequest(LianLianError, ValueError):
    """A request breaks the field rules; nothing was sent. For a new request, ``problems`` contains every problem."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(map(str, self.problems)))


class RefundNotSent(LianLianError):
    """No apply request of this call reached the gateway (DNS, TLS, refused …): it is safe to send the refund again.

    ``last_error`` says why the last of ``attempts`` attempts failed.
    """

    def __init__(self, no_refund: str, *, attempts: int, last_error: str) -> None:
        self.no_refund = no_refund
        self.attempts = attempts
        self.last_error = last_error
        super().__init__(
            f"refund {no_refund} was not sent: {last_error} (attempts: {attempts}); it is safe to send it again"
        )


class _Refusal(LianLianError):
    """The common part of both rejections: the gateway's code and text, and the code's row in ``codes.CODES``."""

    subject = "request"

    def __init__(self, ret_code: str, ret_msg: str, *, verified: bool, no_refund: str | None) -> None:
        row = explain(ret_code)
        self.ret_code = ret_code
        self.ret_msg = ret_msg
        self.verified = verified
        self.no_refund = no_refund
        self.meaning = row.meaning
        self.advice = self._advice(row)
        self.is_configuration = row.is_configuration
        self.may_pass = row.may_pass
        self.stops_batch = row.stops_batch
        about = self.subject if no_refund is None else f"{self.subject} {no_refund}"
        super().__init__(f"{about}: {printable(ret_code)} {printable(ret_msg)} ({row.meaning}); {self.advice}")

    def _advice(self, row: ReturnCode) -> str:
        return row.advice


class RefundRejected(_Refusal):
    """The gateway rejected the refund, and no earlier attempt can have made it.

    ``ret_code`` and ``ret_msg`` (Chinese) come from the gateway, ``meaning`` and ``advice`` from this library.
    ``is_configuration``: the merchant's configuration is the cause (1001, 1008, 3001 …). ``may_pass``: the cause is
    temporary (balance too low, limit exceeded): send the *same* ``no_refund`` again later. ``stops_batch``: further
    refunds would probably be rejected, too. ``verified``: the answer had a valid signature; many rejections have none.
    ``evidence``: the reason if a person decided that the refund was not made (``ret_code`` is then ``decided``).
    """

    subject = "refund rejected"

    def __init__(
        self, ret_code: str, ret_msg: str, *, verified: bool, no_refund: str | None, evidence: str | None = None
    ) -> None:
        super().__init__(ret_code, ret_msg, verified=verified, no_refund=no_refund)
        self.evidence = evidence
        if evidence is not None:
            self.meaning, self.advice = "not made", "to refund the order, use another no_refund"
            self.args = (f"refund {no_refund} was not made: {evidence}; {self.advice}",)


class QueryRejected(_Refusal):
    """The gateway rejected the query (3005, 1004 …); this proves nothing about the refund.

    It has the attributes of :class:`RefundRejected`, except ``evidence``.
    """

    subject = "query rejected"

    def _advice(self, row: ReturnCode) -> str:
        # Most advice in the table is about a rejected refund: that it was not made, or when to send it again.
        is_for_queries = row.is_configuration or row.ret_code == "3005"
        return row.advice if is_for_queries else "this proves nothing about the refund: correct and repeat the query"


class RefundNotFound(LianLianError):
    """The gateway has no record of the refund (8901) *at this moment*.

    This proves nothing shortly after an attempt that may have arrived: LianLian recommends waiting 15 minutes between
    an apply call and a query. ``verified``: see :class:`RefundRejected`.
    """

    def __init__(
        self, *, no_refund: str | None, oid_refundno: str | None, ret_code: str, ret_msg: str, verified: bool
    ) -> None:
        self.no_refund = no_refund
        self.oid_refundno = oid_refundno
        self.ret_code = ret_code
        self.ret_msg = ret_msg
        self.verified = verified
        super().__init__(f"no record of refund {no_refund or oid_refundno}: {printable(ret_code)} {printable(ret_msg)}")


class RefundOutcomeUnknown(LianLianError):
    """The refund may have been made: the call ended before its outcome was known.

    Do not send the refund again under another ``no_refund``. At ``ask_again_at`` (aware datetime) or later, call
    ``await session.resolve(error)``. It queries the refund, and signs and sends it again only if the gateway still
    has no record ``RetryPolicy.not_found_grace`` seconds after the last attempt that may have arrived.

    ``attempts`` and ``queries`` are the numbers of requests of this call and of concurrent calls. ``sent_at`` is the
    latest time at which the gateway may receive an attempt; if another call holds the lease, it is the end of that
    lease. ``moment`` is the same time by all clocks that are known. ``last_error`` describes the last failures, and
    ``reason`` is their kind, without details of the refund, so that errors can be counted by reason. ``refused`` is
    set if no attempt can have made the refund and the last answer was *duplicate* or *in progress*: the
    :class:`RefundRejected` of this answer. Then the ``no_refund`` may belong to another refund. ``request`` is the
    :class:`~lianlian_async.RefundRequest`, ``body`` the signed bytes (may be empty), ``oid_partner`` the merchant,
    and ``apply_url`` the endpoint.
    """

    def __init__(
        self,
        *,
        request: "RefundRequest",
        oid_partner: str,
        apply_url: str,
        body: bytes = b"",
        attempts: int = 0,
        queries: int = 0,
        moment: Any,  # a clock.Moment
        ask_again_at: datetime,
        last_error: str,
        refused: RefundRejected | None = None,
        reason: str | None = None,
    ) -> None:
        self.request = request
        self.no_refund: str = request.no_refund
        self.dt_refund: datetime = request.dt_refund
        self.oid_partner = oid_partner
        self.apply_url = apply_url
        self.body = body
        self.attempts = attempts
        self.queries = queries
        self.moment = moment
        self.sent_at: datetime = moment.wall
        self.refused = refused
        self.ask_again_at = ask_again_at
        self.last_error = last_error
        self.reason = reason or last_error
        super().__init__(
            f"refund {self.no_refund} may have been made: {last_error} (attempts: {attempts}, queries: {queries}); "
            f"ask again at {ask_again_at.isoformat(timespec='seconds')}"
        )

    def query(self) -> "RefundQuery":
        """Return the query about this refund."""
        return self.request.query()

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object with a format ``version`` and everything that ``session.resolve`` needs."""
        form: dict[str, Any] = import_module(".unknown_form", __package__).to_dict(self)  # from a higher layer
        return form

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RefundOutcomeUnknown":
        """Return the error that :meth:`to_dict` wrote. Raises ``InvalidRequest`` if a field is wrong or missing."""
        error: RefundOutcomeUnknown = import_module(".unknown_form", __package__).from_dict(data)
        return error


class GatewayUnavailable(LianLianError):
    """A query got no usable answer within its attempts and its deadline.

    ``ret_code`` is the gateway's code (busy, maintenance …); None: the gateway did not answer.
    """

    def __init__(self, message: str, *, attempts: int, last_error: str, ret_code: str | None) -> None:
        self.attempts = attempts
        self.last_error = last_error
        self.ret_code = ret_code
        super().__init__(message)


class RefundNotFinal(LianLianError):
    """The refund was made, but when the wait ended, ``sta_refund`` was neither success nor failed.

    ``refund`` is its last known record. ``last_error`` describes why the wait ended early or the last query failed;
    None: neither. Wait again, or learn the final status from the notification or ``session.resume()``.
    """

    def __init__(self, refund: "RefundRecord", *, last_error: str | None) -> None:
        self.refund = refund
        self.last_error = last_error
        self.last_exchange = refund.last_exchange
        because = "" if last_error is None else f"; the last query failed: {last_error}"
        super().__init__(f"refund {refund.no_refund} is not final yet: sta_refund is {refund.sta_refund}{because}")


class RefundConflict(LianLianError):
    """The same ``no_refund`` has other content or another outcome, at the gateway or in the journal.

    Check the refund by hand: the gateway may have made one of the two refunds, or both. If the journal has recorded the
    conflict, the library sends nothing more for it. ``field`` is the wire name of the field that differs, or
    ``content``. ``ours`` is its value in the request, ``theirs`` in the gateway's record or in an earlier request; for
    ``sta_refund``, ``ours`` is its value in the message that arrived. ``record`` has the fields of the gateway's record
    that differs from the request, else it is None.
    """

    def __init__(
        self, no_refund: str, *, field: str, ours: str, theirs: str, record: Mapping[str, str] | None = None
    ) -> None:
        self.no_refund = no_refund
        self.field = field
        self.ours = ours
        self.theirs = theirs
        self.record = None if record is None else dict(record)
        super().__init__(
            f"refund {no_refund} exists with another {field}: ours {ours}, recorded {theirs}; "
            "do not refund again before a person has decided"
        )


class SignatureInvalid(LianLianError):
    """None of the configured gateway keys verifies the signature of a message, or the signature is missing."""


class AnswerMismatch(LianLianError):
    """An answer or a notification belongs, or may belong, to another request or merchant.

    ``field`` is the wire name of the wrong field, ``asked`` its expected value, ``answered`` its value (None: absent).
    """

    def __init__(self, field: str, *, asked: str, answered: str | None) -> None:
        self.field = field
        self.asked = asked
        self.answered = answered
        super().__init__(f"message for another request: {field} is {answered!r}, not {asked!r}")


class MalformedMessage(LianLianError):
    """A message violates the protocol: HTTP status not 200, not a JSON object of strings, too big, and so on."""


class JournalError(LianLianError):
    """The journal failed: for example, it cannot be read or written, or another process has locked it.

    A refund that the journal has not recorded is not sent. ``said`` is the outcome that the journal did not record: the
    :class:`~lianlian_async.Refund` that was made, or the error that the call would have raised. None: this call did not
    send the refund. When the journal works again, call ``apply_refund`` with the same request.
    """

    said: "RefundRecord | LianLianError | None" = None


class BatchStopped(LianLianError):
    """A batch or worker stopped, because further refunds would probably fail for the same cause.

    ``cause`` is a :class:`RefundRejected`; or a :class:`SignatureInvalid`, if the answers about several refunds in a
    row had invalid signatures: a key is probably wrong. The batch has yielded the outcome of every refund that it sent.
    With ``keep_going=True`` it continues after a rejection.
    """

    def __init__(self, cause: RefundRejected | SignatureInvalid) -> None:
        self.cause = cause
        self.last_exchange = cause.last_exchange
        super().__init__(f"batch stopped: {cause}")
