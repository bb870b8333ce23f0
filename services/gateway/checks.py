"""uvicorn's HTTP protocol, with a short cut for the edge's checks of keys, which come with each typed request.

And with one write less for each answer: its head goes out together with the beginning of its body.
"""

import asyncio
from typing import TYPE_CHECKING, Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway.authz import AUTHORIZATION_PATH, HttpAuthorization, KnownAnswer
from services.gateway.http import ABORT

if TYPE_CHECKING:
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


def protocol_with(authorization: HttpAuthorization) -> type[HttpToolsProtocol]:
    """The protocol that answers checks of known keys by itself, without a task. All else is as uvicorn has it."""

    class WithChecks(HttpToolsProtocol):
        _known: KnownAnswer | None = None

        def on_headers_complete(self) -> None:
            self._known = None
            is_check = self.url.startswith(_PATH) and self.parser.should_keep_alive()
            if is_check and (self.cycle is None or self.cycle.response_complete):
                self._known = authorization.known_answer(self.url, self.headers)
            if self._known is None:
                before = self.cycle
                super().on_headers_complete()
                if self.cycle is not before:
                    held: Any = _HeldHead(self.cycle, self.transport)
                    self.cycle.transport = held
                    extensions: Any = {ABORT: self.transport.abort}
                    self.scope["extensions"] = extensions

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

    return WithChecks
