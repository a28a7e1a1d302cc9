"""The sandbox as an ASGI application: requests in, signed answers out, faults in between, and a look into the books.

All work on a request is one step without an await, so applications that come at the same time cannot both be
the first. That step includes two signatures of 1024 bits (about half a millisecond) on the event loop: a fake
need not be faster than that, and threads would cost it its simplicity.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from typing import Any, Final, NamedTuple

import anyio

from lianlian_async import asgi, wire
from lianlian_async.merchant import Endpoints, Merchant
from lianlian_async.models import RefundStatus
from lianlian_async.session import RefundSession
from lianlian_async.signing import SigningKey, VerifyingKey, signature_source
from lianlian_async.transport import asgi_transport

from . import answers, rules
from .answers import Refusal
from .faults import Call, Fault, FaultPlan, When, spoil
from .ledger import Ledger, Order, Record, Repeated
from .responding import break_off, respond

__all__ = ["SandboxGateway"]


class _Route(NamedTuple):
    call: Call
    domestic: bool = False


_ROUTES: Final = {
    "/exchangerefund.htm": _Route("apply"),
    "/refund.htm": _Route("apply", domestic=True),
    "/refundquery.htm": _Route("query"),
}


@functools.cache
def _made_up_key(_owner: str, bits: int) -> SigningKey:
    """A key that every sandbox of this process shares: it guards nothing, and making one takes a moment."""
    return SigningKey.generate(bits)


class SandboxGateway:
    """A fake of LianLian's refund gateway, with one merchant known to it; an ASGI 3 application.

    Its clock is ``clock`` plus whatever :meth:`advance` added, so tests need not wait for refunds to settle. Every
    answer has a ``Date`` header by this clock: a server must not add its own (uvicorn: ``--no-date-header``).

    Args:
        oid_partner: The number of the merchant that is known from the start.
        merchant_key: This merchant's private key; made up if not given.
        gateway_key: The private key that answers are signed with; made up if not given.
        bits: The size of keys that are made up. Making them takes a fraction of a second (seconds for 4096),
            once per process.
        repeated: What a second application under the same ``no_refund`` meets.
        settle_after: Seconds from carrying a refund out to its final state; 0: the apply answer has it already.
        default_order: What an order that nobody added is worth, in yuan; None: it does not exist (5002).
        sign_errors: Whether answers other than 0000 are signed; None: all but 1004, 8901 and 9002, as the real gateway
            was seen to do. A signed refusal of a refund repeats its number and amount; an unsigned answer holds code
            and words only.
        faults: How likely each fault is per request.
        seed: Where the dice that throw them start.
        delay: Seconds that faults take which are not scripted with another ``delay``.
        clock: A steady clock, in seconds.
        started_at: The time of day when the gateway was made (aware); now, if not given.

    Raises ``ValueError`` for options that cannot be; for probabilities and key sizes it is a
    :class:`~lianlian_async.ConfigurationError`.
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
        self.merchant_key = merchant_key or _made_up_key("merchant", bits)
        self.gateway_key = gateway_key or _made_up_key("gateway", bits)
        self.sign_errors = sign_errors
        self.requests: Counter[Call] = Counter()
        """How many requests came in for each call, whatever became of them."""
        self._merchants = {oid_partner: self.merchant_key.public_key()}
        self._ledger = Ledger(repeated=repeated, settle_after=settle_after, default_order=default_order)
        self._plan = FaultPlan(faults or {}, seed=seed, delay=delay)
        self._late: list[tuple[float, _Route, Mapping[str, str]]] = []
        self._clock = clock
        self._advanced = 0.0
        self._started = clock()
        self._started_at = started_at or datetime.now(UTC)
        self.made = anyio.Event()
        """Set, and replaced by another one, when refunds may have been carried out."""
        self.advanced = anyio.Event()
        """Set, and replaced by another one, when the clock was put forward."""

    # ── the stage: merchants, orders, time, faults ───────────────────────────────────────────────

    def add_merchant(self, oid_partner: str, public_key: VerifyingKey) -> None:
        """Let another merchant in, or an old one with a new key."""
        self._merchants[oid_partner] = public_key

    def add_order(
        self,
        no_order: str,
        money_order: Decimal,
        *,
        dt_order: datetime | str | None = None,
        oid_paybill: str | None = None,
        oid_partner: str | None = None,
    ) -> Order:
        """Enter a paid order of ``money_order`` yuan; its payment number is made up where none is given.

        Raises ``ValueError`` for an amount or a time that is none, and for a number that is taken.
        """
        return self._ledger.add_order(
            oid_partner or self.oid_partner,
            no_order,
            money_order,
            dt_order=None if dt_order is None else wire.format_timestamp(wire.parse_timestamp(dt_order)),
            oid_paybill=oid_paybill,
        )

    def fail(self, no_refund: str, *, oid_partner: str | None = None) -> None:
        """Let a refund, made already or not yet, turn out as failed when it settles; its money comes back then.

        Raises ``ValueError`` where it is final already.
        """
        self._catch_up()
        self._ledger.fail(oid_partner or self.oid_partner, no_refund, self.now())

    def now(self) -> float:
        """Seconds of the gateway's own clock."""
        return self._clock() + self._advanced

    def time_of_day(self, moment: float | None = None) -> datetime:
        """Return the time of day (aware) at a moment of the gateway's clock; now, if not given."""
        return self._started_at + timedelta(seconds=(self.now() if moment is None else moment) - self._started)

    def advance(self, seconds: float) -> None:
        """Put the gateway's clock forward; ``ValueError`` if that is backward."""
        if seconds < 0:
            raise ValueError("the gateway's clock only goes forward")
        self._advanced += seconds
        for event in (self.advanced, self.made):  # what came in late may be carried out by now
            event.set()
        self.advanced, self.made = anyio.Event(), anyio.Event()

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
        """Let ``fault`` strike the next ``times`` requests that fit, once ``skip`` of them have passed.

        ``call`` and ``no_refund`` say which requests fit (None: all). Of several faults that fit one request,
        the one that was scripted first strikes. ``delay`` in seconds; ``ret_code`` is for ``Fault.BUSY``.
        Raises ``ValueError`` for a negative ``skip`` and for ``times`` below 1.
        """
        self._plan.script(
            fault, call=call, when=when, no_refund=no_refund, skip=skip, times=times, delay=delay, ret_code=ret_code
        )

    @property
    def faults(self) -> Mapping[Fault, float]:
        """How likely each fault is per request. Set it to let a storm rise, or to ``{}`` to let it pass."""
        return self._plan.probabilities

    @faults.setter
    def faults(self, probabilities: Mapping[Fault, float]) -> None:
        self._plan.probabilities = probabilities

    # ── the books: what is true, whatever the answers said ───────────────────────────────────────

    def money_moved(self, no_refund: str, *, oid_partner: str | None = None) -> Decimal:
        """Yuan that left the merchant under ``no_refund``: twice as much if it was made twice, 0 if it failed."""
        return sum((record.moved(self.now()) for record in self._made(no_refund, oid_partner)), Decimal(0))

    def times_made(self, no_refund: str, *, oid_partner: str | None = None) -> int:
        """How many times ``no_refund`` was carried out, those that failed afterwards included."""
        return len(self._made(no_refund, oid_partner))

    @property
    def refunds(self) -> tuple[Record, ...]:
        """Every refund that was carried out, oldest first."""
        self._catch_up()
        return tuple(self._ledger.records)

    def _made(self, no_refund: str, oid_partner: str | None) -> list[Record]:
        self._catch_up()
        return self._ledger.made(oid_partner or self.oid_partner, no_refund)

    def _catch_up(self) -> None:
        """Carry out what came in late, if its time has come. Nobody is there any more to hear the answers."""
        due = sorted((item for item in self._late if item[0] <= self.now()), key=lambda item: item[0])
        for item in due:
            self._late.remove(item)
            at, route, fields = item
            self._handle(route, fields, at)

    # ── ASGI ─────────────────────────────────────────────────────────────────────────────────────

    async def __call__(self, scope: asgi.Message, receive: asgi.Receive, send: asgi.Send) -> None:
        """Serve one connection as ASGI 3 has it: HTTP requests and the server's lifespan."""
        if scope["type"] == "lifespan":
            await asgi.lifespan(receive, send, nullcontext())
            return
        send = self._dated(send)
        route = _ROUTES.get(scope["path"])
        if route is None:
            await respond(send, answers.page(404, "Not Found"))
        elif scope["method"] != "POST":
            await respond(send, answers.page(405, "Method Not Allowed", {"allow": "POST"}))
        else:
            body = await asgi.read(receive, wire.MAX_MESSAGE_BYTES)
            self.requests[route.call] += 1
            try:
                fields = rules.read_body(asgi.headers(scope).get("content-type", ""), body)
            except Refusal as refusal:
                await respond(send, answers.message(self._seal(answers.refusal(refusal.ret_code), {})))
            else:
                await self._serve(route, fields, receive, send)

    def _dated(self, send: asgi.Send) -> asgi.Send:
        async def send_dated(message: asgi.Message) -> None:
            if message["type"] == "http.response.start":
                date = format_datetime(self.time_of_day().astimezone(UTC), usegmt=True)
                message["headers"] = [*message["headers"], (b"date", date.encode())]
            await send(message)

        return send_dated

    async def _serve(self, route: _Route, fields: Mapping[str, str], receive: asgi.Receive, send: asgi.Send) -> None:
        trouble = self._plan.strike(route.call, fields.get("no_refund"))
        seal = functools.partial(self._seal, request=fields)
        if trouble is None:
            await respond(send, answers.message(seal(self._carry_out(route, fields))))
            return
        carried_out = trouble.when is When.AFTER
        match trouble.fault:
            case Fault.LATE:
                self._late.append((self.now() + trouble.delay, route, fields))
                await receive()  # the whole body is here: what comes next is that the client went away
            case Fault.DELAY:
                answer = self._carry_out(route, fields) if carried_out else None
                await anyio.sleep(trouble.delay)
                await respond(send, answers.message(seal(answer or self._carry_out(route, fields))))
            case fault:
                answer = self._carry_out(route, fields) if carried_out else answers.refusal("9999")
                if fault is Fault.NO_ANSWER:
                    await receive()
                elif fault is Fault.RESET:
                    await break_off(send, answers.message(seal(answer)))
                else:
                    await respond(send, spoil(trouble, answer, fields, seal))

    # ── one request, without an await ────────────────────────────────────────────────────────────

    def _carry_out(self, route: _Route, fields: Mapping[str, str]) -> dict[str, str]:
        self._catch_up()
        return self._handle(route, fields, self.now())

    def _handle(self, route: _Route, fields: Mapping[str, str], at: float) -> dict[str, str]:
        """Do what a readable request asks for, as of ``at``; the answer, not yet signed."""
        try:
            oid_partner = rules.authenticate(fields, self._merchants)
            if route.call == "query":
                return self._tell(self._ledger.query(rules.read_question(oid_partner, fields), at), at)
            application = rules.read_application(oid_partner, fields, domestic=route.domestic)
            record = self._ledger.apply(application, at)
            self.made.set()
            self.made = anyio.Event()
        except Refusal as refusal:
            return answers.refusal(refusal.ret_code, refusal.parameter)
        answer = self._tell(record, record.received_at)
        if route.domestic:  # a genuine domestic apply answer was seen without it
            del answer["dt_refund"]
        return answer

    def _tell(self, record: Record, at: float) -> dict[str, str]:
        """The 0000 answer about a refund as it stood at a moment, in the fields of its product."""
        application, status = record.application, record.status(at)
        fields = {
            **answers.SUCCESS,
            "no_refund": application.no_refund,
            "dt_refund": application.dt_refund,
            "money_refund": application.amount_as_sent,
            "oid_refundno": record.oid_refundno,
            "sta_refund": status.value,
        }
        if not application.domestic:
            fields |= answers.foreign_fields(application.money_refund)
        if status is RefundStatus.SUCCESS:
            fields["settle_date"] = wire.format_timestamp(self.time_of_day(record.settles_at))[:8]
        return fields

    def notification(self, record: Record, at: float | None = None) -> bytes:
        """The signed notification of how a refund stands at a moment of the gateway's clock; now, if not given."""
        fields = self._tell(record, self.now() if at is None else at)
        return wire.encode(self._seal(fields, {"oid_partner": record.application.oid_partner}))

    def _seal(self, answer: Mapping[str, str], request: Mapping[str, str]) -> dict[str, str]:
        """Return ``answer`` as it goes out: signed, or an error of code and words alone."""
        echo: dict[str, str] = {}
        if (ret_code := answer["ret_code"]) != "0000":
            signs = ret_code not in answers.UNSIGNED if self.sign_errors is None else self.sign_errors
            if not signs:
                return dict(answer)
            if "money_refund" in request:  # an apply call
                echo = {name: request[name] for name in ("no_refund", "money_refund") if request.get(name)}
        fields = {**answer, **echo, "oid_partner": request.get("oid_partner", ""), "sign_type": "RSA"}
        return {**fields, "sign": self.gateway_key.sign(signature_source(fields))}

    # ── ready-made ───────────────────────────────────────────────────────────────────────────────

    def merchant(
        self, base_url: str = "https://sandbox.invalid", *, domestic: bool = False, **overrides: Any
    ) -> Merchant:
        """The merchant that this gateway knows from the start, with its endpoints at ``base_url``.

        ``overrides`` are further or other arguments of :class:`~lianlian_async.Merchant`.
        """
        apply_path = "/refund.htm" if domestic else "/exchangerefund.htm"
        settings: dict[str, Any] = {
            "oid_partner": self.oid_partner,
            "private_key": self.merchant_key,
            "gateway_public_keys": self.gateway_key.public_key(),
            "endpoints": Endpoints(base_url + apply_path, base_url + "/refundquery.htm"),
            "notify_url": "https://merchant.invalid/lianlian/refund",
        }
        return Merchant(**settings | overrides)

    def session(self, **options: Any) -> RefundSession:
        """A session that talks to this gateway in process; ``options`` are those of ``RefundSession``."""
        return RefundSession(self.merchant(), transport=asgi_transport(self), **options)
