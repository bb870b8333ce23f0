"""Who goes first among tenants: whoever has been served the fewest tokens while waiting."""

from collections.abc import Callable
from typing import Final

__all__ = ["Fairness"]

_MOST_TENANTS: Final = 10_000


class Fairness:
    """Counts the tokens served to tenants that had to wait (start-time fair queueing).

    A tenant that comes back starts where the one served last stood: being away earns no credit.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self.floor = 0.0
        """Where those begin who come."""

    @property
    def charged(self) -> Callable[[str, float], float]:
        """Gives a tenant's count without regard to how far the others are, or what is given for those without one."""
        return self._served.get

    def of(self, tenant: str) -> float:
        """A tenant's count, in tokens; it never falls."""
        return max(self._served.get(tenant, 0.0), self.floor)

    def charge(self, tenant: str, start: float, tokens: float) -> None:
        """A tenant whose turn it was at count `start` has been served."""
        # A higher class may serve somebody far behind; the floor is for those who come, and never falls.
        self._served[tenant] = max(self._served.get(tenant, 0.0), self.floor, start) + tokens
        self.floor = max(self.floor, start)
        if len(self._served) > _MOST_TENANTS:
            self._served = {name: count for name, count in self._served.items() if count > self.floor}

    def lead(self, tenant: str) -> float:
        """How many tokens more it was served than whoever was served last; not below 0."""
        return self.of(tenant) - self.floor

    def settle(self) -> None:
        """Nobody waits any more: everybody has what they wanted, and whoever comes next begins alike."""
        self._served.clear()
        self.floor = 0.0
