"""The little of HTTP that the gateway needs on top of ASGI."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, MutableMapping, Sequence
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec

from services.common.errors import MeshError, Reason
from services.gateway.pieces import Totals
from services.gateway.timers import Timers

__all__ = [
    "ABORT",
    "ENDS_WHEN_NOTED",
    "JSON",
    "QUEUE_HEADER",
    "WATCH",
    "WRITE",
    "ClientLeftError",
    "Headers",
    "Request",
    "Response",
    "error_headers",
    "error_response",
]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]
"""By lower-case names, in their order."""
Watch = Callable[[Callable[[], None]], Callable[[], None]]
WATCH: Final = "tokenloom.watch"
"""The extension of ASGI that is a Watch: it calls back when the client has left, until what it returns is called.

It saves a task that waits for that.
"""
JSON: Final = (b"content-type", b"application/json")
_MOST_PARAMETERS: Final = 64
_NOT_MODIFIED: Final = 304
QUEUE_HEADER: Final = b"x-queue-status"
"""With "1": say in comments where a stream's request stands in the queue, from the moment that it does."""
_CLIENT_SECONDS: Final = 30.0
ABORT: Final = "tokenloom.abort"
"""The extension of ASGI that cuts the connection of a request."""
# A body that comes more slowly is not waited for, whatever its size.
_LEAST_BYTES_PER_SECOND: Final = 4096
# Proxies and clients on the way give up on a connection on which nothing moves.
_WAITING: Final = b": waiting\n\n"


ENDS_WHEN_NOTED: Final = "tokenloom.ends_when_noted"
"""The extension of ASGI that is there where the server has ends of answers wait until requests are written down."""
Write = Callable[[bytes], bool]
WRITE: Final = "tokenloom.write"
"""The extension of ASGI that is a Write: it writes a part of an answer's body that has begun; False while it can't."""


class ClientLeftError(Exception):
    """The client closed its connection, or stood still for too long, before the answer was complete."""


class Request:
    """A request on its way in."""

    def __init__(
        self, scope: MutableMapping[str, Any], receive: Receive, *, client_seconds: float = _CLIENT_SECONDS
    ) -> None:
        """`client_seconds`: how long the body may take to come, beside what its size takes."""
        self._client_seconds = client_seconds
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self._query: bytes = scope.get("query_string", b"")
        self._headers: dict[bytes, bytes | None] = {}
        for name, value in scope["headers"]:
            self._headers[name] = None if name in self._headers else value
        self._receive = receive
        self._watch: Watch | None = scope.get("extensions", {}).get(WATCH)
        self.parameters: dict[str, str] = {}
        """What the route's path has in braces."""

    def header(self, name: bytes) -> str | None:
        """The value of a header, by its lower-case name; None when it is absent or there are several."""
        value = self._headers.get(name)
        return None if value is None else value.decode("latin-1")

    @property
    def query(self) -> dict[str, str]:
        """The query's parameters; of a repeated one the last value.

        Raises:
            MeshError: too many of them, or a NUL, which databases don't take.
        """
        try:
            pairs = parse_qsl(self._query.decode("latin-1"), keep_blank_values=True, max_num_fields=_MOST_PARAMETERS)
        except ValueError:
            message = f"the query has more than {_MOST_PARAMETERS} parameters"
            raise MeshError(Reason.INVALID_REQUEST, message) from None
        for name, value in pairs:
            if "\0" in name + value:
                raise MeshError(Reason.INVALID_REQUEST, f"{name[:64]!r}: a NUL in the query", field=name[:64])
        return dict(pairs)

    async def json_body(self, limit: int) -> bytes:
        """The body, which must say that it is JSON.

        Raises:
            MeshError: another content type (415), or more than `limit` bytes (413); reading stops there.
            ClientLeftError: the client left before the end.
        """
        media_type = (self.header(b"content-type") or "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise MeshError(Reason.UNSUPPORTED_MEDIA_TYPE, "send the body as content-type: application/json")
        if self.header(b"content-encoding") not in (None, "identity"):
            raise MeshError(Reason.UNSUPPORTED_MEDIA_TYPE, "send the body without a content-encoding")
        self.check_length(limit)
        return await self._read(limit)

    def check_length(self, limit: int) -> None:
        """Refuses a body that says of itself that it is larger than `limit` bytes. Raises MeshError."""
        declared = self.header(b"content-length") or "0"
        if declared.isdecimal() and int(declared) > limit:
            raise _too_large(limit)

    async def _read(self, limit: int) -> bytes:
        reader = _BodyReader(self._receive, limit, self._client_seconds)
        parts = [await reader.next()]
        while not reader.is_done:
            parts.append(await reader.next())
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def body_parts(self, limit: int) -> AsyncIterator[bytes]:
        """The body as it comes.

        Raises:
            MeshError: it is larger than `limit` bytes, or comes too slowly; reading stops there.
            ClientLeftError: the client left before the end.
        """
        reader = _BodyReader(self._receive, limit, self._client_seconds)
        while not reader.is_done:
            yield await reader.next()

    def when_left(self, left: Callable[[], None]) -> Callable[[], object]:
        """Calls back when the client has left, until what this returns is called. Only after the body was read."""
        if self._watch is not None:
            return self._watch(left)
        return asyncio.create_task(self._disconnected(left)).cancel

    async def _disconnected(self, left: Callable[[], None]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        left()


class _BodyReader:
    """Reads a body, of which it takes `limit` bytes, and for which it waits as long as its size needs."""

    def __init__(self, receive: Receive, limit: int, client_seconds: float) -> None:
        self._receive = receive
        self._limit = limit
        self._until = asyncio.get_running_loop().time() + client_seconds
        self._size = 0
        self.is_done = False

    async def next(self) -> bytes:
        receiving = self._receive()
        try:
            blocker = receiving.send(None)  # type: ignore[attr-defined]  # servers' receive() is a coroutine function
        except StopIteration as done:
            # Nearly always: a timer is for those that have to wait.
            message: Message = done.value
        else:
            message = await self._wait_for(_Unfinished(receiving, blocker))
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        part: bytes = message.get("body", b"")
        self._size += len(part)
        if self._size > self._limit:
            raise _too_large(self._limit)
        self.is_done = not message.get("more_body", False)
        return part

    async def _wait_for(self, unfinished: "_Unfinished") -> Message:
        try:
            async with asyncio.timeout_at(self._until + self._size / _LEAST_BYTES_PER_SECOND):
                message: Message = await unfinished
        except TimeoutError:
            raise MeshError(Reason.REQUEST_TIMEOUT, "the request did not arrive in time") from None
        return message


class Response:
    """An answer on its way out. `started` tells whether its status is gone already."""

    def __init__(
        self,
        send: Send,
        request_id: str,
        *,
        client_seconds: float = _CLIENT_SECONDS,
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
        self._unfinished: _Unfinished | None = None
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
        await self._finish(_Unfinished(sending, blocker))

    async def _finish(self, unfinished: "_Unfinished") -> None:
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
        self._busy, self._unfinished = True, _Unfinished(sending, blocker)
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


class _Unfinished:
    """A coroutine that was begun outside of a task and is finished in one."""

    def __init__(self, coroutine: Any, blocker: Any) -> None:
        self._coroutine = coroutine
        self._blocker = blocker

    def __await__(self) -> Generator[Any, Any, Any]:
        blocker = self._blocker
        while True:
            try:
                result = yield blocker
                blocker = self._coroutine.send(result)
            except StopIteration as done:
                return done.value


async def error_response(response: Response, error: MeshError) -> None:
    """Answers with an error, or, when the answer has begun, ends it with one error event and no [DONE]."""
    if response.started:
        await response.end(b"data: " + msgspec.json.encode(error.http_body()) + b"\n\n")
        return
    await response.send_json(error.row.http, error.http_body(), error_headers(error))


def error_headers(error: MeshError) -> Headers:
    """What an error says in headers."""
    if error.retry_after_seconds is None:
        return ()
    return ((b"retry-after", str(max(1, math.ceil(error.retry_after_seconds))).encode()),)


def _too_large(limit: int) -> MeshError:
    return MeshError(Reason.REQUEST_TOO_LARGE, f"the body is larger than {limit} bytes")
