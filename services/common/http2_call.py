"""One call of a gRPC client on HTTP/2: what is said, what comes, and how it ends."""

import asyncio
import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import unquote_to_bytes

import grpc
import grpc.aio

from services.common.errors import MeshError
from services.common.http2_connection import WINDOW
from services.common.http2_frames import (
    END_HEADERS,
    END_STREAM,
    BrokenError,
    Code,
    Kind,
    frame,
    reset,
)
from services.common.http2_messages import MessageReader
from services.common.http2_outgoing import Connection, Outgoing
from services.common.status import grpc_code

__all__ = ["STREAM_ID", "ClientCall"]

STREAM_ID: Final = 1
"""Of the only call of a connection."""
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
# What gRPC makes of answers without a status of its own.
_CODES_OF_HTTP: Final = {
    b"400": grpc.StatusCode.INTERNAL,
    b"401": grpc.StatusCode.UNAUTHENTICATED,
    b"403": grpc.StatusCode.PERMISSION_DENIED,
    b"404": grpc.StatusCode.UNIMPLEMENTED,
    b"429": grpc.StatusCode.UNAVAILABLE,
    b"502": grpc.StatusCode.UNAVAILABLE,
    b"503": grpc.StatusCode.UNAVAILABLE,
    b"504": grpc.StatusCode.UNAVAILABLE,
}
_CODES_OF_RESETS: Final[dict[int, grpc.StatusCode]] = {
    Code.REFUSED_STREAM: grpc.StatusCode.UNAVAILABLE,
    Code.CANCEL: grpc.StatusCode.CANCELLED,
    Code.ENHANCE_YOUR_CALM: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.INADEQUATE_SECURITY: grpc.StatusCode.PERMISSION_DENIED,
}


class ClientCall(Outgoing):
    """The call: what is said goes through `send()`, how it ends is told by `ended()`."""

    def __init__(self, headers: bytes, reader: MessageReader, take: Callable[[bytes], None]) -> None:
        super().__init__(STREAM_ID, WINDOW)
        self.connection: Connection[ClientCall] | None = None
        self._headers = headers
        self._reader = reader
        self._take = take
        self._has_begun = self._has_answer = self._said_all = self._has_said_all = False
        self._is_cancelled = False
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def has_room(self) -> bool:
        """Whether what is sent now goes out at once. Whatever is sent without room is kept, however much it is."""
        return not self._unsent and self.connection is not None and not self.connection.is_full

    @property
    def is_over(self) -> bool:
        """Whether the call has ended, one way or the other."""
        return self._ended.done()

    def send(self, message: bytes) -> None:
        """Sends a message; on a call that is over, or has said that nothing more comes, it does nothing."""
        if not self._said_all:
            self._add(message)
            self._write()

    def finish(self) -> None:
        """Says that nothing more is sent; the server ends the call."""
        if not self._said_all:
            self._said_all = True
            self._write()

    def cancel(self) -> None:
        """Ends the call."""
        self.give_up(_error(grpc.StatusCode.CANCELLED, "cancelled"))

    async def ended(self) -> None:
        """Waits until the server has ended the call.

        Raises:
            grpc.aio.AioRpcError: with another status than OK, or it was lost.
            Exception: whatever `take` has raised.
        """
        await asyncio.shield(self._ended)

    def frames(self, window: int) -> tuple[bytes, int, bool]:
        """What is to be sent: frames, how much they take of the connection's `window`, whether they are the last."""
        if self._is_cancelled:
            return reset(STREAM_ID, Code.CANCEL), 0, True
        out = bytearray()
        if not self._has_begun:
            self._has_begun = True
            out += frame(Kind.HEADERS, END_HEADERS, STREAM_ID, self._headers)
        data, taken = self._data(window)
        out += data
        if self._said_all and not self._unsent and not self._has_said_all:
            self._has_said_all = True
            out += frame(Kind.DATA, END_STREAM, STREAM_ID)
        return bytes(out), taken, False

    def feed(self, data: bytes) -> None:
        """Takes in a piece of what the server says."""
        if not self._has_answer:
            raise BrokenError(Code.PROTOCOL_ERROR, "data before the headers")
        try:
            for message in self._reader.read(data):
                self._take(message)
                if self.is_over:
                    return
        except MeshError as error:
            self.give_up(_error(grpc_code(error), error.message))
        except Exception as error:  # noqa: BLE001  # it is raised by ended()
            self.give_up(error)

    def answer(self, headers: Mapping[bytes, bytes], *, ended: bool) -> None:
        """Takes in the server's headers or trailers."""
        status = headers.get(b":status", b"")
        if not self._has_answer and status.startswith(b"1") and not ended:
            # There will be others.
            return
        if not self._has_answer:
            self._has_answer = True
            if status != b"200":
                code = _CODES_OF_HTTP.get(status, grpc.StatusCode.UNKNOWN)
                self.give_up(_error(code, f"HTTP status {status.decode('latin-1')}"))
            elif not headers.get(b"content-type", b"").startswith(b"application/grpc"):
                self.give_up(_error(grpc.StatusCode.UNKNOWN, "the answer is not gRPC's"))
        elif not ended:
            raise BrokenError(Code.PROTOCOL_ERROR, "trailers that do not end a stream")
        if ended and not self.is_over:
            self._end(headers)

    def reset(self, code: int) -> None:
        """Takes in that the server has broken it off."""
        self.fail(_CODES_OF_RESETS.get(code, grpc.StatusCode.INTERNAL), f"the server reset the call: {code}")

    def fail(self, code: grpc.StatusCode, message: str) -> None:
        """The call is lost."""
        self._finish(_error(code, message))

    def give_up(self, error: Exception) -> None:
        """Ends the call with an error of our own."""
        if not self.is_over:
            self._is_cancelled = True
            self._finish(error)
            if self.connection is not None:
                self.connection.write(self)

    def _write(self) -> None:
        if self.connection is not None and not self.is_over:
            self.connection.write(self)

    def _end(self, trailers: Mapping[bytes, bytes]) -> None:
        number = trailers.get(b"grpc-status", b"")
        code = _CODES.get(int(number), grpc.StatusCode.UNKNOWN) if number.isdigit() else grpc.StatusCode.UNKNOWN
        if code is grpc.StatusCode.OK:
            self._finish(None)
            return
        told = unquote_to_bytes(trailers.get(b"grpc-message", b"")).decode(errors="replace")
        self._finish(_error(code, told if number else "no status", trailers))

    def _finish(self, error: Exception | None) -> None:
        if self.is_over:
            return
        self._said_all = True
        self._unsent.clear()
        self._reader.clear()
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)
            # Nobody has to ask.
            self._ended.exception()


def _error(code: grpc.StatusCode, message: str, trailers: Mapping[bytes, bytes] | None = None) -> grpc.aio.AioRpcError:
    told = [(key.decode("latin-1"), value) for key, value in (trailers or {}).items()]
    metadata = [(key, _value(key, value)) for key, value in told if not key.startswith((":", "grpc-message"))]
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details=message)


def _value(key: str, value: bytes) -> str | bytes:
    if not key.endswith("-bin"):
        return value.decode("latin-1")
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4))
    except binascii.Error:
        return b""
