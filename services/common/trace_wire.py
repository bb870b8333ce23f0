"""Spans as OTLP has them on the wire, written field by field: a quarter of what protobuf's objects cost."""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, Final

from opentelemetry.trace import Status, StatusCode, TraceState
from opentelemetry.util.types import AttributeValue

from services.common.trace_spans import Event, Recorded

__all__ = ["export_request", "resource_message"]

# The numbers are those of opentelemetry/proto/trace/v1/trace.proto and common/v1/common.proto.
_TIMES: Final = struct.Struct("<BQBQ")
_FLAGS: Final = struct.Struct("<BBI")
_DOUBLE: Final = struct.Struct("<Bd")
_AT: Final = struct.Struct("<BQ")
_HAS_IS_REMOTE: Final = 0x100
_IS_REMOTE: Final = 0x200
_STATUS_CODES: Final = {StatusCode.UNSET: b"", StatusCode.OK: b"\x18\x01", StatusCode.ERROR: b"\x18\x02"}
_UINT64: Final = (1 << 64) - 1
_LONGEST_KEPT: Final = 64
_LARGEST_KEPT: Final = 256
_MOST_KEPT: Final = 4
_FRACTION: Final = struct.Struct("<d")
# No two requests have the same.
_IDS: Final = frozenset({"tokenloom.request_id", "gen_ai.response.id", "gen_ai.conversation.id"})


def export_request(resource: bytes, spans: Iterable[Recorded]) -> bytes:
    """An ExportTraceServiceRequest of spans that have ended; `resource` is what `resource_message` made."""
    # The scope is the same for nearly all of them.
    groups = b"".join(
        _field(0x12, b"".join((_field(0x0A, _text(0x0A, scope)), *[_field(0x12, _span(span)) for span in group])))
        for scope, group in groupby(spans, lambda span: span.scope)
    )
    return _field(0x0A, resource + groups)


def resource_message(attributes: Mapping[str, Any]) -> bytes:
    """The `resource` field of ResourceSpans, the same for all that a process sends."""
    return _field(0x0A, _attributes(0x0A, attributes))


def _span(span: Recorded) -> bytes:
    parent = span.parent
    parts = [
        b"\x0a\x10", span.trace_id.to_bytes(16, "big"), b"\x12\x08", span.span_id.to_bytes(8, "big"),
    ]  # fmt: skip  # tag, value
    if span.state:
        parts.append(_text(0x1A, _state(span.state)))
    flags = _HAS_IS_REMOTE
    if parent is not None:
        parts += (b"\x22\x08", parent.span_id.to_bytes(8, "big"))
        if parent.is_remote:
            flags |= _IS_REMOTE
    parts += (
        _named(span.name, span.kind.value),
        _TIMES.pack(0x39, span.start_time, 0x41, span.end_time),
        _attributes(0x4A, span.attributes),
    )
    for event in span.events:
        parts.append(_event(event))
    if span.status is not None:
        parts.append(_field(0x7A, _status(span.status)))
    parts.append(_FLAGS.pack(0x85, 0x01, flags))
    return b"".join(parts)


@lru_cache(1024)
def _named(name: str, kind: int) -> bytes:
    return _text(0x2A, name) + b"\x30" + _varint(kind + 1)


def _event(event: Event) -> bytes:
    at, name, attributes = event
    return _field(0x5A, _AT.pack(0x09, at) + _text(0x12, name) + _attributes(0x1A, attributes))


def _status(status: Status) -> bytes:
    said = _text(0x12, status.description) if status.description else b""
    return said + _STATUS_CODES[status.status_code]


def _state(state: TraceState) -> str:
    return ",".join(f"{key}={value}" for key, value in state.items())


def _attributes(tag: int, attributes: Mapping[str, AttributeValue]) -> bytes:
    return b"".join([_WRITERS.get(type(value), _attribute)(tag, key, value) for key, value in attributes.items()])


def _attribute(tag: int, key: str, value: Any) -> bytes:
    return _field(tag, _key(key) + _field(0x12, _value(value)))


# The same few come again and again: models, workers, operations, small numbers. True is not the same as 1.
_known_attribute: Final = lru_cache(4096, typed=True)(_attribute)


def _string(tag: int, key: str, value: str) -> bytes:
    if key in _IDS or len(value) > _LONGEST_KEPT:
        return _attribute(tag, key, value)
    return _known_attribute(tag, key, value)


def _number(tag: int, key: str, value: int) -> bytes:
    return (_known_attribute if 0 <= value < _LARGEST_KEPT else _attribute)(tag, key, value)


def _fraction(tag: int, key: str, value: float) -> bytes:
    return _before_fraction(tag, key) + _FRACTION.pack(value)


@lru_cache(1024)
def _before_fraction(tag: int, key: str) -> bytes:
    return _attribute(tag, key, 0.0)[: -_FRACTION.size]


def _list(tag: int, key: str, value: Sequence[Any]) -> bytes:
    # Reasons why choices ended, and hardly anything else.
    known = len(value) <= _MOST_KEPT and all(type(each) is str and len(each) <= _LONGEST_KEPT for each in value)
    return _known_attribute(tag, key, tuple(value)) if known else _attribute(tag, key, value)


_WRITERS: Final[Mapping[type, Callable[[int, str, Any], bytes]]] = {
    str: _string,
    bool: _known_attribute,
    int: _number,
    float: _fraction,
    list: _list,
    tuple: _list,
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
    # What clients send may have halves of surrogate pairs, which UTF-8 has not.
    return _field(tag, text.encode("utf-8", "replace"))


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
