"""Takes a sample every so often and tells whoever wants to know."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from services.telemetry.gpu import Change, Driver, DriverState, Sample, Scan
from services.telemetry.roster import Roster
from services.telemetry.slow_call import SlowCall

__all__ = ["Sampler", "deadline_for"]

_log = logging.getLogger(__name__)


def deadline_for(period_seconds: float) -> float:
    """How long one sample may take before the driver counts as hanging, in seconds."""
    return min(5.0, max(1.0, 3 * period_seconds))


class Sampler:
    """Keeps the latest sample.

    Watchers hold no queue: each is told what is different between the sample that it has seen and the latest one, so
    a slow watcher skips samples and costs no memory.
    """

    def __init__(
        self,
        read: Callable[[], Scan],
        roster: Roster,
        *,
        period_seconds: float,
        deadline_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`read` may block for as long as it likes; `clock` gives seconds since the epoch."""
        self._call = SlowCall(read, name="nvml")
        self._roster = roster
        self._period_seconds = period_seconds
        self._deadline_seconds = deadline_seconds
        self._clock = clock
        self._latest: Sample | None = None
        self._news = asyncio.Event()
        self._closed = False
        self._counts: Counter[DriverState] = Counter()

    @property
    def latest(self) -> Sample | None:
        """The latest sample; None before the first. Safe to read from any thread."""
        return self._latest

    @property
    def counts(self) -> dict[DriverState, int]:
        """How many samples found the driver in each state."""
        return {state: self._counts[state] for state in DriverState}

    async def run(self) -> None:
        """Samples until cancelled; then every watch ends."""
        try:
            due = asyncio.get_running_loop().time()
            while True:
                self._publish(await self._sample())
                due = await self._pause(due)
        finally:
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

    async def _sample(self) -> Sample:
        started = self._clock()
        try:
            scan = await self._call.result(self._deadline_seconds)
        except TimeoutError:
            scan = Scan(driver=Driver(state=DriverState.FAILED, message="the NVIDIA driver does not answer"))
        return self._roster.update(scan, started)

    async def _pause(self, due: float) -> float:
        # Ticks that have passed during a slow sample are skipped, not caught up with.
        now = asyncio.get_running_loop().time()
        due = max(due + self._period_seconds, now)
        await asyncio.sleep(due - now)
        return due

    def _publish(self, sample: Sample) -> None:
        before = self._latest
        if before is None or before.driver != sample.driver:
            _log.info("driver", extra={"state": sample.driver.state.value, "cause": sample.driver.message})
        self._latest = sample
        self._counts[sample.driver.state] += 1
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
