"""The words of HTTP that the gateway has on top of ASGI."""

import math
from collections.abc import Awaitable, Callable, Generator, MutableMapping, Sequence
from typing import Any, Final

from services.common.errors import MeshError

__all__ = [
    "ABORT",
    "CLIENT_SECONDS",
    "ENDS_WHEN_NOTED",
    "JSON",
    "QUEUE_HEADER",
    "WATCH",
    "WRITE",
    "ClientLeftError",
    "Headers",
    "Message",
    "Receive",
    "Send",
    "Unfinished",
    "Watch",
    "Write",
    "error_headers",
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
QUEUE_HEADER: Final = b"x-queue-status"
"""With "1": say in comments where a stream's request stands in the queue, from the moment that it does."""
CLIENT_SECONDS: Final = 30.0
"""How long a client may stand still, if nothing else is said."""
ABORT: Final = "tokenloom.abort"
"""The extension of ASGI that cuts the connection of a request."""


ENDS_WHEN_NOTED: Final = "tokenloom.ends_when_noted"
"""The extension of ASGI that is there where the server has ends of answers wait until requests are written down."""
Write = Callable[[bytes], bool]
WRITE: Final = "tokenloom.write"
"""The extension of ASGI that is a Write: it writes a part of an answer's body that has begun; False while it can't."""


class ClientLeftError(Exception):
    """The client closed its connection, or stood still for too long, before the answer was complete."""


class Unfinished:
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


def error_headers(error: MeshError) -> Headers:
    """What an error says in headers."""
    if error.retry_after_seconds is None:
        return ()
    return ((b"retry-after", str(max(1, math.ceil(error.retry_after_seconds))).encode()),)
