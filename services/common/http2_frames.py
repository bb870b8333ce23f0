"""HTTP/2 frames, as far as gRPC needs them (RFC 9113)."""

import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Final, NamedTuple

from hpack import Decoder, HPACKError

__all__ = [
    "ACK",
    "END_HEADERS",
    "END_STREAM",
    "MAX_FRAME_BYTES",
    "PREFACE",
    "BrokenError",
    "Code",
    "Frame",
    "FrameReader",
    "HeaderReader",
    "Kind",
    "Setting",
    "frame",
    "goaway",
    "header",
    "read_settings",
    "reset",
    "settings",
    "unpadded",
    "update",
]

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_FRAME_BYTES: Final = 16_384
"""What every peer takes, and all that is taken from it."""
ACK: Final = 0x1
END_STREAM: Final = 0x1
END_HEADERS: Final = 0x4
_PADDED: Final = 0x8
_HEAD_BYTES: Final = 9
_HEAD: Final = struct.Struct(">BHBBI")
_SETTING: Final = struct.Struct(">HI")
_ID: Final = 0x7FFFFFFF
_REMEMBERED_BLOCKS: Final = 64
_LONG_STRING: Final = 0x7F


class Kind(IntEnum):
    """What a frame is."""

    DATA = 0x0
    HEADERS = 0x1
    PRIORITY = 0x2
    RST_STREAM = 0x3
    SETTINGS = 0x4
    PUSH_PROMISE = 0x5
    PING = 0x6
    GOAWAY = 0x7
    WINDOW_UPDATE = 0x8
    CONTINUATION = 0x9


class Code(IntEnum):
    """What is wrong."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC


class Setting(IntEnum):
    """What a peer may ask for."""

    HEADER_TABLE_SIZE = 0x1
    ENABLE_PUSH = 0x2
    MAX_CONCURRENT_STREAMS = 0x3
    INITIAL_WINDOW_SIZE = 0x4
    MAX_FRAME_SIZE = 0x5
    MAX_HEADER_LIST_SIZE = 0x6


class BrokenError(Exception):
    """The peer broke the protocol; the connection can't go on."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class Frame(NamedTuple):
    """One frame as it came."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes


def frame(kind: Kind, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """A frame on its way out."""
    size = len(payload)
    return _HEAD.pack(size >> 16, size & 0xFFFF, kind, flags, stream_id) + payload


def settings(values: Mapping[Setting, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(Kind.SETTINGS, 0, 0, b"".join(_SETTING.pack(key, value) for key, value in values.items()))


def read_settings(payload: bytes) -> Iterator[tuple[int, int]]:
    """What a SETTINGS frame says.

    Raises:
        BrokenError: it has another length than settings have.
    """
    if len(payload) % _SETTING.size:
        raise BrokenError(Code.FRAME_SIZE_ERROR, "settings that end early")
    return _SETTING.iter_unpack(payload)


def goaway(last_stream_id: int, code: Code, message: str = "") -> bytes:
    """A GOAWAY frame."""
    return frame(Kind.GOAWAY, 0, 0, struct.pack(">II", last_stream_id, code) + message.encode())


def reset(stream_id: int, code: Code) -> bytes:
    """A RST_STREAM frame."""
    return frame(Kind.RST_STREAM, 0, stream_id, struct.pack(">I", code))


def update(stream_id: int, more: int) -> bytes:
    """A WINDOW_UPDATE frame."""
    return frame(Kind.WINDOW_UPDATE, 0, stream_id, struct.pack(">I", more))


def header(name: bytes, value: bytes) -> bytes:
    """A header in HPACK, without a table: the same bytes at any time."""
    return b"\0" + _string(name) + _string(value)


def _string(text: bytes) -> bytes:
    size = len(text)
    if size < _LONG_STRING:
        return bytes((size,)) + text
    out, size = bytearray((_LONG_STRING,)), size - _LONG_STRING
    while size >= 0x80:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out) + text


def unpadded(flags: int, payload: bytes) -> bytes:
    """The payload of a DATA or HEADERS frame without its padding.

    Raises:
        BrokenError: there is more padding than payload.
    """
    if not flags & _PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise BrokenError(Code.PROTOCOL_ERROR, "more padding than payload")
    return payload[1 : len(payload) - payload[0]]


class FrameReader:
    """Cuts what a peer sends into frames."""

    def __init__(self, *, greeted: bool = False) -> None:
        """`greeted`: the peer is a server, which begins without a preface."""
        self._rest = b""
        self._greeted = greeted

    def read(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with `data`.

        Raises:
            BrokenError: this is no HTTP/2, or a frame is too large.
        """
        if self._rest:
            data = self._rest + data
        at = 0
        if not self._greeted:
            if not PREFACE.startswith(data[: len(PREFACE)]):
                raise BrokenError(Code.PROTOCOL_ERROR, "no HTTP/2 preface")
            if len(data) >= len(PREFACE):
                self._greeted, at = True, len(PREFACE)
        while self._greeted and len(data) - at >= _HEAD_BYTES:
            high, low, kind, flags, stream_id = _HEAD.unpack_from(data, at)
            size = high << 16 | low
            if size > MAX_FRAME_BYTES:
                raise BrokenError(Code.FRAME_SIZE_ERROR, "a frame that is too large")
            end = at + _HEAD_BYTES + size
            if end > len(data):
                break
            payload = data[at + _HEAD_BYTES : end]
            at = end
            yield Frame(kind, flags, stream_id & _ID, payload)
        self._rest = data[at:]


class HeaderReader:
    """Decodes header blocks.

    The peer is told to keep no table, so that the same headers are the same bytes; then they are decoded once.
    """

    def __init__(self, max_bytes: int) -> None:
        self._decoder = Decoder(max_header_list_size=max_bytes)
        self._known: dict[bytes, Mapping[bytes, bytes]] = {}

    def read(self, block: bytes) -> Mapping[bytes, bytes]:
        """The headers of a block; of a repeated one the last value.

        Raises:
            BrokenError: it can't be decoded.
        """
        # Only without a table do the same bytes mean the same for ever.
        known = self._known.get(block) if self._decoder.header_table_size == 0 else None
        if known is not None:
            return known
        try:
            decoded = self._decoder.decode(block, raw=True)
            headers = MappingProxyType({bytes(key): bytes(value) for key, value in decoded})
        except (HPACKError, UnicodeDecodeError) as error:
            raise BrokenError(Code.COMPRESSION_ERROR, "headers that can't be decoded") from error
        if self._decoder.header_table_size == 0 and not _resizes(block) and len(self._known) < _REMEMBERED_BLOCKS:
            self._known[block] = headers
        return headers


def _resizes(block: bytes) -> bool:
    return block[:1] != b"" and block[0] & 0xE0 == 0x20
