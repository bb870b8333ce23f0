"""One request that came whole, and its answer: ASGI for the usual case, which needs a third of uvicorn's own."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

if TYPE_CHECKING:
    from uvicorn.protocols.http.flow_control import FlowControl

__all__ = ["Exchange", "Target", "WhenNoted", "target_of"]

_log = logging.getLogger(__name__)
_BODILESS: Final = (204, 304)
Message = MutableMapping[str, Any]
Target = tuple[str, bytes, bytes]
"""The path, as it is meant and as it came, and the query."""


WhenNoted = Callable[[Callable[[], None]], None]
"""Calls back once it is written down what requests took whose answers have come to their ends."""


@lru_cache(512)
def target_of(url: bytes) -> Target:
    """What a request asks for.

    Raises:
        httptools.HttpParserInvalidURLError, UnicodeDecodeError: it can't be read.
    """
    parsed = httptools.parse_url(url)
    raw_path: bytes = parsed.path
    path = raw_path.decode("ascii")
    return unquote(path) if "%" in path else path, raw_path, parsed.query or b""


class _Wakes(Protocol):
    def set(self) -> None: ...


class _Nobody:
    """Whom nobody has to wake."""

    def set(self) -> None:
        """Does nothing."""


_NOBODY: Final = _Nobody()


class Exchange:
    """The request is there, the connection is kept, and there is no other request on it before the answer's end.

    It stands where uvicorn has its RequestResponseCycle, and has the attributes of that which uvicorn looks at. The
    answer's head goes out with the beginning of its body, and its end when the time has come for that.
    """

    def __init__(
        self,
        scope: MutableMapping[str, Any],
        body: bytes,
        transport: asyncio.Transport,
        flow: "FlowControl",
        *,
        on_response: Callable[[], None],
        when_noted: WhenNoted,
    ) -> None:
        """`on_response` is called when the answer is out, whose end waits for `when_noted`."""
        self.message_event: _Wakes = _NOBODY
        """Of who waits for the client to leave."""
        self.disconnected = False
        self.response_complete = False
        """Whether all of it is out."""
        self.keep_alive = True
        """Whether the connection is used again; the server may change its mind."""
        self._scope = scope
        self._body: bytes | None = body
        self._transport = transport
        self._flow = flow
        self._on_response = on_response
        self._when_noted = when_noted
        self._has_ended = False
        self._head = b""
        self._has_begun = False
        self._is_chunked = False
        self._left = 0

    async def run(self, app: Callable[..., Awaitable[None]]) -> None:
        """Has the application answer; what it does not answer is a failure of ours."""
        try:
            await app(self._scope, self.receive, self.send)
        except Exception:  # noqa: BLE001  # the server goes on, whatever it is
            _log.exception("a request failed")
        except BaseException:
            self._fail()
            raise
        if not self._has_ended and not self.disconnected:
            _log.error("a request has no answer, or not all of it")
            self._fail()

    async def receive(self) -> Message:
        """The request, and then that the client has left, or the answer is complete."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        while not self.disconnected and not self.response_complete:
            event = self.message_event = asyncio.Event()
            await event.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """A part of the answer. Waits while the system takes no more."""
        if self._flow.write_paused and not self.disconnected:
            await self._flow.drain()
        if self.disconnected:
            return
        if message["type"] == "http.response.start":
            self._begin(message["status"], message["headers"])
        else:
            self._write(message.get("body", b""), is_last=not message.get("more_body", False))

    def write(self, events: bytes) -> bool:
        """A part of an answer of unknown length, without a coroutine; False while the system takes no more."""
        if self._flow.write_paused or not self._is_chunked:
            return False
        if self._head:
            self._write(events, is_last=False)
        elif events and not self.disconnected:
            # Written out: this is what comes with every token.
            self._transport.write(b"%x\r\n%b\r\n" % (len(events), events))
        return True

    def _begin(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        if self._has_begun:
            raise RuntimeError("an answer that begins twice")
        self._is_chunked = status not in _BODILESS
        lines = [STATUS_LINE[status]]
        for name, value in headers:
            if name == b"content-length":
                self._is_chunked, self._left = False, int(value)
            lines.append(b"%b: %b\r\n" % (name, value))
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        if self._is_chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
            raise RuntimeError("a header with a line break in it")
        self._has_begun, self._head = True, head + b"\r\n"

    def _write(self, body: bytes, *, is_last: bool) -> None:
        if not self._has_begun or self._has_ended:
            raise RuntimeError("a body without a head, or behind its end")
        if self._is_chunked:
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
            if is_last:
                body += b"0\r\n\r\n"
        else:
            self._left -= len(body)
            if self._left < 0 or (is_last and self._left):
                raise RuntimeError("a body of another length than was said")
        if self._head:
            body, self._head = self._head + body, b""
        if is_last:
            self._has_ended = True
            self._when_noted(partial(self._end, body))
        elif body:
            self._transport.write(body)

    def _end(self, body: bytes) -> None:
        if self.disconnected:
            return
        if body:
            self._transport.write(body)
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self._transport.close()
        self._on_response()

    def _fail(self) -> None:
        if self._has_ended or self.disconnected:
            return
        if not self._has_begun:
            text = (b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"21")
            self.keep_alive = False
            self._begin(500, text)
            self._write(b"Internal Server Error", is_last=True)
        else:
            self._transport.close()
