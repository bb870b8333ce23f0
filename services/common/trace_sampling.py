"""Which traces are kept: a share of all, decided where a trace begins; and what failed, moved or was slow."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode, TraceFlags, TraceState
from opentelemetry.util.types import Attributes

from services.common.trace_export import Outbound

__all__ = ["FAILOVER", "Head", "Keeper"]

FAILOVER: Final = "failover"
"""The event of a span whose request moved to another worker."""
_MOST_TRACES: Final = 1024
_MOST_SPANS: Final = 64
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)


class Head(Sampler):
    """Takes over what the parent was decided to be; records every span either way, since how it ends may matter."""

    def __init__(self, ratio: float) -> None:
        """`ratio` is the share of the traces that begin in this process, 0 to 1."""
        self._root = TraceIdRatioBased(ratio)

    def should_sample(  # noqa: PLR0917  # the signature is the base class's
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """What becomes of a span that begins."""
        parent = trace.get_current_span(parent_context).get_span_context()
        if not parent.is_valid:
            result = self._root.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
            sampled = result.decision is Decision.RECORD_AND_SAMPLE
        else:
            sampled = parent.trace_flags.sampled
        decision = Decision.RECORD_AND_SAMPLE if sampled else Decision.RECORD_ONLY
        return SamplingResult(decision, attributes, parent.trace_state)

    def get_description(self) -> str:
        """For people."""
        return f"Head{{{self._root.get_description()}}}"


class Keeper(SpanProcessor):
    """Sends sampled spans on at once. Of other traces it holds the spans until this process's part of the request is
    over, and sends them on if anything in it failed or moved, or it was slow.

    Each process judges by what it sees itself: of a request that only one of them found notable, the others keep
    nothing.
    """

    def __init__(self, outbound: Outbound, *, slow_seconds: float) -> None:
        """`slow_seconds`: a request that took as long is kept."""
        self._outbound = outbound
        self._slow_ns = slow_seconds * 1e9
        self._held: OrderedDict[int, list[ReadableSpan]] = OrderedDict()
        self._lock = threading.Lock()

    def on_end(self, span: ReadableSpan) -> None:
        """A span is over."""
        context = span.context
        if context is None:
            return
        if context.trace_flags.sampled:
            self._outbound.send(span)
            return
        is_last = span.parent is None or span.parent.is_remote
        for kept in self._judged(context.trace_id, span, is_last=is_last):
            self._outbound.send(_as_sampled(kept))

    def shutdown(self) -> None:
        """Whoever made the outbound queue closes it."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:  # noqa: ARG002  # as the base class has it
        """Sends what is queued."""
        return self._outbound.flush()

    def _judged(self, trace_id: int, span: ReadableSpan, *, is_last: bool) -> Iterable[ReadableSpan]:
        with self._lock:
            if not is_last:
                held = self._held.setdefault(trace_id, [])
                if len(held) < _MOST_SPANS:
                    held.append(span)
                if len(self._held) > _MOST_TRACES:
                    self._held.popitem(last=False)
                return ()
            spans = [*self._held.pop(trace_id, ()), span]
        return spans if self._is_slow(span) or any(map(_is_notable, spans)) else ()

    def _is_slow(self, span: ReadableSpan) -> bool:
        return (span.end_time or 0) - (span.start_time or 0) >= self._slow_ns


def _is_notable(span: ReadableSpan) -> bool:
    return span.status.status_code is StatusCode.ERROR or any(event.name == FAILOVER for event in span.events)


def _as_sampled(span: ReadableSpan) -> ReadableSpan:
    context = span.context
    assert context is not None
    return ReadableSpan(
        name=span.name,
        context=SpanContext(
            context.trace_id, context.span_id, is_remote=False, trace_flags=_SAMPLED, trace_state=context.trace_state
        ),
        parent=span.parent,
        resource=span.resource,
        attributes=span.attributes,
        events=span.events,
        links=span.links,
        kind=span.kind,
        status=span.status,
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )
