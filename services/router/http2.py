"""A gRPC server of methods that stream both ways, on asyncio: a message is read, answered and written in one turn.

This is as much of HTTP/2 as our own edge and gateways speak with us; its frames are in services/common.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc

from services.common.http2_connection import (
    ANSWER_SECONDS,
    CONNECTION_WINDOW,
    MOST_HEADER_BYTES,
    SILENT_SECONDS,
    STREAM_WINDOW,
    WINDOW,
    Connection,
)
from services.common.http2_frames import (
    END_STREAM,
    BrokenError,
    Code,
    Frame,
    Setting,
    reset,
    settings,
    unpadded,
    update,
)
from services.common.rpc import timeout_seconds
from services.router.http2_stream import Budget, Call, Stream

__all__ = ["Call", "Open", "Stream", "serve_streams"]

_MOST_CONNECTIONS: Final = 512
_MOST_STREAMS: Final = 10_000
_SETTINGS: Final = {
    Setting.HEADER_TABLE_SIZE: 0,
    Setting.MAX_CONCURRENT_STREAMS: _MOST_STREAMS,
    Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
    Setting.MAX_HEADER_LIST_SIZE: MOST_HEADER_BYTES,
}


Open = Callable[["Stream", Mapping[bytes, bytes]], Call]
"""Begins a call, given its answers' way and its headers."""


@asynccontextmanager
async def serve_streams(
    address: str,
    methods: Mapping[str, Open],
    *,
    max_message_bytes: int,
    grace_seconds: float,
    silent_seconds: float = SILENT_SECONDS,
    answer_seconds: float = ANSWER_SECONDS,
) -> AsyncIterator[int]:
    """Serves gRPC methods, by their paths, on `host:port` (port 0: any free one) until the block is left.

    Yields the port. At the end no connection is taken any more, and calls that run have `grace_seconds` to end. A
    peer that says nothing for `silent_seconds` is asked for a sign of life, which it has `answer_seconds` to give.

    Raises:
        OSError: the address is in use or not ours.
    """
    host, _, port = address.rpartition(":")
    named = {path.encode(): opened for path, opened in methods.items()}
    server = _Server(named, max_message_bytes, silent_seconds, answer_seconds)
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: _Connection(server), host.strip("[]"), int(port), backlog=1024)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        await server.close(grace_seconds)


class _Server:
    """What the connections share."""

    def __init__(
        self, methods: Mapping[bytes, Open], max_message_bytes: int, silent_seconds: float, answer_seconds: float
    ) -> None:
        self.methods = methods
        self.budget = Budget(max_message_bytes)
        self.silent_seconds = silent_seconds
        self.answer_seconds = answer_seconds
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


class _Connection(Connection[Stream]):
    """One peer."""

    def __init__(self, server: _Server) -> None:
        super().__init__(greeted=False, silent_seconds=server.silent_seconds, answer_seconds=server.answer_seconds)
        self._server = server
        self.is_full = False
        """Whether the system takes no more for now."""

    def connection_made(self, transport: Any) -> None:
        """Greets the peer."""
        super().connection_made(transport)
        if len(self._server.connections) >= _MOST_CONNECTIONS:
            transport.abort()
            return
        self._server.connections.add(self)
        self._out += [settings(_SETTINGS), update(0, CONNECTION_WINDOW - WINDOW)]
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Lets go of every call."""
        self._server.connections.discard(self)
        super().connection_lost(exc)
        self._server.emptied()

    def pause_writing(self) -> None:
        """The peer takes nothing: nothing is taken from it."""
        self.is_full = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The peer takes something again."""
        if not self._transport.is_closing():
            self._transport.resume_reading()
        self.is_full = False
        for stream in tuple(self.streams.values()):
            stream.more_room()

    def _on_block(self, one: Frame, headers: Mapping[bytes, bytes]) -> None:
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
            self._out.append(reset(one.stream_id, Code.REFUSED_STREAM))
            return
        self._open(one, headers)

    def _open(self, one: Frame, headers: Mapping[bytes, bytes]) -> None:
        stream = self.streams[one.stream_id] = Stream(one.stream_id, self, self._streams_window, self._server.budget)
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

    def _on_stream_data(self, stream: Stream, one: Frame) -> None:
        if stream.has_ended:
            raise BrokenError(Code.STREAM_CLOSED, "data after the end")
        stream.feed(unpadded(one.flags, one.payload))
        if one.flags & END_STREAM:
            self._end(stream)

    def _on_stream_reset(self, stream: Stream, code: int) -> None:  # noqa: ARG002  # whyever, it is over
        self._drop(stream)

    def _end(self, stream: Stream) -> None:
        # Whoever says nothing more has no use for a pick that is still to come.
        stream.has_ended = True
        stream.close()
        stream.end()

    def _drop(self, stream: Stream, message: str = "") -> None:  # noqa: ARG002  # the connection's last words
        if self.streams.pop(stream.stream_id, None) is not None:
            stream.close()
            if not self.streams:
                self._server.emptied()
