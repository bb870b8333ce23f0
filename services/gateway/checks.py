"""uvicorn's HTTP protocol, with a short cut for the edge's checks of keys, which come with each typed request.

And with one write less for each answer: its head goes out together with the beginning of its body.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway.authz import AUTHORIZATION_PATH, HttpAuthorization, KnownAnswer
from services.gateway.http import ABORT, WATCH, WRITE

if TYPE_CHECKING:
    from uvicorn.protocols.http.flow_control import FlowControl
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

__all__ = ["protocol_with"]

_PATH: Final = AUTHORIZATION_PATH.encode()
_CONTINUE: Final = b"HTTP/1.1 100 "


class _HeldHead:
    """The transport of one answer until its body begins: keeps the head back until then, or the loop's next turn."""

    def __init__(self, cycle: "RequestResponseCycle", transport: asyncio.Transport) -> None:
        self._cycle = cycle
        self._transport = transport
        self._head = b""

    def write(self, data: bytes) -> None:
        """The head, and then what is first behind it."""
        if self._head:
            self._let_go(data)
        elif data.startswith(_CONTINUE):
            self._transport.write(data)
        else:
            self._head = data
            asyncio.get_running_loop().call_soon(self._let_go)

    def close(self) -> None:
        """Closes the connection behind what was written."""
        self._let_go()
        self._transport.close()

    def _let_go(self, more: bytes = b"") -> None:
        if self._head or more:
            self._transport.write(self._head + more)
            self._head = b""
        # The rest goes its usual way.
        self._cycle.transport = self._transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _write_chunk(cycle: "RequestResponseCycle", flow: "FlowControl", events: bytes) -> bool:
    """Writes a part of an answer's body, as uvicorn does, but without a coroutine."""
    if flow.write_paused or not cycle.chunked_encoding:
        return False
    if events and not cycle.disconnected:
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(events), events))
    return True


class _WithChecks(HttpToolsProtocol):
    """One connection."""

    authorization: HttpAuthorization
    _known: KnownAnswer | None = None
    _left: Callable[[], None] | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._left is not None:
            self._left()

    def _watch(self, left: Callable[[], None]) -> Callable[[], None]:
        self._left = left
        if self.transport.is_closing():
            self.loop.call_soon(left)
        return self._watch_no_more

    def _watch_no_more(self) -> None:
        self._left = None

    def on_headers_complete(self) -> None:
        self._known = None
        is_check = self.url.startswith(_PATH) and self.parser.should_keep_alive()
        if is_check and (self.cycle is None or self.cycle.response_complete):
            self._known = self.authorization.known_answer(self.url, self.headers)
        if self._known is None:
            before = self.cycle
            super().on_headers_complete()
            if self.cycle is not before:
                self._extend(self.cycle)

    def _extend(self, cycle: "RequestResponseCycle") -> None:
        held: Any = _HeldHead(cycle, self.transport)
        cycle.transport = held
        write = partial(_write_chunk, cycle, self.flow)
        extensions: Any = {ABORT: self.transport.abort, WATCH: self._watch, WRITE: write}
        cycle.scope["extensions"] = extensions

    def on_body(self, body: bytes) -> None:
        if self._known is None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._known is None:
            super().on_message_complete()
        else:
            answer, then = self._known
            self.transport.write(answer)
            then()
            self.on_response_complete()


def protocol_with(authorization: HttpAuthorization) -> type[HttpToolsProtocol]:
    """The protocol that answers checks of known keys by itself, without a task. All else is as uvicorn has it."""
    return type("WithChecks", (_WithChecks,), {"authorization": authorization})
