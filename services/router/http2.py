"""A gRPC server of a few methods that stream, on asyncio: a message is read, answered and written in one turn.

grpc.aio hands every message from thread to thread, which takes longer than the picking itself, and so does the
bookkeeping of the h2 library. This is as much of HTTP/2 as our own edge speaks with us, strictly checked.
"""

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc

from services.common.rpc import timeout_seconds
from services.router.http2_frames import (
    ACK,
    END_HEADERS,
    END_STREAM,
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
    settings,
    unpadded,
)
from services.router.http2_stream import Budget, Call, Stream, reset_frame

__all__ = ["Call", "Open", "Stream", "serve_streams"]

_MOST_CONNECTIONS: Final = 512
_MOST_STREAMS: Final = 10_000
_MOST_HEADER_BYTES: Final = 16 << 10
_WINDOW: Final = 65_535
_STREAM_WINDOW: Final = 1 << 20
_CONNECTION_WINDOW: Final = 16 << 20
_MOST_UNFLUSHED: Final = 16
_LARGEST_WINDOW: Final = (1 << 31) - 1
_SETTINGS: Final = {
    Setting.HEADER_TABLE_SIZE: 0,
    Setting.MAX_CONCURRENT_STREAMS: _MOST_STREAMS,
    Setting.INITIAL_WINDOW_SIZE: _STREAM_WINDOW,
    Setting.MAX_HEADER_LIST_SIZE: _MOST_HEADER_BYTES,
}
# A peer that vanished without a FIN is noticed within 30 s.
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 30_000}
_log = logging.getLogger(__name__)


Open = Callable[["Stream", Mapping[bytes, bytes]], Call]
"""Begins a call, given its answers' way and its headers."""


@asynccontextmanager
async def serve_streams(
    address: str, methods: Mapping[str, Open], *, max_message_bytes: int, grace_seconds: float
) -> AsyncIterator[int]:
    """Serves gRPC methods, by their paths, on `host:port` (port 0: any free one) until the block is left.

    Yields the port. Then no connection is taken any more, and calls that run have `grace_seconds` to end.

    Raises:
        OSError: the address is in use or not ours.
    """
    host, _, port = address.rpartition(":")
    server = _Server({path.encode(): opened for path, opened in methods.items()}, max_message_bytes)
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: _Connection(server), host.strip("[]"), int(port), backlog=1024)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        await server.close(grace_seconds)


class _Server:
    """What the connections share."""

    def __init__(self, methods: Mapping[bytes, Open], max_message_bytes: int) -> None:
        self.methods = methods
        self.budget = Budget(max_message_bytes)
        self.connections: set[_Connection] = set()
        self._emptied = asyncio.Event()

    def emptied(self) -> None:
        """A connection has no stream any more, or is gone."""
        self._emptied.set()

    async def close(self, grace_seconds: float) -> None:
        """Waits for the calls, then says goodbye to every peer and waits until they are gone."""
        await self._until(lambda: not any(connection.streams for connection in self.connections), grace_seconds)
        for connection in tuple(self.connections):
            connection.end(Code.NO_ERROR, "the server stops")
        await self._until(lambda: not self.connections, grace_seconds)
        for connection in tuple(self.connections):
            connection.abort()

    async def _until(self, is_so: Callable[[], bool], seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not is_so():
                    self._emptied.clear()
                    await self._emptied.wait()
        except TimeoutError:
            return


class _Connection(asyncio.Protocol):
    """One peer."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._reader = FrameReader()
        self._headers = HeaderReader(_MOST_HEADER_BYTES)
        self._out: list[bytes] = []
        self._is_reading = False
        self._is_over = False
        self._has_settings = False
        self._last_id = 0
        self._window = _WINDOW
        self._streams_window = _WINDOW
        self._unread = 0
        self._block: tuple[Frame, bytearray] | None = None
        self.streams: dict[int, Stream] = {}

    def connection_made(self, transport: Any) -> None:
        """Greets the peer."""
        self._transport: asyncio.Transport = transport
        if len(self._server.connections) >= _MOST_CONNECTIONS:
            transport.abort()
            return
        self._server.connections.add(self)
        _keep_alive(transport.get_extra_info("socket"))
        self._out += [settings(_SETTINGS), _update(0, _CONNECTION_WINDOW - _WINDOW)]
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Lets go of every call."""
        self._server.connections.discard(self)
        self._drop_all()
        self._server.emptied()

    def pause_writing(self) -> None:
        """The peer takes nothing: nothing is taken from it."""
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The peer takes something again."""
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Reads, answers, writes."""
        self._is_reading = True
        try:
            for one in self._reader.read(data):
                if self._is_over:
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

    def write(self, stream: Stream) -> None:
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
        if not self._is_over:
            self._is_over = True
            self._drop_all()
            self._out.append(goaway(self._last_id, code, message))
            self._flush()
            self._transport.close()

    def abort(self) -> None:
        """Closes at once."""
        self._transport.abort()

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
        if self._unread >= _CONNECTION_WINDOW // 2:
            self._out.append(_update(0, self._unread))
            self._unread = 0
        stream = self._stream_of(one)
        if stream is None:
            return
        if stream.has_ended:
            raise BrokenError(Code.STREAM_CLOSED, "data after the end")
        stream.unread += len(one.payload)
        ended = bool(one.flags & END_STREAM)
        if stream.unread >= _STREAM_WINDOW // 2 and not ended:
            self._out.append(_update(one.stream_id, stream.unread))
            stream.unread = 0
        stream.feed(unpadded(one.flags, one.payload), self._server.budget)
        if ended:
            self._end(stream)

    def _on_headers(self, one: Frame) -> None:
        block = unpadded(one.flags, one.payload)
        if one.flags & _PRIORITY:
            if len(block) < _PRIORITY_BYTES:
                raise BrokenError(Code.FRAME_SIZE_ERROR, "a priority that ends early")
            block = block[_PRIORITY_BYTES:]
        if one.flags & END_HEADERS:
            self._on_block(one, block)
        else:
            self._block = (one, bytearray(block))

    def _on_continuation(self, one: Frame) -> None:
        if self._block is None or self._block[0].stream_id != one.stream_id:
            raise BrokenError(Code.PROTOCOL_ERROR, "a continuation of nothing")
        first, block = self._block
        # An empty one is no progress, and could be sent for ever.
        if len(block) + len(one.payload) > _MOST_HEADER_BYTES or not one.payload:
            raise BrokenError(Code.ENHANCE_YOUR_CALM, "too many headers")
        block += one.payload
        if one.flags & END_HEADERS:
            self._block = None
            self._on_block(first, bytes(block))

    def _on_block(self, one: Frame, block: bytes) -> None:
        # Refused or not, it has to be read: the next ones may build on it.
        headers = self._headers.read(block)
        stream = self.streams.get(one.stream_id)
        if stream is not None:
            if stream.has_ended or not one.flags & END_STREAM:
                raise BrokenError(Code.PROTOCOL_ERROR, "trailers that do not end a stream")
            self._end(stream)
            return
        if one.stream_id % 2 == 0:
            raise BrokenError(Code.PROTOCOL_ERROR, "no stream of a client's")
        if one.stream_id <= self._last_id:
            # Trailers of one that was ended here; h2 spells it differently, and nothing is to be done.
            return
        self._last_id = one.stream_id
        if len(self.streams) >= _MOST_STREAMS:
            self._out.append(reset_frame(one.stream_id, Code.REFUSED_STREAM))
            return
        self._open(one, headers)

    def _open(self, one: Frame, headers: Mapping[bytes, bytes]) -> None:
        stream = self.streams[one.stream_id] = Stream(one.stream_id, self, self._streams_window)
        opened = self._server.methods.get(headers.get(b":path", b""))
        if opened is None:
            stream.end(grpc.StatusCode.UNIMPLEMENTED)
            return
        timeout = timeout_seconds(headers.get(b"grpc-timeout", b"").decode("latin-1"))
        if timeout is not None:
            stream.end_in(timeout)
        stream.call = opened(stream, headers)
        if one.flags & END_STREAM:
            self._end(stream)

    def _on_reset(self, one: Frame) -> None:
        if len(one.payload) != 4:
            raise BrokenError(Code.FRAME_SIZE_ERROR, "a reset of another size")
        stream = self._stream_of(one)
        if stream is not None:
            self._drop(stream)

    def _on_settings(self, one: Frame) -> None:
        if one.stream_id or (one.flags & ACK and one.payload):
            raise BrokenError(Code.PROTOCOL_ERROR, "settings of a stream, or with an acknowledgement")
        if one.flags & ACK:
            return
        self._has_settings = True
        for name, value in read_settings(one.payload):
            if name == Setting.INITIAL_WINDOW_SIZE:
                self._resize_streams(value)
            elif name == Setting.MAX_FRAME_SIZE and value < MAX_FRAME_BYTES:
                raise BrokenError(Code.PROTOCOL_ERROR, "frames that are too small")
        self._out.append(frame(Kind.SETTINGS, ACK, 0))

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

    def _on_forbidden(self, one: Frame) -> None:
        raise BrokenError(Code.PROTOCOL_ERROR, f"a frame that no client sends: {one.kind}")

    def _write_held_up(self) -> None:
        for stream in tuple(self.streams.values()):
            if stream.is_held_up:
                self.write(stream)

    def _stream_of(self, one: Frame) -> Stream | None:
        """The stream of a frame; None when it is over already."""
        if one.stream_id == 0 or one.stream_id > self._last_id:
            raise BrokenError(Code.PROTOCOL_ERROR, "a stream that was not begun")
        return self.streams.get(one.stream_id)

    def _end(self, stream: Stream) -> None:
        # Whoever says nothing more has no use for a pick that is still to come.
        stream.has_ended = True
        stream.close(self._server.budget)
        stream.end()

    def _drop(self, stream: Stream) -> None:
        if self.streams.pop(stream.stream_id, None) is not None:
            stream.close(self._server.budget)
            if not self.streams:
                self._server.emptied()

    def _drop_all(self) -> None:
        for stream in tuple(self.streams.values()):
            self._drop(stream)

    def _flush(self) -> None:
        if self._out and not self._transport.is_closing():
            self._transport.write(b"".join(self._out))
        self._out.clear()


_PRIORITY: Final = 0x20
_PRIORITY_BYTES: Final = 5
_HANDLERS: Final[dict[int, Callable[[_Connection, Frame], None]]] = {
    Kind.DATA: _Connection._on_data,
    Kind.HEADERS: _Connection._on_headers,
    Kind.RST_STREAM: _Connection._on_reset,
    Kind.SETTINGS: _Connection._on_settings,
    Kind.PUSH_PROMISE: _Connection._on_forbidden,
    Kind.PING: _Connection._on_ping,
    Kind.WINDOW_UPDATE: _Connection._on_window_update,
    Kind.CONTINUATION: _Connection._on_continuation,
}


def _update(stream_id: int, more: int) -> bytes:
    return frame(Kind.WINDOW_UPDATE, 0, stream_id, struct.pack(">I", more))


def _keep_alive(connected: socket.socket) -> None:
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        # Not every system has all of them.
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
