"""An answer on its way out."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Final

import msgspec

from services.common.errors import MeshError
from services.gateway.http import CLIENT_SECONDS, JSON, ClientLeftError, Message, Send, Unfinished, Write, error_headers
from services.gateway.pieces import Totals
from services.gateway.timers import Timers

__all__ = ["Response", "error_response"]

_NOT_MODIFIED: Final = 304
# Proxies and clients on the way give up on a connection on which nothing moves.
_WAITING: Final = b": waiting\n\n"


class Response:
    """An answer on its way out. `started` tells whether its status is gone already."""

    def __init__(
        self,
        send: Send,
        request_id: str,
        *,
        client_seconds: float = CLIENT_SECONDS,
        abort: Callable[[], None] | None = None,
        write: Write | None = None,
        timers: Timers | None = None,
        before_end: Callable[[], None] | None = None,
    ) -> None:
        """`client_seconds`: how long a client may take nothing; then `abort` cuts its connection.

        `write`: a shorter way for what is sent without waiting, if the server has one. `timers`: those of all requests.
        `before_end` is called before the end is sent, if the server does not see to that.
        """
        self._before_end = before_end
        self.timers = timers or Timers()
        self._send = send
        self._write = write
        self._client_seconds = client_seconds
        self._abort = abort
        self._headers: list[tuple[bytes, bytes]] = [(b"x-request-id", request_id.encode())]
        self.request_id = request_id
        self.started = False
        self.ended = False
        self.status = 0
        self._busy = False
        self._spoke = False
        self._waiting = _WAITING
        self._on_queued: Callable[[], None] | None = None
        self._unfinished: Unfinished | None = None
        # Used again and again: a message is done with when send() returns, and while it doesn't we are busy.
        self._message: Message = {"type": "http.response.body", "body": b"", "more_body": True}
        self._error: Exception | None = None
        self.facts: dict[str, object] = {}
        """What the request's log line tells beside its outcome."""
        self.totals = Totals()

    def add_header(self, name: str, value: str, *, once: bool = False) -> None:
        """Adds a header; before anything is sent. `once`: unless it is there."""
        key = name.encode()
        if not (once and any(there == key for there, _ in self._headers)):
            self._headers.append((key, value.encode("latin-1", "replace")))

    async def send_json(self, status: int, body: object, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Sends a whole JSON answer."""
        encoded = body if isinstance(body, bytes) else msgspec.json.encode(body)
        await self.send_whole(status, encoded, [JSON, *headers])

    async def send_whole(self, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Sends a whole answer of any type, which the headers tell."""
        length = [] if status == _NOT_MODIFIED else [(b"content-length", str(len(body)).encode())]
        await self._start(status, [*length, *headers])
        await self._deliver_end(body)

    async def send_bytes(self, parts: AsyncIterator[bytes], *, length: int) -> None:
        """Sends a file."""
        headers = ((b"content-type", b"application/octet-stream"), (b"content-length", str(length).encode()))
        await self._start(200, headers)
        async for part in parts:
            await self._deliver({"type": "http.response.body", "body": part, "more_body": True})
        await self.end()

    async def start_events(self) -> None:
        """Begins a stream of server-sent events."""
        # Proxies on the way must not collect the events.
        no_buffering = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
        await self._start(200, [(b"content-type", b"text/event-stream; charset=utf-8"), *no_buffering])

    async def send_events(self, events: bytes) -> None:
        """Sends events; waits while the client's buffers are full.

        Raises:
            ClientLeftError: they are full for so long that the client is given up.
        """
        await self._own()
        await self._deliver({"type": "http.response.body", "body": events, "more_body": True})
        self._busy = False

    async def _own(self) -> None:
        """Has nobody else write, and what was begun to be written be gone."""
        if self._error is not None:
            raise self._error
        self._busy = True
        if self._unfinished is not None:
            unfinished, self._unfinished = self._unfinished, None
            await self._finish(unfinished)

    async def _deliver(self, message: Message) -> None:
        sending = self._send(message)
        try:
            blocker = sending.send(None)  # type: ignore[attr-defined]  # servers' send() is a coroutine function
        except StopIteration:
            # Nearly always: a timer is for those that have to wait.
            return
        await self._finish(Unfinished(sending, blocker))

    async def _finish(self, unfinished: Unfinished) -> None:
        try:
            async with asyncio.timeout(self._client_seconds):
                await unfinished
        except TimeoutError:
            if self._abort is not None:
                self._abort()
            raise ClientLeftError from None

    def write_events(self, events: bytes) -> bool:
        """Sends events without giving way to other tasks, which saves a wake-up a token.

        False, and nothing is sent, while the client's buffers are full.
        """
        if self._busy:
            return False
        self._spoke = True
        if self._write is not None:
            return self._write(events)
        message = self._message
        message["body"] = events
        sending = self._send(message)
        try:
            blocker = sending.send(None)  # type: ignore[attr-defined]  # servers' send() is a coroutine function
        except StopIteration:
            return True
        except Exception as error:  # noqa: BLE001  # it is this stream's own error, and whoever writes has others to serve
            self._busy, self._error = True, error
            return False
        # The buffers are full, and the server waits until they are not: the next send_events() waits with it.
        self._busy, self._unfinished = True, Unfinished(sending, blocker)
        return True

    async def keep_alive(self) -> None:
        """Begins the events, or sends a comment, which clients skip, when nothing was sent since the last call."""
        if self._busy or self.ended:
            return
        if not self.started:
            await self.start_events()
        if not self._spoke:
            self.write_events(self._waiting)
        self._spoke = False

    def note_queue(self, position: int, expected_seconds: float | None) -> None:
        """Says from now on, while there is nothing else to send, where the request stands in the queue."""
        expected = "" if expected_seconds is None else f" expected_wait={expected_seconds:.1f}s"
        self._waiting = f": queued position={position}{expected}\n\n".encode()
        if self._on_queued is not None:
            self._on_queued()

    def when_queued(self, call: Callable[[], None]) -> None:
        """Calls back when the request is known to stand in the queue."""
        self._on_queued = call

    async def end(self, events: bytes = b"") -> None:
        """Ends a stream, with its last events; waits while the client's buffers are full."""
        await self._own()
        await self._deliver_end(events)

    async def _deliver_end(self, body: bytes) -> None:
        self.ended = True
        if self._before_end is not None:
            self._before_end()
        await self._deliver({"type": "http.response.body", "body": body})

    async def _start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.started, self.status = True, status
        await self._deliver({"type": "http.response.start", "status": status, "headers": [*self._headers, *headers]})


async def error_response(response: Response, error: MeshError) -> None:
    """Answers with an error, or, when the answer has begun, ends it with one error event and no [DONE]."""
    if response.started:
        await response.end(b"data: " + msgspec.json.encode(error.http_body()) + b"\n\n")
        return
    await response.send_json(error.row.http, error.http_body(), error_headers(error))
