"""When something has to be looked at again."""

import heapq
from collections import deque
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

__all__ = ["Deadlines"]

T = TypeVar("T", bound=Hashable)
_COMPACT_ABOVE: Final = 64


class Deadlines(Generic[T]):
    """A time for each member; setting, dropping and taking cost O(log members), and less where times only grow."""

    def __init__(self) -> None:
        self._times: dict[T, float] = {}
        # Most are set for as long from now as those before them, so that there is nothing to sort.
        self._in_order: deque[tuple[float, int, T]] = deque()
        self._heap: list[tuple[float, int, T]] = []
        self._order = 0

    @property
    def is_empty(self) -> bool:
        """Whether no member has a time."""
        return not self._times

    @property
    def next(self) -> float | None:
        """The earliest time, or None."""
        queue = self._in_order
        if queue and not self._heap and self._times.get(queue[0][2]) == queue[0][0]:
            # Nearly always.
            return queue[0][0]
        first = self._first()
        return None if first is None else first[0]

    @property
    def first(self) -> T | None:
        """The member whose time is the earliest, or None."""
        first = self._first()
        return None if first is None else first[2]

    def set(self, member: T, at: float) -> None:
        """Sets a member's time, in place of the one it had."""
        self._order += 1
        self._times[member] = at
        queue = self._in_order
        if not queue or at >= queue[-1][0]:
            queue.append((at, self._order, member))
        else:
            heapq.heappush(self._heap, (at, self._order, member))
        entries = len(queue) + len(self._heap)
        if entries > _COMPACT_ABOVE and entries > 2 * len(self._times):
            self._compact()

    def drop(self, member: T) -> None:
        """Forgets a member."""
        self._times.pop(member, None)

    def take_due(self, now: float) -> list[T]:
        """The members whose time has come, earliest first; they have no time any more."""
        due: list[T] = []
        while (first := self._first()) is not None and first[0] <= now:
            # Its entry is out of date from now on.
            del self._times[first[2]]
            due.append(first[2])
        return due

    def _first(self) -> tuple[float, int, T] | None:
        queue, heap, times = self._in_order, self._heap, self._times
        while queue and times.get(queue[0][2]) != queue[0][0]:
            queue.popleft()
        while heap and times.get(heap[0][2]) != heap[0][0]:
            heapq.heappop(heap)
        if not heap or (queue and queue[0] < heap[0]):
            return queue[0] if queue else None
        return heap[0]

    def _compact(self) -> None:
        times = self._times
        self._in_order = deque(
            sorted(entry for entry in (*self._in_order, *self._heap) if times.get(entry[2]) == entry[0])
        )
        self._heap = []
