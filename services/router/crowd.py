"""Who waits, by class and tenant: how many, who makes room when the line is full, and who has waited for too long."""

from collections import Counter
from typing import Generic, Protocol, TypeVar

__all__ = ["Counts", "Crowd"]


class Member(Protocol):
    """What is counted."""

    @property
    def tenant(self) -> str: ...
    @property
    def priority(self) -> int: ...


M = TypeVar("M", bound=Member)


class _Group(Generic[M]):
    """One class: its tenants by how many of their requests wait. Everything takes the same time, however many do."""

    def __init__(self) -> None:
        self.oldest_first: dict[M, None] = {}
        self.tenants: dict[str, dict[M, None]] = {}
        self._by_count: dict[int, dict[str, None]] = {}
        self._most = 0

    def add(self, member: M) -> None:
        self.oldest_first[member] = None
        tenant = member.tenant
        queue = self.tenants.get(tenant)
        if queue is None:
            queue = self.tenants[tenant] = {}
        count = len(queue)
        self._move(tenant, count, count + 1)
        queue[member] = None

    def remove(self, member: M) -> None:
        del self.oldest_first[member]
        tenant = member.tenant
        queue = self.tenants[tenant]
        count = len(queue)
        self._move(tenant, count, count - 1)
        del queue[member]
        if count == 1:
            del self.tenants[tenant]

    @property
    def largest(self) -> str:
        """A tenant of whom the most requests wait."""
        return next(iter(self._by_count[self._most]))

    def _move(self, tenant: str, before: int, after: int) -> None:
        if before:
            peers = self._by_count[before]
            del peers[tenant]
            if not peers:
                del self._by_count[before]
        if after:
            equals = self._by_count.get(after)
            if equals is None:
                equals = self._by_count[after] = {}
            equals[tenant] = None
        # It changes by one at a time, so the most is never more than one away.
        if after > self._most or (before == self._most and before not in self._by_count):
            self._most = after


class Counts:
    """How many wait, by class and tenant."""

    def __init__(self) -> None:
        self._groups: dict[int, dict[str, int]] = {}
        self._totals: dict[int, int] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits."""
        return not self._groups

    def add(self, priority: int, tenant: str) -> None:
        """One more of a tenant waits in a class."""
        group = self._groups.get(priority)
        if group is None:
            group = self._groups[priority] = {}
            self._totals[priority] = 0
        group[tenant] = group.get(tenant, 0) + 1
        self._totals[priority] += 1

    def remove(self, priority: int, tenant: str) -> None:
        """One of them waits no more."""
        group = self._groups[priority]
        left = group[tenant] - 1
        if left:
            group[tenant] = left
        else:
            del group[tenant]
            if not group:
                del self._groups[priority], self._totals[priority]
                return
        self._totals[priority] -= 1

    def before(self, priority: int, tenant: str) -> int:
        """How many would go before a request that comes now: all of higher classes, and of its own class those whose
        turn comes first when tenants take turns.
        """
        higher = 0
        for one, count in self._totals.items():
            if one < priority:
                higher += count
        group = self._groups.get(priority)
        if group is None:
            return higher
        own = group.get(tenant, 0)
        tenants = len(group) if own else len(group) + 1
        turns, total = tenants * (own + 1) - 1, self._totals[priority]
        return higher + (turns if turns < total else total)

    def tenants(self, priority: int) -> int:
        """How many tenants of a class wait."""
        group = self._groups.get(priority)
        return len(group) if group is not None else 0


class Crowd(Generic[M]):
    """All that wait."""

    def __init__(self) -> None:
        self._groups: dict[int, _Group[M]] = {}

    def add(self, member: M) -> None:
        """One more waits."""
        group = self._groups.get(member.priority)
        if group is None:
            group = self._groups[member.priority] = _Group()
        group.add(member)

    def remove(self, member: M) -> None:
        """One waits no more."""
        group = self._groups[member.priority]
        group.remove(member)
        if not group.oldest_first:
            del self._groups[member.priority]

    @property
    def by_tenant(self) -> Counter[str]:
        """How many of each tenant wait."""
        waiting: Counter[str] = Counter()
        for group in self._groups.values():
            waiting.update({tenant: len(members) for tenant, members in group.tenants.items()})
        return waiting

    def makes_room(self, priority: int, tenant: str) -> M | None:
        """Who should leave a full line for a request that comes now; None when it has no better right to a place.

        The newest request of the lowest class; in its own class, that of a tenant who has more requests waiting.
        """
        lowest = max(self._groups, default=priority)
        if lowest < priority:
            return None
        group = self._groups.get(lowest)
        if group is None:
            return None
        largest = group.tenants[group.largest]
        if lowest == priority and len(largest) <= len(group.tenants.get(tenant, ())) + 1:
            return None
        return next(reversed(largest))

    def oldest_of_lower_classes(self) -> M | None:
        """The oldest of the lowest class, whose turn does not come while higher classes wait."""
        if len(self._groups) < 2:
            return None
        return next(iter(self._groups[max(self._groups)].oldest_first))
