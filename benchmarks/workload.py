"""The work that all programs do: refund R-0, R-1 … of one merchant, and the keys that sign and answer them.

Everything is a function of the refund's index, so that the server can sign its answers before it serves.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

OID_PARTNER = "201304121000001004"
DT_REFUND = "20240102030405"
MONEY_REFUND = "200.01"
NOTIFY_URL = "https://shop.example/lianlian/refund"
HEADERS = {"Content-Type": "application/json;charset=utf-8"}
NO_REFUND = re.compile(rb'"no_refund": ?"(R-[0-9]+)"')

_ANSWER = {
    "ret_code": "0000",
    "ret_msg": "交易成功",
    "sign_type": "RSA",
    "oid_partner": OID_PARTNER,
    "dt_refund": DT_REFUND,
    "money_refund": MONEY_REFUND,
    "money_foreign_refund": "30.03",
    "rate_id": "1",
    "rate": "6.66",
    "exchange_bankcode": "01040000",
    "oid_refundno": "2024010200000001",
    "sta_refund": "0",
}


def request_fields(index: int) -> dict[str, str]:
    """Return the fields that a program has to sign and send for refund ``index``."""
    return {
        "oid_partner": OID_PARTNER,
        "sign_type": "RSA",
        "no_refund": f"R-{index}",
        "dt_refund": DT_REFUND,
        "money_refund": MONEY_REFUND,
        "no_order": f"O-{index}",
        "dt_order": DT_REFUND,
        "notify_url": NOTIFY_URL,
    }


def answer_fields(no_refund: str) -> dict[str, str]:
    """Return the unsigned fields of the gateway's answer, as in the sample of the apply page."""
    return {**_ANSWER, "no_refund": no_refund}


def source(fields: dict[str, str]) -> bytes:
    """Return the source string of a signature, written by hand (not the library's function)."""
    return "&".join(f"{key}={value}" for key, value in sorted(fields.items()) if value and key != "sign").encode()


# ── for programs of this library; imported late, since others must not pay for it ─────────────────


def merchant(keys: str, url: str) -> Any:
    """Return the ``Merchant`` whose keys are in the folder ``keys`` and whose gateway is at ``url``."""
    from lianlian_async import Endpoints, Merchant

    return Merchant(
        oid_partner=OID_PARTNER,
        private_key=Path(keys, "merchant.pem"),
        gateway_public_keys=[Path(keys, "gateway.pub.pem")],
        endpoints=Endpoints(url, url),
        notify_url=NOTIFY_URL,
    )


def refund_request(index: int) -> Any:
    """Return refund ``index`` as a ``RefundRequest`` of Python values, as a shop would build it."""
    from datetime import UTC, datetime
    from decimal import Decimal

    from lianlian_async import RefundRequest

    moment = datetime(2024, 1, 1, 19, 4, 5, tzinfo=UTC)
    return RefundRequest(
        no_refund=f"R-{index}",
        dt_refund=moment,
        money_refund=Decimal(MONEY_REFUND),
        no_order=f"O-{index}",
        dt_order=moment,
    )
