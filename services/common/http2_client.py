"""A gRPC call that streams both ways over a connection of its own: what the long-lived sessions inside the mesh need.

It speaks with any gRPC server. What comes is passed on in the turn of the event loop in which it comes; whatever is
called seldom goes through `rpc.channel()`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc

from services.common.http2_call import STREAM_ID, ClientCall
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
    PREFACE,
    BrokenError,
    Code,
    Frame,
    Setting,
    goaway,
    header,
    settings,
    unpadded,
    update,
)
from services.common.http2_messages import MessageReader
from services.common.rpc import MAX_MESSAGE_BYTES

__all__ = ["ClientCall", "calling"]

_GREETING: Final = PREFACE + settings(
    {
        Setting.HEADER_TABLE_SIZE: 0,
        Setting.ENABLE_PUSH: 0,
        Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
        Setting.MAX_HEADER_LIST_SIZE: MOST_HEADER_BYTES,
    }
)


@asynccontextmanager
async def calling(
    target: str,
    path: str,
    take: Callable[[bytes], None],
    *,
    connect_seconds: float,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    silent_seconds: float = SILENT_SECONDS,
    answer_seconds: float = ANSWER_SECONDS,
) -> AsyncIterator[ClientCall]:
    """Calls the method at `path` of the server at `host:port`, and cancels the call, if it runs, as the block is left.

    `take` gets each message as it comes, before anything else does; one of more than `max_message_bytes` ends the call.
    A server that says nothing for `silent_seconds` is asked for a sign of life, which it has `answer_seconds` to give.

    Raises:
        TimeoutError: nobody listens there, or nobody answers for `connect_seconds`.
    """
    call = ClientCall(_request_headers(path, target), MessageReader(max_message_bytes), take)
    try:
        async with asyncio.timeout(connect_seconds):
            connection = await _connected(target, lambda: _Connection(call, silent_seconds, answer_seconds))
    except OSError as error:  # TimeoutError is one, too
        raise TimeoutError("no connection") from error
    try:
        connection.begin()
        yield call
    finally:
        call.cancel()
        connection.leave()


async def _connected(target: str, new: Callable[[], "_Connection"]) -> "_Connection":
    host, _, port = target.rpartition(":")
    _, connection = await asyncio.get_running_loop().create_connection(new, host.strip("[]"), int(port))
    try:
        await connection.greeted
    except BaseException:
        connection.abort()
        raise
    return connection


class _Connection(Connection[ClientCall]):
    """The connection of one call."""

    def __init__(self, call: ClientCall, silent_seconds: float, answer_seconds: float) -> None:
        super().__init__(greeted=True, silent_seconds=silent_seconds, answer_seconds=answer_seconds)
        self._call = call
        self._is_left = False
        self.is_full = False
        """Whether the system takes no more for now."""
        self.greeted: asyncio.Future[None] = self._loop.create_future()

    def connection_made(self, transport: Any) -> None:
        """Greets the server."""
        super().connection_made(transport)
        self._out += [_GREETING, update(0, CONNECTION_WINDOW - WINDOW)]
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Lets go of the call."""
        if not self.greeted.done():
            self.greeted.set_exception(exc or ConnectionResetError("the server closed the connection"))
            self.greeted.exception()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The system takes no more: what is to be said waits with those who say it."""
        self.is_full = True

    def resume_writing(self) -> None:
        """The system takes more."""
        self.is_full = False
        self._call.more_room()

    def begin(self) -> None:
        """Begins the call."""
        self._last_id = STREAM_ID
        self._call.window = self._streams_window
        self._call.connection = self
        self.streams[STREAM_ID] = self._call
        if self._is_left or self._transport.is_closing():
            self._drop_all("the connection is lost")
        self.write(self._call)

    def leave(self) -> None:
        """Says goodbye, and closes the connection: at once, if the server takes nothing."""
        if not self.is_over:
            self.is_over = True
            self._out.append(goaway(0, Code.NO_ERROR))
            self._flush()
        if self.is_full:
            self.abort()
        self._transport.close()

    def _on_greeted(self) -> None:
        if not self.greeted.done():
            self.greeted.set_result(None)

    def _on_block(self, one: Frame, headers: Mapping[bytes, bytes]) -> None:
        stream = self._stream_of(one)
        if stream is not None:
            stream.answer(headers, ended=bool(one.flags & END_STREAM))
            if stream.is_over:
                self.streams.pop(stream.stream_id, None)

    def _on_stream_data(self, stream: ClientCall, one: Frame) -> None:
        stream.feed(unpadded(one.flags, one.payload))
        if one.flags & END_STREAM and not stream.is_over:
            stream.fail(grpc.StatusCode.INTERNAL, "the call ended without a status")
        if stream.is_over:
            self.streams.pop(stream.stream_id, None)

    def _on_stream_reset(self, stream: ClientCall, code: int) -> None:
        self.streams.pop(stream.stream_id, None)
        stream.reset(code)

    def _on_goaway(self, one: Frame) -> None:
        if len(one.payload) < 8:
            raise BrokenError(Code.FRAME_SIZE_ERROR, "a goodbye that ends early")
        if not self.greeted.done():
            self.greeted.set_exception(ConnectionResetError("the server goes away"))
        last_id = int.from_bytes(one.payload[:4], "big") & 0x7FFFFFFF
        if last_id < STREAM_ID:
            self._is_left = True
            self._drop_all("the server goes away")

    def _drop(self, stream: ClientCall, message: str = "") -> None:
        if self.streams.pop(stream.stream_id, None) is not None:
            stream.fail(grpc.StatusCode.UNAVAILABLE, message)


def _request_headers(path: str, authority: str) -> bytes:
    # `:method: POST` is entry 3 of HPACK's own table, `:scheme: http` is 6.
    named = ((b":path", path), (b":authority", authority), (b"te", "trailers"), (b"content-type", "application/grpc"))
    return b"\x83\x86" + b"".join(header(name, value.encode()) for name, value in named)
