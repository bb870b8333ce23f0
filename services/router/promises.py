"""When those should be served whom the line was short enough for, by model and class: who is overdue goes first."""

from collections.abc import Hashable, Iterable
from typing import Generic, Protocol, TypeVar

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


class Promises(Generic[P]):
    """A time for each that waits; setting, dropping and looking cost O(log waiting). Times are seconds."""

    def __init__(self) -> None:
        self._times: dict[tuple[str, int], Deadlines[P]] = {}

    def set(self, one: P, at: float) -> None:
        """It should be served by then."""
        self._times.setdefault(_key(one), Deadlines()).set(one, at)

    def drop(self, one: P) -> None:
        """It waits no more; one that was promised nothing changes nothing."""
        times = self._times.get(_key(one))
        if times is not None:
            times.drop(one)
            if times.next is None:
                del self._times[_key(one)]

    def overdue(self, models: Iterable[str], priority: int, now: float) -> P | None:
        """Who of a class should have been served the longest ago, of these models; None where nobody should."""
        if not self._times:
            return None
        groups = [times for model in models if (times := self._times.get((model, priority))) is not None]
        late = [(at, times) for times in groups if (at := times.next) is not None and at <= now]
        return min(late, key=lambda entry: entry[0])[1].first if late else None


def _key(one: Promised) -> tuple[str, int]:
    return one.lane.model, one.priority
