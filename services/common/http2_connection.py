"""One end of an HTTP/2 connection, strictly checked: frames, settings, pings, windows; for gRPC servers and clients.

grpc.aio hands every message from thread to thread, which takes longer than what most of ours are about, and so does the
bookkeeping of the h2 library. Here a message is read, answered and written in one turn of the event loop.
"""

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, Protocol, TypeVar

from services.common.http2_frames import (
    ACK,
    END_HEADERS,
    MAX_FRAME_BYTES,
    BrokenError,
    Code,
    Frame,
    FrameReader,
    HeaderReader,
    Kind,
    Setting,
    frame,
    goaway,
    read_settings,
    unpadded,
    update,
)

__all__ = [
    "ANSWER_SECONDS",
    "CONNECTION_WINDOW",
    "MOST_HEADER_BYTES",
    "SILENT_SECONDS",
    "STREAM_WINDOW",
    "WINDOW",
    "Connection",
    "Stream",
]

MOST_HEADER_BYTES: Final = 16 << 10
"""What all headers of a stream may have."""
WINDOW: Final = 65_535
"""What either end may send of a stream, and of all, before it is told more."""
STREAM_WINDOW: Final = 1 << 20
"""What our peers may send of a stream."""
CONNECTION_WINDOW: Final = 16 << 20
"""What our peers may send of all streams."""
SILENT_SECONDS: Final = 20.0
ANSWER_SECONDS: Final = 10.0
"""A peer that vanished without a FIN, or hangs, is noticed within so many seconds, and so many more."""
_PING: Final = frame(Kind.PING, 0, 0, b"tokenloo")
_LARGEST_WINDOW: Final = (1 << 31) - 1
_MOST_UNFLUSHED: Final = 16
_PRIORITY: Final = 0x20
_PRIORITY_BYTES: Final = 5
_log = logging.getLogger(__name__)


class Stream(Protocol):
    """What a connection knows of its streams."""

    stream_id: int
    window: int
    """How much more the peer takes."""
    unread: int
    """How much came that the peer was not told to be taken."""

    @property
    def is_held_up(self) -> bool:
        """Whether something waits for the peer to take it."""

    def frames(self, window: int) -> tuple[bytes, int, bool]:
        """What is to be sent: frames, how much they take of the connection's `window`, whether they are the last."""


S = TypeVar("S", bound=Stream)


class Connection(asyncio.Protocol, Generic[S]):
    """What servers' and clients' ends have in common. Their own classes say what becomes of headers and data."""

    def __init__(self, *, greeted: bool, silent_seconds: float, answer_seconds: float) -> None:
        """`greeted`: the peer is a server.

        A peer that is silent for `silent_seconds` is asked for a sign of life, which it has `answer_seconds` to give.
        """
        self._loop = asyncio.get_running_loop()
        self._silent_seconds = silent_seconds
        self._answer_seconds = answer_seconds
        self._heard_at = self._loop.time()
        self._watch: asyncio.TimerHandle | None = None
        self.streams: dict[int, S] = {}
        self.is_over = False
        """Whether nothing more is taken."""
        self._reader = FrameReader(greeted=greeted)
        self._headers = HeaderReader(MOST_HEADER_BYTES)
        self._out: list[bytes] = []
        self._is_reading = False
        self._has_settings = False
        self._last_id = 0
        self._window = WINDOW
        self._streams_window = WINDOW
        self._unread = 0
        self._block: tuple[Frame, bytearray] | None = None

    def connection_made(self, transport: Any) -> None:
        """Is called once, at first."""
        self._transport: asyncio.Transport = transport
        self._watch = self._loop.call_later(self._silent_seconds, self._look)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # whyever
        """Lets go of every stream."""
        if self._watch is not None:
            self._watch.cancel()
        self._drop_all("the connection is lost")

    def data_received(self, data: bytes) -> None:
        """Reads, answers, writes."""
        self._heard_at = self._loop.time()
        self._is_reading = True
        try:
            for one in self._reader.read(data):
                if self.is_over:
                    return
                self._on_frame(one)
                if len(self._out) >= _MOST_UNFLUSHED:
                    # Many came at once: the first need not wait for the last.
                    self._flush()
        except BrokenError as error:
            _log.warning("a peer broke HTTP/2: %s", error)
            self.end(error.code, str(error))
        finally:
            self._is_reading = False
            self._flush()

    def write(self, stream: S) -> None:
        """Writes what a stream has to say; nothing, once it is over."""
        if self.streams.get(stream.stream_id) is not stream:
            return
        frames, taken, is_last = stream.frames(self._window)
        self._window -= taken
        self._out.append(frames)
        if is_last:
            self._drop(stream)
        if not self._is_reading:
            self._flush()

    def end(self, code: Code, message: str) -> None:
        """Tells the peer why nothing more is taken, and closes."""
        if not self.is_over:
            self.is_over = True
            self._drop_all(message)
            self._out.append(goaway(self._last_id, code, message))
            self._flush()
            self._transport.close()

    def abort(self) -> None:
        """Closes at once."""
        self._transport.abort()

    @abstractmethod
    def _on_block(self, one: Frame, headers: Mapping[bytes, bytes]) -> None:
        """Headers or trailers have come, with the frame that they began with."""

    @abstractmethod
    def _on_stream_data(self, stream: S, one: Frame) -> None:
        """Data of a stream has come; its windows are seen to."""

    @abstractmethod
    def _on_stream_reset(self, stream: S, code: int) -> None:
        """The peer has ended a stream."""

    @abstractmethod
    def _drop(self, stream: S, message: str = "") -> None:
        """Lets go of a stream."""

    def _on_goaway(self, one: Frame) -> None:
        """The peer takes no new streams, which a server need not mind."""

    def _on_greeted(self) -> None:
        """The peer's first settings have come."""

    def _on_frame(self, one: Frame) -> None:
        if self._block is not None and one.kind != Kind.CONTINUATION:
            raise BrokenError(Code.PROTOCOL_ERROR, "headers that do not end")
        if not self._has_settings and one.kind != Kind.SETTINGS:
            raise BrokenError(Code.PROTOCOL_ERROR, "no settings at first")
        handler = _HANDLERS.get(one.kind)
        if handler is not None:
            handler(self, one)

    def _on_data(self, one: Frame) -> None:
        self._unread += len(one.payload)
        if self._unread >= CONNECTION_WINDOW // 2:
            self._out.append(update(0, self._unread))
            self._unread = 0
        stream = self._stream_of(one)
        if stream is None:
            return
        stream.unread += len(one.payload)
        if stream.unread >= STREAM_WINDOW // 2:
            self._out.append(update(one.stream_id, stream.unread))
            stream.unread = 0
        self._on_stream_data(stream, one)

    def _on_headers(self, one: Frame) -> None:
        block = unpadded(one.flags, one.payload)
        if one.flags & _PRIORITY:
            if len(block) < _PRIORITY_BYTES:
                raise BrokenError(Code.FRAME_SIZE_ERROR, "a priority that ends early")
            block = block[_PRIORITY_BYTES:]
        if one.flags & END_HEADERS:
            self._on_block(one, self._headers.read(block))
        else:
            self._block = (one, bytearray(block))

    def _on_continuation(self, one: Frame) -> None:
        if self._block is None or self._block[0].stream_id != one.stream_id:
            raise BrokenError(Code.PROTOCOL_ERROR, "a continuation of nothing")
        first, block = self._block
        # An empty one is no progress, and could be sent for ever.
        if len(block) + len(one.payload) > MOST_HEADER_BYTES or not one.payload:
            raise BrokenError(Code.ENHANCE_YOUR_CALM, "too many headers")
        block += one.payload
        if one.flags & END_HEADERS:
            self._block = None
            # Refused or not, it has to be read: the next ones may build on it.
            self._on_block(first, self._headers.read(bytes(block)))

    def _on_reset(self, one: Frame) -> None:
        if len(one.payload) != 4:
            raise BrokenError(Code.FRAME_SIZE_ERROR, "a reset of another size")
        stream = self._stream_of(one)
        if stream is not None:
            self._on_stream_reset(stream, int.from_bytes(one.payload, "big"))

    def _on_settings(self, one: Frame) -> None:
        if one.stream_id or (one.flags & ACK and one.payload):
            raise BrokenError(Code.PROTOCOL_ERROR, "settings of a stream, or with an acknowledgement")
        if one.flags & ACK:
            return
        # Before what they allow: the peer counts by its old ones until it has this.
        self._out.append(frame(Kind.SETTINGS, ACK, 0))
        for name, value in read_settings(one.payload):
            if name == Setting.INITIAL_WINDOW_SIZE:
                self._resize_streams(value)
            elif name == Setting.MAX_FRAME_SIZE and value < MAX_FRAME_BYTES:
                raise BrokenError(Code.PROTOCOL_ERROR, "frames that are too small")
        if not self._has_settings:
            self._has_settings = True
            self._on_greeted()

    def _resize_streams(self, window: int) -> None:
        if window > _LARGEST_WINDOW:
            raise BrokenError(Code.FLOW_CONTROL_ERROR, "a window that is too large")
        for stream in tuple(self.streams.values()):
            stream.window += window - self._streams_window
            if stream.window > _LARGEST_WINDOW:
                raise BrokenError(Code.FLOW_CONTROL_ERROR, "a window that is too large")
        self._streams_window = window
        self._write_held_up()

    def _on_ping(self, one: Frame) -> None:
        if one.stream_id or len(one.payload) != 8:
            raise BrokenError(Code.FRAME_SIZE_ERROR, "a ping of another form")
        if not one.flags & ACK:
            self._out.append(frame(Kind.PING, ACK, 0, one.payload))

    def _on_window_update(self, one: Frame) -> None:
        if len(one.payload) != 4:
            raise BrokenError(Code.FRAME_SIZE_ERROR, "a window update of another size")
        more = int.from_bytes(one.payload, "big") & _LARGEST_WINDOW
        if not more:
            raise BrokenError(Code.PROTOCOL_ERROR, "a window update by nothing")
        if one.stream_id == 0:
            self._window += more
            if self._window > _LARGEST_WINDOW:
                raise BrokenError(Code.FLOW_CONTROL_ERROR, "a window that is too large")
            self._write_held_up()
            return
        stream = self._stream_of(one)
        if stream is not None:
            stream.window += more
            if stream.window > _LARGEST_WINDOW:
                raise BrokenError(Code.FLOW_CONTROL_ERROR, "a window that is too large")
            self.write(stream)

    def _on_push(self, one: Frame) -> None:
        raise BrokenError(Code.PROTOCOL_ERROR, f"a frame that no peer of ours sends: {one.kind}")

    def _write_held_up(self) -> None:
        for stream in tuple(self.streams.values()):
            if stream.is_held_up:
                self.write(stream)

    def _stream_of(self, one: Frame) -> S | None:
        """The stream of a frame; None when it is over already."""
        if one.stream_id == 0 or one.stream_id > self._last_id:
            raise BrokenError(Code.PROTOCOL_ERROR, "a stream that was not begun")
        return self.streams.get(one.stream_id)

    def _look(self) -> None:
        silent = self._loop.time() - self._heard_at
        if silent < self._silent_seconds:
            self._watch = self._loop.call_later(self._silent_seconds - silent, self._look)
            return
        self._out.append(_PING)
        self._flush()
        self._watch = self._loop.call_later(self._answer_seconds, self._despair, self._heard_at)

    def _despair(self, heard_at: float) -> None:
        if self._heard_at == heard_at:
            self._drop_all("the peer gives no sign of life")
            self.abort()
            return
        self._look()

    def _drop_all(self, message: str = "") -> None:
        for stream in tuple(self.streams.values()):
            self._drop(stream, message)

    def _flush(self) -> None:
        if self._out and not self._transport.is_closing():
            self._transport.write(b"".join(self._out))
        self._out.clear()


_HANDLERS: Final[dict[int, Callable[[Connection[Any], Frame], None]]] = {
    Kind.DATA: Connection._on_data,
    Kind.HEADERS: Connection._on_headers,
    Kind.RST_STREAM: Connection._on_reset,
    Kind.SETTINGS: Connection._on_settings,
    Kind.PUSH_PROMISE: Connection._on_push,
    Kind.PING: Connection._on_ping,
    Kind.GOAWAY: lambda connection, one: connection._on_goaway(one),
    Kind.WINDOW_UPDATE: Connection._on_window_update,
    Kind.CONTINUATION: Connection._on_continuation,
}
