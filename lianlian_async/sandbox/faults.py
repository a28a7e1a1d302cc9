"""The faults that the sandbox injects: which request gets a fault, and how the fault changes the response."""

import gzip
from collections.abc import Callable, Mapping
from decimal import Decimal
from enum import Enum
from math import ceil
from random import Random
from typing import Final, Literal, TypeAlias

import attrs

from lianlian_async import wire
from lianlian_async.errors import ConfigurationError
from lianlian_async.exchange import HttpResponse
from lianlian_async.settings import check_seconds

from .answers import SUCCESS, error_answer, message, page

Call: TypeAlias = Literal["apply", "query"]


class When(Enum):
    """Whether the gateway carries out a request with a fault."""

    BEFORE = "before"
    """The request is not carried out, so the fault changes an error answer (9999) or a forged success. ``DELAY`` and
    ``LATE``: the request is carried out after the delay. If a client without a socket gives up first, ``DELAY`` is
    cancelled: use ``LATE``."""
    AFTER = "after"
    """The request is carried out first; the fault changes its answer."""


class Fault(Enum):
    """The faults. ``delay`` is an argument of :meth:`SandboxGateway.script` and of the gateway."""

    DELAY = "delay"
    """The correct answer after ``delay`` seconds."""
    NO_ANSWER = "no answer"
    """No response until the client disconnects."""
    LATE = "late"
    """No response. The request is carried out ``delay`` seconds later by the gateway's clock; until then a query finds
    nothing. ``when`` has no effect."""
    RESET = "reset"
    """The connection breaks in the middle of the response."""
    HTTP_500 = "http 500"
    """500 with an HTML page."""
    BAD_GATEWAY = "bad gateway"
    """502 with an HTML page."""
    TOO_MANY = "too many"
    """429 with ``delay`` as Retry-After."""
    REDIRECT = "redirect"
    """302 to another host."""
    BUSY = "busy"
    """An answer with ``ret_code``: 1007, 9902 or 9999 at random, or as scripted."""
    BROKEN_JSON = "broken json"
    """The first half of the answer; Content-Length matches this half."""
    WRONG_SIGNATURE = "wrong signature"
    """A success (``ret_code`` 0000) with the signature of another message."""
    NO_SIGNATURE = "no signature"
    """A success without a signature."""
    ALTERED_FIELD = "altered field"
    """A success whose amount is one yuan above the signed amount."""
    OTHER_REFUND = "other refund"
    """A success with a valid signature, but for another refund."""
    OVERSIZED = "oversized"
    """The answer, followed by 64 KiB of spaces."""
    COMPRESSED = "compressed"
    """The answer compressed with gzip, whatever the client accepts."""


_BUSY_CODES: Final = ("1007", "9902", "9999")


def _check_delay(_owner: object, _field: object, seconds: float) -> None:
    check_seconds("delay", seconds, least=0)


@attrs.define
class Injection:
    """A fault to inject: into ``times`` matching requests after the first ``skip``."""

    fault: Fault
    when: When
    delay: float = attrs.field(validator=_check_delay)
    """Seconds."""
    ret_code: str
    call: Call | None = None
    """None, like ``no_refund``: all."""
    no_refund: str | None = None
    skip: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    times: int = attrs.field(default=1, validator=attrs.validators.ge(1))


def _check_probabilities(_plan: object, _field: object, probabilities: Mapping[Fault, float]) -> None:
    if min(probabilities.values(), default=0) < 0 or sum(probabilities.values()) > 1 + 1e-9:  # the sum is inexact
        raise ConfigurationError("faults: each probability must be at least 0, and their sum at most 1")


@attrs.define
class FaultPlan:
    """Decides which fault occurs: a scripted fault if one matches (oldest first), else a random one.

    Random values are drawn for every request, also for one with a scripted fault, so the same seed and the same
    requests give the same random faults.
    """

    probabilities: Mapping[Fault, float] = attrs.field(validator=_check_probabilities)
    random: Random
    delay: float = attrs.field(validator=_check_delay)
    """Seconds."""
    scripted: list[Injection] = attrs.field(factory=list, init=False)

    def choose(self, call: Call, no_refund: str | None) -> Injection | None:
        """Return the fault for the next request, if any."""
        drawn = self._draw()
        for scripted in self.scripted:
            if scripted.call not in (None, call) or scripted.no_refund not in (None, no_refund):
                continue
            if scripted.skip:
                scripted.skip -= 1
                continue
            if scripted.times == 1:
                self.scripted.remove(scripted)
            else:
                scripted.times -= 1
            return scripted
        return drawn

    def _draw(self) -> Injection | None:
        none = max(0.0, 1 - sum(self.probabilities.values()))
        [fault] = self.random.choices([*self.probabilities, None], [*self.probabilities.values(), none])
        when, ret_code = self.random.choice(list(When)), self.random.choice(_BUSY_CODES)
        return fault and Injection(fault, when, self.delay, ret_code)


_IDENTITY: Final = ("no_refund", "dt_refund", "money_refund", "oid_refundno")


def faulty_response(
    injection: Injection,
    answer: Mapping[str, str],
    request: Mapping[str, str],
    sign: Callable[[Mapping[str, str]], dict[str, str]],
) -> HttpResponse:
    """Return the faulty response that replaces ``answer`` to ``request``; ``sign`` signs an answer.

    The gateway itself handles ``DELAY``, ``NO_ANSWER``, ``LATE`` and ``RESET``.
    """
    success, correct = _success(answer, request), message(sign(answer))
    other_message, other_refund = {"ret_msg": "另一条消息"}, {"no_refund": "OTHER", "oid_refundno": "8888888888888888"}
    one_more = wire.format_money(Decimal(success["money_refund"]) + 1)
    zipped = {**correct.headers, "content-encoding": "gzip"}
    responses: dict[Fault, Callable[[], HttpResponse]] = {
        Fault.HTTP_500: lambda: page(500, "Internal Server Error"),
        Fault.BAD_GATEWAY: lambda: page(502, "Bad Gateway"),
        Fault.REDIRECT: lambda: page(302, "Found", {"location": "https://elsewhere.invalid/"}),
        Fault.TOO_MANY: lambda: page(429, "Too Many Requests", {"retry-after": str(ceil(injection.delay))}),
        Fault.BUSY: lambda: message(sign(error_answer(injection.ret_code))),
        Fault.WRONG_SIGNATURE: lambda: message({**sign(success | other_message), **success}),
        Fault.NO_SIGNATURE: lambda: message(success),
        Fault.ALTERED_FIELD: lambda: message({**sign(success), "money_refund": one_more}),
        Fault.OTHER_REFUND: lambda: message(sign(success | other_refund)),
        Fault.BROKEN_JSON: lambda: correct._replace(body=correct.body[: len(correct.body) // 2]),
        Fault.OVERSIZED: lambda: correct._replace(body=correct.body + b" " * wire.MAX_MESSAGE_BYTES),
        Fault.COMPRESSED: lambda: correct._replace(headers=zipped, body=gzip.compress(correct.body)),
    }
    return responses[injection.fault]()


def _success(answer: Mapping[str, str], request: Mapping[str, str]) -> dict[str, str]:
    """Return ``answer`` if it is a success (0000), else a forged success for the request."""
    if answer["ret_code"] == "0000":
        return dict(answer)
    identity = {name: request[name] for name in _IDENTITY if name in request}
    return {"money_refund": "1.00", "oid_refundno": "9999999999999999", **identity, **SUCCESS, "sta_refund": "2"}
