"""Spans that cost little: what OpenTelemetry's API asks for, kept in plain fields until they are sent."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from random import getrandbits
from time import time_ns
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)
from opentelemetry.util.types import Attributes, AttributeValue

from services.common.trace_context import SPAN_KEY, Current, Remote, failed

__all__ = ["Event", "Provider", "Recorded", "Trace", "Tracer"]

_FLAGS_TEXT: Final = tuple(f"{flags:02x}" for flags in range(256))
_NO_STATE: Final = TraceState()
# As the SDK's TraceIdRatioBased has it, so that whoever else samples by the same share takes the same traces.
_RATIO_BITS: Final = 1 << 64

_NONE: Final[Mapping[str, AttributeValue]] = {}

Event = tuple[int, str, Mapping[str, AttributeValue]]
"""When (ns since the epoch), what, and its attributes."""


class Trace:
    """What the spans of one trace have in common, put into words once."""

    __slots__ = ("exemplar", "flags", "flags_text", "id", "id_text", "is_sampled", "state")

    def __init__(self, id_text: str, flags: int, state: TraceState) -> None:
        """`id_text`: 32 hexadecimal digits."""
        self.id = bytes.fromhex(id_text)
        self.flags = flags
        self.state = state
        self.is_sampled = bool(flags & TraceFlags.SAMPLED)
        """Whether it is kept however it ends."""
        self.id_text = id_text
        self.flags_text = _FLAGS_TEXT[flags]
        self.exemplar = {"trace_id": id_text} if self.is_sampled else None
        """What leads to it from a measurement; None where it isn't sampled."""

    def context(self, span_id: int, *, is_remote: bool) -> SpanContext:
        """What OpenTelemetry calls a span of it by."""
        return SpanContext(int(self.id_text, 16), span_id, is_remote, TraceFlags(self.flags), self.state)


class Recorded(Span):
    """A span that is recorded, whether its trace is sampled or not. Once it has ended nothing changes it any more."""

    __slots__ = (
        *("_on_end", "attributes", "end_time", "events", "kind", "name", "parent_id", "parent_is_remote"),
        *("sayings", "scope", "span_id", "start_time", "status", "trace"),
    )

    def __init__(  # noqa: PLR0917  # several are made for every request, and names take time
        self,
        name: str,
        kind: SpanKind,
        scope: str,
        trace: Trace,
        parent_id: int,
        parent_is_remote: bool,
        attributes: dict[str, AttributeValue] | None,
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
        self.span_id = getrandbits(64) or 1
        self.parent_id = parent_id
        self.parent_is_remote = parent_is_remote
        self.attributes = attributes
        """What was set one by one."""
        self.sayings: dict[Callable[..., bytes], tuple[Any, ...]] = {}
        """What writes the other attributes, and of what."""
        self.events: Sequence[Event] = ()
        self.status: Status | None = None
        self.start_time = start_time
        self.end_time = 0
        """0 while it runs."""
        self._on_end = on_end

    def say(self, write: Callable[..., bytes], *facts: Any) -> None:
        """Adds the attributes that `write` makes of facts, by trace_words, once the span is written, when many are.

        Said again with the same `write`, the later facts count. What is said is not to be set as well.
        """
        if not self.end_time:
            self.sayings[write] = facts

    @property
    def parent(self) -> SpanContext | None:
        """What it hangs on."""
        return self.trace.context(self.parent_id, is_remote=self.parent_is_remote) if self.parent_id else None

    @property
    def context(self) -> SpanContext:
        """What its children hang on. Made when it is asked for, which is seldom: ours need less."""
        return self.trace.context(self.span_id, is_remote=False)

    @property
    def traceparent(self) -> str:
        """The `traceparent` header for its children elsewhere."""
        trace = self.trace
        return f"00-{trace.id_text}-{self.span_id:016x}-{trace.flags_text}"

    def end(self, end_time: int | None = None) -> None:
        """It is over, now if no other time is told."""
        if not self.end_time:
            self.end_time = end_time or time_ns()
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
            if self.attributes is None:
                self.attributes = {}
            self.attributes.update(attributes)

    def set_attribute(self, key: str, value: Any) -> None:
        """Sets one."""
        if not self.end_time:
            if self.attributes is None:
                self.attributes = {}
            self.attributes[key] = value

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        """Something happened, now if no other time is told."""
        if not self.end_time:
            self.events = (*self.events, (timestamp or time_ns(), name, attributes or _NONE))

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
            self.set_status(failed(error))
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
        parent = (otel_context.get_current() if context is None else context).get(SPAN_KEY, trace.INVALID_SPAN)
        assert isinstance(parent, Span)
        return self._below(parent, name, kind, dict(attributes) if attributes else None, start_time or time_ns())

    def start_child(self, parent: Span, name: str, kind: SpanKind) -> Span:
        """Starts a span below one that is at hand, which need not be looked for."""
        if type(parent) is not Recorded:
            return self._below(parent, name, kind, None, time_ns())
        if not self._admits():
            return NonRecordingSpan(parent.context)
        of, parent_id = parent.trace, parent.span_id
        return Recorded(name, kind, self._scope, of, parent_id, False, None, time_ns(), self._on_end)

    def _below(
        self, parent: Span, name: str, kind: SpanKind, attributes: dict[str, AttributeValue] | None, start_time: int
    ) -> Span:
        if not self._admits():
            # Its children are its parent's.
            return NonRecordingSpan(parent.get_span_context())
        if type(parent) is Recorded:
            of, parent_id, is_remote = parent.trace, parent.span_id, False
        elif type(parent) is Remote:
            of = Trace(parent.trace_id, int(parent.flags, 16), _NO_STATE)
            parent_id, is_remote = int(parent.span_id, 16), True
        elif parent is trace.INVALID_SPAN:
            of, parent_id, is_remote = self._new_trace(), 0, False
        else:
            of, parent_id, is_remote = self._continued(parent.get_span_context())
        return Recorded(name, kind, self._scope, of, parent_id, is_remote, attributes, start_time, self._on_end)

    def _continued(self, context: SpanContext) -> tuple[Trace, int, bool]:
        """The trace that a span belongs to whose parent is elsewhere, or nowhere; and that parent."""
        if context.is_valid:
            of = Trace(f"{context.trace_id:032x}", context.trace_flags, context.trace_state)
            return of, context.span_id, context.is_remote
        return self._new_trace(), 0, False

    def _new_trace(self) -> Trace:
        number = getrandbits(128) or 1
        return Trace(f"{number:032x}", int(number & (_RATIO_BITS - 1) < self._bound), _NO_STATE)

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
        return Current(span, record_exception, set_status_on_exception, end_on_exit)


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
