"""Exchanges for tests that send nothing."""

from typing import Any

from lianlian_async import RetryPolicy
from lianlian_async.exchange import Call, Exchange, SendCount
from lianlian_async.retry import Deadline


def exchange(call: Call = Call.APPLY, **changes: Any) -> Exchange:
    """Return an exchange with the attributes ``changes``; the others are the same in every test."""
    settings = {
        "url": "https://gw.example/",
        "body": b"{}",
        "asked": {},
        "deadline": Deadline(0.0),
        "policy": RetryPolicy(),
        "send_count": SendCount(),
    }
    return Exchange(call=call, **settings | changes)
