"""uvicorn's HTTP protocol, with a short cut for the edge's checks of keys, which come with each typed request."""

from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway.authz import AUTHORIZATION_PATH, HttpAuthorization

__all__ = ["protocol_with"]

_PATH: Final = AUTHORIZATION_PATH.encode()


def protocol_with(authorization: HttpAuthorization) -> type[HttpToolsProtocol]:
    """The protocol that answers checks of known keys by itself, without a task. All else is as uvicorn has it."""

    class WithChecks(HttpToolsProtocol):
        _answer: bytes | None = None

        def on_headers_complete(self) -> None:
            self._answer = None
            is_check = self.url.startswith(_PATH) and self.parser.should_keep_alive()
            if is_check and (self.cycle is None or self.cycle.response_complete):
                self._answer = authorization.known_answer(self.url, self.headers)
            if self._answer is None:
                super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if self._answer is None:
                super().on_body(body)

        def on_message_complete(self) -> None:
            if self._answer is None:
                super().on_message_complete()
            else:
                self.transport.write(self._answer)
                self.on_response_complete()

    return WithChecks
