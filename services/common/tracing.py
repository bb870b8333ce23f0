"""OpenTelemetry tracing: the provider of a process, and W3C trace context where there are no headers to carry it."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import Span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

__all__ = ["context_from", "provider", "traceparent_of", "tracer"]

# Spans wait here for the exporter; when it is away, the oldest wait and new ones are dropped.
_QUEUE_SPANS: Final = 4096
_EXPORT_TIMEOUT_SECONDS: Final = 2.0
_PROPAGATOR: Final = TraceContextTextMapPropagator()


@contextmanager
def provider(service: str, *, endpoint: str | None, instance: str = "") -> Iterator[None]:
    """Exports this process's spans over OTLP gRPC to `endpoint` (`host:port`); None exports nothing.

    On leaving, what is still queued is sent, for two seconds at most.
    """
    if endpoint is None:
        yield
        return
    resource = Resource.create({"service.name": f"tokenloom-{service}", "service.instance.id": instance or service})
    tracing = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = _Exporter(endpoint=endpoint, insecure=True, timeout=_EXPORT_TIMEOUT_SECONDS)
    tracing.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=_QUEUE_SPANS, schedule_delay_millis=500))
    # A backend that is away is said once by the exporter itself, at a level that people see; not for every batch.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
    trace.set_tracer_provider(tracing)
    try:
        yield
    finally:
        tracing.force_flush(timeout_millis=int(_EXPORT_TIMEOUT_SECONDS * 1000))
        tracing.shutdown()


class _Exporter(OTLPSpanExporter):
    """Exports from the process that made it; a forked copy of gRPC hangs instead of sending."""

    def __init__(self, *, endpoint: str, insecure: bool, timeout: float) -> None:
        super().__init__(endpoint=endpoint, insecure=insecure, timeout=timeout)
        self._home = os.getpid()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends a batch, or forgets it in a copy."""
        return super().export(spans) if os.getpid() == self._home else SpanExportResult.SUCCESS


def tracer() -> trace.Tracer:
    """The tracer of this process. Without a provider its spans cost next to nothing."""
    return trace.get_tracer("tokenloom")


def context_from(traceparent: str | None, tracestate: str | None = None) -> Context | None:
    """The context that a `traceparent` header tells of; None when there is none."""
    if not traceparent:
        return None
    carrier: dict[str, str] = {"traceparent": traceparent}
    if tracestate:
        carrier["tracestate"] = tracestate
    return _PROPAGATOR.extract(carrier)


def traceparent_of(span: Span) -> str:
    """The `traceparent` header for children of a span; empty when it isn't recorded."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")
