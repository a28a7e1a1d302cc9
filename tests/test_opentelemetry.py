"""Spans, metrics and ``traceparent``, with the instrumentors of httpx and aiohttp and without them."""

from __future__ import annotations

import re
from contextlib import contextmanager
from decimal import Decimal

import anyio
import httpx
import pytest
from opentelemetry import baggage, context
from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import REGISTRY, generate_latest

from lianlian_async import NotificationEndpoint, RefundRejected, RefundSession, RetryPolicy
from lianlian_async.cli.sandbox.server import serving
from lianlian_async.contrib import opentelemetry
from lianlian_async.contrib.opentelemetry import OpenTelemetry
from lianlian_async.events import Event
from lianlian_async.journal import MemoryJournal
from lianlian_async.sandbox import Fault, SandboxGateway
from tests.support.notices import HEADERS, Handler, notification
from tests.support.parties import boot_clock, refund_request, sandbox
from tests.support.readme import run_example
from tests.test_events import POLICY, request

pytestmark = pytest.mark.anyio


class Telemetry:
    """Providers with in-memory exporters, and a listener that uses them."""

    def __init__(self):
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.listener = OpenTelemetry(tracer_provider=self.tracers, meter_provider=self.meters)

    @property
    def spans(self):
        return self.exporter.get_finished_spans()

    def tree(self):
        """Return the spans in the order of their start, each with the names of its ancestors before it."""
        by_id = {span.context.span_id: span for span in self.spans}

        def path(span):
            above = path(by_id[span.parent.span_id]) if span.parent and span.parent.span_id in by_id else ()
            return (*above, span.name)

        return [path(span) for span in sorted(self.spans, key=lambda span: span.start_time)]

    def metrics(self):
        """Return each metric as {its attribute values: count or sum}."""
        found = {}
        for resource in self.reader.get_metrics_data().resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    found[metric.name] = {
                        tuple(str(value) for _, value in sorted(point.attributes.items())): getattr(
                            point, "count", None
                        )
                        or point.value
                        for point in metric.data.data_points
                    }
        return found


@pytest.fixture
def telemetry():
    made = Telemetry()
    yield made
    made.tracers.shutdown()
    made.meters.shutdown()


@contextmanager
def instrumented(instrumentor, telemetry):
    """Activate an instrumentor (or none) with the providers of ``telemetry``."""
    if instrumentor is None:
        yield
        return
    made = instrumentor()
    made.instrument(tracer_provider=telemetry.tracers, meter_provider=telemetry.meters)
    try:
        yield
    finally:
        made.uninstrument()


class Watched:
    """The gateway as an ASGI application that records the ``traceparent`` headers of each request."""

    def __init__(self, gateway):
        self.gateway = gateway
        self.traceparents = []

    async def __call__(self, scope, receive, send):
        self.traceparents.append([value.decode() for name, value in scope["headers"] if name == b"traceparent"])
        await self.gateway(scope, receive, send)


INSTRUMENTORS = {"none": None, "httpx": HTTPXClientInstrumentor, "aiohttp": AioHttpClientInstrumentor}


@pytest.mark.parametrize("instrumentor", INSTRUMENTORS)
@pytest.mark.parametrize("backend", ["httpx", "aiohttp"])
async def test_spans_of_a_refund(backend, instrumentor, telemetry, anyio_backend):
    """A call has its requests and pauses as children; each request has one CLIENT span and one ``traceparent``."""
    if backend == "aiohttp" and anyio_backend[0] == "trio":
        pytest.skip("aiohttp runs on asyncio only")
    gateway = SandboxGateway(default_order=Decimal("10.00"))
    gateway.script(Fault.HTTP_500, call="apply")
    gateway.script(Fault.BUSY, call="query")
    watched = Watched(gateway)
    with instrumented(INSTRUMENTORS[instrumentor], telemetry), serving(watched) as base_url:
        async with RefundSession(
            gateway.merchant(base_url), http_backend=backend, retry=POLICY, listeners=[telemetry.listener]
        ) as session:
            with telemetry.tracers.get_tracer("shop").start_as_current_span("order"):
                await session.apply_refund(request())
    has_http = instrumentor == backend
    call = ("order", "apply_refund")

    def sent(name):
        return [(*call, name), *([(*call, name, "POST")] if has_http else [])]

    query = sent("query request")
    assert telemetry.tree() == [
        call[:1],
        call,
        *sent("apply request"),
        *query,
        (*call, "wait for backoff"),
        *query,
    ]
    clients = [
        span for span in sorted(telemetry.spans, key=lambda span: span.start_time) if span.kind is SpanKind.CLIENT
    ]
    assert [span.name for span in clients] == (
        ["POST"] * 3 if has_http else [name[-1] for name in (*sent("apply request"), *query, *query)]
    )
    assert watched.traceparents == [
        [f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{span.context.trace_flags:02x}"]
        for span in clients
    ]
    if not has_http:
        port = int(base_url.rpartition(":")[2])
        first, _, third = (dict(span.attributes) for span in clients)
        expected = {
            "http.request.method": "POST",
            "url.full": f"{base_url}/exchangerefund.htm",
            "server.address": "127.0.0.1",
            "server.port": port,
            "http.response.status_code": 500,
            "error.type": "500",
            "lianlian.no_refund": "R-1",
            "lianlian.attempt": 1,
            "lianlian.backend": backend,
            "lianlian.finding": "UNCERTAIN",
        }
        assert first.items() >= expected.items()
        assert third["http.request.resend_count"] == 1
        assert third["lianlian.ret_code"] == "0000"
        assert [span.status.status_code for span in clients] == [StatusCode.ERROR, StatusCode.ERROR, StatusCode.UNSET]
    (ended,) = [span for span in telemetry.spans if span.name == "apply_refund"]
    assert ended.attributes["lianlian.outcome"] == "made"
    assert (ended.attributes["lianlian.attempts"], ended.attributes["lianlian.queries"]) == (1, 2)
    assert ended.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("instrumentor", INSTRUMENTORS)
async def test_the_gateway_gets_no_baggage(instrumentor, telemetry, anyio_backend):
    """A web service may keep the user's name in it. An instrumentor sends the baggage of the current context."""
    if instrumentor == "aiohttp" and anyio_backend[0] == "trio":
        pytest.skip("aiohttp runs on asyncio only")
    gateway, headers = sandbox(), []

    async def application(scope, receive, send):
        headers.append({name for name, _ in scope["headers"]} & {b"traceparent", b"baggage"})
        await gateway(scope, receive, send)

    backend = "aiohttp" if instrumentor == "aiohttp" else "httpx"
    with instrumented(INSTRUMENTORS[instrumentor], telemetry), serving(application) as base_url:
        token = context.attach(baggage.set_baggage("user", "Li Lei"))
        async with RefundSession(
            gateway.merchant(base_url), http_backend=backend, listeners=[telemetry.listener]
        ) as session:
            await session.apply_refund(refund_request())
        assert baggage.get_all() == {"user": "Li Lei"}
        context.detach(token)
    assert headers == [{b"traceparent"}]


@pytest.mark.virtual_time
async def test_metrics(telemetry):
    """Refunds by outcome, requests, calls in flight and queued, commits, notifications and handler calls."""
    gateway, in_flight = sandbox(), []
    gateway.add_order("O-2", Decimal("5.00"))
    gateway.script(Fault.HTTP_500, no_refund="R-3", call="apply")
    gateway.script(Fault.BUSY, no_refund="R-3", call="query", ret_code="3005")

    async def watching(exchange, call_next):
        metrics = telemetry.metrics()
        in_flight.append((metrics["lianlian.calls.in_flight"], metrics.get("lianlian.calls.queued")))
        return await call_next(exchange)

    async with MemoryJournal() as journal:
        options = {"journal": journal, "max_connections": 1, "middleware": [watching], "clock": boot_clock}
        async with gateway.session(**options, listeners=[telemetry.listener]) as session:
            async with anyio.create_task_group() as tasks:
                for number in (1, 2, 3):
                    tasks.start_soon(session.outcome_of, refund_request(number))
            endpoint = NotificationEndpoint(session.merchant, Handler(), session=session, clock=boot_clock)
            await endpoint.handle(notification(), HEADERS)
            found = await session.query_refund(refund_request(1).query())
            assert found.no_refund == "R-1"
    metrics = telemetry.metrics()
    assert in_flight[0] == ({("apply_refund",): 3}, {("slot",): 2})
    assert metrics["lianlian.calls.in_flight"] == {("apply_refund",): 0, ("query_refund",): 0}
    assert metrics["lianlian.calls.queued"] == {("slot",): 0}
    reason = "3005 date of the refund too old"
    (unknown,) = [key for key in metrics["lianlian.refunds"] if key[0] == "RefundOutcomeUnknown"]
    assert unknown[1].startswith("3005 "), reason
    assert metrics["lianlian.refunds"] == {("made",): 1, ("RefundRejected",): 1, unknown: 1}
    assert metrics["lianlian.refund.duration"] == {("made",): 1, ("RefundRejected",): 1, ("RefundOutcomeUnknown",): 1}
    assert metrics["lianlian.requests"] == {
        ("FOUND", "apply"): 1,
        ("REJECTED", "apply"): 1,
        ("UNCERTAIN", "apply"): 1,
        ("REJECTED", "query"): 1,
        ("FOUND", "query"): 1,
    }
    assert metrics["lianlian.journal.commit.duration"] == {("new",): 3}
    assert metrics["lianlian.notifications"] == {("acted",): 1}
    assert metrics["lianlian.handler.duration"] == {("True",): 1}
    (lease, *_) = [span.events for span in telemetry.spans if span.name == "apply_refund"]
    assert [(event.name, event.attributes["lianlian.standing"]) for event in lease] == [("lease", "new")]


@pytest.mark.virtual_time
async def test_two_telemetries_do_not_share_spans(telemetry):
    """Each listener ends its own spans, whichever is the current one."""
    other, gateway = Telemetry(), sandbox()
    gateway.add_order("O-1", Decimal("5.00"))
    async with gateway.session(listeners=[telemetry.listener, other.listener]) as session:
        with pytest.raises(RefundRejected):
            await session.apply_refund(refund_request())
    for each in (telemetry, other):
        assert [(span.name, span.attributes["error.type"]) for span in each.spans] == [
            ("apply request", "REJECTED"),
            ("apply_refund", "RefundRejected"),
        ]
    other.tracers.shutdown()
    other.meters.shutdown()


async def test_an_event_of_a_later_release_is_ignored(telemetry):
    """An unknown event begins no span and changes no metric."""
    assert telemetry.listener(Event(no_refund=None, backend="httpx")) is None
    assert telemetry.spans == ()


@pytest.mark.virtual_time
async def test_no_span_has_a_key_or_a_body(telemetry):
    """Spans hold neither keys nor signatures nor messages."""
    gateway, bodies = sandbox(), []

    async def watching(exchange, call_next):
        bodies.append(exchange.body.decode())
        return await call_next(exchange)

    for fault in Fault:
        gateway.script(fault, call="apply", no_refund=f"R-{fault.name}")
    async with gateway.session(
        clock=boot_clock, listeners=[telemetry.listener], middleware=[watching], retry=RetryPolicy()
    ) as session:
        for fault in Fault:
            await session.outcome_of(refund_request(fault.name))
    text = "".join(span.to_json() for span in telemetry.spans)
    keys = [line for line in gateway.merchant_key.to_pem().splitlines() if "-----" not in line]
    signatures = [re.search('"sign": ?"([^"]+)"', body)[1] for body in bodies]
    assert [secret for secret in (*keys, *signatures, "oid_partner") if secret in text] == []


async def test_every_metric_of_the_list_is_served_to_prometheus():
    """The recipe serves each metric of the module's list, with the label that the list names."""
    recipe, gateway = run_example("opentelemetry"), SandboxGateway(default_order=Decimal("10.00"))
    gateway.script(Fault.HTTP_500, call="apply")
    async with MemoryJournal() as journal:
        session = recipe["make_session"](
            gateway.merchant(), max_connections=1, journal=journal, transport=httpx.ASGITransport(app=gateway)
        )
        async with session, anyio.create_task_group() as tasks:
            endpoint = NotificationEndpoint(session.merchant, Handler(), session=session)
            await endpoint.handle(b"", HEADERS)
            for number in (1, 2):
                tasks.start_soon(session.apply_refund, request(number))
    server, thread = recipe["serve_metrics"](0)
    try:
        async with httpx.AsyncClient() as client:
            served = (await client.get(f"http://127.0.0.1:{server.server_port}/metrics")).text
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    listed = re.findall(r"^    (lianlian_\w+)  +(\w+)", opentelemetry.__doc__, re.MULTILINE)
    assert len(listed) == 8
    missing = [
        name for name, label in listed if not re.search(rf"^{name}(_count)?{{.*lianlian_{label}=", served, re.MULTILINE)
    ]
    assert missing == ["lianlian_handler_duration_seconds"]
    assert generate_latest(REGISTRY)
