"""One HTTP exchange: every exception of an HTTP library becomes *not sent* or *maybe sent*.

Tests over sockets run on both HTTP stacks; on trio, which aiohttp does not support, both stacks are httpx.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import importlib.metadata
import os
import re
import socket
import ssl
import subprocess
import sys
from decimal import Decimal

import aiohttp
import anyio
import attrs
import certifi
import httpcore
import httpx
import httpx2
import pytest
from httpx_aiohttp import AiohttpTransport as HttpxAiohttpTransport

from lianlian_async import (
    ConfigurationError,
    Endpoints,
    GatewayUnavailable,
    Merchant,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundRejected,
    RefundSession,
    RetryPolicy,
    wire,
)
from lianlian_async.exchange import HttpResponse, NoResponse
from lianlian_async.outcome import unknown_reason
from lianlian_async.sandbox import Fault, Repeated, When
from lianlian_async.transport import HttpSender, PoolTransport, http_backend, own_transport
from lianlian_async.transport.aiohttp import LeasedPayload
from lianlian_async.transport.tracked_request import SendRefusedError, request_classes
from tests.support import certificates
from tests.support.bad_network import STRAY
from tests.support.parties import (
    Connection,
    answering,
    as_json,
    boot_clock,
    made,
    refund_request,
    sandbox,
    serving,
    trickling,
    unused_port,
)

pytestmark = pytest.mark.anyio

URL = "http://127.0.0.1:1/exchangerefund.htm"
ONCE = RetryPolicy(attempts=1)


@contextlib.asynccontextmanager
async def transport_over(*, client=None, transport=None, max_connections=4, urls=()):
    opened = await HttpSender.open(client, transport, max_connections, urls=urls)
    try:
        yield opened
    finally:
        await opened.aclose()


async def wait_until(condition):
    """Let the other tasks run until ``condition`` holds."""
    with anyio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in the kernel
            await anyio.sleep(0.001)


def at(merchant_keys, gateway_keys, url):
    """Return the tests' merchant with its endpoints at ``url``."""
    return Merchant(
        oid_partner="201103171000000000",
        private_key=merchant_keys.private,
        gateway_public_keys=[gateway_keys.public],
        endpoints=Endpoints(f"{url}/exchangerefund.htm", f"{url}/refundquery.htm"),
        notify_url="https://shop.example/lianlian/refund",
    )


# ── the mapping is total ─────────────────────────────────────────────────────────────────────────


def family(root):
    """Return ``root`` and all its subclasses."""
    return {root}.union(*(family(child) for child in root.__subclasses__()))


def instance(kind):
    """An exception of ``kind``, whatever its constructor wants."""
    request = httpx.Request("POST", URL)
    for arguments, options in (
        (("told",), {"request": request}),
        (("told",), {"request": request, "response": httpx.Response(500)}),
        (("told",), {}),
        ((), {}),
    ):
        with contextlib.suppress(TypeError):
            return kind(*arguments, **options)
    raise AssertionError(kind)


PUBLIC = {value for value in vars(httpx).values() if isinstance(value, type) and issubclass(value, Exception)}
FOREIGN = PUBLIC.union(
    family(httpx.HTTPError),
    family(httpx.StreamError),
    {value for value in vars(httpcore).values() if isinstance(value, type) and issubclass(value, Exception)},
    {OSError, ConnectionRefusedError, TimeoutError, ssl.SSLError, UnicodeError, ValueError, RuntimeError, ImportError},
    {anyio.ClosedResourceError, anyio.BrokenResourceError, anyio.EndOfStream, StopAsyncIteration, RecursionError},
)
NEVER_SENT = {
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
}
every_foreign_exception = pytest.mark.parametrize(
    "kind", sorted(FOREIGN, key=lambda kind: (kind.__module__, kind.__name__))
)


def test_the_exception_trees_are_complete():
    """The collected subclasses include the documented exceptions, so the tests below are not empty."""
    assert {httpx.ReadTimeout, httpx.CookieConflict, httpx.StreamConsumed, httpx.InvalidURL} <= FOREIGN
    assert NEVER_SENT < FOREIGN
    assert len(FOREIGN) > 45


class Raising(httpx.AsyncBaseTransport):
    """Raises before it reads the request."""

    def __init__(self, error):
        self.error = error

    async def handle_async_request(self, request):
        raise self.error


class RaisingAfterSending(Raising):
    """Raises after it has read the request's body."""

    async def handle_async_request(self, request):
        assert [chunk async for chunk in request.stream] == [b"{}"]
        raise self.error


class RaisingAfterSendingPlainly(Raising):
    """Raises after it has read the request's body synchronously, as adapters for other clients do."""

    async def handle_async_request(self, request):
        assert list(request.stream) == [b"{}"]
        raise self.error


class SendingACopyTwice(Raising):
    """Sends a copy of the request, and a second copy after a failure, as retrying layers do."""

    async def handle_async_request(self, request):
        copy = httpx.Request(request.method, request.url, content=await request.aread())
        try:
            assert [chunk async for chunk in copy.stream] == [b"{}"]
            raise httpx.ReadError("the connection broke")
        except httpx.ReadError:
            raise self.error  # noqa: B904 - what such layers do


class RaisingFromItsClientsError(Raising):
    """Reads the whole request and raises an error from another client's error, as adapters for other clients do."""

    async def handle_async_request(self, request):
        assert request.content == b"{}"
        raise self.error from EOFError("the other client's word")


class RaisingFromItsClientsErrorAfterReading(Raising):
    """The same, after reading the request."""

    async def handle_async_request(self, request):
        assert await request.aread() == request.read() == b"{}"
        raise self.error from EOFError("the other client's word")


class Answering(httpx.AsyncBaseTransport):
    """Answers with ``stream``."""

    def __init__(self, stream):
        self.stream = stream

    async def handle_async_request(self, request):
        return httpx.Response(200, stream=self.stream)


class BrokenStream(httpx.AsyncByteStream):
    """A response that fails while it is read."""

    def __init__(self, error):
        self.error = error

    async def __aiter__(self):
        yield b"{"
        raise self.error


class UnclosableStream(httpx.AsyncByteStream):
    """A response that fails when it is closed."""

    def __init__(self, error):
        self.error = error

    async def __aiter__(self):
        yield b"{}"

    async def aclose(self):
        raise self.error


@every_foreign_exception
async def test_exception_before_the_send(kind):
    """Every exception of a transport becomes NoResponse; only those that httpx raises before writing are *not sent*."""
    error = instance(kind)
    async with transport_over(transport=Raising(error)) as transport:
        delivery = await transport.post(URL, b"{}", 5.0)
    assert isinstance(delivery, NoResponse)
    assert delivery.may_have_arrived is (kind not in NEVER_SENT)
    assert kind.__name__ in delivery.reason or kind is StopAsyncIteration
    assert delivery.cause is error or kind is StopAsyncIteration


SENDERS = [
    RaisingAfterSending,
    RaisingAfterSendingPlainly,
    SendingACopyTwice,
    RaisingFromItsClientsError,
    RaisingFromItsClientsErrorAfterReading,
]


@every_foreign_exception
async def test_after_the_send_no_exception_means_not_sent(kind):
    """Once the body was read for sending, no exception proves that it did not arrive."""
    for sender in SENDERS:
        async with transport_over(transport=sender(instance(kind))) as transport:
            delivery = await transport.post(URL, b"{}", 5.0)
        assert isinstance(delivery, NoResponse), sender
        assert delivery.may_have_arrived, sender


@pytest.mark.parametrize("sender", [RaisingAfterSending, RaisingFromItsClientsError])
async def test_transport_of_a_given_client_is_tracked(sender):
    """With a caller's client, too, a failure to connect is believed only if the body was not read."""
    deliveries = []
    for transport in (Raising(httpx.ConnectError("refused")), sender(httpx.ConnectError("refused"))):
        async with httpx.AsyncClient(transport=transport) as client, transport_over(client=client) as opened:
            deliveries.append(await opened.post(URL, b"{}", 5.0))
    assert [delivery.may_have_arrived for delivery in deliveries] == [False, True]


@pytest.mark.parametrize("kind", sorted(NEVER_SENT, key=lambda kind: kind.__name__))
async def test_mocked_transport_is_believed(kind):
    """A handler of httpx.MockTransport that reads the request and fails to connect has sent nothing."""

    def handler(request):
        assert request.content == b"{}"
        raise instance(kind)

    async with transport_over(transport=httpx.MockTransport(handler)) as transport:
        delivery = await transport.post(URL, b"{}", 5.0)
    assert isinstance(delivery, NoResponse)
    assert not delivery.may_have_arrived


def aiohttp_instance(kind):
    """An exception of ``kind``, whatever its constructor wants."""
    to = aiohttp.client_reqrep.ConnectionKey("gateway.example", 443, True, True, None, None, None)
    about = aiohttp.RequestInfo(URL, "POST", {}, URL)
    wanted = ((), (to, OSError("out of reach")), ("/a/path", to, OSError(2, "not there")), (about, ()), (URL,))
    for arguments in (*wanted, (b"1", b"2", "gateway.example", 443)):
        with contextlib.suppress(TypeError, AttributeError):
            error = kind(*arguments)
            assert str(error) is not None
            return error
    raise AssertionError(kind)


AIOHTTPS_OWN = sorted(family(aiohttp.ClientError), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("kind", AIOHTTPS_OWN)
async def test_exceptions_of_aiohttp(monkeypatch, kind, is_written):
    """Every exception of aiohttp becomes NoResponse; the request is *not sent* if aiohttp did not write it."""

    class Writer:
        async def write(self, content):
            assert content == b"{}"

    async def request(*_args, data, **_options):
        if is_written:
            await data.write_with_length(Writer(), 2)
        raise aiohttp_instance(kind)

    monkeypatch.setenv("LIANLIAN_HTTP_BACKEND", "aiohttp")
    monkeypatch.setattr(aiohttp.ClientSession, "request", request)
    async with transport_over() as transport:
        delivery = await transport.post(URL, b"{}", 5.0)
    assert isinstance(delivery, NoResponse)
    assert delivery.may_have_arrived is is_written
    assert isinstance(delivery.cause, httpx.RequestError)
    assert type(delivery.cause.__cause__) is kind


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_adapter_that_misreports_a_broken_connection_makes_no_second_refund(merchant_keys, gateway_keys):
    """If the server disconnects after the request, httpx-aiohttp raises ConnectTimeout: this is *maybe sent*."""
    came = []

    async def handler(connection: Connection):
        came.append(await connection.request())

    async with serving(handler) as server:
        merchant = at(merchant_keys, gateway_keys, server.url)
        async with RefundSession(merchant, transport=HttpxAiohttpTransport(), retry=ONCE, deadline=2.0) as session:
            with pytest.raises(RefundOutcomeUnknown):
                await session.apply_refund(refund_request())
    assert sum(b"/exchangerefund.htm" in head for head, _ in filter(None, came)) == 1


@every_foreign_exception
async def test_exception_of_the_response_is_maybe_sent(kind):
    """Every exception while a response is read or closed means *maybe sent*."""

    class Sent(Answering):
        async def handle_async_request(self, request):
            assert [chunk async for chunk in request.stream] == [b"{}"]
            return await super().handle_async_request(request)

    for stream in (BrokenStream, UnclosableStream):
        async with transport_over(transport=Sent(stream(instance(kind)))) as transport:
            delivery = await transport.post(URL, b"{}", 5.0)
        assert isinstance(delivery, NoResponse), stream
        assert delivery.may_have_arrived, stream


class Retrying(httpx.AsyncBaseTransport):
    """A transport that retries by itself; its second attempt cannot connect."""

    def __init__(self, inner):
        self.inner = inner

    async def handle_async_request(self, request):
        with contextlib.suppress(Exception):
            await self.inner.handle_async_request(request)
        raise httpx.ConnectError("refused")


@pytest.mark.virtual_time
async def test_retrying_transport_makes_no_second_refund():
    """A retrying transport whose last error is a refused connection leaves a refund unknown, not unsent."""
    gateway = sandbox()
    client = httpx.AsyncClient(transport=Retrying(httpx.ASGITransport(app=gateway)))
    async with client, RefundSession(gateway.merchant(), client=client, clock=boot_clock) as session:
        with pytest.raises(RefundOutcomeUnknown):
            await session.apply_refund(refund_request())
    assert gateway.times_made("R-1") == 1


class Repeating(httpx.ASGITransport):
    """A transport that repeats a request by itself, because it takes the first answer for a broken connection."""

    async def handle_async_request(self, request):
        if "query" not in request.url.path:
            await super().handle_async_request(request)
        return await super().handle_async_request(request)


@pytest.mark.virtual_time
@pytest.mark.parametrize("repeated", [Repeated.AGAIN, Repeated.REJECT])  # codes 5007 and 1002
async def test_rejection_of_a_request_that_a_transport_repeated_proves_nothing(repeated):
    """The first of two sends made the refund, so the rejection of the second one is not believed."""
    gateway = sandbox(default_order=Decimal("200.01"), repeated=repeated)
    client = httpx.AsyncClient(transport=Repeating(app=gateway))
    async with client, RefundSession(gateway.merchant(), client=client, clock=boot_clock) as session:
        assert (await session.apply_refund(refund_request(money_refund="200.01"))).no_refund == "R-1"
        gateway.script(Fault.BUSY, call="query", times=100)
        with pytest.raises(RefundOutcomeUnknown) as caught:
            await session.apply_refund(refund_request(2, money_refund="200.01", no_order="another"))
    assert caught.value.refused is None
    assert [gateway.times_made(number) for number in ("R-1", "R-2")] == [1, 1]


class GoingAway(httpx.ASGITransport):
    """Sends as httpcore does if an HTTP/2 server closes its connection before it processes the request."""

    async def handle_async_request(self, request):
        trace, info = request.extensions["trace"], {"request": httpcore.Request("POST", str(request.url))}
        await trace("http2.send_request_headers.started", info)
        assert b"".join([chunk async for chunk in request.stream])
        await trace("http2.receive_response_headers.failed", {"exception": httpcore.ConnectionNotAvailable()})
        await trace("http2.send_request_headers.started", info)
        return await super().handle_async_request(request)


async def test_request_that_an_http2_server_did_not_process_is_sent_again():
    """GOAWAY names the last stream that was processed (RFC 9113 §6.8), so httpcore sends a later one again."""
    gateway = sandbox(default_order=Decimal("200.01"))
    async with (
        httpx.AsyncClient(transport=GoingAway(app=gateway)) as client,
        RefundSession(gateway.merchant(), client=client) as session,
    ):
        await session.apply_refund(refund_request(money_refund="200.01"))
    assert gateway.requests == {"apply": 1}


@pytest.mark.parametrize("library", [httpx, httpx2])
@pytest.mark.parametrize("layer", ["transport", "auth"])
async def test_client_that_repeats_a_request_cannot_send_it_again(layer, library):
    """The second send of a retrying transport, or of ``DigestAuth``, does not leave this machine."""

    class Repeater(library.AsyncHTTPTransport):
        async def handle_async_request(self, request):
            await (await super().handle_async_request(request)).aread()
            return await super().handle_async_request(request)

    repeats = {"transport": {"transport": Repeater()}, "auth": {"auth": library.DigestAuth("user", "secret")}}
    challenge = 'www-authenticate: Digest realm="r", nonce="n", qop="auth"\r\n'
    async with (
        answering(b"{}", "401 Unauthorized", challenge) as server,
        library.AsyncClient(**repeats[layer]) as client,
        transport_over(client=client) as transport,
    ):
        delivery = await transport.post(server.url, b"{}", 5.0)
        assert len(server.requests) == 1
    assert delivery.may_have_arrived
    error = GatewayUnavailable("", attempts=1, last_error=delivery.reason, ret_code=None)
    assert unknown_reason(error, None) == "the client tried to send a request again that may have arrived"


@pytest.mark.virtual_time
async def test_hook_that_fails_to_connect_makes_no_second_refund():
    """A response hook that raises ConnectError runs after the send: the refund is queried, and found."""
    gateway = sandbox()
    troubles = [httpx.ConnectError("the log server is down")]

    async def hook(response):
        if troubles:
            raise troubles.pop()

    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=gateway), event_hooks={"response": [hook]})
    async with client, RefundSession(gateway.merchant(), client=client, clock=boot_clock) as session:
        refund = await session.apply_refund(refund_request())
    assert refund.no_refund == "R-1"
    assert gateway.requests == {"apply": 1, "query": 1}
    assert gateway.times_made("R-1") == 1


@pytest.mark.virtual_time
async def test_hook_may_read_the_response_first():
    """If a response hook, such as a logging hook, reads the body, the session still gets it."""
    gateway = sandbox()
    logged = []

    async def hook(response):
        logged.append(wire.decode(await response.aread()))

    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=gateway), event_hooks={"response": [hook]})
    async with client, RefundSession(gateway.merchant(), client=client, clock=boot_clock) as session:
        refund = await session.apply_refund(refund_request())
    assert [refund.raw] == logged
    assert gateway.requests == {"apply": 1}


@pytest.mark.usefixtures("http_stack")
@pytest.mark.parametrize("url", ["ftp://gw.example/", "https://", "http://a:b:c/", "//gw.example/"])
async def test_unusable_url_is_not_sent(url):
    """A URL that httpx cannot use is *not sent*."""
    async with transport_over() as transport:
        delivery = await transport.post(url, b"{}", 5.0)
    assert isinstance(delivery, NoResponse)
    assert not delivery.may_have_arrived


# ── real sockets ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["httpx", "aiohttp"])
def http_stack(request, monkeypatch):
    """Selects the HTTP stack of a session's own transport."""
    monkeypatch.setenv("LIANLIAN_HTTP_BACKEND", request.param)
    return request.param


on_both_stacks = pytest.mark.usefixtures("http_stack")


@on_both_stacks
async def test_exchange_sends_the_body_and_returns_the_response_unchanged():
    """The POST has the documented content type and refuses compression; status, headers and body come back."""
    async with answering(b'{"ret_code":"0000"}', headers="X-Trace: 7\r\n") as server, transport_over() as transport:
        delivery = await transport.post(f"{server.url}/exchangerefund.htm", b'{"no_refund":"R-1"}', 5.0)
    assert isinstance(delivery, HttpResponse)
    assert (delivery.status, delivery.body) == (200, b'{"ret_code":"0000"}')
    assert delivery.headers["x-trace"] == "7"
    ((_, head, body),) = server.requests
    assert body == b'{"no_refund":"R-1"}'
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /exchangerefund.htm HTTP/1.1"
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    assert headers["content-type"] == "application/json;charset=utf-8"
    assert headers["content-length"] == str(len(body))
    assert headers["accept-encoding"] == "identity"
    assert "transfer-encoding" not in headers


@pytest.mark.parametrize("own", [True, False], ids=["own client", "given client"])
async def test_connect_timeout_is_half_of_the_attempt(own):
    """An attempt that cannot connect ends as *not sent* after half of its time."""
    seen = []

    class Watching(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            seen.append(request.extensions["timeout"])
            return httpx.Response(200)

    client = None if own else httpx.AsyncClient(transport=Watching(), timeout=99)
    async with transport_over(client=client, transport=Watching() if own else None) as transport:
        await transport.post(URL, b"{}", 8.0)
    if client:
        await client.aclose()
    assert [(timeout["connect"], timeout["pool"]) for timeout in seen] == [(4.0, 8.0)]


@on_both_stacks
async def test_a_refused_connection_is_not_sent(merchant_keys, gateway_keys):
    """If the connection is refused, every attempt is *not sent*, and the refund is safe to send again."""
    merchant = at(merchant_keys, gateway_keys, f"http://127.0.0.1:{unused_port()}")
    async with RefundSession(merchant, retry=RetryPolicy(attempts=2, initial=0.001)) as session:
        with pytest.raises(RefundNotSent) as caught:
            await session.apply_refund(refund_request())
    assert caught.value.attempts == 2
    assert isinstance(caught.value.__cause__, httpx.ConnectError)


@on_both_stacks
async def test_unknown_host_is_not_sent():
    """A host name that does not exist is *not sent*."""
    async with transport_over() as transport:
        delivery = await transport.post("https://gateway.invalid/", b"{}", 10.0)
    assert isinstance(delivery, NoResponse)
    assert not delivery.may_have_arrived


@pytest.fixture(scope="module")
def self_signed(tmp_path_factory):
    """Return a server's TLS context with a self-signed certificate, and the file of that certificate."""
    return certificates.self_signed(tmp_path_factory.mktemp("tls"))


async def honestly(connection: Connection):
    """Answer each apply call as if the refund was made."""
    while (request := await connection.request()) is not None:
        await connection.respond(as_json(made(wire.decode(request[1]))))


async def heartily(connection: Connection):
    """Answer each request with an empty object."""
    while await connection.request() is not None:
        await connection.respond(b"{}")


@on_both_stacks
async def test_untrusted_certificate_is_not_sent(self_signed):
    """TLS fails before the first byte of the request: *not sent*."""
    asked = []

    async def handler(connection: Connection):
        asked.append(await connection.request())

    async with serving(handler, tls=self_signed[0]) as server, transport_over() as transport:
        delivery = await transport.post(server.url.replace("http:", "https:"), b"{}", 5.0)
    assert isinstance(delivery, NoResponse)
    assert not delivery.may_have_arrived
    assert "CERTIFICATE_VERIFY_FAILED" in delivery.reason
    assert not any(asked)


@on_both_stacks
async def test_ssl_cert_file_is_trusted(self_signed, monkeypatch):
    """SSL_CERT_FILE names the trusted CA; one connection serves several exchanges."""
    context, file = self_signed
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    async with serving(heartily, tls=context) as server, transport_over() as transport:
        for _ in range(2):
            delivery = await transport.post(server.url.replace("http:", "https:"), b"{}", 5.0)
            assert isinstance(delivery, HttpResponse)
    assert server.opened == 1


async def test_given_client_keeps_its_tls_settings_and_stays_open(self_signed):
    """A given client is used as it is, and stays open when the session closes."""
    context, file = self_signed
    trusting = ssl.create_default_context(cafile=str(file))
    async with serving(heartily, tls=context) as server, httpx.AsyncClient(verify=trusting) as client:
        for _ in range(2):
            async with transport_over(client=client) as transport:
                delivery = await transport.post(server.url.replace("http:", "https:"), b"{}", 5.0)
            assert isinstance(delivery, HttpResponse)
            assert not client.is_closed
    assert server.opened == 1


async def test_closed_client_is_not_sent(merchant):
    """With a closed client, a request is *not sent*, and the reason says that the client is closed."""
    client = httpx.AsyncClient()
    await client.aclose()
    async with RefundSession(merchant, client=client, retry=ONCE) as session:
        with pytest.raises(RefundNotSent, match="closed"):
            await session.apply_refund(refund_request())


@on_both_stacks
async def test_other_protocol_is_maybe_sent():
    """A server that does not speak HTTP may have read the request."""

    async def handler(connection: Connection):
        await connection.request()
        await connection.stream.send(b"220 smtp.example ESMTP\r\n")

    async with serving(handler) as server, transport_over() as transport:
        delivery = await transport.post(server.url, b"{}", 5.0)
    assert isinstance(delivery, NoResponse)
    assert delivery.may_have_arrived


@on_both_stacks
async def test_endless_response_is_cut():
    """Little more than 64 KiB of an endless body is read, and the connection is not reused."""

    async def handler(connection: Connection):
        while await connection.request() is not None:
            await connection.respond(bytes(4 * 1024 * 1024))

    async with serving(handler) as server, transport_over() as transport:
        for opened in (1, 2):
            delivery = await transport.post(server.url, b"{}", 5.0)
            assert isinstance(delivery, HttpResponse)
            assert wire.MAX_MESSAGE_BYTES < len(delivery.body) < 1024 * 1024
            assert server.opened == opened


@on_both_stacks
async def test_compressed_response_is_not_decompressed():
    """A compressed body is returned unchanged; the protocol module refuses it by its header."""
    packed = gzip.compress(b"{}")
    async with answering(packed, headers="content-encoding: gzip\r\n") as server, transport_over() as transport:
        delivery = await transport.post(server.url, b"{}", 5.0)
    assert isinstance(delivery, HttpResponse)
    assert delivery.body == packed
    assert delivery.headers["content-encoding"] == "gzip"


@on_both_stacks
async def test_cookies_are_not_sent_back():
    """No request carries data of an earlier response."""
    async with answering(headers="set-cookie: a=b\r\n") as server, transport_over() as transport:
        for _ in range(2):
            assert isinstance(await transport.post(server.url, b"{}", 5.0), HttpResponse)
    assert not any(b"cookie" in head.lower() for _, head, _ in server.requests)


@on_both_stacks
@pytest.mark.parametrize("given", [None, HttpxAiohttpTransport], ids=["own", "httpx-aiohttp"])
@pytest.mark.parametrize("location", ["mailto:nobody@example.com", "javascript:x", "http:login", "//"])
async def test_response_with_unusable_location_is_maybe_sent(location, given, anyio_backend_name):
    """An exception of httpx about a response's Location does not mean that the request was not sent."""
    if given is not None and anyio_backend_name == "trio":
        pytest.skip("aiohttp needs asyncio")
    async with (
        answering(status="302 Found", headers=f"location: {location}\r\n") as server,
        transport_over(transport=given and given()) as transport,
    ):
        delivery = await transport.post(server.url, b"{}", 5.0)
    assert isinstance(delivery, HttpResponse) or delivery.may_have_arrived
    assert len(server.requests) == 1


@on_both_stacks
async def test_unexpected_bytes_are_not_the_next_response():
    """After bytes on an idle connection, the next request uses another one, or is not sent."""
    idle, spoilt = anyio.Event(), anyio.Event()

    async def handler(connection: Connection):
        while (request := await connection.request()) is not None:
            await connection.respond(request[1])
            if connection.number == 1:
                await idle.wait()
                await connection.respond(b"late")
                spoilt.set()

    async with serving(handler) as server, transport_over() as transport:
        assert (await transport.post(server.url, b"1", 5.0)).body == b"1"
        idle.set()
        await spoilt.wait()
        with anyio.move_on_after(0.05):  # until the system has carried it over
            await anyio.sleep_forever()
        second = await transport.post(server.url, b"2", 5.0)
        assert second.body == b"2" if isinstance(second, HttpResponse) else not second.may_have_arrived
        assert (await transport.post(server.url, b"3", 5.0)).body == b"3"


@on_both_stacks
@pytest.mark.parametrize("given", [None, httpx.AsyncClient, httpx2.AsyncClient], ids=["own", "httpx", "httpx2"])
async def test_second_response_in_the_same_segment(given):
    """A response that no request asked for does not answer the next request, which uses a new connection."""

    async def handler(connection: Connection):
        while (request := await connection.request()) is not None:
            await connection.stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n" + request[1] + STRAY)

    client = given and given()
    async with (
        serving(handler) as server,
        client or contextlib.nullcontext(),
        transport_over(client=client) as transport,
    ):
        for number in (b"1", b"2", b"3"):
            assert (await transport.post(server.url, number, 5.0)).body == number
    assert server.opened == 3


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_close_during_a_wait_for_a_connection(monkeypatch):
    """A request that waits for a connection of aiohttp at closing ends as *not sent*, not cancelled."""
    monkeypatch.setenv("LIANLIAN_HTTP_BACKEND", "aiohttp")
    deliveries = []
    came = anyio.Event()

    async def handler(connection: Connection):
        await connection.request()
        came.set()
        await anyio.sleep_forever()

    async with serving(handler) as server, transport_over(max_connections=1) as transport:

        async def post():
            deliveries.append(await transport.post(server.url, b"{}", 30.0))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(post)
            await came.wait()
            tasks.start_soon(post)
            await anyio.wait_all_tasks_blocked()
            await transport.aclose()
    assert [type(delivery) for delivery in deliveries] == [NoResponse, NoResponse]
    assert sorted(delivery.may_have_arrived for delivery in deliveries) == [False, True]


@on_both_stacks
async def test_own_transports_follow_no_redirect():
    """Our own transports never send signed fields to another URL."""
    elsewhere = {"status": "307 Temporary Redirect", "headers": "location: /elsewhere\r\n"}
    async with answering(**elsewhere) as server, transport_over() as transport:
        assert (await transport.post(server.url, b"{}", 5.0)).status == 307
    assert len(server.requests) == 1


@pytest.mark.parametrize("follows", [True, False])
async def test_a_redirect_is_not_followed(follows):
    """Signed fields are sent only to the merchant's URL, even over a client that follows redirects."""
    async with answering(status="307 Temporary Redirect", headers="location: /elsewhere\r\n") as server:
        async with httpx.AsyncClient(follow_redirects=follows) as client, transport_over(client=client) as transport:
            delivery = await transport.post(server.url, b"{}", 5.0)
        assert isinstance(delivery, HttpResponse)
        assert delivery.status == 307
        assert len(server.requests) == 1


@on_both_stacks
@pytest.mark.virtual_time
async def test_trickling_response_ends_with_the_attempt(merchant_keys, gateway_keys):
    """A response that sends a byte every second is ended by the time limit of the attempt."""
    began = []

    async def handler(connection: Connection):
        await connection.request()
        began.append(anyio.current_time())
        await connection.stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        while True:
            await connection.stream.send(b" ")
            await anyio.sleep(1)

    async with serving(handler) as server:
        async with RefundSession(at(merchant_keys, gateway_keys, server.url), deadline=30, clock=boot_clock) as session:
            with pytest.raises(RefundOutcomeUnknown, match="no answer within"):
                await session.apply_refund(refund_request())
        assert anyio.current_time() <= 30
    assert began[:2] == [0.0, 10.0]


@pytest.mark.virtual_time
async def test_attempt_that_gets_no_connection_was_not_sent(merchant_keys, gateway_keys):
    """A caller's client has no free connection within the time limit of an attempt."""

    async def handler(connection: Connection):
        await connection.request()
        await connection.stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n")
        await anyio.sleep_forever()

    async with serving(handler) as server, httpx.AsyncClient(limits=httpx.Limits(max_connections=1)) as client:
        merchant = at(merchant_keys, gateway_keys, server.url)
        async with (
            client.stream("GET", server.url),
            RefundSession(merchant, client=client, clock=boot_clock) as session,
        ):
            with pytest.raises(RefundNotSent, match="nothing could be sent within"):
                await session.apply_refund(refund_request())


@pytest.mark.virtual_time
@pytest.mark.parametrize("answer", [None, b"", b"SSH-2.0-OpenSSH_9.7\r\n\r\n"], ids=["silence", "close", "nonsense"])
async def test_attempt_whose_proxy_does_not_connect_was_not_sent(monkeypatch, merchant_keys, gateway_keys, answer):
    """The proxy does not answer CONNECT, or closes the connection instead, as an overloaded one does."""

    async def handler(connection: Connection):
        await connection.request()
        if answer is None:
            await anyio.sleep_forever()
        await connection.stream.send(answer)

    async with serving(handler) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        merchant = at(merchant_keys, gateway_keys, "https://127.0.0.1:1")
        reason = "nothing could be sent within" if answer is None else "RemoteProtocolError"
        async with RefundSession(merchant, clock=boot_clock) as session:
            with pytest.raises(RefundNotSent, match=reason):
                await session.apply_refund(refund_request())
    assert proxy.opened == 4


async def test_a_request_through_the_tunnel_of_a_proxy(self_signed, monkeypatch):
    """The CONNECT request to the proxy does not count as a send of the request that follows it."""
    context, file = self_signed
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    async with serving(heartily, tls=context) as server:

        async def tunnel(connection: Connection):
            async def pass_on(source, target):
                with contextlib.suppress(anyio.BrokenResourceError):
                    async for chunk in source:
                        await target.send(chunk)
                tasks.cancel_scope.cancel()

            await connection.request()
            await connection.stream.send(b"HTTP/1.1 200 OK\r\n\r\n")
            async with await anyio.connect_tcp("127.0.0.1", server.port) as target, anyio.create_task_group() as tasks:
                tasks.start_soon(pass_on, connection.stream, target)
                tasks.start_soon(pass_on, target, connection.stream)

        async with serving(tunnel) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", proxy.url)
            url = server.url.replace("http:", "https:")
            async with transport_over(urls=[url]) as transport:
                delivery = await transport.post(url, b"{}", 5.0)
    assert isinstance(delivery, HttpResponse), delivery
    assert proxy.opened == 1


@pytest.mark.virtual_time
@pytest.mark.parametrize("is_read", [False, True])
async def test_attempt_that_ends_before_its_body_is_read_cannot_be_sent_later(is_read):
    """A transport that goes on in the background can no longer read the body. After a read, the outcome is unknown."""
    gateway, seen = sandbox(), []

    class Hanging(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            seen.append(request)
            if is_read:
                await request.aread()
            await anyio.sleep_forever()

    async with RefundSession(gateway.merchant(), transport=Hanging(), clock=boot_clock) as session:
        with pytest.raises(RefundOutcomeUnknown if is_read else RefundNotSent):
            await session.apply_refund(refund_request())
    with pytest.raises(Exception, match="the lease ended before the request was sent"):
        list(seen[0].stream)


@on_both_stacks
async def test_a_whole_refund_over_a_socket(merchant_keys, gateway_keys):
    """Apply over a real connection; the signed answer becomes the refund."""

    async def handler(connection: Connection):
        while (request := await connection.request()) is not None:
            await connection.respond(as_json(made(wire.decode(request[1]))))

    async with serving(handler) as server, RefundSession(at(merchant_keys, gateway_keys, server.url)) as session:
        for number in (1, 2):
            refund = await session.apply_refund(refund_request(number))
            assert refund.no_refund == f"R-{number}"
    assert server.opened == 1


@on_both_stacks
async def test_burst_waits_for_connections(merchant_keys, gateway_keys):
    """More requests than connections all get a response, over at most the allowed number of connections."""
    most = 0

    async def handler(connection: Connection):
        nonlocal most
        while await connection.request() is not None:
            most = max(most, server.open)
            await connection.respond(b"{}")

    answers = []

    async def post(transport):
        answers.append(await transport.post(server.url, b"{}", 30.0))

    async with (
        serving(handler) as server,
        transport_over(max_connections=3) as transport,
        anyio.create_task_group() as tasks,
    ):
        for _ in range(60):
            tasks.start_soon(post, transport)
    assert [answer.status for answer in answers] == [200] * 60
    assert most <= 3


@on_both_stacks
async def test_cancelled_exchanges_leak_no_connection():
    """Requests that are cancelled while they wait, connect, send or read leave every connection to later ones."""

    async def cancelled(number):
        with anyio.move_on_after(0.0005 * (number % 12)):
            await transport.post(server.url, b"{}", 5.0)

    async with serving(trickling) as server, transport_over(max_connections=4) as transport:
        async with anyio.create_task_group() as tasks:
            for number in range(300):
                tasks.start_soon(cancelled, number)
        with anyio.fail_after(30):
            for _ in range(8):
                assert isinstance(await transport.post(server.url, b"{}", 30.0), HttpResponse)


@on_both_stacks
async def test_a_request_that_is_cancelled_before_it_gets_a_connection_was_not_sent():
    """Only the cancelled request that waited for the connection is reported as not sent."""
    received, not_sent = anyio.Event(), []

    async def handler(connection: Connection):
        await connection.request()
        received.set()
        await anyio.sleep_forever()

    async with serving(handler) as server, transport_over(max_connections=1) as opened:

        async def post(name):
            await opened.post(server.url, b"{}", 30.0, not_sent=lambda: not_sent.append(name))

        async with anyio.create_task_group() as group:
            group.start_soon(post, "first")
            await received.wait()
            group.start_soon(post, "second")
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
    assert not_sent == ["second"]


@on_both_stacks
async def test_failed_opening_closes_the_transport(merchant_keys, gateway_keys, tmp_path):
    """If opening fails, the session closes its transport, and no ResourceWarning is raised."""
    merchant = attrs.evolve(at(merchant_keys, gateway_keys, "http://127.0.0.1:1"), private_key=tmp_path / "none.pem")
    with pytest.raises(ConfigurationError):
        await RefundSession(merchant).__aenter__()


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
@pytest.mark.parametrize("raised_by", ["transport", "response"])
async def test_unrequested_cancellation_is_maybe_sent(raised_by):
    """A CancelledError that nobody requested does not end the task silently: the request is *maybe sent*."""
    error = asyncio.CancelledError()
    transport = RaisingAfterSending(error) if raised_by == "transport" else Answering(BrokenStream(error))
    async with transport_over(transport=transport) as opened:
        delivery = await opened.post(URL, b"{}", 5.0)
    assert isinstance(delivery, NoResponse)
    assert delivery.may_have_arrived
    assert delivery.cause is error


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
@pytest.mark.parametrize("how", ["scope", "task"])
async def test_requested_cancellation_is_raised(how):
    """A request that is cancelled by its scope or by ``Task.cancel`` ends as cancelled."""
    ends = []

    class Hanging(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            await anyio.sleep_forever()

    async def post():
        try:
            ends.append(await opened.post(URL, b"{}", 5.0))
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    async with transport_over(transport=Hanging()) as opened:
        with anyio.CancelScope() as scope:
            task = asyncio.create_task(post()) if how == "task" else None
            if how == "scope":
                scope.cancel()
                await post()
            await anyio.wait_all_tasks_blocked()
            task.cancel()
            await asyncio.wait([task])
    assert ends == ["cancelled"]


# ── what the environment and TLS say ─────────────────────────────────────────────────────────────


@on_both_stacks
@pytest.mark.parametrize(
    ("variable", "content", "told"),
    [
        ("SSL_CERT_FILE", None, "No such file or directory"),
        ("SSL_CERT_FILE", "no certificate", "NO_CERTIFICATE_OR_CRL_FOUND"),
        ("SSL_CERT_DIR", None, "no such directory"),
    ],
)
async def test_unreadable_ca_certificates_are_reported_at_opening(
    monkeypatch, merchant, tmp_path, variable, content, told
):
    """The error names the variable, its path and the cure."""
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv(variable, str(path))
    with pytest.raises(ConfigurationError, match=rf"{variable}={path}: .*{told}.*or unset it"):
        await RefundSession(merchant).__aenter__()


@pytest.mark.skipif(httpx is httpx2, reason="httpx2 reads the operating system's CA certificates, not certifi's")
async def test_missing_certifi_bundle_is_reported_at_opening(monkeypatch, merchant, tmp_path):
    """If no variable is set, the error names certifi."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.setattr(certifi, "where", lambda: str(tmp_path / "cacert.pem"))
    with pytest.raises(ConfigurationError, match=r"certifi's CA bundle: .*No such file or directory.*reinstall"):
        await RefundSession(merchant).__aenter__()


async def test_ssl_cert_dir_is_trusted(monkeypatch, merchant, tmp_path):
    """SSL_CERT_DIR may name several directories; one that exists is enough."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", f"{tmp_path / 'none'}{os.pathsep}{tmp_path}")
    async with RefundSession(merchant):
        pass


async def reason_of(url, seconds=5.0):
    """Return why a POST to ``url`` gets no response, and whether it may have arrived."""
    async with transport_over() as transport:
        delivery = await transport.post(url, b"{}", seconds)
    assert isinstance(delivery, NoResponse)
    return delivery.reason, delivery.may_have_arrived


@on_both_stacks
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_required_client_certificate_is_reported(self_signed, monkeypatch, version):
    """The reason has the server's alert. TLS 1.3 sends it after the handshake: the request may have arrived."""
    _, file = self_signed
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=file)
    context.load_cert_chain(file)
    context.verify_mode = ssl.CERT_REQUIRED
    context.maximum_version = ssl.TLSVersion[version]

    def refuse():
        connection, _ = listener.accept()
        connection.settimeout(30)
        with connection.dup() as raw:
            with pytest.raises(ssl.SSLError):
                context.wrap_socket(connection, server_side=True)
            with contextlib.suppress(ConnectionResetError):
                while raw.recv(1000):  # closing with unread bytes would be a reset, which overtakes the alert
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, refuse)
            reason, sent = await reason_of(f"https://shop:sesame@{host}/")
    assert "ALERT" in reason
    assert reason.endswith(f"; {host} may require a client certificate")
    assert f"the TLS handshake with {host} failed: " in reason or sent
    assert sent is (version == "TLSv1_3")


@on_both_stacks
async def test_dropped_handshake_is_reported():
    """The server closes the connection instead of its hello: not sent, and the reason says so."""

    async def handler(connection: Connection):
        await connection.stream.receive()

    async with serving(handler) as server:
        told = await reason_of(server.url.replace("http:", "https:"))
    host = f"127.0.0.1:{server.port}"
    assert told == (f"ConnectError: the TLS handshake with {host} failed: the connection was closed or reset", False)


@on_both_stacks
async def test_server_without_tls_is_reported():
    """A response in plain HTTP is a failed handshake: not sent."""

    async def handler(connection: Connection):
        await connection.stream.receive()
        await connection.stream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await anyio.sleep_forever()

    async with serving(handler) as server:
        reason, sent = await reason_of(server.url.replace("http:", "https:"))
    assert re.search(rf"the TLS handshake with 127.0.0.1:{server.port} failed: .*\[SSL: ", reason)
    assert not sent


@on_both_stacks
async def test_connect_timeout_is_reported():
    """If the server never answers the handshake, the reason contains only the host and the seconds."""

    async def handler(connection: Connection):
        await anyio.sleep_forever()

    async with serving(handler) as server:
        told = await reason_of(server.url.replace("http:", "https:"), 0.2)
    assert told == (f"ConnectTimeout: no connection to 127.0.0.1:{server.port} within 0.1 s", False)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (httpx.ReadError(""), "ReadError: the connection to 127.0.0.1:1 was lost"),
        (httpx.ReadTimeout(""), "ReadTimeout: no answer from 127.0.0.1:1 in time"),
    ],
)
async def test_reason_has_no_library_internals(error, reason):
    """The reason of a failed request does not show internal errors of HTTP libraries."""
    error.__cause__ = IndexError("pop from an empty deque")
    async with transport_over(transport=Raising(error)) as transport:
        delivery = await transport.post("http://127.0.0.1:1/", b"{}", 5.0)
    assert delivery.reason == reason


# ── leases ───────────────────────────────────────────────────────────────────────────────────────


def holding_for(looks):
    """Return a lease check that returns True ``looks`` times, then False."""
    answers = iter([True] * looks)
    return lambda: next(answers, False)


@on_both_stacks
@pytest.mark.parametrize("kept_alive", [False, True], ids=["new connection", "kept-alive connection"])
async def test_lease_that_ends_before_the_last_byte(kept_alive):
    """If the lease ends at any time before the last byte, the gateway gets no complete request: *not sent*."""
    requests = []

    async def handler(connection: Connection):
        while (request := await connection.request()) is not None:
            requests.append(request)
            await connection.respond(b"{}")

    async with serving(handler) as server:
        for looks in range(20):
            async with transport_over() as transport:
                if kept_alive:
                    assert isinstance(await transport.post(server.url, b"{}", 5.0), HttpResponse)
                    requests.clear()
                delivery = await transport.post(server.url, b"{}", 5.0, holding_for(looks))
                if isinstance(delivery, HttpResponse):
                    break
                assert not delivery.may_have_arrived
                assert "lease ended" in delivery.reason
                assert requests == []
                assert isinstance(await transport.post(server.url, b"{}", 5.0), HttpResponse)
                requests.clear()
    assert looks >= 2
    assert len(requests) == 1


def test_every_way_to_the_bytes_of_a_body_for_aiohttp_counts_as_a_send():
    """A later release of aiohttp that gets the bytes in another way must not send them unseen."""
    _, body_class = request_classes(httpx)
    body = body_class("退款".encode(), holding_for(1))
    payload = LeasedPayload(body)
    assert (payload.size, payload.decode(), body.sends) == (6, "退款", 1)
    with pytest.raises(SendRefusedError):
        payload.decode()
    assert body.sends == 1


@on_both_stacks
async def test_lease_that_ends_during_the_tls_handshake(self_signed, monkeypatch):
    """If the lease ends during the handshake, the gateway receives no byte of the request."""
    context, file = self_signed
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    received, handshakes = [], []
    monkeypatch.setattr(context, "sni_callback", lambda *_: handshakes.append(1))

    async def handler(connection: Connection):
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            received.append(await connection.stream.receive())

    async with serving(handler, tls=context) as server, transport_over() as transport:
        url = server.url.replace("http:", "https:")
        delivery = await transport.post(url, b"{}", 5.0, lambda: not handshakes)
        assert handshakes
        await wait_until(lambda: server.opened == 1 and server.open == 0)
    assert isinstance(delivery, NoResponse)
    assert not delivery.may_have_arrived
    assert received == []


@pytest.mark.parametrize("looks", [0, 1])
async def test_given_transport_without_a_lease(looks):
    """Without a lease, a caller's transport is not called; after the lease has ended, it cannot read the body."""
    taken = []

    class Taking(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            taken.append("called")
            taken.extend([chunk async for chunk in request.stream])

    async with transport_over(transport=Taking()) as transport:
        delivery = await transport.post(URL, b"{}", 5.0, holding_for(looks))
    assert isinstance(delivery, NoResponse)
    assert not delivery.may_have_arrived
    assert taken == ["called"] * looks


# ── giving up ────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def slow_reader():
    """A listening socket with a small receive buffer: a few kilobytes until the server reads."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(30)
        yield listener


def read_to_the_end(connection):
    """Return the bytes that still arrive, and whether the connection was reset."""
    received = bytearray()
    connection = socket.socket(fileno=connection.detach())
    connection.settimeout(30)
    with connection, contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            received += chunk
        return bytes(received), False
    return bytes(received), True


@on_both_stacks
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("size", [100_000, 1_000_000], ids=["in the kernel", "in asyncio's buffer, too"])
@pytest.mark.parametrize("kept_alive", [False, True], ids=["new connection", "kept-alive connection"])
async def test_given_up_request_is_not_sent_later(self_signed, monkeypatch, tls, size, kept_alive):
    """Unsent bytes of a cancelled request are discarded: the server sees a reset and no complete request."""
    context, file = self_signed
    monkeypatch.setenv("SSL_CERT_FILE", str(file))

    def accepted():
        connection, _ = listener.accept()
        return context.wrap_socket(connection, server_side=True) if tls else connection

    def answer(connection):
        received = b""
        while b"{}" not in received:
            received += connection.recv(1000)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    with slow_reader() as listener:
        url = f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
        async with transport_over() as transport:
            connection = None
            if kept_alive:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(transport.post, url, b"{}", 30.0)
                    connection = await anyio.to_thread.run_sync(accepted)
                    await anyio.to_thread.run_sync(answer, connection)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(transport.post, url, b" " * size, 30.0)
                connection = connection or await anyio.to_thread.run_sync(accepted)
                await anyio.to_thread.run_sync(connection.recv, 1)
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
            received, was_reset = await anyio.to_thread.run_sync(read_to_the_end, connection)
    assert was_reset
    assert len(received) < size / 2


@pytest.mark.parametrize("stack", ["httpx", "aiohttp"])
def test_request_of_a_killed_process_is_not_sent_later(stack):
    """After SIGKILL, the kernel also discards unsent bytes."""
    program = (
        "import anyio, sys\n"
        "from lianlian_async.transport import HttpSender\n"
        "async def main():\n"
        "    transport = await HttpSender.open(None, None, 1)\n"
        "    await transport.post(sys.argv[1], b' ' * 100_000, 60.0)\n"
        "anyio.run(main)\n"
    )
    with slow_reader() as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        environment = os.environ | {"LIANLIAN_HTTP_BACKEND": stack}
        with subprocess.Popen([sys.executable, "-c", program, url], env=environment) as process:
            connection, _ = listener.accept()
            assert connection.recv(1)
            process.kill()
        received, was_reset = read_to_the_end(connection)
    assert was_reset
    assert len(received) < 50_000


@on_both_stacks
async def test_idle_connection_is_closed_normally():
    """An idle connection that was used twice is closed without a reset."""

    async def handler(connection: Connection):
        for _ in range(2):
            await connection.request()
            await connection.respond(b"{}")
        with pytest.raises(anyio.EndOfStream):
            await connection.stream.receive()
        ends.append("normal")

    ends = []
    async with serving(handler) as server:
        async with transport_over() as transport:
            for _ in range(2):
                assert isinstance(await transport.post(server.url, b"{}", 5.0), HttpResponse)
        await wait_until(lambda: server.open == 0)
    assert ends == ["normal"]


# ── connections in advance ───────────────────────────────────────────────────────────────────────


@on_both_stacks
async def test_warm_up_opens_connections(merchant_keys, gateway_keys):
    """The first refunds use the connections that the warm-up opened; the warm-up sends nothing about a refund."""

    async def handler(connection: Connection):
        while (request := await connection.request()) is not None:
            head, body = request
            server.requests.append((connection.number, head, body))
            if head.startswith(b"HEAD"):
                await connection.respond(b"", status="405 Method Not Allowed")
            else:
                await connection.respond(as_json(made(wire.decode(body))))

    async with serving(handler) as server:
        async with RefundSession(at(merchant_keys, gateway_keys, server.url), warm_up=3) as session:
            assert server.opened == 3
            async with anyio.create_task_group() as tasks:
                for number in range(3):
                    tasks.start_soon(session.apply_refund, refund_request(number))
        assert server.opened == 3
    heads = [head for _, head, _ in server.requests]
    assert sum(head.startswith(b"HEAD /exchangerefund.htm ") for head in heads) == 3
    assert sum(head.startswith(b"POST /exchangerefund.htm ") for head in heads) == 3


@on_both_stacks
async def test_session_opens_although_the_warm_up_fails(merchant_keys, gateway_keys, caplog):
    """The failure is logged, and the session opens; the first refund reports the failure again."""
    caplog.set_level("INFO", "lianlian_async")
    merchant = at(merchant_keys, gateway_keys, f"http://127.0.0.1:{unused_port()}")
    async with RefundSession(merchant, warm_up=2, retry=ONCE) as session:
        assert "no connection opened in advance: ConnectError" in caplog.text
        with pytest.raises(RefundNotSent):
            await session.apply_refund(refund_request())


# ── httpx2 (LIANLIAN_TEST_HTTP=httpx2 runs every test on it) ─────────────────────────────────────


@pytest.mark.parametrize("kind", ["client", "transport"])
async def test_clients_and_transports_of_httpx2_work(kind):
    """A refund whose answer is lost is made once, and queried."""
    gateway = sandbox()
    gateway.script(Fault.RESET, call="apply", when=When.AFTER)
    transport = httpx2.ASGITransport(app=gateway)
    async with httpx2.AsyncClient(transport=transport) as client:
        given = {kind: {"client": client, "transport": transport}[kind]}
        async with RefundSession(gateway.merchant(), **given, clock=boot_clock) as session:
            refund = await session.apply_refund(refund_request())
    assert (refund.no_refund, gateway.times_made("R-1"), gateway.requests) == ("R-1", 1, {"apply": 1, "query": 1})


async def test_httpx2_over_a_socket():
    """The request arrives whole; a refused connection and an ended lease are *not sent*."""
    received = []

    async def noting(connection):
        while (request := await connection.request()) is not None:
            received.append(request)
            await connection.respond(b"{}")

    async with serving(noting) as server, httpx2.AsyncClient() as client, transport_over(client=client) as sender:
        answer = await sender.post(server.url, b'{"a":"b"}', 5.0)
        ended = await sender.post(server.url, b"{}", 5.0, iter([True, False, False]).__next__)
        refused = await sender.post(f"http://127.0.0.1:{unused_port()}/", b"{}", 5.0)
        await sender.warm_up(server.url, 1, 5.0)
    assert (answer.status, answer.body, received[0][1]) == (200, b"{}", b'{"a":"b"}')
    assert b"user-agent: lianlian-async/" in received[0][0].lower()
    assert [head.split()[0] for head, _ in received] == [b"POST", b"HEAD"]
    assert isinstance(refused.cause, httpx2.ConnectError)
    for delivery, begin in ((refused, "ConnectError"), (ended, "the lease ended before the request was sent")):
        assert (delivery.may_have_arrived, delivery.reason.partition(":")[0]) == (False, begin)


# ── which stack ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("argument", "variable", "chosen"),
    [
        (None, "", "httpx"),
        (None, "httpx", "httpx"),
        (None, "aiohttp", "aiohttp"),
        ("httpx", "aiohttp", "httpx"),
        ("aiohttp", "httpx", "aiohttp"),
        ("aiohttp", "", "aiohttp"),
    ],
)
@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_choice_of_the_backend(monkeypatch, merchant_keys, gateway_keys, argument, variable, chosen):
    """The backend aiohttp is never selected just because it is installed."""
    monkeypatch.setenv("LIANLIAN_HTTP_BACKEND", variable)
    async with (
        serving(honestly) as server,
        RefundSession(at(merchant_keys, gateway_keys, server.url), http_backend=argument) as session,
    ):
        await session.apply_refund(refund_request())
        assert isinstance(session._gateway._transport._over, PoolTransport) is (chosen == "httpx")
    assert http_backend(argument) == chosen


@pytest.mark.parametrize("streamed", [False, True], ids=["content", "stream"])
async def test_libraries_that_mock_httpx_reach_the_default_backend(merchant, monkeypatch, streamed):
    """pytest-httpx and respx replace AsyncHTTPTransport.handle_async_request: every request reaches them."""
    mocked = []

    async def handle_async_request(self, request):
        mocked.append((request.url.path, await request.aread()))
        answer = as_json(made(wire.decode(request.content)))
        return httpx.Response(200, stream=httpx.ByteStream(answer)) if streamed else httpx.Response(200, content=answer)

    monkeypatch.delenv("LIANLIAN_HTTP_BACKEND", raising=False)
    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", handle_async_request)
    async with RefundSession(merchant) as session:
        for number in range(2):
            assert (await session.apply_refund(refund_request(number))).no_refund == f"R-{number}"
    assert len(mocked) == 2


async def test_a_rejection_through_a_mock_that_reads_the_body_first_is_believed(monkeypatch):
    """A mock such as respx reads the body, and so does its ``side_effect``; the request is not sent twice."""
    gateway = sandbox(default_order=None)
    inner = httpx.ASGITransport(app=gateway)

    async def handle_async_request(self, request):
        assert b"".join([chunk async for chunk in request.stream])
        return await inner.handle_async_request(request)

    monkeypatch.delenv("LIANLIAN_HTTP_BACKEND", raising=False)
    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", handle_async_request)
    async with RefundSession(gateway.merchant()) as session:
        with pytest.raises(RefundRejected):
            await session.apply_refund(refund_request())
    assert gateway.requests == {"apply": 1}


@pytest.mark.parametrize("kind", [httpx.ReadTimeout, httpx.ConnectTimeout])
async def test_a_mocked_connect_timeout_of_the_default_backend_means_not_sent(merchant, monkeypatch, kind):
    """pytest-httpx reads the content of a request before it raises the error that a test wants."""

    async def handle_async_request(self, request):
        await request.aread()
        raise kind("mocked")

    monkeypatch.delenv("LIANLIAN_HTTP_BACKEND", raising=False)
    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", handle_async_request)
    async with RefundSession(merchant, retry=ONCE, deadline=1.0) as session:
        with pytest.raises(RefundNotSent if kind is httpx.ConnectTimeout else RefundOutcomeUnknown):
            await session.apply_refund(refund_request())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"client": httpx.Client()},
            f"client: must be an httpx.AsyncClient or httpx2.AsyncClient object, is {httpx.__name__}.Client",
        ),
        ({"client": httpx.AsyncClient}, f"httpx2.AsyncClient object, is {httpx.__name__}.AsyncClient"),
        ({"client": "httpx"}, "httpx2.AsyncClient object, is builtins.str"),
        ({"client": httpx.AsyncHTTPTransport(verify=False)}, "client: must be an httpx.AsyncClient"),
        (
            {"transport": httpx.HTTPTransport(verify=False)},
            "transport: must be an httpx.AsyncBaseTransport or httpx2.AsyncBaseTransport object",
        ),
        (
            {"client": httpx2.Client()},
            "client: must be an httpx.AsyncClient or httpx2.AsyncClient object, is httpx2.Client",
        ),
        ({"transport": httpx2.AsyncClient()}, "transport: must be an httpx.AsyncBaseTransport"),
        ({"http_backend": "aiohtpp"}, "http_backend: must be httpx or aiohttp, is 'aiohtpp'"),
        ({"http_backend": 1}, "http_backend: must be httpx or aiohttp, is 1"),
        ({"client": httpx.AsyncClient(), "http_backend": "httpx"}, "client, transport and http_backend: give only one"),
    ],
)
def test_client_or_transport_of_another_type_is_refused(merchant, given, told):
    """The error names the argument and its type, before the first refund."""
    with pytest.raises(ConfigurationError, match=re.escape(told)):
        RefundSession(merchant, **given)


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_client_of_aiohttp_is_refused(merchant):
    """The error names the other library's client, before the first refund."""
    async with aiohttp.ClientSession() as client:
        with pytest.raises(ConfigurationError, match=r"httpx2.AsyncClient object, is aiohttp\."):
            RefundSession(merchant, client=client)


@pytest.fixture
def _version_is_read(monkeypatch):
    """Read the version of the installed aiohttp at each use: usually it is read once per process."""
    monkeypatch.setattr(own_transport, "_has_aiohttp", own_transport._has_aiohttp.__wrapped__)


@pytest.mark.usefixtures("_version_is_read")
@pytest.mark.parametrize("installed", ["3.14", "3.14b1", "3.14.5", "4.0.0a1"])
async def test_recent_aiohttp_is_accepted(monkeypatch, installed):
    """Every version from 3.14 on is accepted, however it is written."""
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: installed)
    assert http_backend("aiohttp") == "aiohttp"


@pytest.mark.usefixtures("_version_is_read")
@pytest.mark.parametrize("installed", [None, "3.9.5", "3.13.3"])
async def test_missing_or_old_aiohttp_is_refused(monkeypatch, installed):
    """An aiohttp without a limit on the size of headers is refused like a missing one."""

    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv("LIANLIAN_HTTP_BACKEND", "aiohttp")
    for wanted in (None, "aiohttp"):
        with pytest.raises(ConfigurationError, match=r"lianlian-async\[fast\]"):
            http_backend(wanted)


async def test_unknown_backend_is_refused(monkeypatch, merchant):
    """A misspelt LIANLIAN_HTTP_BACKEND is a ConfigurationError that lists the right values."""
    monkeypatch.setenv("LIANLIAN_HTTP_BACKEND", "aiohtpp")
    with pytest.raises(ConfigurationError, match="LIANLIAN_HTTP_BACKEND: must be httpx or aiohttp, is 'aiohtpp'"):
        RefundSession(merchant)
