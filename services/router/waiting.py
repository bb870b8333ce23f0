"""The requests that wait: by priority, then fair by tenant in tokens, then first come, first served."""

import heapq
import math
from bisect import insort
from collections import OrderedDict
from collections.abc import Collection, Hashable
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from services.router.crowd import Crowd
from services.router.fairness import Fairness

__all__ = ["LaneKey", "WaitingLine", "Waits"]

# Requests of one model that differ in which workers they may go to wait in lanes of their own, so that those whose
# workers are busy don't hold up the rest. Beyond so many lanes they share one.
_MOST_LANES: Final = 64
_COMPACT_ABOVE: Final = 64
_MEAN_WEIGHT: Final = 0.05


class LaneKey(NamedTuple):
    """Requests with the same key are interchangeable for a worker."""

    model: str
    constraint: Hashable
    others: tuple[str, ...] = ()
    """Further models whose workers may serve them."""


class Waits(Protocol):
    """What the line needs to know of who waits in it."""

    @property
    def lane(self) -> LaneKey: ...
    @property
    def tenant(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def tokens(self) -> float: ...


W = TypeVar("W", bound=Waits)


class _Turn(NamedTuple):
    priority: int
    served: float
    order: int


class _TenantQueue(Generic[W]):
    __slots__ = ("members", "tenant")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.members: OrderedDict[int, W] = OrderedDict()


class _Class(Generic[W]):
    """One priority class of one lane: a heap of its tenants by tokens served."""

    def __init__(self, fairness: Fairness) -> None:
        self._fairness = fairness
        self._queues: dict[str, _TenantQueue[W]] = {}
        self._heap: list[tuple[float, int, _TenantQueue[W]]] = []
        self._count = 0
        self._last = 0.0
        """Nobody stands further behind."""

    def __len__(self) -> int:
        return self._count

    def add(self, order: int, waiter: W) -> None:
        queue = self._queues.get(waiter.tenant)
        if queue is None:
            queue = self._queues[waiter.tenant] = _TenantQueue(waiter.tenant)
            self._push(self._fairness.of(waiter.tenant), order, queue)
        queue.members[order] = waiter
        self._count += 1

    def remove(self, order: int, waiter: W) -> None:
        queue = self._queues[waiter.tenant]
        del queue.members[order]
        self._count -= 1
        if len(self._heap) > _COMPACT_ABOVE and len(self._heap) > 2 * self._count:
            self._compact()

    def head(self) -> tuple[float, int, W]:
        """The count of the tenant whose turn it is, and its oldest request. The class must not be empty."""
        charged = self._fairness.charged
        while True:
            count, order, queue = self._heap[0]
            members = queue.members
            if not members:
                heapq.heappop(self._heap)
                del self._queues[queue.tenant]
                continue
            oldest = next(iter(members))
            # The floor moves all the time and orders nobody anew: only those that were served have fallen behind.
            served = charged(queue.tenant, 0.0)
            if served <= count and oldest == order:
                return max(served, self._fairness.floor), oldest, members[oldest]
            # Counts and orders only grow, so an entry that is out of date stands too far in front, never too far back.
            heapq.heappop(self._heap)
            self._push(max(count, served), oldest, queue)

    def pass_over(self) -> bool:
        """Puts the tenant whose turn it is behind all others that wait now; False where there are none."""
        _, order, _ = self.head()
        queue = self._heap[0][2]
        if len(queue.members) == self._count:
            return False
        heapq.heappop(self._heap)
        self._push(math.nextafter(self._last, math.inf), order, queue)
        return True

    def _push(self, count: float, order: int, queue: _TenantQueue[W]) -> None:
        self._last = max(self._last, count)
        heapq.heappush(self._heap, (count, order, queue))

    def _compact(self) -> None:
        self._queues = {tenant: queue for tenant, queue in self._queues.items() if queue.members}
        self._heap = [(self._fairness.of(name), next(iter(q.members)), q) for name, q in self._queues.items()]
        heapq.heapify(self._heap)


class _Lane(Generic[W]):
    """The requests of one lane, by priority class."""

    def __init__(self, fairness: Fairness) -> None:
        self._fairness = fairness
        self.classes: dict[int, _Class[W]] = {}
        self._priorities: list[int] = []

    def add(self, order: int, waiter: W) -> None:
        group = self.classes.get(waiter.priority)
        if group is None:
            group = self.classes[waiter.priority] = _Class(self._fairness)
            insort(self._priorities, waiter.priority)
        group.add(order, waiter)

    def remove(self, order: int, waiter: W) -> None:
        group = self.classes[waiter.priority]
        group.remove(order, waiter)
        if not group:
            del self.classes[waiter.priority]
            self._priorities.remove(waiter.priority)

    def pass_over(self) -> bool:
        return self.classes[self._priorities[0]].pass_over()

    def head(self) -> tuple[_Turn, W]:
        priority = self._priorities[0]
        count, order, waiter = self.classes[priority].head()
        return _Turn(priority, count, order), waiter


class WaitingLine(Generic[W]):
    """All that wait. Adding, taking and removing cost O(log tenants), however many wait."""

    def __init__(self) -> None:
        self._fairness = Fairness()
        self._models: dict[str, dict[LaneKey, _Lane[W]]] = {}
        self.crowd: Crowd[W] = Crowd()
        """The same requests, counted."""
        self._crowds: dict[str, Crowd[W]] = {}
        self._orders: dict[W, tuple[int, LaneKey]] = {}
        self._next_order = 0
        self._mean_tokens = 0.0
        """Of those served lately."""

    def __len__(self) -> int:
        return len(self._orders)

    def has_lane(self, key: LaneKey) -> bool:
        """Whether somebody waits who is interchangeable with a request of this key."""
        return key in self._models.get(key.model, ())

    def before(self, waiter: W) -> int:
        """How many of its model would go before a request that comes now, those that come later included."""
        crowd = self._crowds.get(waiter.lane.model)
        if crowd is None:
            return 0
        before = crowd.before(waiter.priority, waiter.tenant)
        # Others catch up with a tenant that is ahead of them, whoever of theirs is there already or comes until then.
        # They are ahead themselves by half a request, on average.
        ahead = self._fairness.lead(waiter.tenant) / max(self._mean_tokens, 1.0) - 0.5
        return max(before, int(ahead * crowd.tenants(waiter.priority))) if ahead > 0 else before

    def add(self, waiter: W) -> None:
        """Puts a request at the end of its tenant's queue."""
        lanes = self._models.setdefault(waiter.lane.model, {})
        key = waiter.lane
        if key not in lanes and len(lanes) >= _MOST_LANES:
            key = key._replace(constraint="mixed")
        lane = lanes.get(key)
        if lane is None:
            lane = lanes[key] = _Lane(self._fairness)
            for model in key.others:
                self._models.setdefault(model, {})[key] = lane
        self._next_order += 1
        self._orders[waiter] = (self._next_order, key)
        lane.add(self._next_order, waiter)
        self.crowd.add(waiter)
        self._crowds.setdefault(waiter.lane.model, Crowd()).add(waiter)

    def remove(self, waiter: W) -> bool:
        """Takes a request out, and says whether it waited; one that did not changes nothing."""
        order, key = self._orders.pop(waiter, (0, None))
        if key is None:
            return False
        lanes = self._models[key.model]
        lane = lanes[key]
        lane.remove(order, waiter)
        self.crowd.remove(waiter)
        of_model = self._crowds[key.model]
        of_model.remove(waiter)
        if of_model.is_empty:
            del self._crowds[key.model]
        if not lane.classes:
            for model in (key.model, *key.others):
                del self._models[model][key]
                if not self._models[model]:
                    del self._models[model]
        if not self._orders:
            self._fairness.settle()
        return True

    def serve(self, waiter: W) -> None:
        """Takes a request out because it is served, and charges its tenant."""
        self._mean_tokens += _MEAN_WEIGHT * (waiter.tokens - self._mean_tokens) if self._mean_tokens else waiter.tokens
        self._fairness.charge(waiter.tenant, self._fairness.of(waiter.tenant), waiter.tokens)
        self.remove(waiter)

    def pass_over(self, lane: LaneKey) -> bool:
        """Puts the tenant whose turn it is in a lane behind all others of its class there; False: there are none."""
        return self._models[lane.model][lane].pass_over()

    def first(self, models: Collection[str], *, skip: Collection[LaneKey] = ()) -> tuple[LaneKey, W] | None:
        """Whose turn it is among requests for these models, and the lane it waits in; None when nobody waits."""
        first: tuple[_Turn, W] | None = None
        found: LaneKey | None = None
        for model in models:
            for key, lane in self._models.get(model, {}).items():
                if key in skip:
                    continue
                head = lane.head()
                if first is None or head[0] < first[0]:
                    first, found = head, key
        return None if first is None or found is None else (found, first[1])
