"""What holds while a client waits for its answer: signs of life to it, and that it is there and within its time."""

import asyncio
from typing import Final, Literal

from services.common.errors import MeshError, Reason
from services.gateway.http import ClientLeftError
from services.gateway.request import Request
from services.gateway.response import Response

__all__ = ["kept_alive", "while_connected"]

_KEEP_ALIVE_SECONDS: Final = 10.0


class kept_alive:  # noqa: N801  # as context managers are called; a generator would take three times as long
    """Sends comments while the block's events are long in coming: a request that waits in the queue, say."""

    def __init__(self, response: Response, *, tell_queue: bool = False) -> None:
        """`tell_queue`: the first comment comes as soon as it does wait there, and says at which place."""
        self._response = response
        self._tell_queue = tell_queue
        self._beats: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        # Few streams last that long: the others are spared the task.
        self._stop_timer = self._response.timers.after(_KEEP_ALIVE_SECONDS, self._begin)
        if self._tell_queue:
            self._response.when_queued(self._begin)

    def __exit__(self, *_: object) -> None:
        self._stop_timer()
        if self._beats is not None:
            self._beats.cancel()

    def _begin(self) -> None:
        if self._beats is None:
            self._beats = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        while True:
            await self._response.keep_alive()
            await asyncio.sleep(_KEEP_ALIVE_SECONDS)


class while_connected:  # noqa: N801  # as context managers are called; a generator would take three times as long
    """Runs the block for as long as the client is there, and `seconds` at most.

    Raises:
        ClientLeftError: the client left before the answer was complete.
        MeshError: DEADLINE_EXCEEDED.
    """

    def __init__(self, request: Request, response: Response, seconds: float) -> None:
        self._request = request
        self._response = response
        self._seconds = seconds
        self._cut: Literal["left", "late"] | None = None

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        # As asyncio.timeout() does it, but with a timer that costs less.
        self._task, self._cancelled_before = task, task.cancelling()
        self._stop_timer = self._response.timers.after(self._seconds, self._be_late)
        self._watch_no_more = self._request.when_left(self._leave)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._watch_no_more()
        self._stop_timer()
        if self._cut is None or self._task.uncancel() > self._cancelled_before:
            return
        if kind is None or not issubclass(kind, asyncio.CancelledError):
            return
        if self._cut == "left":
            raise ClientLeftError from None
        message = f"the request took longer than {self._seconds:g} s"
        raise MeshError(Reason.DEADLINE_EXCEEDED, message) from None

    def _be_late(self) -> None:
        self._end("late")

    def _leave(self) -> None:
        # Servers tell of a "disconnect" when the answer is complete, too.
        if not self._response.ended:
            self._end("left")

    def _end(self, why: Literal["left", "late"]) -> None:
        if self._cut is None:
            self._cut = why
            self._task.cancel()
