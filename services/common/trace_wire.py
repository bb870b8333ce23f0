"""Spans as OTLP has them on the wire, written field by field: a quarter of what protobuf's objects cost."""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from typing import Any, Final

from opentelemetry.trace import Status, StatusCode, TraceState
from opentelemetry.util.types import AttributeValue

from services.common.trace_spans import Event, Recorded

__all__ = ["export_request", "resource_message"]

# The numbers are those of opentelemetry/proto/trace/v1/trace.proto and common/v1/common.proto.
_TIMES: Final = struct.Struct("<BQBQ")
_IDS: Final = struct.Struct(">2sQQ2sQ")
_PARENT: Final = struct.Struct(">2sQ")
_FLAGS: Final = struct.Struct("<BBI")
_DOUBLE: Final = struct.Struct("<Bd")
_AT: Final = struct.Struct("<BQ")
_LOCAL: Final = _FLAGS.pack(0x85, 0x01, 0x100)
_REMOTE: Final = _FLAGS.pack(0x85, 0x01, 0x300)
_STATUS_CODES: Final = {StatusCode.UNSET: b"", StatusCode.OK: b"\x18\x01", StatusCode.ERROR: b"\x18\x02"}
_UINT64: Final = (1 << 64) - 1
_LONGEST_KEPT: Final = 64
_MOST_KEPT: Final = 4
_MOST_KNOWN: Final = 4096
_OF_SPAN: Final = 0x4A
_SCOPE_OF: Final = attrgetter("scope")
_FRACTION: Final = struct.Struct("<d")
# No two requests have the same.
_UNIQUE: Final = frozenset({"tokenloom.request_id", "gen_ai.response.id", "gen_ai.conversation.id"})


def export_request(resource: bytes, spans: Iterable[Recorded]) -> bytes:
    """An ExportTraceServiceRequest of spans that have ended; `resource` is what `resource_message` made."""
    # The scope is the same for nearly all of them.
    groups = b"".join([_group(scope, group) for scope, group in groupby(spans, _SCOPE_OF)])
    return _field(0x0A, resource + groups)


def resource_message(attributes: Mapping[str, Any]) -> bytes:
    """The `resource` field of ResourceSpans, the same for all that a process sends."""
    return _field(0x0A, _attributes(0x0A, attributes))


def _group(scope: str, spans: Iterable[Recorded]) -> bytes:
    return _field(0x12, _scope(scope) + b"".join(map(_span, spans)))


@lru_cache(256)
def _scope(scope: str) -> bytes:
    return _field(0x0A, _text(0x0A, scope))


def _span(span: Recorded) -> bytes:
    trace = span.trace
    trace_id, state = trace.trace_id, trace.state
    parts = [_IDS.pack(b"\x0a\x10", trace_id >> 64, trace_id & _UINT64, b"\x12\x08", span.span_id)]
    if state:
        parts.append(_text(0x1A, _state(state)))
    if span.parent_id:
        parts.append(_PARENT.pack(b"\x22\x08", span.parent_id))
    parts += (_named(span.name, span.kind.value), _TIMES.pack(0x39, span.start_time, 0x41, span.end_time))
    attributes = span.attributes.items()
    try:
        parts += [_known.get(one) or _WRITERS.get(type(one[1]), _any)(*one) for one in attributes]
    except TypeError:  # a list, which can't be looked up
        parts += [_WRITERS.get(type(one[1]), _any)(*one) for one in attributes]
    for event in span.events:
        parts.append(_event(event))
    if span.status is not None:
        parts.append(_field(0x7A, _status(span.status)))
    parts.append(_REMOTE if span.parent_is_remote else _LOCAL)
    return _field(0x12, b"".join(parts))


@lru_cache(1024)
def _named(name: str, kind: int) -> bytes:
    return _text(0x2A, name) + b"\x30" + _varint(kind + 1)


def _event(event: Event) -> bytes:
    at, name, attributes = event
    if attributes:
        return _field(0x5A, _AT.pack(0x09, at) + _text(0x12, name) + _attributes(0x1A, attributes))
    before, after = _around_time(name)
    return before + _AT.pack(0x09, at) + after


@lru_cache(256)
def _around_time(event_name: str) -> tuple[bytes, bytes]:
    after = _text(0x12, event_name)
    return b"\x5a" + _varint(_AT.size + len(after)), after


def _status(status: Status) -> bytes:
    said = _text(0x12, status.description) if status.description else b""
    return said + _STATUS_CODES[status.status_code]


def _state(state: TraceState) -> str:
    return ",".join(f"{key}={value}" for key, value in state.items())


def _attributes(tag: int, attributes: Mapping[str, AttributeValue]) -> bytes:
    return b"".join([_attribute(tag, key, value) for key, value in attributes.items()])


def _attribute(tag: int, key: str, value: Any) -> bytes:
    return _field(tag, _key(key) + _field(0x12, _value(value)))


# The same few come again and again: models, workers, operations. They are looked up as they stand in the span: a text
# is equal to nothing else, which can't be said of numbers.
_known: Final[dict[tuple[str, Any], bytes]] = {}


def _any(key: str, value: Any) -> bytes:
    return _attribute(_OF_SPAN, key, value)


def _keep(key: str, value: Any) -> bytes:
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    written = _known[key, value] = _any(key, value)
    return written


def _string(key: str, value: str) -> bytes:
    if key not in _UNIQUE and len(value) <= _LONGEST_KEPT:
        return _keep(key, value)
    content = _utf8(value)
    return _before_text(key, len(content)) + content


@lru_cache(2048)
def _before_text(key: str, length: int) -> bytes:
    text = b"\x0a" + _varint(length)
    value = _key(key) + b"\x12" + _varint(len(text) + length) + text
    return b"\x4a" + _varint(len(value) + length) + value


@lru_cache(4096)
def _number(key: str, value: int) -> bytes:
    return _any(key, value)


@lru_cache(1024)
def _truth(key: str, value: bool) -> bytes:
    return _any(key, value)


def _fraction(key: str, value: float) -> bytes:
    return _before_fraction(key) + _FRACTION.pack(value)


@lru_cache(1024)
def _before_fraction(key: str) -> bytes:
    return _any(key, 0.0)[: -_FRACTION.size]


def _texts(key: str, value: tuple[Any, ...]) -> bytes:
    # Reasons why choices ended, and hardly anything else.
    known = len(value) <= _MOST_KEPT and all(type(each) is str and len(each) <= _LONGEST_KEPT for each in value)
    return _keep(key, value) if known else _any(key, value)


_WRITERS: Final[Mapping[type, Callable[[str, Any], bytes]]] = {
    str: _string,
    bool: _truth,
    int: _number,
    float: _fraction,
    tuple: _texts,
}


@lru_cache(1024)  # there are only so many: they stand in programs
def _key(key: str) -> bytes:
    return _text(0x0A, key)


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return _text(0x0A, value)
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        return b"\x18" + _varint(value & _UINT64)
    if isinstance(value, float):
        return _DOUBLE.pack(0x21, value)
    if isinstance(value, Sequence):
        return _field(0x2A, b"".join([_field(0x0A, _value(each)) for each in value]))
    # An exporter that chokes on one attribute would lose all that is sent with it.
    return _text(0x0A, repr(value))


def _text(tag: int, text: str) -> bytes:
    return _field(tag, _utf8(text))


def _utf8(text: str) -> bytes:
    # What clients send may have halves of surrogate pairs, which UTF-8 has not.
    return text.encode("utf-8", "replace")


def _field(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:
        return bytes((tag, length)) + content
    return b"%c%b%b" % (tag, _varint(length), content)


def _varint(number: int) -> bytes:
    if number < 0x80:
        return bytes((number,))
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
