"""A gateway without a network and keys without RSA, for cases that measure neither.

The keys have the shape of real ones; signing returns a constant, and verifying says yes.
"""

from __future__ import annotations

import json

import httpx

from benchmarks import workload
from lianlian_async import Endpoints, Merchant, SigningKey, VerifyingKey

_SIGNATURE = "A" * 172  # as long as a 1024-bit signature


class StampingKey(SigningKey):
    """A private key whose signature is always the same."""

    __slots__ = ()

    def sign(self, source: bytes) -> str:
        return _SIGNATURE


class TrustingKey(VerifyingKey):
    """A public key that takes any signature."""

    __slots__ = ()

    def verify(self, source: bytes, signature: str) -> bool:
        return True


def merchant() -> Merchant:
    """Return the workload's merchant, with keys without RSA."""
    private, public = StampingKey.generate(1024), SigningKey.generate(1024).public_key().to_pem()
    return Merchant(
        oid_partner=workload.OID_PARTNER,
        private_key=private,
        gateway_public_keys=[TrustingKey.load(public)],
        endpoints=Endpoints("http://127.0.0.1/apply", "http://127.0.0.1/query"),
        notify_url=workload.NOTIFY_URL,
    )


def answer(no_refund: str, **changes: str) -> bytes:
    """Return the body of the gateway's answer."""
    fields = {**workload.answer_fields(no_refund), **changes, "sign": _SIGNATURE}
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


_BEFORE, _, _AFTER = answer("R-N").partition(b"R-N")


class NoOpTransport(httpx.AsyncBaseTransport):
    """Answers every apply at once."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        found = workload.NO_REFUND.search(body)
        if found is None:
            raise ValueError(body)
        return httpx.Response(200, content=_BEFORE + found[1] + _AFTER)
