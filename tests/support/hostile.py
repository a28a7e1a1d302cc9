"""A server whose answers attack the memory or the time of a client; the path selects the attack."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import cache
from typing import Final

import anyio

from lianlian_async.wire import MAX_MESSAGE_BYTES
from tests.support.parties import Connection


def _sized(body: bytes, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n%bcontent-length: %d\r\n\r\n%b" % (headers, len(body), body)


def _keys(count: int) -> bytes:
    return b'{"ret_code":"0000"' + b"".join(b',"%x":1' % number for number in range(count)) + b"}"


WHOLE: Final[dict[str, Callable[[], bytes]]] = {
    "compression bomb": lambda: _sized(gzip.compress(bytes(2**26), 1), b"content-encoding: gzip\r\n"),
    "a million keys": lambda: _sized(b'{"ret_code":"0000"' + b',"":1' * 1_000_000 + b"}"),
    "as many keys as the limit allows": lambda: _sized(_keys(MAX_MESSAGE_BYTES // 10)),
    "equal keys": lambda: _sized(b"{" + b",".join([b'"":1'] * (MAX_MESSAGE_BYTES // 6)) + b"}"),
    "deep lists": lambda: _sized(b"[" * MAX_MESSAGE_BYTES),
    "deep objects": lambda: _sized(b'{"a":' * (MAX_MESSAGE_BYTES // 5)),
    "long number": lambda: _sized(b'{"ret_code":' + b"9" * (MAX_MESSAGE_BYTES - 20) + b"}"),
    "long list": lambda: _sized(b'{"a":[' + b"1," * (MAX_MESSAGE_BYTES // 2 - 20) + b"1]}"),
}
"""Answers with an end."""

_OK: Final = b"HTTP/1.1 200 OK\r\n"
_CHUNKED: Final = _OK + b"transfer-encoding: chunked\r\n\r\n"
ENDLESS: Final[dict[str, tuple[bytes, bytes]]] = {
    "endless headers": (_OK, b"x-header: some value\r\n"),
    "endless header line": (_OK + b"x-header: ", b"a"),
    "endless status line": (b"HTTP/1.1 200 ", b"a"),
    "endless 1xx responses": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "endless body": (_OK + b"\r\n", b" "),
    "endless chunks of one byte": (_CHUNKED, b"1\r\n \r\n"),
    "endless chunk extension": (_CHUNKED + b"1;", b"a"),
    "endless trailers": (_CHUNKED + b"0\r\n", b"x-trailer: some value\r\n"),
}
"""The start of each answer, and what follows without end."""

SLOW: Final[dict[str, tuple[bytes, bytes]]] = {
    "slow body": (_OK + b"content-length: 1000000\r\n\r\n", b" "),
    "slow headers": (_OK, b"a: b\r\n"),
}
"""The same, sent every 20 ms."""

ATTACKS: Final = (*WHOLE, *ENDLESS, *SLOW)


@cache
def _whole(name: str) -> bytes:
    return WHOLE[name]()


async def attack(connection: Connection) -> None:
    """Answer every request of a connection with the attack whose index in ``ATTACKS`` its path begins with."""
    while (request := await connection.request()) is not None:
        name, send = ATTACKS[int(request[0].split(b"/")[1])], connection.stream.send
        if name in WHOLE:
            await send(_whole(name))
            continue
        start, piece = (ENDLESS | SLOW)[name]
        await send(start)
        while True:
            await send(piece if name in SLOW else piece * (65536 // len(piece)))
            await anyio.sleep(0.02 if name in SLOW else 0)


def prepare() -> None:
    """Build all answers in advance."""
    for name in WHOLE:
        _whole(name)
