"""The sandbox as an ASGI application: it receives requests, injects faults and sends signed answers.

A request is carried out without an await, so of two concurrent apply requests exactly one is the first. This blocks
the event loop for two RSA operations (below 1 ms with 1024 bits), which is acceptable in a fake.
"""

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from operator import itemgetter
from random import Random
from typing import Any, Final

import anyio

from lianlian_async import asgi, wire
from lianlian_async.exchange import HttpResponse
from lianlian_async.merchant import Endpoints, Merchant
from lianlian_async.models import RefundStatus
from lianlian_async.session import RefundSession
from lianlian_async.signing import SigningKey, signature_source
from lianlian_async.transport import asgi_transport

from . import answers, rules
from .answers import Rejection
from .faults import Call, Fault, FaultPlan, Injection, When, faulty_response
from .ledger import Ledger, Order, Record, Repeated

_APPLY, _APPLY_DOMESTIC, _QUERY = "/exchangerefund.htm", "/refund.htm", "/refundquery.htm"
_CALLS: Final[Mapping[str, Call]] = {_APPLY: "apply", _APPLY_DOMESTIC: "apply", _QUERY: "query"}
"""The call by its path."""


@functools.cache
def _generated_key(_owner: str, bits: int) -> SigningKey:
    """Generate a key; the sandboxes of this process share it, because generating a key is slow."""
    return SigningKey.generate(bits)


class SandboxGateway:
    """A fake of LianLian's refund gateway that knows one merchant; an ASGI 3 application.

    The gateway's clock is ``clock`` plus the seconds of :meth:`advance`, so tests need not wait for final states. The
    ``Date`` header shows this clock; the server must not add its own header (uvicorn: ``--no-date-header``).

    Args:
        oid_partner: The merchant's number.
        merchant_key: The merchant's private key; generated with ``bits`` if not given.
        gateway_key: The private key that signs answers; generated with ``bits`` if not given.
        bits: Size of generated keys.
        repeated: The effect of a second apply request with the same ``no_refund``.
        settle_after: Seconds until a refund is final; with 0, the apply answer has the final state.
        default_order: Amount in yuan of each order that was not added; None: such an order does not exist (5002).
        sign_errors: Whether answers other than 0000 are signed; None: all except 1004, 8901 and 9002, like genuine
            answers. A signed rejection of a refund repeats ``no_refund`` and ``money_refund``; an unsigned answer has
            only ``ret_code`` and ``ret_msg``.
        faults: Probability of each fault per request.
        seed: Seed of the random faults.
        delay: Seconds of delay for random faults, and for scripted faults without a ``delay``.
        clock: A monotonic clock in seconds.
        started_at: Date and time of the gateway's creation (aware); default: now.

    Raises ``ValueError`` for a wrong ``repeated``, ``settle_after`` or ``default_order``, ``ConfigurationError`` for
    wrong probabilities, delays and key sizes.
    """

    def __init__(
        self,
        *,
        oid_partner: str = "201103171000000000",
        merchant_key: SigningKey | None = None,
        gateway_key: SigningKey | None = None,
        bits: int = 1024,
        repeated: Repeated = Repeated.REJECT,
        settle_after: float = 2.0,
        default_order: Decimal | None = None,
        sign_errors: bool | None = None,
        faults: Mapping[Fault, float] | None = None,
        seed: int = 0,
        delay: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        started_at: datetime | None = None,
    ) -> None:
        self.oid_partner = oid_partner
        self.merchant_key = merchant_key or _generated_key("merchant", bits)
        self.gateway_key = gateway_key or _generated_key("gateway", bits)
        self.sign_errors = sign_errors
        self.requests: Counter[Call] = Counter()
        """Number of requests by call, including requests with a fault."""
        self._ledger = Ledger(repeated=repeated, settle_after=settle_after, default_order=default_order)
        self._plan = FaultPlan(faults or {}, Random(seed), delay)  # noqa: S311 - the same seed gives the same faults
        self._late: list[tuple[float, str, Mapping[str, str]]] = []
        """Time, path and fields of the requests with ``Fault.LATE`` that are not carried out yet."""
        self._clock = clock
        self._advanced = 0.0
        self._started = clock()
        self._started_at = started_at or datetime.now(UTC)
        self.made = anyio.Event()
        """Set when there may be new ``refunds``, now or later, and then replaced by a new event."""
        self.advanced = anyio.Event()
        """Set when the clock was advanced, and then replaced by a new event."""

    # ── set-up: orders, time, faults ─────────────────────────────────────────────────────────────

    def add_order(self, no_order: str | None, money_order: Decimal, *, oid_paybill: str | None = None) -> Order:
        """Add a paid order of ``money_order`` yuan; ``oid_paybill`` is generated if it is None.

        Raises ``ValueError`` for an invalid amount, and for an existing number.
        """
        number = oid_paybill or self._ledger.new_number()
        return self._ledger.add_order(Order(no_order=no_order, oid_paybill=number, money_order=money_order))

    def fail(self, no_refund: str) -> None:
        """Let an existing or future refund fail when it becomes final, so that its money is returned then.

        Raises ``ValueError`` if the refund is already final.
        """
        self._current_ledger().fail(no_refund, self.now())

    def now(self) -> float:
        """Return the time of the gateway's clock in seconds."""
        return self._clock() + self._advanced

    def time_of_day(self, moment: float | None = None) -> datetime:
        """Convert seconds of the gateway's clock (default: now) to an aware date and time."""
        return self._started_at + timedelta(seconds=(self.now() if moment is None else moment) - self._started)

    def advance(self, seconds: float) -> None:
        """Advance the gateway's clock; raises ``ValueError`` if ``seconds`` is negative, infinite or NaN."""
        if not 0 <= seconds < math.inf:
            raise ValueError(f"seconds must be finite and not negative, is {seconds}")
        self._advanced += seconds
        self.advanced.set()
        self.advanced = anyio.Event()
        self._set_made()  # late requests may now be due

    def script(
        self,
        fault: Fault,
        *,
        call: Call | None = None,
        when: When = When.AFTER,
        no_refund: str | None = None,
        skip: int = 0,
        times: int = 1,
        delay: float | None = None,
        ret_code: str = "1007",
    ) -> None:
        """Inject ``fault`` into the next ``times`` matching requests, after ``skip`` matching requests without it.

        ``call`` and ``no_refund`` select the requests (None: all). If several faults match a request, the gateway
        uses the oldest one that does not skip it. ``delay`` is in seconds; only ``Fault.BUSY`` uses ``ret_code``.
        Raises ``ValueError`` for a negative ``skip`` and for ``times`` below 1, ``ConfigurationError`` for a wrong
        ``delay``.
        """
        delay = self._plan.delay if delay is None else delay
        self._plan.scripted.append(Injection(fault, when, delay, ret_code, call, no_refund, skip, times))

    @property
    def faults(self) -> Mapping[Fault, float]:
        """Probability of each fault per request. Can be set at any time; ``{}`` ends all random faults."""
        return self._plan.probabilities

    @faults.setter
    def faults(self, probabilities: Mapping[Fault, float]) -> None:
        self._plan.probabilities = probabilities

    # ── the ledger: refunds that were made, with or without a correct answer ─────────────────────

    def money_moved(self, no_refund: str) -> Decimal:
        """Return the yuan that all refunds with ``no_refund`` moved; a failed refund moves none."""
        return sum((record.moved(self.now()) for record in self._current_ledger().made(no_refund)), Decimal(0))

    def times_made(self, no_refund: str) -> int:
        """Return how many refunds with ``no_refund`` were made, including those that failed later."""
        return len(self._current_ledger().made(no_refund))

    @property
    def refunds(self) -> tuple[Record, ...]:
        """Every refund that was made, oldest first."""
        return tuple(self._current_ledger().records)

    @property
    def next_late(self) -> float:
        """Seconds until the next request with ``Fault.LATE`` is carried out; infinite if there is none."""
        return min((at for at, _, _ in self._late), default=math.inf) - self.now()

    def _set_made(self) -> None:
        self.made.set()
        self.made = anyio.Event()

    def _current_ledger(self) -> Ledger:
        """Carry out the requests with ``Fault.LATE`` that are due, without an answer; return the ledger."""
        while self.next_late <= 0:
            first = min(self._late, key=itemgetter(0))
            self._late.remove(first)
            at, path, fields = first
            self._handle(path, fields, at)
        return self._ledger

    # ── ASGI ─────────────────────────────────────────────────────────────────────────────────────

    async def __call__(self, scope: asgi.Message, receive: asgi.Receive, send: asgi.Send) -> None:
        """Serve one ASGI 3 connection: an HTTP request or the server's lifespan."""
        if scope["type"] == "lifespan":
            await asgi.lifespan(receive, send, nullcontext())
            return
        path = scope["path"]
        if path not in _CALLS:
            await self._respond(send, answers.page(404, "Not Found"))
        elif scope["method"] != "POST":
            await self._respond(send, answers.page(405, "Method Not Allowed", {"allow": "POST"}))
        else:
            body = await asgi.read(receive, wire.MAX_MESSAGE_BYTES)
            self.requests[_CALLS[path]] += 1
            try:
                fields = rules.read_body(asgi.headers(scope).get("content-type", ""), body)
            except Rejection as rejection:
                await self._respond(send, answers.message(self._sign(rejection.answer, {})))
            else:
                await self._serve(path, fields, receive, send)

    async def _serve(self, path: str, fields: Mapping[str, str], receive: asgi.Receive, send: asgi.Send) -> None:
        injection = self._plan.choose(_CALLS[path], fields.get("no_refund"))
        sign = functools.partial(self._sign, request=fields)
        if injection is None:
            await self._respond(send, answers.message(sign(self._carry_out(path, fields))))
            return
        if injection.fault is Fault.LATE:
            self._late.append((self.now() + injection.delay, path, fields))
            self._set_made()
            await receive()  # the body was read, so the next message is the client's disconnect
            return
        answer = self._carry_out(path, fields) if injection.when is When.AFTER else None
        if injection.fault is Fault.DELAY:
            await anyio.sleep(injection.delay)
            await self._respond(send, answers.message(sign(answer or self._carry_out(path, fields))))
            return
        answer = answer or answers.error_answer("9999")
        if injection.fault is Fault.NO_ANSWER:
            await receive()
        elif injection.fault is Fault.RESET:
            await self._respond(send, answers.message(sign(answer)), breaks_off=True)
        else:
            await self._respond(send, faulty_response(injection, answer, fields, sign))

    async def _respond(self, send: asgi.Send, response: HttpResponse, *, breaks_off: bool = False) -> None:
        """Send a response; with ``breaks_off``, send half of its body and raise, so that the server disconnects."""
        date = format_datetime(self.time_of_day().astimezone(UTC), usegmt=True)
        await asgi.respond(send, response.status, {**response.headers, "date": date}, response.body, cut=breaks_off)
        if breaks_off:
            raise ConnectionResetError("the sandbox broke the connection")

    # ── one request, without an await ────────────────────────────────────────────────────────────

    def _carry_out(self, path: str, fields: Mapping[str, str]) -> dict[str, str]:
        self._current_ledger()  # late requests precede this one
        return self._handle(path, fields, self.now())

    def _handle(self, path: str, fields: Mapping[str, str], at: float) -> dict[str, str]:
        """Carry out a request at time ``at`` of the gateway's clock; return the unsigned answer."""
        try:
            rules.authenticate(fields, self.oid_partner, self.merchant_key.public_key())
            rules.check(_CALLS[path], fields)
            if path == _QUERY:
                return self._answer(self._ledger.query(fields, at), at)
            record = self._ledger.apply(fields, at, domestic=path == _APPLY_DOMESTIC)
            self._set_made()
        except Rejection as rejection:
            return rejection.answer
        answer = self._answer(record, record.received_at)
        if record.domestic:  # genuine domestic apply answers lack this field
            del answer["dt_refund"]
        return answer

    def _answer(self, record: Record, at: float) -> dict[str, str]:
        """Return the unsigned 0000 answer with a refund's state at time ``at`` of the gateway's clock."""
        status = record.status(at)
        fields = {
            **answers.SUCCESS,
            "no_refund": record.no_refund,
            "dt_refund": record.dt_refund,
            "money_refund": f"{record.money_refund:f}",
            "oid_refundno": record.oid_refundno,
            "sta_refund": status.value,
        }
        if not record.domestic:
            fields |= answers.foreign_fields(record.money_refund)
        if status is RefundStatus.SUCCESS:
            fields["settle_date"] = wire.format_timestamp(self.time_of_day(record.settles_at))[:8]
        return fields

    def notification(self, record: Record, at: float | None = None) -> bytes:
        """Return the signed notification with a refund's state at time ``at`` of the gateway's clock (default: now)."""
        fields = self._answer(record, self.now() if at is None else at)
        return wire.encode(self._sign(fields, {"oid_partner": self.oid_partner}))

    def statement(self) -> str:
        """Return all successful refunds in the form of LianLian's daily statement of domestic refunds (CSV)."""
        virtual_goods, sent, refunded, lines = "101001", "1", "5", ""  # busi_partner, direction, status
        for refund in self.refunds:
            if refund.status(self.now()) is RefundStatus.SUCCESS:
                order, money = refund.no_order or refund.oid_paybill or "", f"-{refund.money_refund.normalize():f}"
                settled = wire.format_timestamp(self.time_of_day(refund.settles_at))
                identity = refund.no_refund, self.oid_partner, _statement_time(refund.dt_refund)
                rest = _statement_time(settled), "0", "API渠道", "余额支付", "sandbox"
                lines += ",".join((*identity, virtual_goods, order, settled[:8], money, sent, refunded, *rest)) + "\n"
        return lines

    def _sign(self, answer: Mapping[str, str], request: Mapping[str, str]) -> dict[str, str]:
        """Sign ``answer`` to ``request``, unless it is an error that the gateway sends unsigned."""
        ret_code, echo = answer["ret_code"], dict[str, str]()
        if ret_code != "0000":
            if not (ret_code not in answers.UNSIGNED if self.sign_errors is None else self.sign_errors):
                return dict(answer)
            if "money_refund" in request:  # an apply request
                echo = {name: request[name] for name in ("no_refund", "money_refund") if request.get(name)}
        fields = {**answer, **echo, "oid_partner": request.get("oid_partner", ""), "sign_type": "RSA"}
        return {**fields, "sign": self.gateway_key.sign(signature_source(fields))}

    # ── merchant and session ─────────────────────────────────────────────────────────────────────

    def merchant(
        self, base_url: str = "https://sandbox.invalid", *, domestic: bool = False, **overrides: Any
    ) -> Merchant:
        """Return the merchant of this gateway, with endpoints at ``base_url``.

        ``overrides`` replace arguments of :class:`~lianlian_async.Merchant`.
        """
        settings: dict[str, Any] = {
            "oid_partner": self.oid_partner,
            "private_key": self.merchant_key,
            "gateway_public_keys": self.gateway_key.public_key(),
            "endpoints": Endpoints(base_url + (_APPLY_DOMESTIC if domestic else _APPLY), base_url + _QUERY),
            "notify_url": "https://merchant.invalid/lianlian/refund",
        }
        return Merchant(**settings | overrides)

    def session(self, **options: Any) -> RefundSession:
        """Return a session that calls this gateway in process; ``options`` are those of ``RefundSession``."""
        return RefundSession(self.merchant(), transport=asgi_transport(self), **options)


def _statement_time(digits: str) -> str:
    return f"{digits[:8]} {digits[8:10]}:{digits[10:12]}:{digits[12:]}"
