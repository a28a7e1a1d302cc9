"""The public face as a strictly typed program uses it. Nothing here runs: type checkers read it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import assert_type

import anyio
import httpx
import httpx2

from lianlian_async import (
    AnswerMismatch,
    BatchStopped,
    ConfigurationError,
    Endpoints,
    GatewayUnavailable,
    InvalidRequest,
    JournalError,
    LianLianError,
    MalformedMessage,
    Merchant,
    NotificationEndpoint,
    Outcome,
    QueryRejected,
    Refund,
    RefundConflict,
    RefundNotFinal,
    RefundNotFound,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundQuery,
    RefundRecord,
    RefundRejected,
    RefundRequest,
    RefundSession,
    RefundStatus,
    RetryBudget,
    RetryPolicy,
    SignatureInvalid,
    SigningKey,
    VerifyingKey,
    refund_many,
)
from lianlian_async.events import CallEnded, Event
from lianlian_async.exchange import Exchange, Reply
from lianlian_async.middleware import Middleware, Next, RateLimit
from lianlian_async.signing import signature_source


def keys() -> SigningKey:
    """Keys in all their forms."""
    assert_type(signature_source({"no_refund": "R-1", "sign": None}), bytes)
    key = SigningKey.load(Path("merchant.pem"), password="secret")
    assert_type(SigningKey.generate(bits=4096), SigningKey)
    assert_type(key.public_key(), VerifyingKey)
    assert_type(key.sign(b"a=1"), str)
    assert_type(key.bits, int)
    assert_type(key.fingerprint, str)
    assert_type(VerifyingKey.load(b"MII").verify(b"a=1", "c2ln"), bool)
    return key


def merchants(now: datetime) -> Merchant:
    """A merchant from each of its sources."""
    assert_type(Merchant.from_toml("lianlian.toml"), Merchant)
    assert_type(Merchant.from_env(), Merchant)
    assert_type(Merchant.from_env({"LIANLIAN_OID_PARTNER": "1"}), Merchant)
    return Merchant(
        oid_partner="201103171000000000",
        private_key=keys(),
        gateway_public_keys=["gateway.pem", b"MII", Path("next.pem"), VerifyingKey.load("MII")],
        endpoints=Endpoints(apply="https://gw.example/a", query="https://gw.example/q"),
        notify_url="https://shop.example/refund",
    )


def values(now: datetime) -> RefundRequest:
    """Requests and their wire forms."""
    request = RefundRequest(
        no_refund="R-1",
        dt_refund=now,
        money_refund=Decimal("200.01"),
        no_order="O-1",
        dt_order="20260105160000",
        oid_paybill=None,
        notify_url=None,
    )
    assert_type(request.no_refund, str)
    assert_type(request.dt_refund, datetime)
    assert_type(request.money_refund, Decimal)
    assert_type(request.no_order, str | None)
    assert_type(request.dt_order, datetime | None)
    assert_type(request.to_dict(), dict[str, str])
    assert_type(RefundRequest.from_dict({"no_refund": "R-1"}), RefundRequest)
    assert_type(request.query(), RefundQuery)
    assert_type(RefundQuery(oid_refundno="1", dt_refund=now).to_dict(), dict[str, str])
    return request


def records(refund: Refund, record: RefundRecord) -> None:
    """Every documented field of an answer, with its type."""
    assert_type(record.no_refund, str | None)
    assert_type(record.money_refund, Decimal | None)
    if isinstance(record, Refund):
        assert_type(record.money_refund, Decimal)
    assert_type(RefundRecord.from_dict({}), RefundRecord)
    assert_type(Refund.from_dict(refund.raw, asked={"no_refund": "R-1"}), Refund)
    assert_type(refund.ret_code, str | None)
    assert_type(refund.no_refund, str)
    assert_type(refund.dt_refund, datetime | None)
    assert_type(refund.money_refund, Decimal)
    assert_type(refund.money_foreign_refund, Decimal | None)
    assert_type(refund.rate, Decimal | None)
    assert_type(refund.oid_refundno, str | None)
    assert_type(refund.sta_refund, RefundStatus | None)
    assert_type(refund.settle_date, date | None)
    assert_type(refund.extra, Mapping[str, str])
    assert_type(refund.raw, Mapping[str, str])
    assert_type(refund.is_final, bool)
    assert_type(refund.query(), RefundQuery)
    assert_type(refund.to_dict(), dict[str, str])
    assert_type(RefundStatus.SUCCESS.is_final, bool)


async def careful(exchange: Exchange, call_next: Next) -> Reply:
    """A caller's own layer."""
    return await call_next(exchange)


def listener(event: Event) -> None:
    """A caller's own listener."""
    if isinstance(event, CallEnded):
        assert_type(event.outcome, str)


async def sessions(now: datetime) -> None:
    """One session with all its options, and every call."""
    layer: Middleware = careful
    policy = RetryPolicy(
        attempts=4, initial=0.5, maximum=8.0, multiplier=2.0, budget=RetryBudget(), not_found_grace=900
    )
    request = values(now)
    async with RefundSession(
        merchants(now),
        client=httpx.AsyncClient(),
        transport=None,
        retry=policy,
        deadline=30,
        max_connections=20,
        middleware=[layer],
        listeners=[listener],
        limiter=RateLimit(20),
        journal=None,
    ) as session:
        assert_type(session, RefundSession)
        try:
            assert_type(await session.apply_refund(request, deadline=10, retry=policy), Refund)
        except RefundOutcomeUnknown as unknown:
            assert_type(unknown.ask_again_at, datetime)
            assert_type(unknown.attempts, int)
            assert_type(unknown.body, bytes)
            assert_type((unknown.request, unknown.query()), tuple[RefundRequest, RefundQuery])
            assert_type(await session.resolve(unknown, deadline=10), Refund)
        record = await session.query_refund(request.query())
        assert_type(record, RefundRecord)
        assert_type(await session.wait_refund(record, deadline=60), RefundRecord)
        refund = await session.apply_refund(request)
        assert_type(await session.wait_refund(refund, deadline=60), Refund)
        ledger: dict[str, Decimal] = {refund.no_refund: refund.money_refund}
        assert_type(ledger, dict[str, Decimal])
        assert_type(await session.apply_and_wait(request, deadline=60, retry=policy), Refund)
        async for outcome in refund_many(session, [request], concurrency=4):
            assert_type(outcome, Outcome)
            assert_type(outcome.refund, Refund | None)
            assert_type(outcome.error, LianLianError | None)
    async with RefundSession(merchants(now), limiter=anyio.Semaphore(4)), RefundSession(merchants(now)):
        pass
    RefundSession(merchants(now), client=httpx2.AsyncClient())
    RefundSession(merchants(now), transport=httpx2.AsyncHTTPTransport())


async def notifications(merchant: Merchant, session: RefundSession, body: bytes) -> None:
    """An endpoint, with a handler whose result is ignored."""

    async def on_refund(refund: Refund) -> int:
        assert_type(refund.money_refund, Decimal)
        return len(refund.raw)

    async with NotificationEndpoint(merchant, on_refund, journal=None, session=session, inbox=False) as endpoint:
        assert_type(endpoint, NotificationEndpoint)
        ack = await endpoint.handle(body, {"x-forwarded-for": "203.0.113.7"}, client=None)
        assert_type((ack.status, ack.headers, ack.body), tuple[int, Mapping[str, str], bytes])
        assert_type(endpoint.counts["acted"], int)


def errors(error: LianLianError) -> object:
    """Each error and its attributes."""
    match error:
        case RefundRejected() | QueryRejected():
            assert_type(error.is_configuration, bool)
            assert_type(error.verified, bool)
            assert_type(error.may_pass, bool)
            assert_type(error.stops_batch, bool)
            return error.ret_code, error.ret_msg, error.meaning, error.advice
        case RefundNotSent():
            return error.no_refund, error.attempts, error.last_error
        case RefundNotFound():
            return error.oid_refundno
        case RefundOutcomeUnknown():
            return error.query()
        case GatewayUnavailable():
            assert_type(error.ret_code, str | None)
        case RefundNotFinal():
            return error.refund, error.last_error
        case RefundConflict():
            return error.field, error.ours, error.theirs
        case AnswerMismatch():
            return error.asked, error.answered
        case InvalidRequest():
            return [(problem.field, problem.rule, problem.value) for problem in error.problems]
        case BatchStopped():
            assert_type(error.cause, RefundRejected | SignatureInvalid)
        case ConfigurationError() | JournalError() | SignatureInvalid() | MalformedMessage():
            value_error: type[ValueError] = ConfigurationError
            return value_error
        case _:
            pass
    return None
