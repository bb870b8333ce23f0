"""Clients of the typed API that take nothing of their answers: how long that is borne, and who hears of it."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

__all__ = ["Abandoned", "Writing", "bounded_writes"]

_TOLD_SECONDS: Final = 2.0
_MOST: Final = 1024


class Writing:
    """Notes what is being written."""

    __slots__ = ("since",)

    def __init__(self) -> None:
        self.since: float | None = None
        """When the write that is under way began, by the event loop's clock; None when there is none."""


@asynccontextmanager
async def bounded_writes(seconds: float) -> AsyncIterator[Writing]:
    """Runs the block for as long as no write that it notes takes longer than `seconds`.

    One timer a block, and not one a write: a write is one token.

    Raises:
        TimeoutError: one took longer.
    """
    writing = Writing()
    async with asyncio.timeout(None) as scope:
        watch = _Watch(writing, scope, seconds)
        try:
            yield writing
        finally:
            watch.timer.cancel()


class _Watch:
    """Ends a scope once a write takes too long."""

    def __init__(self, writing: Writing, scope: asyncio.Timeout, seconds: float) -> None:
        self._writing = writing
        self._scope = scope
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self.timer = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        now, since = self._loop.time(), self._writing.since
        until = (now if since is None else since) + self._seconds
        if until <= now:
            self._scope.reschedule(now)
        else:
            self.timer = self._loop.call_at(until, self._look)


class Abandoned:
    """Requests whose clients were given up lately.

    gRPC can't end a stream whose client takes nothing: the end would come behind what is not taken. The router can, as
    it talks with the edge, so every router is told.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._noted: deque[tuple[float, str]] = deque(maxlen=_MOST)

    def note(self, request_id: str) -> None:
        """One more."""
        self._noted.append((self._clock(), request_id))

    def recent(self) -> Sequence[str]:
        """Those of the last two seconds, so that each is in several reports."""
        noted = self._noted
        while noted and noted[0][0] < self._clock() - _TOLD_SECONDS:
            noted.popleft()
        return [request_id for _, request_id in noted]
