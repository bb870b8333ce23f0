"""When those should be served whom the line was short enough for, by model and class: who is overdue goes first."""

from collections.abc import Container, Hashable, Iterable
from typing import Any, Final, Generic, Protocol, TypeVar

from services.router.deadlines import Deadlines
from services.router.waiting import LaneKey

__all__ = ["Promises"]


class Promised(Hashable, Protocol):
    """What is known of who waits."""

    @property
    def lane(self) -> LaneKey: ...
    @property
    def priority(self) -> int: ...


P = TypeVar("P", bound=Promised)
_NO_LANES: Final[dict[LaneKey, Any]] = {}


class Promises(Generic[P]):
    """A time for each that waits; setting and dropping cost O(log waiting), looking O(lanes). Times are seconds."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[str, int], dict[LaneKey, Deadlines[P]]] = {}

    def set(self, one: P, at: float) -> None:
        """It should be served by then."""
        lane = one.lane
        key = (lane.model, one.priority)
        lanes = self._lanes.get(key)
        if lanes is None:
            lanes = self._lanes[key] = {}
        times = lanes.get(lane)
        if times is None:
            times = lanes[lane] = Deadlines()
        times.set(one, at)

    def drop(self, one: P) -> None:
        """It waits no more; one that was promised nothing changes nothing."""
        lane = one.lane
        key = (lane.model, one.priority)
        lanes = self._lanes.get(key, _NO_LANES)
        times = lanes.get(lane)
        if times is None:
            return
        times.drop(one)
        if times.is_empty:
            del lanes[lane]
            if not lanes:
                del self._lanes[key]

    def overdue(self, models: Iterable[str], priority: int, now: float, *, skip: Container[LaneKey] = ()) -> P | None:
        """Who of a class should have been served the longest ago, of these models; None where nobody should."""
        if not self._lanes:
            return None
        found, first = None, now
        for model in models:
            lanes = self._lanes.get((model, priority))
            if lanes is None:
                continue
            for lane, times in lanes.items():
                at = times.next
                if at is not None and at <= first and lane not in skip:
                    found, first = times, at
        return found.first if found is not None else None
