"""OpenTelemetry: a span for each call with its requests and pauses as children, and metrics (extra ``otel``).

``RefundSession(merchant, listeners=[OpenTelemetry()])`` uses the global providers. An instrumentor of the HTTP library
adds its HTTP span below each request span. Without an instrumentor, the request span itself is the HTTP client span,
with kind CLIENT and the attributes of the semantic conventions. In both cases a request has one ``traceparent`` header.

Each metric by its name in Prometheus, with one of its labels (prefix: ``lianlian_``) and a query for Grafana:

    lianlian_refunds_total                    outcome    sum by (lianlian_outcome) (rate(…[5m]))
    lianlian_refund_duration_seconds          outcome    histogram_quantile(0.95, sum by (le) (rate(…_bucket[5m])))
    lianlian_requests_total                   finding    sum by (lianlian_request, lianlian_finding) (rate(…[5m]))
    lianlian_calls_in_flight                  call       sum(…)
    lianlian_calls_queued                     cause      sum(…): calls that wait for a connection slot
    lianlian_journal_commit_duration_seconds  standing   histogram_quantile(0.95, sum by (le) (rate(…_bucket[5m])))
    lianlian_notifications_total              verdict    sum by (lianlian_verdict) (rate(…[5m]))
    lianlian_handler_duration_seconds         succeeded  sum(rate(…_count{lianlian_succeeded="false"}[5m]))

To serve them (``pip install opentelemetry-exporter-prometheus``)::

    from lianlian_async import RefundSession
    from lianlian_async.contrib.opentelemetry import OpenTelemetry
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from opentelemetry.sdk.metrics import MeterProvider
    from prometheus_client import start_http_server

    def make_session(merchant, **options):
        provider = MeterProvider(metric_readers=[PrometheusMetricReader()])
        return RefundSession(merchant, listeners=[OpenTelemetry(meter_provider=provider)], **options)

    def serve_metrics(port=9464):
        return start_http_server(port)
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, cast
from urllib.parse import urlsplit

import attrs
from opentelemetry import baggage, context, metrics, propagate, trace
from opentelemetry.trace import Span, SpanKind, StatusCode

from lianlian_async import events

_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Boundaries of the histograms, in seconds."""
_INSTRUMENTORS: Final = {
    "httpx": ("opentelemetry.instrumentation.httpx", "HTTPXClientInstrumentor"),
    "httpx2": ("opentelemetry.instrumentation.httpx", "HTTPX2ClientInstrumentor"),
    "aiohttp": ("opentelemetry.instrumentation.aiohttp_client", "AioHttpClientInstrumentor"),
}


class OpenTelemetry:
    """A listener for any number of sessions and notification endpoints; by default with the global providers."""

    def __init__(
        self, tracer_provider: trace.TracerProvider | None = None, meter_provider: metrics.MeterProvider | None = None
    ) -> None:
        self._tracer = trace.get_tracer("lianlian_async", tracer_provider=tracer_provider)
        self._key = context.create_key("lianlian-span")
        meter = metrics.get_meter("lianlian_async", meter_provider=meter_provider)
        self._refunds = meter.create_counter("lianlian.refunds", "{refund}")
        self._requests = meter.create_counter("lianlian.requests", "{request}")
        self._notifications = meter.create_counter("lianlian.notifications", "{notification}")
        self._in_flight = meter.create_up_down_counter("lianlian.calls.in_flight", "{call}")
        self._queued = meter.create_up_down_counter("lianlian.calls.queued", "{call}")
        self._duration, self._commits, self._handler = (
            meter.create_histogram(f"lianlian.{name}.duration", "s", explicit_bucket_boundaries_advisory=_BUCKETS)
            for name in ("refund", "journal.commit", "handler")
        )

    def __call__(self, event: events.Event) -> AbstractContextManager[None] | None:
        """Receive an event."""
        match event:
            case events.CallBegan():
                return self._span(event.call, event, self._in_flight)
            case events.Paused():
                return self._span(f"wait for {event.cause}", event, self._queued if event.cause == "slot" else None)
            case events.AttemptBegan():
                return self._span(f"{event.request} request", event)
            case events.AttemptEnded():
                status = event.http_status
                self._end(event, str(status) if status and status >= 400 else event.finding, {"FOUND", "NOT_FOUND"})
                self._requests.add(1, _labels(event, "request", "finding"))
            case events.CallEnded():
                self._end(event, event.outcome, {"made", "found"})
                if event.call != "query_refund":
                    self._refunds.add(1, _labels(event, "outcome", "reason"))
                    self._duration.record(event.seconds, _labels(event, "outcome"))
            case events.Leased():
                self._current.add_event("lease", _labels(event, "standing", "seconds"))
                self._commits.record(event.seconds, _labels(event, "standing"))
            case events.Notified():
                self._notifications.add(1, _labels(event, "verdict"))
            case events.ActedOn():
                self._handler.record(event.seconds, _labels(event, "succeeded"))
        return None

    @property
    def _current(self) -> Span:
        """The innermost span of this listener."""
        return cast("Span", context.get_value(self._key) or trace.INVALID_SPAN)

    @contextmanager
    def _span(self, name: str, event: events.Event, counter: metrics.UpDownCounter | None = None) -> Iterator[None]:
        attributes, kind, labels = _labels(event), SpanKind.INTERNAL, _labels(event, "call", "cause")
        if isinstance(event, events.AttemptBegan) and not _has_http_spans(event.backend):
            attributes, kind = attributes | _http(event), SpanKind.CLIENT
        span = self._tracer.start_span(name, kind=kind, attributes=attributes)
        # The baggage is data of the application, which the gateway must not get; an instrumentor would send it, too.
        without_baggage = baggage.clear(trace.set_span_in_context(span))
        token = context.attach(context.set_value(self._key, span, without_baggage))
        if counter is not None:
            counter.add(1, labels)
        try:
            if isinstance(event, events.AttemptBegan):
                propagate.inject(event.headers)  # an instrumentor replaces this header with its own
            yield
        finally:
            if counter is not None:
                counter.add(-1, labels)
            context.detach(token)
            span.end()

    def _end(self, event: events.AttemptEnded | events.CallEnded, result: str, good: set[str]) -> None:
        span = self._current
        span.set_attributes(_labels(event))
        if isinstance(event, events.AttemptEnded) and event.http_status is not None:
            span.set_attribute("http.response.status_code", event.http_status)
        if result not in good:
            span.set_attribute("error.type", result)
            span.set_status(StatusCode.ERROR)


def _labels(event: events.Event, *names: str) -> dict[str, Any]:
    """Return the fields ``names`` of ``event`` as attributes; by default all except HTTP fields and the error text."""
    fields = attrs.asdict(event, recurse=False)
    wanted = names or fields.keys() - {"url", "headers", "http_status", "error"}
    return {f"lianlian.{name}": fields[name] for name in wanted if fields.get(name) is not None}


def _has_http_spans(backend: str) -> bool:
    module, name = _INSTRUMENTORS[backend]
    instrumentor: Any = getattr(sys.modules.get(module), name, None)
    return instrumentor is not None and instrumentor().is_instrumented_by_opentelemetry


def _http(event: events.AttemptBegan) -> dict[str, Any]:
    url = urlsplit(event.url)
    return {
        "http.request.method": "POST",
        "url.full": event.url,
        "server.address": url.hostname or "",
        "server.port": url.port or (80 if url.scheme == "http" else 443),
    } | ({"http.request.resend_count": event.attempt - 1} if event.attempt > 1 else {})
