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

__all__ = ["Event", "Provider", "Recorded", "Trace", "Tracer", "Untraced"]

_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_UNSAMPLED: Final = TraceFlags(TraceFlags.DEFAULT)
_NO_STATE: Final = TraceState()
# Where the library keeps the current span. Asking it each time takes five calls, a third of what a span costs.
(_SPAN_KEY,) = trace.set_span_in_context(trace.INVALID_SPAN, Context())
# As the SDK's TraceIdRatioBased has it, so that whoever else samples by the same share takes the same traces.
_RATIO_BITS: Final = 1 << 64

Event = tuple[int, str, Mapping[str, AttributeValue]]
"""When (ns since the epoch), what, and its attributes."""


class Trace:
    """What the spans of one trace have in common, put into words once."""

    __slots__ = ("exemplar", "flags", "flags_text", "id_text", "is_sampled", "state", "trace_id")

    def __init__(self, trace_id: int, flags: TraceFlags, state: TraceState) -> None:
        self.trace_id = trace_id
        self.flags = flags
        self.state = state
        self.is_sampled = bool(flags & TraceFlags.SAMPLED)
        """Whether it is kept however it ends."""
        self.id_text = f"{trace_id:032x}"
        self.flags_text = f"{flags:02x}"
        self.exemplar = {"trace_id": self.id_text}
        """What leads to it from a measurement."""


class Recorded(Span):
    """A span that is recorded, whether its trace is sampled or not. Once it has ended nothing changes it any more."""

    def __init__(  # noqa: PLR0917  # several are made for every request, and names take time
        self,
        name: str,
        kind: SpanKind,
        scope: str,
        trace: Trace,
        parent_id: int,
        parent_is_remote: bool,
        attributes: dict[str, AttributeValue],
        start_time: int,
        on_end: "Callable[[Recorded], object]",
    ) -> None:
        """`parent_id` is 0 where there is no parent. Times are ns since the epoch; `on_end` gets the span when it is
        over.
        """
        self.name = name
        self.kind = kind
        self.scope = scope
        self.trace = trace
        self.span_id = random.getrandbits(64) or 1
        self.parent_id = parent_id
        self.parent_is_remote = parent_is_remote
        self._attributes = attributes
        self._later: tuple[Callable[..., Mapping[str, AttributeValue]], tuple[Any, ...]] | None = None
        self.events: Sequence[Event] = ()
        self.status: Status | None = None
        self.start_time = start_time
        self.end_time = 0
        """0 while it runs."""
        self._on_end = on_end

    @property
    def attributes(self) -> Mapping[str, AttributeValue]:
        """What it says."""
        if self._later is not None:
            (make, facts), self._later = self._later, None
            self._attributes = {**make(*facts), **self._attributes}
        return self._attributes

    def set_later(self, make: Callable[..., Mapping[str, AttributeValue]], *facts: Any) -> None:
        """Sets what `make` makes of facts, once somebody looks: the export, where it is made for many spans at a time.

        Once a span; what is set itself counts more.
        """
        if not self.end_time:
            self._later = make, facts

    @property
    def parent(self) -> SpanContext | None:
        """What it hangs on."""
        if not self.parent_id:
            return None
        trace = self.trace
        return SpanContext(trace.trace_id, self.parent_id, self.parent_is_remote, trace.flags, trace.state)

    @property
    def context(self) -> SpanContext:
        """What its children hang on. Made when it is asked for, which is seldom: ours need less."""
        trace = self.trace
        return SpanContext(trace.trace_id, self.span_id, False, trace.flags, trace.state)

    @property
    def traceparent(self) -> str:
        """The `traceparent` header for its children elsewhere."""
        return f"00-{self.trace.id_text}-{self.span_id:016x}-{self.trace.flags_text}"

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
            self._attributes.update(attributes)

    def set_attribute(self, key: str, value: Any) -> None:
        """Sets one."""
        if not self.end_time:
            self._attributes[key] = value

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
        parent = (otel_context.get_current() if context is None else context).get(_SPAN_KEY, trace.INVALID_SPAN)
        assert isinstance(parent, Span)
        return self._below(parent, name, kind, dict(attributes) if attributes else {}, start_time or time.time_ns())

    def start_child(self, parent: Span, name: str, kind: SpanKind) -> Span:
        """Starts a span below one that is at hand, which need not be looked for."""
        return self._below(parent, name, kind, {}, time.time_ns())

    def _below(
        self, parent: Span, name: str, kind: SpanKind, attributes: dict[str, AttributeValue], start_time: int
    ) -> Span:
        if not self._admits():
            # Its children are its parent's.
            return trace.NonRecordingSpan(parent.get_span_context())
        if type(parent) is Recorded:
            of, parent_id, is_remote = parent.trace, parent.span_id, False
        else:
            of, parent_id, is_remote = self._continued(parent.get_span_context())
        return Recorded(name, kind, self._scope, of, parent_id, is_remote, attributes, start_time, self._on_end)

    def _continued(self, context: SpanContext) -> tuple[Trace, int, bool]:
        """The trace that a span belongs to whose parent is elsewhere, or nowhere; and that parent."""
        if context.is_valid:
            of = Trace(context.trace_id, context.trace_flags, context.trace_state)
            return of, context.span_id, context.is_remote
        trace_id = random.getrandbits(128) or 1
        flags = _SAMPLED if trace_id & (_RATIO_BITS - 1) < self._bound else _UNSAMPLED
        return Trace(trace_id, flags, _NO_STATE), 0, False

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
        self._token = otel_context.attach(Context({**otel_context.get_current(), _SPAN_KEY: self._span}))
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
