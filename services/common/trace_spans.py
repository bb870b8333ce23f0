"""Spans that cost little: what OpenTelemetry's API asks for, kept in plain fields until they are sent."""

import random
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from opentelemetry.util.types import Attributes, AttributeValue

__all__ = ["Event", "Provider", "Recorded", "Tracer", "Untraced"]

_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_UNSAMPLED: Final = TraceFlags(TraceFlags.DEFAULT)
_NO_STATE: Final = TraceState()
# As the SDK's TraceIdRatioBased has it, so that whoever else samples by the same share takes the same traces.
_RATIO_BITS: Final = 1 << 64

Event = tuple[int, str, Mapping[str, AttributeValue]]
"""When (ns since the epoch), what, and its attributes."""


class Recorded(Span):
    """A span that is recorded, whether its trace is sampled or not. Once it has ended nothing changes it any more."""

    def __init__(
        self,
        *,
        name: str,
        scope: str,
        trace_id: int,
        flags: TraceFlags,
        state: TraceState,
        parent: SpanContext | None,
        kind: SpanKind,
        attributes: dict[str, AttributeValue],
        start_time: int,
        on_end: "Callable[[Recorded], object]",
    ) -> None:
        """Times are ns since the epoch; `on_end` gets the span when it is over."""
        self.name = name
        self.scope = scope
        self.trace_id = trace_id
        self.span_id = random.getrandbits(64) or 1
        self.flags = flags
        self.state = state
        self.parent = parent
        self.kind = kind
        self.attributes = attributes
        self.events: Sequence[Event] = ()
        self.status: Status | None = None
        self.start_time = start_time
        self.end_time = 0
        """0 while it runs."""
        self._on_end = on_end
        self._context: SpanContext | None = None

    @property
    def context(self) -> SpanContext:
        """What its children hang on. Made when it is asked for, since most have none here."""
        if self._context is None:
            self._context = SpanContext(self.trace_id, self.span_id, False, self.flags, self.state)
        return self._context

    @property
    def is_sampled(self) -> bool:
        """Whether its trace is kept however it ends."""
        return bool(self.flags & TraceFlags.SAMPLED)

    @property
    def traceparent(self) -> str:
        """The `traceparent` header for its children elsewhere."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.flags:02x}"

    def end(self, end_time: int | None = None) -> None:
        """It is over, now if no other time is told."""
        if not self.end_time:
            self.end_time = end_time or time.time_ns()
            self._on_end(self)

    def get_span_context(self) -> SpanContext:
        """What its children hang on."""
        return self.context

    def is_recording(self) -> bool:
        """Whether it runs still."""
        return not self.end_time

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Sets many."""
        if not self.end_time:
            self.attributes.update(attributes)

    def set_attribute(self, key: str, value: Any) -> None:
        """Sets one."""
        if not self.end_time:
            self.attributes[key] = value

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        """Something happened, now if no other time is told."""
        if not self.end_time:
            self.events = (*self.events, (timestamp or time.time_ns(), name, attributes or {}))

    def update_name(self, name: str) -> None:
        """Names it anew."""
        if not self.end_time:
            self.name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """How it went; what was said to be well stays well, as OpenTelemetry wants it."""
        if not self.end_time and (self.status is None or self.status.status_code is not StatusCode.OK):
            self.status = status if isinstance(status, Status) else Status(status, description)

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,  # the signature is the base class's
    ) -> None:
        """Adds the event of an exception."""
        told: dict[str, AttributeValue] = {
            "exception.type": type(exception).__qualname__,
            "exception.message": str(exception),
            "exception.stacktrace": "".join(traceback.format_exception(exception)),
            "exception.escaped": str(escaped),
            **(attributes or {}),
        }
        self.add_event("exception", told, timestamp)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: Any) -> None:
        if isinstance(error, Exception):
            self.record_exception(error)
            self.set_status(_failed(error))
        self.end()


class Tracer(trace.Tracer):
    """Makes spans that are recorded."""

    def __init__(
        self, scope: str, ratio: float, on_end: Callable[[Recorded], object], admits: Callable[[], bool]
    ) -> None:
        self._scope = scope
        self._bound = round(ratio * _RATIO_BITS)
        self._on_end = on_end
        self._admits = admits

    def start_span(  # noqa: PLR0917  # the signature is the base class's
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,  # noqa: ARG002
        start_time: int | None = None,
        record_exception: bool = True,  # noqa: ARG002
        set_status_on_exception: bool = True,  # noqa: ARG002
    ) -> Span:
        """Starts a span. Links are not kept; nothing here makes any."""
        return self._start(name, trace.get_current_span(context).get_span_context(), kind, attributes, start_time)

    def start_child(self, parent: Span, name: str, kind: SpanKind) -> Span:
        """Starts a span below one that is at hand, which need not be looked for."""
        return self._start(name, parent.get_span_context(), kind, None, None)

    def _start(
        self, name: str, parent: SpanContext | None, kind: SpanKind, attributes: Attributes, start_time: int | None
    ) -> Span:
        assert parent is not None
        if not self._admits():
            # Its children are its parent's.
            return trace.NonRecordingSpan(parent)
        if parent.is_valid:
            trace_id, flags, state = parent.trace_id, parent.trace_flags, parent.trace_state
        else:
            parent, trace_id, state = None, random.getrandbits(128) or 1, _NO_STATE
            flags = _SAMPLED if trace_id & (_RATIO_BITS - 1) < self._bound else _UNSAMPLED
        return Recorded(
            name=name,
            scope=self._scope,
            trace_id=trace_id,
            flags=flags,
            state=state,
            parent=parent,
            kind=kind,
            attributes=dict(attributes) if attributes else {},
            start_time=start_time or time.time_ns(),
            on_end=self._on_end,
        )

    def start_as_current_span(  # type: ignore[override]  # noqa: PLR0917  # the base class's makes decorators, too
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
        end_on_exit: bool = True,
    ) -> AbstractContextManager[Span]:
        """Starts a span that is the current one in the block."""
        span = self.start_span(name, context, kind, attributes, links, start_time)
        return _Current(span, record_exception, set_status_on_exception, end_on_exit)


class _Current(AbstractContextManager[Span]):
    """What the library's `use_span` does, at a third of its cost."""

    __slots__ = ("_ends", "_records", "_says_status", "_span", "_token")

    def __init__(self, span: Span, records: bool, says_status: bool, ends: bool) -> None:
        self._span = span
        self._records = records
        self._says_status = says_status
        self._ends = ends

    def __enter__(self) -> Span:
        self._token = otel_context.attach(trace.set_span_in_context(self._span))
        return self._span

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: Any) -> None:
        otel_context.detach(self._token)
        span = self._span
        if isinstance(error, Exception):
            if self._records:
                span.record_exception(error)
            if self._says_status:
                span.set_status(_failed(error))
        if self._ends:
            span.end()


class Untraced(trace.Tracer):
    """Records nothing, as the library's own does that, at a third of its cost: spans only hand on their parents'."""

    def start_span(  # noqa: PLR0917  # the signature is the base class's
        self,
        name: str,  # noqa: ARG002
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,  # noqa: ARG002
        attributes: Attributes = None,  # noqa: ARG002
        links: Sequence[Link] | None = None,  # noqa: ARG002
        start_time: int | None = None,  # noqa: ARG002
        record_exception: bool = True,  # noqa: ARG002
        set_status_on_exception: bool = True,  # noqa: ARG002
    ) -> Span:
        """What its children are to hang on."""
        return self._below(trace.get_current_span(context))

    def start_child(
        self,
        parent: Span,
        name: str,  # noqa: ARG002
        kind: SpanKind,  # noqa: ARG002
    ) -> Span:
        """The same below one that is at hand."""
        return self._below(parent)

    @staticmethod
    def _below(parent: Span) -> Span:
        return trace.NonRecordingSpan(parent.get_span_context()) if parent.is_recording() else parent

    def start_as_current_span(  # type: ignore[override]  # noqa: PLR0917  # the base class's makes decorators, too
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,  # noqa: ARG002
        attributes: Attributes = None,  # noqa: ARG002
        links: Sequence[Link] | None = None,  # noqa: ARG002
        start_time: int | None = None,  # noqa: ARG002
        record_exception: bool = True,
        set_status_on_exception: bool = True,
        end_on_exit: bool = True,
    ) -> AbstractContextManager[Span]:
        """The same, as the current one in the block."""
        span = self.start_span(name, context)
        if context is None and span is trace.INVALID_SPAN:
            return nullcontext(span)
        return _Current(span, record_exception, set_status_on_exception, end_on_exit)


class Provider(trace.TracerProvider):
    """Makes tracers whose spans are all recorded, since how they end may matter, and given away when they have ended.

    A span's trace is sampled when its parent's is; of traces that begin here, the share that was asked for.
    """

    def __init__(
        self, ratio: float, on_end: Callable[[Recorded], object], admits: Callable[[], bool] = lambda: True
    ) -> None:
        """`ratio`: the share of the traces that begin in this process, 0 to 1. `admits` is asked for each span that
        begins: one that could not be sent anyway is not recorded.
        """
        self._ratio = ratio
        self._on_end = on_end
        self._admits = admits

    def get_tracer(
        self,
        instrumenting_module_name: str,
        instrumenting_library_version: str | None = None,  # noqa: ARG002
        schema_url: str | None = None,  # noqa: ARG002
        attributes: Attributes = None,  # noqa: ARG002
    ) -> Tracer:
        """A tracer whose spans say which module made them."""
        return Tracer(instrumenting_module_name, self._ratio, self._on_end, self._admits)


def _failed(error: Exception) -> Status:
    return Status(StatusCode.ERROR, f"{type(error).__name__}: {error}")
