"""When something has to be looked at again."""

import heapq
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

__all__ = ["Deadlines"]

T = TypeVar("T", bound=Hashable)
_COMPACT_ABOVE: Final = 64


class Deadlines(Generic[T]):
    """A time for each member; setting, dropping and taking cost O(log members)."""

    def __init__(self) -> None:
        self._times: dict[T, float] = {}
        self._heap: list[tuple[float, int, T]] = []
        self._order = 0

    @property
    def is_empty(self) -> bool:
        """Whether no member has a time."""
        return not self._times

    @property
    def next(self) -> float | None:
        """The earliest time, or None."""
        heap, times = self._heap, self._times
        while heap:
            at, _, member = heap[0]
            if times.get(member) == at:
                return at
            heapq.heappop(heap)
        return None

    @property
    def first(self) -> T | None:
        """The member whose time is the earliest, or None."""
        return self._heap[0][2] if self.next is not None else None

    def set(self, member: T, at: float) -> None:
        """Sets a member's time, in place of the one it had."""
        self._order += 1
        self._times[member] = at
        heapq.heappush(self._heap, (at, self._order, member))
        if len(self._heap) > _COMPACT_ABOVE and len(self._heap) > 2 * len(self._times):
            self._heap = [entry for entry in self._heap if self._times.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)

    def drop(self, member: T) -> None:
        """Forgets a member."""
        self._times.pop(member, None)

    def take_due(self, now: float) -> list[T]:
        """The members whose time has come, earliest first; they have no time any more."""
        due: list[T] = []
        while (at := self.next) is not None and at <= now:
            member = heapq.heappop(self._heap)[2]
            del self._times[member]
            due.append(member)
        return due
