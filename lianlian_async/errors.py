"""Every error that this library raises about a refund, as one tree.

LianLianError
├── ConfigurationError      a key or setting is unusable (also a ValueError)
├── InvalidRequest          a field breaks the gateway's rules (also a ValueError)
├── RefundNotSent           certainly never reached the gateway: safe to send again
├── RefundRejected          apply only: the gateway refused; ``may_pass`` tells whether only for now
├── RefundNotFound          query only: the gateway has no such record
├── QueryRejected           query only: the gateway refused the query; says nothing about the refund
├── RefundOutcomeUnknown    the refund may have been made; carries everything needed to query again
├── GatewayUnavailable      query only: no usable answer in time
├── RefundNotFinal          waiting only: made, but its status can still change
├── RefundConflict          the same no_refund belongs to a refund with other content
├── SignatureInvalid        nothing proves that an answer or notification comes from LianLian
├── AnswerMismatch          validly signed, but the answer to another query
├── MalformedMessage        not the protocol: not JSON, not an object of strings, too big …
├── JournalError            the journal failed; nothing is sent that it does not hold
└── BatchStopped            refund_many stopped: every further refund would fail for the same cause

Every error survives pickling, so that worker processes can hand it over. None holds key material.
Wrong use of a session (closed, from another event loop) is a bug in the program, not news about a refund: it raises
``RuntimeError``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from .codes import explain


def _revive(cls: type[LianLianError], args: tuple[Any, ...], state: dict[str, Any]) -> LianLianError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def printable(text: str) -> str:
    """Return the gateway's ``text`` in one line of at most 100 characters, for a message or a log."""
    return "".join(character if character.isprintable() else "?" for character in text[:100])


class LianLianError(Exception):
    """The root of the tree: ``except LianLianError`` catches every error about a refund."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (type(self), self.args, self.__dict__.copy())


class ConfigurationError(LianLianError, ValueError):
    """A key or setting is unusable. The message names the setting and the cure, never key text."""


class Problem(NamedTuple):
    """One broken rule: the wire name of the field, the rule, and the given value (shortened)."""

    field: str
    rule: str
    value: str

    def __str__(self) -> str:
        return f"{self.field}: {self.rule} (got {self.value})"


class InvalidRequest(LianLianError, ValueError):
    """A request breaks the gateway's field rules; nothing was sent. ``problems`` holds every broken rule."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(map(str, self.problems)))


class RefundNotSent(LianLianError):
    """No attempt reached the gateway (refused, DNS, TLS, connect timeout): it is safe to send the refund again.

    ``attempts`` counts the attempts to connect; ``last_error`` tells why the last one failed.
    """

    def __init__(self, no_refund: str, *, attempts: int, last_error: str) -> None:
        self.no_refund = no_refund
        self.attempts = attempts
        self.last_error = last_error
        super().__init__(
            f"refund {no_refund} was not sent: {last_error} ({attempts} attempts); it is safe to send it again"
        )


class _Refusal(LianLianError):
    """What both refusals carry: the gateway's code and text, and the row of :mod:`lianlian_async.codes`."""

    subject = "request"

    def __init__(self, ret_code: str, ret_msg: str, *, verified: bool, no_refund: str | None) -> None:
        row = explain(ret_code)
        self.ret_code = ret_code
        self.ret_msg = ret_msg
        self.verified = verified
        self.no_refund = no_refund
        self.meaning = row.meaning
        self.advice = row.advice
        self.is_configuration = row.is_configuration
        self.may_pass = row.may_pass
        self.stops_batch = row.stops_batch
        about = self.subject if no_refund is None else f"{self.subject} {no_refund}"
        super().__init__(f"{about}: {printable(ret_code)} {printable(ret_msg)} ({row.meaning}); {row.advice}")


class RefundRejected(_Refusal):
    """The gateway refused the refund, and no earlier attempt may have arrived.

    ``ret_code`` and ``ret_msg`` (Chinese) come from the gateway, ``meaning`` and ``advice`` from this library.
    ``is_configuration``: the merchant's configuration is the cause (1001, 1008, 3001 …). ``may_pass``: the cause may
    pass (balance too low, limit exceeded); send the *same* ``no_refund`` again then. ``stops_batch``: every further
    refund would be rejected too. ``verified``: the answer had a valid signature; error answers often have none.
    """

    subject = "refund rejected"


class QueryRejected(_Refusal):
    """The gateway refused the query (3005, 1004 …): this says nothing about the refund.

    Attributes as of :class:`RefundRejected`.
    """

    subject = "query rejected"


class RefundNotFound(LianLianError):
    """The gateway has no record of the refund (8901) *at this moment*.

    This proves nothing shortly after an attempt that may have arrived: LianLian recommends to query no sooner than 15
    minutes after applying. ``verified`` as on :class:`RefundRejected`.
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
    """The refund may have been made, and no query gave certainty in time.

    Do not send it again under another ``no_refund``. From ``ask_again_at`` (aware datetime) on, call
    ``await session.resolve(error)``: it queries, and sends the same bytes again only once the gateway's "no such
    record" can be believed.

    ``attempts`` counts the sends, ``queries`` the queries. ``sent_at`` is when the last attempt was made that may have
    arrived (``moment``: the same on every clock). ``last_error`` is the last failure; ``reason`` is the same without
    the details of one refund, for counting. ``refused`` is the :class:`RefundRejected` in which every attempt so far
    ended; None: one may have worked. ``request`` is the :class:`~lianlian_async.RefundRequest`, ``body`` the signed
    bytes, ``oid_partner`` the merchant that signed them.
    """

    def __init__(
        self,
        *,
        request: Any,  # RefundRequest and Moment, from modules above this one
        oid_partner: str,
        body: bytes,
        attempts: int,
        queries: int,
        moment: Any,
        ask_again_at: datetime,
        last_error: str,
        refused: RefundRejected | None = None,
        reason: str | None = None,
    ) -> None:
        self.request = request
        self.no_refund: str = request.no_refund
        self.dt_refund: datetime = request.dt_refund
        self.oid_partner = oid_partner
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
            f"refund {self.no_refund} may have been made: {attempts} attempts, {queries} queries, "
            f"last: {last_error}; ask again at {ask_again_at.isoformat(timespec='seconds')}"
        )

    def query(self) -> Any:
        """Return the :class:`~lianlian_async.RefundQuery` about this refund."""
        return self.request.query()


class GatewayUnavailable(LianLianError):
    """A query got no usable answer within its attempts and its deadline.

    ``ret_code`` is the code that the gateway answered (busy, maintenance …); None: it did not answer.
    """

    def __init__(self, message: str, *, attempts: int, last_error: str, ret_code: str | None) -> None:
        self.attempts = attempts
        self.last_error = last_error
        self.ret_code = ret_code
        super().__init__(message)


class RefundNotFinal(LianLianError):
    """The refund was made, but ``sta_refund`` was neither success nor failed at the deadline.

    ``refund`` is the last known :class:`~lianlian_async.Refund`, ``last_error`` the error of the last query (None: it
    worked). Wait for the refund again, or leave it to its notification and to ``session.resume()``.
    """

    def __init__(self, refund: Any, *, last_error: str | None) -> None:
        self.refund = refund
        self.last_error = last_error
        because = "" if last_error is None else f"; the last query failed: {last_error}"
        super().__init__(f"refund {refund.no_refund} is not final yet: sta_refund is {refund.sta_refund}{because}")


class RefundConflict(LianLianError):
    """The same ``no_refund`` belongs to a refund with other content, at the gateway or in the journal.

    A person has to decide: the gateway may have made one of the two refunds, or both. Nothing more is sent.
    ``field`` is the wire name that differs, ``ours`` and ``theirs`` are the two values. ``record`` holds the fields of
    the gateway's signed record; None: the number was used for another request of this merchant.
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
    """A message has no valid signature of any known gateway key."""


class AnswerMismatch(LianLianError):
    """An answer is validly signed but belongs to another query.

    ``field`` is the wire name, ``asked`` the value that was sent, ``answered`` the value received (None: absent).
    """

    def __init__(self, field: str, *, asked: str, answered: str | None) -> None:
        self.field = field
        self.asked = asked
        self.answered = answered
        super().__init__(f"answer to another query: {field} is {answered!r}, asked for {asked!r}")


class MalformedMessage(LianLianError):
    """A message is not the protocol: not JSON, not an object of strings, duplicate keys, too big."""


class JournalError(LianLianError):
    """The journal cannot be read or written; another process holds it; its version is unknown.

    Nothing is sent that the journal does not hold. The message names the journal and the cure.
    ``said`` is what the gateway said if the journal failed *after* a send: the :class:`~lianlian_async.Refund` that was
    made, or the error that the call would have raised. None: nothing was sent. Call ``apply_refund`` again with the
    same request once the journal works.
    ``holder`` names the process that holds the journal, and since when; None: this is not the cause.
    """

    said: Any = None
    holder: str | None = None


class BatchStopped(LianLianError):
    """A batch or worker stopped, because every further refund would fail for the same cause.

    ``cause`` is the :class:`RefundRejected` (also ``rejection``), or a :class:`SignatureInvalid` (``rejection`` is
    None then): several answers in a row did not verify, so a key is wrong. The outcome of every refund that was begun
    was yielded; no other was sent. ``keep_going=True`` continues after a rejection.
    """

    def __init__(self, cause: RefundRejected | SignatureInvalid) -> None:
        self.cause = cause
        self.rejection = cause if isinstance(cause, RefundRejected) else None
        super().__init__(f"batch stopped: {cause}")
