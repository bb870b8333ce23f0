"""One call of a gRPC server on HTTP/2: what of its messages has come, and the way of its answers."""

import asyncio
import base64
import logging
from typing import Final, Protocol
from urllib.parse import quote

import grpc

from services.common.errors import MeshError, Reason
from services.common.http2_frames import END_HEADERS, END_STREAM, Code, Kind, frame, header, reset
from services.common.http2_messages import MessageReader
from services.common.http2_outgoing import Connection, Outgoing
from services.common.status import DETAILS_KEY, grpc_code, status_from_error

__all__ = ["Budget", "Call", "Stream"]

# Of all messages that are not complete yet, and of what one peer does not take.
_MOST_INCOMPLETE_BYTES: Final = 256 << 20
_MOST_UNSENT_BYTES: Final = 32 << 20
# HPACK without a table: `:status: 200` is its entry 8, `content-type` the name of its entry 31.
_RESPONSE_HEADERS: Final = b"\x88\x0f\x10\x10application/grpc"


_log = logging.getLogger(__name__)


class Budget:
    """What all calls of a server share."""

    def __init__(self, max_message_bytes: int) -> None:
        self.max_message_bytes = max_message_bytes
        self.incomplete_bytes = 0


class Call(Protocol):
    """What is done with one call."""

    def take(self, message: bytes) -> None:
        """Takes in a message."""

    def fail(self, error: MeshError) -> None:
        """Takes in that what comes is no message that could be taken."""

    def close(self) -> None:
        """The call is over, however it ended."""


class Stream(Outgoing):
    """One call: what of its messages has come, and the way of its answers."""

    def __init__(self, stream_id: int, connection: "Connection[Stream]", window: int, budget: Budget) -> None:
        super().__init__(stream_id, window)
        self.call: Call | None = None
        self.has_ended = False
        """Whether the peer says nothing more."""
        self._connection = connection
        self._budget = budget
        self._messages = MessageReader(budget.max_message_bytes)
        self._counted = 0
        self._status: grpc.StatusCode | None = None
        self._told = b""
        self._has_answered = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def has_room(self) -> bool:
        """Whether what is sent now goes out at once. Whatever is sent without room is kept, as far as it goes."""
        return not self._unsent and not self._connection.is_full

    def send(self, message: bytes) -> None:
        """Sends a message; what the peer does not take yet is kept. On a call that is over it does nothing."""
        if self._status is None:
            self._add(message)
            self._connection.write(self)

    def end(self, status: grpc.StatusCode = grpc.StatusCode.OK) -> None:
        """Ends the call with a status, after what is to be sent."""
        if self._status is None:
            self._status = status
            self._connection.write(self)

    def finish(self) -> None:
        """Ends the call well."""
        self.end()

    def give_up(self, error: Exception) -> None:
        """Ends the call with an error, and what there is to say of it."""
        if not isinstance(error, MeshError):
            _log.error("a call failed", exc_info=error)
            error = MeshError(Reason.INTERNAL, "internal error")
        if self._status is None:
            details = base64.b64encode(status_from_error(error).SerializeToString()).rstrip(b"=")
            self._told = header(b"grpc-message", quote(error.message).encode()) + header(DETAILS_KEY.encode(), details)
            self.end(grpc_code(error))

    def end_in(self, seconds: float) -> None:
        """Ends the call after that time, if it is not over by then."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, self.end, grpc.StatusCode.DEADLINE_EXCEEDED)

    def feed(self, data: bytes) -> None:
        """Takes in a piece of what the peer sends, and passes the messages on that it completes."""
        call = self.call
        if call is None or self._status is not None:
            return
        try:
            for message in self._messages.read(data):
                call.take(message)
                if self._is_over:
                    break
        except MeshError as error:
            call.fail(error)
        if self._is_over:
            self._messages.clear()
        self._count()
        if self._counted and self._budget.incomplete_bytes > _MOST_INCOMPLETE_BYTES:
            call.fail(MeshError(Reason.NO_CAPACITY, "too many bodies are on their way", retry_after_seconds=1.0))

    @property
    def _is_over(self) -> bool:
        return self.call is None or self._status is not None

    def frames(self, window: int) -> tuple[bytes, int, bool]:
        """What is to be sent: frames, how much they take of the connection's `window`, whether they are the last."""
        out = bytearray()
        if not self._has_answered:
            self._has_answered = True
            out += frame(Kind.HEADERS, END_HEADERS, self.stream_id, _RESPONSE_HEADERS)
        data, taken = self._data(window)
        out += data
        if len(self._unsent) > _MOST_UNSENT_BYTES:
            out += reset(self.stream_id, Code.ENHANCE_YOUR_CALM)
            return bytes(out), taken, True
        if self._unsent or self._status is None:
            return bytes(out), taken, False
        trailers = header(b"grpc-status", str(self._status.value[0]).encode()) + self._told
        out += frame(Kind.HEADERS, END_HEADERS | END_STREAM, self.stream_id, trailers)
        if not self.has_ended:
            # As gRPC has it: the peer need say nothing more.
            out += reset(self.stream_id, Code.NO_ERROR)
        return bytes(out), taken, True

    def close(self) -> None:
        """Lets go of the call."""
        if self._timer is not None:
            self._timer.cancel()
        self._messages.clear()
        self._count()
        call, self.call = self.call, None
        if call is not None:
            call.close()

    def _count(self) -> None:
        self._budget.incomplete_bytes += len(self._messages) - self._counted
        self._counted = len(self._messages)
