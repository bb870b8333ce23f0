"""What spans say as OTLP has it on the wire, written by hand: a quarter of what protobuf's objects cost."""

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from opentelemetry.util.types import AttributeValue

__all__ = ["attributes_of", "field", "fraction", "number", "opening", "said", "text", "text_field", "varint"]

# The numbers are those of opentelemetry/proto/trace/v1/trace.proto and common/v1/common.proto.
_DOUBLE: Final = struct.Struct("<Bd")
_FRACTION: Final = struct.Struct("<d")
_UINT64: Final = (1 << 64) - 1
_LONGEST_KEPT: Final = 64
_MOST_KEPT: Final = 4
_MOST_KNOWN: Final = 4096
_OF_SPAN: Final = 0x4A
# No two requests have the same.
_UNIQUE: Final = frozenset({"tokenloom.request_id", "gen_ai.response.id", "gen_ai.conversation.id"})


def said(attributes: Mapping[str, AttributeValue]) -> bytes:
    """The attributes of a span."""
    items = attributes.items()
    try:
        parts = [_known.get(one) or _WRITERS.get(type(one[1]), _any)(*one) for one in items]
    except TypeError:  # a list, which can't be looked up
        parts = [_WRITERS.get(type(one[1]), _any)(*one) for one in items]
    return b"".join(parts)


def text(key: str, value: str) -> bytes:
    """An attribute of a span whose value hardly ever comes again."""
    content = _utf8(value)
    return _before_text(key, len(content)) + content


@lru_cache(4096)
def number(key: str, value: int) -> bytes:
    """An attribute of a span that is a whole number."""
    return _any(key, value)


def fraction(key: str, value: float) -> bytes:
    """An attribute of a span that is any other number."""
    return _before_fraction(key) + _FRACTION.pack(value)


def attributes_of(tag: int, attributes: Mapping[str, AttributeValue]) -> bytes:
    """The attributes of anything else, which are the field `tag` of it."""
    return b"".join([_attribute(tag, key, value) for key, value in attributes.items()])


def field(tag: int, content: bytes) -> bytes:
    """A field that is no number; `tag` is what the wire has before it."""
    return opening(tag, len(content)) + content


@lru_cache(8192)
def opening(tag: int, length: int) -> bytes:
    """What stands before the content of a field that is no number."""
    return bytes((tag,)) + varint(length)


def text_field(tag: int, value: str) -> bytes:
    """A field that is a text."""
    return field(tag, _utf8(value))


def varint(number: int) -> bytes:
    """A whole number, not below 0."""
    if number < 0x80:
        return bytes((number,))
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _attribute(tag: int, key: str, value: Any) -> bytes:
    return field(tag, _key(key) + field(0x12, _value(value)))


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
    return _keep(key, value) if key not in _UNIQUE and len(value) <= _LONGEST_KEPT else text(key, value)


@lru_cache(2048)
def _before_text(key: str, length: int) -> bytes:
    start = b"\x0a" + varint(length)
    value = _key(key) + b"\x12" + varint(len(start) + length) + start
    return b"\x4a" + varint(len(value) + length) + value


@lru_cache(1024)
def _truth(key: str, value: bool) -> bytes:
    return _any(key, value)


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
    int: number,
    float: fraction,
    tuple: _texts,
}


@lru_cache(1024)  # there are only so many: they stand in programs
def _key(key: str) -> bytes:
    return text_field(0x0A, key)


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return text_field(0x0A, value)
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        return b"\x18" + varint(value & _UINT64)
    if isinstance(value, float):
        return _DOUBLE.pack(0x21, value)
    if isinstance(value, Sequence):
        return field(0x2A, b"".join([field(0x0A, _value(each)) for each in value]))
    # An exporter that chokes on one attribute would lose all that is sent with it.
    return text_field(0x0A, repr(value))


def _utf8(value: str) -> bytes:
    # What clients send may have halves of surrogate pairs, which UTF-8 has not.
    return value.encode("utf-8", "replace")
