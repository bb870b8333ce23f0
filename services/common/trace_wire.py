"""Spans as OTLP has them on the wire."""

import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from typing import Any, Final

from opentelemetry.trace import Status, StatusCode, TraceState

from services.common.trace_spans import Event, Recorded
from services.common.trace_words import attributes_of, field, opening, said, text_field, varint

__all__ = ["export_request", "resource_message"]

# The numbers are those of opentelemetry/proto/trace/v1/trace.proto.
_TIMES: Final = struct.Struct("<BQBQ")
_IDS: Final = struct.Struct(">2s16s2sQ")
_IDS_AND_PARENT: Final = struct.Struct(">2s16s2sQ2sQ")
_FLAGS: Final = struct.Struct("<BBI")
_AT: Final = struct.Struct("<BQ")
_LOCAL: Final = _FLAGS.pack(0x85, 0x01, 0x100)
_REMOTE: Final = _FLAGS.pack(0x85, 0x01, 0x300)
_STATUS_CODES: Final = {StatusCode.UNSET: b"", StatusCode.OK: b"\x18\x01", StatusCode.ERROR: b"\x18\x02"}
_SCOPE_OF: Final = attrgetter("scope")


def export_request(resource: bytes, spans: Iterable[Recorded]) -> bytes:
    """An ExportTraceServiceRequest of spans that have ended; `resource` is what `resource_message` made."""
    # The scope is the same for nearly all of them.
    groups = b"".join([_group(scope, group) for scope, group in groupby(spans, _SCOPE_OF)])
    return field(0x0A, resource + groups)


def resource_message(attributes: Mapping[str, Any]) -> bytes:
    """The `resource` field of ResourceSpans, the same for all that a process sends."""
    return field(0x0A, attributes_of(0x0A, attributes))


def _group(scope: str, spans: Iterable[Recorded]) -> bytes:
    return field(0x12, _scope(scope) + b"".join([part for span in spans for part in _span(span)]))


@lru_cache(256)
def _scope(scope: str) -> bytes:
    return field(0x0A, text_field(0x0A, scope))


def _span(span: Recorded) -> tuple[bytes, bytes]:
    """What stands before a span, and the span."""
    trace = span.trace
    if span.parent_id:
        ids = _IDS_AND_PARENT.pack(b"\x0a\x10", trace.id, b"\x12\x08", span.span_id, b"\x22\x08", span.parent_id)
    else:
        ids = _IDS.pack(b"\x0a\x10", trace.id, b"\x12\x08", span.span_id)
    times = _TIMES.pack(0x39, span.start_time, 0x41, span.end_time)
    parts = [ids, _named(span.name, span.kind.value), times, _REMOTE if span.parent_is_remote else _LOCAL]
    for write, facts in span.sayings.items():
        parts.append(write(*facts))
    if span.attributes:
        parts.append(said(span.attributes))
    for event in span.events:
        parts += _event(event)
    if span.status is not None:
        parts.append(field(0x7A, _status(span.status)))
    if trace.state:
        parts.append(text_field(0x1A, _state(trace.state)))
    content = b"".join(parts)
    return opening(0x12, len(content)), content


@lru_cache(1024)
def _named(name: str, kind: int) -> bytes:
    return text_field(0x2A, name) + b"\x30" + varint(kind + 1)


def _event(event: Event) -> tuple[bytes, ...]:
    at, name, attributes = event
    if attributes:
        return (field(0x5A, _AT.pack(0x09, at) + text_field(0x12, name) + attributes_of(0x1A, attributes)),)
    before, after = _around_time(name)
    return before, _AT.pack(0x09, at), after


@lru_cache(256)
def _around_time(event_name: str) -> tuple[bytes, bytes]:
    after = text_field(0x12, event_name)
    return b"\x5a" + varint(_AT.size + len(after)), after


def _status(status: Status) -> bytes:
    told = text_field(0x12, status.description) if status.description else b""
    return told + _STATUS_CODES[status.status_code]


def _state(state: TraceState) -> str:
    return ",".join(f"{key}={value}" for key, value in state.items())
