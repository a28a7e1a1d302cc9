"""The sandbox's answers, with the fields that LianLian documents, and their HTTP responses."""

from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Final

from lianlian_async import wire
from lianlian_async.exchange import HttpResponse

SUCCESS: Final = {"ret_code": "0000", "ret_msg": "交易成功"}

_MESSAGES: Final = {
    "1001": "商户请求签名错误",
    "1002": "第三方单号重复",
    "1004": "商户请求参数校验错误[{}]",
    "1007": "网络链接繁忙",
    "3001": "非法商户",
    "3005": "查询跨度不得高于3个月",
    "5002": "原始交易不存在",
    "5003": "退款金额错误",
    "5007": "累计退款金额大于原交易金额",
    "8901": "没有记录",
    "9002": "报文解析异常",
    "9092": "支付单号与订单号不一致",
    "9902": "接口调用异常",
    "9999": "系统错误",
}
"""``ret_msg`` by ``ret_code``, from LianLian's page of return codes; ``{}``: the invalid parameter."""
_OTHER_MESSAGE: Final = "交易失败"

UNSIGNED: Final = frozenset({"1004", "8901", "9002"})
"""Codes whose error answers from LianLian's own gateway had no signature. Its rejection 9093 had one."""

# From the sample answer on LianLian's apply page: 200.01 yuan are 30.03 in the foreign currency.
_RATE: Final = Decimal("6.66")
_EXCHANGE: Final = {"rate_id": "1", "rate": str(_RATE), "exchange_bankcode": "01040000"}


class Rejection(Exception):
    """Raised inside the sandbox to reject a request; ``parameter`` appears in ``ret_msg``."""

    def __init__(self, ret_code: str, parameter: str = "") -> None:
        super().__init__(ret_code, parameter)
        self.answer = error_answer(ret_code, parameter)


def error_answer(ret_code: str, parameter: str = "") -> dict[str, str]:
    """Return an error answer, which has only ``ret_code`` and ``ret_msg`` (apply page)."""
    return {"ret_code": ret_code, "ret_msg": _MESSAGES.get(ret_code, _OTHER_MESSAGE).format(parameter)}


def foreign_fields(money_refund: Decimal) -> dict[str, str]:
    """Return the fields that the cross-border product adds to an answer about ``money_refund`` yuan."""
    foreign = (money_refund / _RATE).quantize(Decimal("0.01"), ROUND_HALF_EVEN)
    return {"money_foreign_refund": wire.format_money(foreign), **_EXCHANGE}


def message(fields: Mapping[str, str]) -> HttpResponse:
    """Return the HTTP response for an answer."""
    return HttpResponse(200, {"content-type": "application/json;charset=utf-8"}, wire.encode(fields))


def page(status: int, title: str, headers: Mapping[str, str] | None = None) -> HttpResponse:
    """Return an HTML error page like those of web servers and proxies."""
    html = f"<html><head><title>{status} {title}</title></head><body><h1>{status} {title}</h1></body></html>\n"
    return HttpResponse(status, {"content-type": "text/html", **(headers or {})}, html.encode())
