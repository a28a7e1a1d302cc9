"""What the sandbox says: answers in the fields of LianLian's pages, and the HTTP responses that carry them."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Final

import attrs

from lianlian_async import wire

__all__ = ["MESSAGES", "SUCCESS", "Refusal", "Response", "foreign_fields", "message", "page", "refusal"]

SUCCESS: Final = {"ret_code": "0000", "ret_msg": "交易成功"}

MESSAGES: Final = {
    "1001": "商户请求签名错误",
    "1002": "商户退款单号重复",
    "1004": "商户请求参数校验错误[{}]",
    "1007": "网络繁忙，请稍后再试",
    "1012": "请求报文格式错误",
    "3001": "非法的商户号",
    "3005": "查询时间跨度超过三个月",
    "5002": "原交易不存在",
    "5003": "退款金额与原交易不符",
    "5007": "累计退款金额超过原交易金额",
    "8901": "没有记录",
    "9091": "支付单号与商户订单号不匹配",
    "9902": "接口调用异常",
    "9999": "系统错误",
}
"""``ret_msg`` in the manner of the real gateway; ``{}`` stands for the parameter at fault."""

_ANY_OTHER: Final = "交易失败"

# The sample answer of the apply page: 200.01 yuan are 30.03 abroad.
_RATE: Final = Decimal("6.66")
_EXCHANGE: Final = {"rate_id": "1", "rate": str(_RATE), "exchange_bankcode": "01040000"}


class Refusal(Exception):
    """The gateway says no: ``ret_code``, and the ``parameter`` that ``ret_msg`` names. Never leaves the sandbox."""

    def __init__(self, ret_code: str, parameter: str = "") -> None:
        self.ret_code = ret_code
        self.parameter = parameter
        super().__init__(ret_code, parameter)


def refusal(ret_code: str, parameter: str = "") -> dict[str, str]:
    """The answer that says no: nothing but the code and its words (apply page)."""
    return {"ret_code": ret_code, "ret_msg": MESSAGES.get(ret_code, _ANY_OTHER).format(parameter)}


def foreign_fields(money_refund: Decimal) -> dict[str, str]:
    """What the cross-border product adds to an answer about ``money_refund`` yuan."""
    foreign = (money_refund / _RATE).quantize(Decimal("0.01"), ROUND_HALF_EVEN)
    return {"money_foreign_refund": wire.format_money(foreign), **_EXCHANGE}


@attrs.frozen
class Response:
    """One HTTP response; header names in lower case."""

    status: int
    body: bytes
    headers: Mapping[str, str]


def message(fields: Mapping[str, str]) -> Response:
    """The response that an answer comes in."""
    return Response(200, wire.encode(fields), {"content-type": "application/json;charset=utf-8"})


def page(status: int, title: str, headers: Mapping[str, str] | None = None) -> Response:
    """An HTML page, as web servers and proxies speak of their own troubles."""
    html = f"<html><head><title>{status} {title}</title></head><body><h1>{status} {title}</h1></body></html>\n"
    return Response(status, html.encode(), {"content-type": "text/html", **(headers or {})})
