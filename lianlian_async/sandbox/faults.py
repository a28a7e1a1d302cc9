"""What can go wrong between a client and the sandbox: which fault comes when, and how it spoils an answer."""

from __future__ import annotations

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

from . import answers
from .answers import Response

__all__ = ["Call", "Fault", "FaultPlan", "Trouble", "When", "spoil"]

Call: TypeAlias = Literal["apply", "query"]


class When(Enum):
    """Whether the books get to see the request that a fault strikes."""

    BEFORE = "before"
    """They do not: nothing is carried out, and the answer to be spoiled is 9999."""
    AFTER = "after"
    """They do: the refund is carried out, then its answer is spoiled."""


class Fault(Enum):
    """The ways to go wrong. ``delay`` is said when a fault is scripted, or once for the whole gateway."""

    DELAY = "delay"
    """The right answer after ``delay`` seconds; the request is carried out before or after the wait."""
    NO_ANSWER = "no answer"
    """Silence until the client goes away."""
    LATE = "late"
    """Silence too, and the request is carried out ``delay`` seconds later by the gateway's clock, so that a query
    in between finds nothing. ``when`` has no say in it."""
    RESET = "reset"
    """The connection breaks in the middle of the answer."""
    HTTP_500 = "http 500"
    """An HTML page of the application server."""
    BAD_GATEWAY = "bad gateway"
    """502: an HTML page of a proxy."""
    TOO_MANY = "too many"
    """429, with ``delay`` as Retry-After."""
    REDIRECT = "redirect"
    """302 to another host."""
    BUSY = "busy"
    """An answer of the gateway's own: ``ret_code`` (1007, 9902 and 9999 in turn of the dice, or as scripted)."""
    BROKEN_JSON = "broken json"
    """Half of the answer, as if that were all."""
    WRONG_SIGNATURE = "wrong signature"
    """A forgery that says 0000 under the signature of another message."""
    NO_SIGNATURE = "no signature"
    """A forgery that says 0000 without a signature."""
    ALTERED_FIELD = "altered field"
    """A forgery that says 0000 with one yuan more than was signed."""
    OTHER_REFUND = "other refund"
    """The validly signed 0000 of another refund."""
    OVERSIZED = "oversized"
    """The right answer followed by more than a megabyte of blanks."""
    COMPRESSED = "compressed"
    """The right answer in gzip, though nobody asked for it."""


BUSY_CODES: Final = ("1007", "9902", "9999")


@attrs.frozen(kw_only=True)
class Trouble:
    """One fault that strikes one request."""

    fault: Fault
    when: When
    delay: float
    """Seconds."""
    ret_code: str


# ── which fault comes when ───────────────────────────────────────────────────────────────────────


@attrs.define(kw_only=True)
class _Scripted:
    trouble: Trouble
    call: Call | None
    no_refund: str | None
    skip: int = attrs.field(validator=attrs.validators.ge(0))
    times: int = attrs.field(validator=attrs.validators.ge(1))

    def matches(self, call: Call, no_refund: str | None) -> bool:
        return self.call in (None, call) and self.no_refund in (None, no_refund)


class FaultPlan:
    """Scripted faults first, in the order they were scripted; then by probability.

    The dice are thrown the same number of times for every request, so one seed and one sequence of requests
    always meet the same faults.
    """

    def __init__(self, probabilities: Mapping[Fault, float], *, seed: int, delay: float) -> None:
        self._random = Random(seed)  # noqa: S311 -- dice that fall the same way again are the point
        self._delay = delay
        self._scripted: list[_Scripted] = []
        self.probabilities = probabilities

    @property
    def probabilities(self) -> Mapping[Fault, float]:
        """How likely each fault is per request."""
        return self._probabilities

    @probabilities.setter
    def probabilities(self, value: Mapping[Fault, float]) -> None:
        if any(share < 0 for share in value.values()) or sum(value.values()) > 1 + 1e-9:  # 1e-9: sums of floats
            raise ConfigurationError("faults: no probability may be negative, nor all of them together more than 1")
        self._probabilities = dict(value)

    def script(
        self,
        fault: Fault,
        *,
        call: Call | None,
        when: When,
        no_refund: str | None,
        skip: int,
        times: int,
        delay: float | None,
        ret_code: str,
    ) -> None:
        """As :meth:`.SandboxGateway.script`."""
        trouble = Trouble(fault=fault, when=when, delay=self._delay if delay is None else delay, ret_code=ret_code)
        self._scripted.append(_Scripted(trouble=trouble, call=call, no_refund=no_refund, skip=skip, times=times))

    def strike(self, call: Call, no_refund: str | None) -> Trouble | None:
        """What goes wrong with the request that has just come in, if anything."""
        drawn = self._draw()
        for scripted in self._scripted:
            if scripted.matches(call, no_refund):
                if scripted.skip:
                    scripted.skip -= 1
                    continue
                if scripted.times == 1:
                    self._scripted.remove(scripted)
                else:
                    scripted.times -= 1
                return scripted.trouble
        return drawn

    def _draw(self) -> Trouble | None:
        point, when, ret_code = self._random.random(), self._random.choice(list(When)), self._random.choice(BUSY_CODES)
        for fault, share in self._probabilities.items():
            if point < share:
                return Trouble(fault=fault, when=when, delay=self._delay, ret_code=ret_code)
            point -= share
        return None


# ── how an answer is spoiled ─────────────────────────────────────────────────────────────────────


@attrs.frozen
class _Case:
    """All that a spoiler may use."""

    trouble: Trouble
    answer: Mapping[str, str]
    request: Mapping[str, str]
    seal: Callable[[Mapping[str, str]], dict[str, str]]

    def honest(self) -> Response:
        return answers.message(self.seal(self.answer))

    def claim(self) -> dict[str, str]:
        """What a forger would like to be believed: the true answer if it is 0000, else one made of the request."""
        if self.answer["ret_code"] == "0000":
            return dict(self.answer)
        asked = {name: self.request[name] for name in _IDENTITY if name in self.request}
        return {
            "money_refund": "1.00",
            "oid_refundno": "9999999999999999",
            **asked,
            **answers.SUCCESS,
            "sta_refund": "2",
        }


_IDENTITY: Final = ("no_refund", "dt_refund", "money_refund", "oid_refundno")


def spoil(
    trouble: Trouble,
    answer: Mapping[str, str],
    request: Mapping[str, str],
    seal: Callable[[Mapping[str, str]], dict[str, str]],
) -> Response:
    """What the client gets instead of ``answer`` to ``request``; ``seal`` signs an answer as the gateway does.

    For the faults that are about what the response says; those about the connection are the gateway's.
    """
    return _SPOILERS[trouble.fault](_Case(trouble, answer, request, seal))


def _wrong_signature(case: _Case) -> Response:
    claim = case.claim()
    return answers.message({**case.seal(claim), "sign": case.seal({**claim, "ret_msg": "另一条消息"})["sign"]})


def _no_signature(case: _Case) -> Response:
    return answers.message(case.claim())


def _altered_field(case: _Case) -> Response:
    sealed = case.seal(case.claim())
    return answers.message({**sealed, "money_refund": wire.format_money(Decimal(sealed["money_refund"]) + 1)})


def _other_refund(case: _Case) -> Response:
    return answers.message(case.seal({**case.claim(), "no_refund": "OTHER", "oid_refundno": "8888888888888888"}))


def _broken_json(case: _Case) -> Response:
    whole = case.honest()
    return attrs.evolve(whole, body=whole.body[: len(whole.body) // 2])


def _oversized(case: _Case) -> Response:
    whole = case.honest()
    return attrs.evolve(whole, body=whole.body + b" " * wire.MAX_MESSAGE_BYTES)


def _compressed(case: _Case) -> Response:
    whole = case.honest()
    return Response(200, gzip.compress(whole.body), {**whole.headers, "content-encoding": "gzip"})


_SPOILERS: Final[Mapping[Fault, Callable[[_Case], Response]]] = {
    Fault.HTTP_500: lambda _: answers.page(500, "Internal Server Error"),
    Fault.BAD_GATEWAY: lambda _: answers.page(502, "Bad Gateway"),
    Fault.TOO_MANY: lambda case: answers.page(429, "Too Many Requests", {"retry-after": str(ceil(case.trouble.delay))}),
    Fault.REDIRECT: lambda _: answers.page(302, "Found", {"location": "https://elsewhere.invalid/"}),
    Fault.BUSY: lambda case: answers.message(case.seal(answers.refusal(case.trouble.ret_code))),
    Fault.BROKEN_JSON: _broken_json,
    Fault.WRONG_SIGNATURE: _wrong_signature,
    Fault.NO_SIGNATURE: _no_signature,
    Fault.ALTERED_FIELD: _altered_field,
    Fault.OTHER_REFUND: _other_refund,
    Fault.OVERSIZED: _oversized,
    Fault.COMPRESSED: _compressed,
}
