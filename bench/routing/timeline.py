"""Virtual time: events in order, and a clock that jumps from one to the next."""

import heapq
import itertools
from collections.abc import Callable

__all__ = ["Timeline"]


class Timeline:
    """Runs callbacks at their time. Two at the same time run in the order in which they were set."""

    def __init__(self) -> None:
        self.now = 1000.0
        """Seconds; not zero, so that nobody mistakes a time that was never set for the beginning."""
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def clock(self) -> float:
        """The time."""
        return self.now

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Has `call` run at `when`, or now when that is over."""
        heapq.heappush(self._heap, (max(when, self.now), next(self._order), call))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Has `call` run in so many seconds."""
        self.at(self.now + seconds, call)

    def run_until(self, end: float) -> None:
        """Runs everything that is due before `end`, and stops there."""
        while self._heap and self._heap[0][0] <= end:
            self.now, _, call = heapq.heappop(self._heap)
            call()
        self.now = end
