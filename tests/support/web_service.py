"""A FastAPI service on ``PostgresJournal`` for servers with several workers: ``tests.support.web_service:app``."""

import os

from fastapi import FastAPI

from lianlian_async import LianLianError, Merchant, RefundRequest, RefundSession
from lianlian_async.contrib.fastapi import Session, apply_shielded, lifespan, refund_error
from lianlian_async.journal.postgres import PostgresJournal

journal = PostgresJournal(os.environ["SHOP_DSN"])
app = FastAPI(lifespan=lifespan(journal, RefundSession(Merchant.from_env(), journal=journal)))
app.add_exception_handler(LianLianError, refund_error)


@app.get("/worker")
async def worker() -> int:
    return os.getpid()


@app.post("/refunds")
async def make_refund(request: dict[str, str], session: Session) -> str | None:
    return (await apply_shielded(session, RefundRequest.from_dict(request))).oid_refundno
