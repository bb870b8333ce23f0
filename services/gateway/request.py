"""A request on its way in."""

import asyncio
from collections.abc import AsyncIterator, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import parse_qsl

from services.common.errors import MeshError, Reason
from services.gateway.http import CLIENT_SECONDS, WATCH, ClientLeftError, Message, Receive, Unfinished, Watch

__all__ = ["Request"]

_MOST_PARAMETERS: Final = 64
# A body that comes more slowly is not waited for, whatever its size.
_LEAST_BYTES_PER_SECOND: Final = 4096


class Request:
    """A request on its way in."""

    def __init__(
        self, scope: MutableMapping[str, Any], receive: Receive, *, client_seconds: float = CLIENT_SECONDS
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
        self.json = b""
        """The body, once json_body() has read it."""

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
        self.json = await self._read(limit)
        return self.json

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
            message = await self._wait_for(Unfinished(receiving, blocker))
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        part: bytes = message.get("body", b"")
        self._size += len(part)
        if self._size > self._limit:
            raise _too_large(self._limit)
        self.is_done = not message.get("more_body", False)
        return part

    async def _wait_for(self, unfinished: Unfinished) -> Message:
        try:
            async with asyncio.timeout_at(self._until + self._size / _LEAST_BYTES_PER_SECOND):
                message: Message = await unfinished
        except TimeoutError:
            raise MeshError(Reason.REQUEST_TIMEOUT, "the request did not arrive in time") from None
        return message


def _too_large(limit: int) -> MeshError:
    return MeshError(Reason.REQUEST_TOO_LARGE, f"the body is larger than {limit} bytes")
