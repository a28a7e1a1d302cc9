"""Everything this library raises about a refund, drawn as one tree; plain values only.

LianLianError
├── ConfigurationError      a key or setting is unusable (also a ValueError)
├── InvalidRequest          a field breaks the gateway's rules (also a ValueError)
├── RefundNotSent           certainly never reached the gateway: safe to send again
├── RefundRejected          apply only: the gateway said no; ``may_pass`` tells whether only for now
├── RefundNotFound          query only: the gateway has no such record
├── QueryRejected           query only: the query was refused; says nothing about the refund
├── RefundOutcomeUnknown    the refund may have been made; carries all that is needed to ask again
├── GatewayUnavailable      query only: no usable answer in time
├── RefundNotFinal          waiting only: made, and its state could still change at the deadline
├── RefundConflict          the same no_refund stands for other content
├── SignatureInvalid        an answer or notification is not proved to be LianLian's
├── AnswerMismatch          validly signed, but not the answer to our query
├── MalformedMessage        not the protocol: not JSON, not an object of strings, too big …
├── JournalError            the journal cannot do its work; nothing is sent that it does not hold
└── BatchStopped            refund_many stopped at what every further refund would meet: a rejection, a wrong key

Every error survives pickling, so that batch workers can hand it over. None ever holds key material.
Using a session wrongly (closed, from another event loop) is a bug in the program, not news about a
refund: that is a plain ``RuntimeError``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

__all__ = [
    "AnswerMismatch",
    "BatchStopped",
    "ConfigurationError",
    "GatewayUnavailable",
    "InvalidRequest",
    "JournalError",
    "LianLianError",
    "MalformedMessage",
    "Problem",
    "QueryRejected",
    "RefundConflict",
    "RefundNotFinal",
    "RefundNotFound",
    "RefundNotSent",
    "RefundOutcomeUnknown",
    "RefundRejected",
    "SignatureInvalid",
]


def _revive(cls: type[LianLianError], args: tuple[Any, ...], state: dict[str, Any]) -> LianLianError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def spoken(ret_msg: str) -> str:
    """``ret_msg`` as far as it may stand in a message or a log: its documented 100 characters, in one line."""
    return "".join(character if character.isprintable() else "?" for character in ret_msg[:100])


class LianLianError(Exception):
    """The root: ``except LianLianError`` catches whatever this library says about a refund."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (type(self), self.args, self.__dict__.copy())


class ConfigurationError(LianLianError, ValueError):
    """A key or setting is unusable. The message names the setting and the cure, never key text."""


class Problem(NamedTuple):
    """One broken rule: the wire name of the field, the rule in words, the value as given (shortened)."""

    field: str
    rule: str
    value: str

    def __str__(self) -> str:
        return f"{self.field}: {self.rule} (got {self.value})"


class InvalidRequest(LianLianError, ValueError):
    """A request breaks the gateway's field rules; nothing was sent.

    ``problems`` holds every broken rule of the request, not just the first.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(map(str, self.problems)))


class RefundNotSent(LianLianError):
    """No attempt reached the gateway (refused, DNS, TLS, connect timeout): safe to send again.

    ``attempts`` counts the connections tried; ``last_error`` says what the last one met.
    """

    def __init__(self, no_refund: str, *, attempts: int, last_error: str) -> None:
        self.no_refund = no_refund
        self.attempts = attempts
        self.last_error = last_error
        super().__init__(
            f"refund {no_refund} was not sent: {last_error} ({attempts} attempts); it is safe to send it again"
        )


class _SaidNo(LianLianError):
    """What an answered refusal carries: the gateway's code and words, and ours."""

    subject = "request"

    def __init__(
        self,
        ret_code: str,
        ret_msg: str,
        *,
        meaning: str,
        advice: str,
        is_configuration: bool,
        verified: bool,
        no_refund: str | None,
        may_pass: bool = False,
        stops_batch: bool = False,
    ) -> None:
        self.ret_code = ret_code
        self.ret_msg = ret_msg
        self.meaning = meaning
        self.advice = advice
        self.is_configuration = is_configuration
        self.verified = verified
        self.no_refund = no_refund
        self.may_pass = may_pass
        self.stops_batch = stops_batch
        about = self.subject if no_refund is None else f"{self.subject} {no_refund}"
        super().__init__(f"{about}: {spoken(ret_code)} {spoken(ret_msg)} ({meaning}); {advice}")


class RefundRejected(_SaidNo):
    """The gateway refused the refund, and no earlier attempt may have arrived.

    ``ret_code`` and ``ret_msg`` (Chinese) are the gateway's own; ``meaning`` and ``advice`` are ours
    (see :mod:`lianlian_async.codes`). ``is_configuration`` is True where the cure lies in the
    merchant's set-up (1001, 1008, 3001 …). ``may_pass`` is True where the cause may pass (balance too low,
    limit exceeded) and the *same* ``no_refund`` may be sent again then. ``stops_batch`` is True where every
    further refund would be rejected too: the set-up, or the balance.
    ``verified`` tells whether the answer bore a valid signature; error answers often bear none.
    """

    subject = "refund rejected"


class QueryRejected(_SaidNo):
    """The query itself was refused (3005, 1004 …): this says nothing about the refund.

    The attributes are those of :class:`RefundRejected`.
    """

    subject = "query rejected"


class RefundNotFound(LianLianError):
    """The gateway has no record of the refund (8901) *at this moment*.

    Shortly after an attempt that may have arrived this proves nothing yet: LianLian recommends
    asking 15 minutes after applying. ``verified`` as on :class:`RefundRejected`.
    """

    def __init__(
        self, *, no_refund: str | None, oid_refundno: str | None, ret_code: str, ret_msg: str, verified: bool
    ) -> None:
        self.no_refund = no_refund
        self.oid_refundno = oid_refundno
        self.ret_code = ret_code
        self.ret_msg = ret_msg
        self.verified = verified
        super().__init__(f"no record of refund {no_refund or oid_refundno}: {spoken(ret_code)} {spoken(ret_msg)}")


class RefundOutcomeUnknown(LianLianError):
    """The refund may have been made, and the gateway could not be made to tell in time.

    Do not send it again under another ``no_refund``. Ask again at ``ask_again_at`` (aware datetime):
    ``await session.resolve(error)`` does it, and sends the same bytes again only when the gateway's
    "no such record" may be believed.

    ``attempts`` counts the sends, ``queries`` the queries, ``sent_at`` is the last moment at which
    an attempt may have arrived (``moment``: the same on every clock), ``last_error`` is the last failure in words,
    ``reason`` the same without details that differ from refund to refund, to count by.
    ``refused`` is the :class:`RefundRejected` in which every attempt so far ended, None where one may have worked.
    ``request`` is the :class:`~lianlian_async.RefundRequest`, ``body`` the exact signed bytes, ``oid_partner`` the
    merchant that signed them.
    """

    def __init__(
        self,
        *,
        request: Any,
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
        # `request` and `moment` are values of other modules, none of which is below this one: hence Any.
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
        """The :class:`~lianlian_async.RefundQuery` that asks about this refund."""
        return self.request.query()


class GatewayUnavailable(LianLianError):
    """A query got no usable answer within its attempts and its deadline.

    ``ret_code`` is the gateway's code where it answered at all (busy, maintenance …), else None.
    """

    def __init__(self, message: str, *, attempts: int, last_error: str, ret_code: str | None) -> None:
        self.attempts = attempts
        self.last_error = last_error
        self.ret_code = ret_code
        super().__init__(message)


class RefundNotFinal(LianLianError):
    """The refund was made, but ``sta_refund`` was neither success nor failed when the deadline came.

    ``refund`` is the gateway's last word on it, ``last_error`` what the last query met (None: that word).
    Wait for it again, or leave it to its notification and to ``session.resume()``.
    """

    def __init__(self, refund: Any, *, last_error: str | None) -> None:
        # `refund` is a value of models, a floor above this one: hence Any.
        self.refund = refund
        self.last_error = last_error
        because = "" if last_error is None else f"; the last query met: {last_error}"
        super().__init__(f"refund {refund.no_refund} is not final yet: sta_refund is {refund.sta_refund}{because}")


class RefundConflict(LianLianError):
    """The same ``no_refund`` stands for other content: at the gateway, or in the journal. Nothing more is sent.

    ``field`` is the wire name that differs, ``ours`` and ``theirs`` the two values. ``record`` holds the fields of
    the gateway's signed record, where the gateway told it; None where the number was used for another request of
    ours. A person has to decide: the gateway may have made one of the two refunds, or both.
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
    """A message does not bear a valid signature of any known gateway key."""


class AnswerMismatch(LianLianError):
    """An answer is validly signed but belongs to another query.

    ``field`` is the wire name, ``asked`` what we sent, ``answered`` what came (None: absent).
    """

    def __init__(self, field: str, *, asked: str, answered: str | None) -> None:
        self.field = field
        self.asked = asked
        self.answered = answered
        super().__init__(f"answer to another query: {field} is {answered!r}, asked for {asked!r}")


class MalformedMessage(LianLianError):
    """A message is not the protocol: not JSON, not an object of strings, duplicate keys, too big."""


class JournalError(LianLianError):
    """The journal cannot be used: not written, not read, held by another process, of an unknown version.

    Nothing is sent that the journal does not hold. The message names the journal and the cure.

    ``said`` tells what became of the refund where the journal failed *after* a send: the
    :class:`~lianlian_async.Refund` that was made, or the error that the call would have raised. None: the call sent
    nothing. Call ``apply_refund`` again with the same request once the journal works.

    ``holder`` says which process has the journal open, and since when, where that is why it cannot be opened: it can be
    once that process has ended. None: that is not the reason.
    """

    said: Any = None
    holder: str | None = None


class BatchStopped(LianLianError):
    """A batch or worker stopped, for a cause that lies with the merchant and that every further refund would meet.

    ``cause`` is the :class:`RefundRejected` with its code and advice (also as ``rejection``), or a
    :class:`SignatureInvalid` (``rejection`` is None then): answers in a row did not verify, so that a key is wrong.
    Every refund that was begun has had its outcome yielded; no other was sent. ``keep_going=True`` carries on after a
    rejection.
    """

    def __init__(self, cause: RefundRejected | SignatureInvalid) -> None:
        self.cause = cause
        self.rejection = cause if isinstance(cause, RefundRejected) else None
        super().__init__(f"batch stopped: {cause}")
