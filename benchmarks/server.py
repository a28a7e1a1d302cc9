"""The gateway of the benchmarks: a minimal keep-alive HTTP/1.1 server with valid answers.

Each apply is answered with a valid signature over its own number. The first ``--answers`` answers are signed before the
first request, so that serving one costs little. The signatures of refunds R-0 to R-9 are verified, as proof that a
program does the work. ``GET /stats`` returns the counts since the previous such request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import ssl
from pathlib import Path

from . import openssl, workload

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_VERIFIED = frozenset(b"R-%d" % index for index in range(10))


class Gateway:
    """All answers, and counts of the requests."""

    def __init__(self, keys: Path, answers: int, delay: float) -> None:
        self._sign = openssl.signer(keys / "gateway.pem")
        self._verify = openssl.verifier(keys / "merchant.pub.pem")
        self.delay = delay
        self._answers = {number: self._answer(number) for number in (b"R-%d" % index for index in range(answers))}
        self.open = 0
        self.stats = {"requests": 0, "refused": 0, "most_connections": 0}

    def respond(self, head: bytes, body: bytes) -> bytes:
        """Return the response to one request."""
        if head.startswith(b"GET"):
            told = json.dumps(self.stats).encode()
            self.stats = {"requests": 0, "refused": 0, "most_connections": self.open}
            return _response(told)
        self.stats["requests"] += 1
        found = workload.NO_REFUND.search(body)
        number = found[1] if found else b""
        if not number or (number in _VERIFIED and not self._is_genuine(body)):
            self.stats["refused"] += 1
            return _response(b'{"ret_code":"1001","ret_msg":"sign"}')
        answer = self._answers.get(number)
        if answer is None:
            answer = self._answers[number] = self._answer(number)
        return answer

    def _is_genuine(self, body: bytes) -> bool:
        fields = json.loads(body)
        return self._verify(workload.source(fields), fields.get("sign", ""))

    def _answer(self, number: bytes) -> bytes:
        fields = workload.answer_fields(number.decode())
        signed = {**fields, "sign": self._sign(workload.source(fields))}
        return _response(json.dumps(signed, ensure_ascii=False, separators=(",", ":")).encode())


def _response(body: bytes) -> bytes:
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json;charset=utf-8\r\ncontent-length: %d\r\n\r\n" % len(body)
    ) + body


class Connection(asyncio.Protocol):
    """One connection: requests in, answers out."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.WriteTransport = transport  # type: ignore[assignment]
        self._gateway.open += 1
        stats = self._gateway.stats
        stats["most_connections"] = max(stats["most_connections"], self._gateway.open)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gateway.open -= 1

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._buffer, 0, end)
            total = end + 4 + (int(length[1]) if length else 0)
            if len(self._buffer) < total:
                return
            answer = self._gateway.respond(self._buffer[:end], self._buffer[end + 4 : total])
            self._buffer = self._buffer[total:]
            if self._gateway.delay:
                asyncio.get_running_loop().call_later(self._gateway.delay, self._transport.write, answer)
            else:
                self._transport.write(answer)


async def _serve(options: argparse.Namespace) -> None:
    gateway = Gateway(options.keys, options.answers, options.delay)
    context = None
    if options.tls:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(options.keys / "tls.pem", options.keys / "tls.key")
    loop = asyncio.get_running_loop()
    plain = await loop.create_server(lambda: Connection(gateway), "127.0.0.1", 0, backlog=4096)
    secure = await loop.create_server(lambda: Connection(gateway), "127.0.0.1", 0, backlog=4096, ssl=context)
    ports = {"plain": plain.sockets[0].getsockname()[1], "served": secure.sockets[0].getsockname()[1]}
    print(json.dumps(ports), flush=True)
    await plain.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=Path, required=True)
    parser.add_argument("--answers", type=int, default=0, help="how many refunds to sign answers for in advance")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--cpu", type=int)
    options = parser.parse_args()
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(_serve(options))


if __name__ == "__main__":
    main()
