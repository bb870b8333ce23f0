"""Takes a sample every so often and tells whoever wants to know."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable

from services.telemetry.board import Board
from services.telemetry.gpu import Driver, DriverState, Sample, Scan
from services.telemetry.roster import Roster
from services.telemetry.slow_call import SlowCall

__all__ = ["Sampler", "deadline_for"]

_log = logging.getLogger(__name__)


def deadline_for(period_seconds: float) -> float:
    """How long one sample may take before the driver counts as hanging, in seconds."""
    return min(5.0, max(1.0, 3 * period_seconds))


class Sampler(Board):
    """A board with the latest sample of this machine's own GPUs."""

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
        super().__init__()
        self._call = SlowCall(read, name="nvml")
        self._roster = roster
        self._period_seconds = period_seconds
        self._deadline_seconds = deadline_seconds
        self._clock = clock
        self._counts: Counter[DriverState] = Counter()

    @property
    def counts(self) -> dict[DriverState, int]:
        """How many samples found the driver in each state."""
        return {state: self._counts[state] for state in DriverState}

    async def run(self) -> None:
        """Samples until cancelled; then every watch ends."""
        try:
            due = asyncio.get_running_loop().time()
            while True:
                self._take(await self._sample())
                due = await self._pause(due)
        finally:
            self.close()

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

    def _take(self, sample: Sample) -> None:
        before = self.latest
        if before is None or before.driver != sample.driver:
            _log.info("driver", extra={"state": sample.driver.state.value, "cause": sample.driver.message})
        self._counts[sample.driver.state] += 1
        self.publish(sample)
