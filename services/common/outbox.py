"""One writer for a stream: what comes while it is busy goes out together."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

__all__ = ["Outbox", "OutboxFullError"]


M = TypeVar("M")


class OutboxFullError(Exception):
    """The peer reads too slowly: more waits for it than the outbox holds."""


class Outbox(Generic[M]):
    """Merges what is put into one message until the stream is free to take it.

    grpc.aio allows one outstanding write a stream. Writers call `edit()` for the message that goes out next, add to
    it, and are done; whoever owns the stream iterates over `messages()`, or, where no task shall be woken for it, is
    called by `drive()` and calls `take()`. All that is added within one turn of the event loop goes out together, so
    one engine step is one message.

    Not for use from several threads.
    """

    def __init__(self, new: Callable[[], M], *, max_edits: int) -> None:
        """`new` makes an empty message; more than `max_edits` edits waiting raise OutboxFullError."""
        self._new = new
        self._max_edits = max_edits
        self._message = new()
        self._edits = 0
        self._wanted = asyncio.Event()
        self._tell = self._wanted.set
        self._closed = False

    @property
    def is_done(self) -> bool:
        """Whether it is closed, and everything is out."""
        return self._closed and not self._edits

    def drive(self, tell: Callable[[], None]) -> None:
        """Calls `tell` whenever there is something to take after there was nothing, and when it is closed."""
        self._tell = tell
        if self._edits or self._closed:
            tell()

    def edit(self, cost: int = 1) -> M:
        """The message that goes out next, to be added to before the next await.

        A large addition may count for more than one edit by its `cost`.

        Raises:
            OutboxFullError: the peer doesn't read.
        """
        if not self._edits:
            self._edits = cost
            self._tell()
            return self._message
        self._edits += cost
        if self._edits > self._max_edits:
            raise OutboxFullError
        return self._message

    def close(self) -> None:
        """Ends `messages()` once everything is out."""
        self._closed = True
        self._tell()

    def take(self) -> M | None:
        """The message that goes out next; None when there is none."""
        if not self._edits:
            return None
        message, self._message, self._edits = self._message, self._new(), 0
        return message

    async def messages(self) -> AsyncIterator[M]:
        """The messages to write, each as soon as the one before it is taken."""
        while True:
            await self._wanted.wait()
            message = self.take()
            if message is None:
                return
            if not self._closed:
                self._wanted.clear()
            yield message
