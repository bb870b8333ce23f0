"""One call of a gRPC server on HTTP/2: what of its messages has come, and the way of its answers."""

import asyncio
import struct
from typing import Final, Protocol

import grpc

from services.common.errors import MeshError, Reason
from services.router.http2_frames import END_HEADERS, END_STREAM, MAX_FRAME_BYTES, Code, Kind, frame

__all__ = ["Budget", "Call", "Stream", "reset_frame"]

_PREFIX_BYTES: Final = 5
# Of all messages that are not complete yet, and of what one peer does not take.
_MOST_INCOMPLETE_BYTES: Final = 256 << 20
_MOST_UNSENT_BYTES: Final = 32 << 20
# HPACK without a table: `:status: 200` is its entry 8, `content-type` the name of its entry 31.
_RESPONSE_HEADERS: Final = b"\x88\x0f\x10\x10application/grpc"
_STATUS_HEADER: Final = b"\x00\x0bgrpc-status"


class Budget:
    """What all calls of a server share."""

    def __init__(self, max_message_bytes: int) -> None:
        self.max_message_bytes = max_message_bytes
        self.incomplete_bytes = 0


class Connection(Protocol):
    """What a call's answers go through."""

    def write(self, stream: "Stream") -> None:
        """Writes what a stream has to say; nothing, once it is over."""


class Call(Protocol):
    """What is done with one call."""

    def take(self, message: bytes) -> None:
        """Takes in a message."""

    def fail(self, error: MeshError) -> None:
        """Takes in that what comes is no message that could be taken."""

    def close(self) -> None:
        """The call is over, however it ended."""


class Stream:
    """One call: what of its messages has come, and the way of its answers."""

    def __init__(self, stream_id: int, connection: Connection, window: int) -> None:
        self.stream_id = stream_id
        self.call: Call | None = None
        self.has_ended = False
        """Whether the peer says nothing more."""
        self.window = window
        """How much more the peer takes."""
        self.unread = 0
        """How much came that the peer was not told to be taken."""
        self._connection = connection
        self._incoming = bytearray()
        self._counted = 0
        self._unsent = bytearray()
        self._status: grpc.StatusCode | None = None
        self._has_answered = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_held_up(self) -> bool:
        """Whether something waits for the peer to take it."""
        return bool(self._unsent)

    def send(self, message: bytes) -> None:
        """Sends a message; what the peer does not take yet is kept. On a call that is over it does nothing."""
        if self._status is None:
            self._unsent += b"\0" + len(message).to_bytes(4, "big") + message
            self._connection.write(self)

    def end(self, status: grpc.StatusCode = grpc.StatusCode.OK) -> None:
        """Ends the call with a status, after what is to be sent."""
        if self._status is None:
            self._status = status
            self._connection.write(self)

    def end_in(self, seconds: float) -> None:
        """Ends the call after that time, if it is not over by then."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, self.end, grpc.StatusCode.DEADLINE_EXCEEDED)

    def feed(self, data: bytes, budget: Budget) -> None:
        """Takes in a piece of what the peer sends, and passes the messages on that it completes."""
        self._incoming += data
        while self.call is not None and self._status is None and self._take_one(self.call, budget.max_message_bytes):
            pass
        if self.call is None or self._status is not None:
            self._incoming.clear()
        self._count(budget)
        if self.call is not None and self._counted and budget.incomplete_bytes > _MOST_INCOMPLETE_BYTES:
            self.call.fail(MeshError(Reason.NO_CAPACITY, "too many bodies are on their way", retry_after_seconds=1.0))

    def frames(self, window: int) -> tuple[bytes, int, bool]:
        """What is to be sent: frames, how much they take of the connection's `window`, whether they are the last."""
        out = bytearray()
        if not self._has_answered:
            self._has_answered = True
            out += frame(Kind.HEADERS, END_HEADERS, self.stream_id, _RESPONSE_HEADERS)
        taken = min(len(self._unsent), self.window, window)
        for start in range(0, taken, MAX_FRAME_BYTES):
            out += frame(Kind.DATA, 0, self.stream_id, bytes(self._unsent[start : min(start + MAX_FRAME_BYTES, taken)]))
        taken = max(0, taken)
        del self._unsent[:taken]
        self.window -= taken
        if len(self._unsent) > _MOST_UNSENT_BYTES:
            out += reset_frame(self.stream_id, Code.ENHANCE_YOUR_CALM)
            return bytes(out), taken, True
        if self._unsent or self._status is None:
            return bytes(out), taken, False
        value = str(self._status.value[0]).encode()
        trailers = _STATUS_HEADER + bytes((len(value),)) + value
        out += frame(Kind.HEADERS, END_HEADERS | END_STREAM, self.stream_id, trailers)
        if not self.has_ended:
            # As gRPC has it: the peer need say nothing more.
            out += reset_frame(self.stream_id, Code.NO_ERROR)
        return bytes(out), taken, True

    def close(self, budget: Budget) -> None:
        """Lets go of the call."""
        if self._timer is not None:
            self._timer.cancel()
        self._incoming.clear()
        self._count(budget)
        call, self.call = self.call, None
        if call is not None:
            call.close()

    def _take_one(self, call: Call, most: int) -> bool:
        incoming = self._incoming
        if len(incoming) < _PREFIX_BYTES:
            return False
        size = int.from_bytes(incoming[1:_PREFIX_BYTES], "big")
        if incoming[0] != 0:
            call.fail(MeshError(Reason.UNIMPLEMENTED, "compressed messages are not taken"))
            return False
        if size > most:
            call.fail(MeshError(Reason.REQUEST_TOO_LARGE, f"the message has more than {most} bytes"))
            return False
        if len(incoming) < _PREFIX_BYTES + size:
            return False
        message = bytes(memoryview(incoming)[_PREFIX_BYTES : _PREFIX_BYTES + size])
        del incoming[: _PREFIX_BYTES + size]
        call.take(message)
        return True

    def _count(self, budget: Budget) -> None:
        budget.incomplete_bytes += len(self._incoming) - self._counted
        self._counted = len(self._incoming)


def reset_frame(stream_id: int, code: Code) -> bytes:
    """A RST_STREAM frame."""
    return frame(Kind.RST_STREAM, 0, stream_id, struct.pack(">I", code))
