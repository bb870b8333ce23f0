"""Who goes first among tenants: whoever has been served the fewest tokens while waiting."""

from typing import Final

__all__ = ["Fairness"]

_MOST_TENANTS: Final = 10_000


class Fairness:
    """Counts the tokens served to tenants that had to wait (start-time fair queueing).

    A tenant that comes back starts where the one served last stood: being away earns no credit.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self.charged = self._served.get
        """Gives a tenant's count without regard to how far the others are, or what is given for those without one."""
        self.floor = 0.0
        """Where those begin who come."""

    def of(self, tenant: str) -> float:
        """A tenant's count, in tokens; it never falls."""
        count, floor = self.charged(tenant, 0.0), self.floor
        return count if count > floor else floor

    def charge(self, tenant: str, tokens: float) -> None:
        """A tenant has been served so much."""
        # A higher class may serve somebody far behind; the floor is for those who come, and never falls.
        start = self.floor = self.of(tenant)
        self._served[tenant] = start + tokens
        if len(self._served) > _MOST_TENANTS:
            for name in [name for name, count in self._served.items() if count <= self.floor]:
                del self._served[name]

    def lead(self, tenant: str) -> float:
        """How many tokens more it was served than whoever was served last; not below 0."""
        return self.of(tenant) - self.floor

    def settle(self) -> None:
        """Nobody waits any more: everybody has what they wanted, and whoever comes next begins alike."""
        self._served.clear()
        self.floor = 0.0
