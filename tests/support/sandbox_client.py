"""A separate client for the sandbox's HTTP interface; it shares no code with the session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import httpx

from lianlian_async.sandbox import SandboxGateway
from lianlian_async.signing import SigningKey, signature_source

CROSS_BORDER = "/exchangerefund.htm"
DOMESTIC = "/refund.htm"
QUERY = "/refundquery.htm"
JSON = "application/json;charset=utf-8"

APPLICATION = {
    "no_refund": "R-1",
    "dt_refund": "20130515094018",
    "money_refund": "200.01",
    "no_order": "O-1",
    "dt_order": "20130515094013",
    "notify_url": "https://shop.example/refund",
}
QUESTION = {"no_refund": "R-1", "dt_refund": "20130515094018"}


@attrs.frozen
class Client:
    """Sends signed requests; by default ``key`` and ``oid_partner`` are those of the gateway's merchant."""

    gateway: SandboxGateway
    key: SigningKey | None = None
    oid_partner: str | None = None
    base_url: str | None = None
    """The URL of a real server; None: the gateway is called in this process."""

    def signed(self, fields: Mapping[str, str | None], **changes: str | None) -> dict[str, str]:
        """Return ``fields`` with ``changes`` (None removes a field) and the merchant's number and signature."""
        named: dict[str, str | None] = {
            "oid_partner": self.oid_partner or self.gateway.oid_partner,
            "sign_type": "RSA",
            **fields,
            **changes,
        }
        present = {name: value for name, value in named.items() if value is not None}
        return {"sign": (self.key or self.gateway.merchant_key).sign(signature_source(present)), **present}

    async def send(self, path: str, *, method: str = "POST", content_type: str = JSON, **body: Any) -> httpx.Response:
        """Send one HTTP request and return its response, whatever the status."""
        transport = None if self.base_url else httpx.ASGITransport(app=self.gateway)
        base_url = self.base_url or "https://sandbox.invalid"
        async with httpx.AsyncClient(transport=transport, base_url=base_url, timeout=60, trust_env=False) as http:
            return await http.request(method, path, headers={"content-type": content_type}, **body)

    async def ask(self, path: str, fields: Mapping[str, str]) -> dict[str, str]:
        """Send ``fields`` unchanged, and return the fields of the answer."""
        response = await self.send(path, json=fields)
        assert response.status_code == 200
        assert response.headers["content-type"] == JSON
        return response.json()

    async def apply(self, path: str = CROSS_BORDER, **changes: str | None) -> dict[str, str]:
        """Send the sample apply call with changes, and return its answer."""
        return await self.ask(path, self.signed(APPLICATION, **changes))

    async def query(self, **changes: str | None) -> dict[str, str]:
        """Send the sample query with changes, and return its answer."""
        return await self.ask(QUERY, self.signed(QUESTION, **changes))

    def is_signed(self, answer: Mapping[str, str]) -> bool:
        """Return whether an answer has a valid signature of the gateway."""
        return self.gateway.gateway_key.public_key().verify(signature_source(answer), answer.get("sign", ""))
