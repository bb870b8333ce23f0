"""OpenTelemetry tracing: the provider of a process, and W3C trace context where there are no headers to carry it."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from services.common.settings import TracingSettings
from services.common.trace_context import SPAN_KEY, Current, Remote
from services.common.trace_export import Outbound
from services.common.trace_sampling import Keeper
from services.common.trace_spans import Provider, Recorded, Tracer
from services.common.trace_untraced import Untraced

__all__ = [
    "FIRST_OUTPUT",
    "child_of",
    "context_from",
    "current",
    "gen_ai",
    "provider",
    "resource_of",
    "traceparent_of",
    "tracer",
]

FIRST_OUTPUT: Final = "first token"
"""The event of a span whose generation began to show."""
_NAME: Final = "tokenloom"
_CLOSING_SECONDS: Final = 2.0
_PROPAGATOR: Final = TraceContextTextMapPropagator()
_USUAL: Final = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_NO_TRACE: Final = "0" * 32
_NO_SPAN: Final = "0" * 16


class _Own:
    """Kept, since asking the library for a tracer costs as much as a span."""

    tracer: Tracer | Untraced = Untraced()


@contextmanager
def provider(
    service: str,
    *,
    endpoint: str | None,
    instance: str = "",
    settings: TracingSettings = TracingSettings(),  # noqa: B008  # immutable
) -> Iterator[None]:
    """Exports this process's spans over OTLP gRPC to `endpoint` (`host:port`); None exports nothing.

    On leaving, what is still queued is sent, for two seconds at most.
    """
    if endpoint is None:
        yield
        return
    outbound = Outbound(endpoint, resource_of(service, instance).attributes)
    keeper = Keeper(outbound.send, slow_seconds=settings.slow_seconds)
    tracing = Provider(settings.sample_ratio, keeper.on_end, outbound.admits)
    # vLLM makes its spans by the process's provider.
    trace.set_tracer_provider(tracing)
    _Own.tracer = tracing.get_tracer(_NAME)
    try:
        yield
    finally:
        outbound.close(within=_CLOSING_SECONDS)


def tracer() -> trace.Tracer:
    """The tracer of this process. Without a provider its spans cost next to nothing."""
    return _Own.tracer


def child_of(parent: Span, name: str, kind: SpanKind) -> Span:
    """A span below one that is at hand: what the tracer does, without looking for the current one."""
    return _Own.tracer.start_child(parent, name, kind)


def current(span: Span) -> AbstractContextManager[Span]:
    """A span as the current one in the block, with which it ends. It doesn't tell what fails there."""
    return nullcontext(span) if span is trace.INVALID_SPAN else Current(span, False, False, True)


def context_from(traceparent: str | None, tracestate: str | None = None) -> Context | None:
    """The context that a `traceparent` header tells of; None when there is none."""
    if not traceparent:
        return None
    if not tracestate and (usual := _USUAL.fullmatch(traceparent)):
        trace_id, span_id, flags = usual.groups()
        if trace_id != _NO_TRACE and span_id != _NO_SPAN:
            # What the library's propagator makes of it, in a fraction of the time.
            return Context({SPAN_KEY: Remote(trace_id, span_id, flags)})
    carrier: dict[str, str] = {"traceparent": traceparent}
    if tracestate:
        carrier["tracestate"] = tracestate
    return _PROPAGATOR.extract(carrier)


def resource_of(service: str, instance: str = "") -> Resource:
    """What everything that a process exports says of it."""
    return Resource.create(
        {
            "service.name": f"tokenloom-{service}",
            "service.instance.id": instance or service,
            "service.version": version("tokenloom"),
        }
    )


def traceparent_of(span: Span) -> str:
    """The `traceparent` header for children of a span; empty when it isn't recorded."""
    if isinstance(span, (Recorded, Remote)):
        return span.traceparent
    # What the library's propagator writes, in a twentieth of the time.
    own = span.get_span_context()
    return f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}" if own.is_valid else ""


def gen_ai(operation: str, model: str | None) -> dict[str, AttributeValue]:
    """What OpenTelemetry's GenAI conventions want on every span: the operation ("chat", …) and the model asked for."""
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _NAME,
        "gen_ai.request.model": model or "",
    }
