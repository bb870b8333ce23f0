"""The latest sample, and everybody who waits for the next one."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from services.telemetry.gpu import Change, Sample

__all__ = ["Board"]


class Board:
    """Keeps the latest sample.

    Watchers hold no queue: each is told what is different between the sample that it has seen and the latest one, so
    a slow watcher skips samples and costs no memory.
    """

    def __init__(self) -> None:
        self._latest: Sample | None = None
        self._news = asyncio.Event()
        self._closed = False

    @property
    def latest(self) -> Sample | None:
        """The latest sample; None before the first. Safe to read from any thread."""
        return self._latest

    def publish(self, sample: Sample) -> None:
        """This is the latest one from now on."""
        self._latest = sample
        self._tell()

    def close(self) -> None:
        """There will be no further one: every watch ends."""
        self._closed = True
        self._tell()

    async def first(self) -> Sample:
        """The latest sample, waiting for the first one if need be: until the deadline at the latest.

        Raises:
            EOFError: sampling has ended before there was one.
        """
        async with aclosing(self.samples()) as samples:
            async for sample in samples:
                return sample
        raise EOFError("sampling has ended")

    async def samples(self) -> AsyncGenerator[Sample, None]:
        """The latest sample, then each new one, except those that come while the caller is busy."""
        seen: Sample | None = None
        while True:
            news, latest = self._news, self._latest
            if latest is not None and latest is not seen:
                seen = latest
                yield latest
            elif self._closed:
                return
            else:
                await news.wait()

    async def changes(self) -> AsyncGenerator[Change, None]:
        """Everything, then what has changed since the last message."""
        seen: Sample | None = None
        async with aclosing(self.samples()) as samples:
            async for sample in samples:
                change, seen = sample.since(seen), sample
                if change is not None:
                    yield change

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
