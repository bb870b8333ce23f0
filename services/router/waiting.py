"""The requests that wait: by priority, then fair by tenant in tokens, then first come, first served."""

import heapq
from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Collection, Hashable
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from services.router.crowd import Counts, Crowd
from services.router.fairness import Fairness

__all__ = ["LaneKey", "WaitingLine", "Waits"]

# Requests of one model that differ in which workers they may go to wait in lanes of their own, so that those whose
# workers are busy don't hold up the rest. Beyond so many lanes they share one.
_MOST_LANES: Final = 64
_COMPACT_ABOVE: Final = 64
# What keeps a tenant parked may change without word of it: so long until it is looked at again.
_PARKED_SECONDS: Final = 1.0
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


# Whose turn comes first: class, tokens served, order.
_Turn = tuple[int, float, int]


class _TenantQueue(Generic[W]):
    __slots__ = ("is_parked", "members", "tenant")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.members: OrderedDict[int, W] = OrderedDict()
        self.is_parked = False
        """Whether its turn does not come for now; it is not in the heap then."""


class _Class(Generic[W]):
    """One priority class of one lane: a heap of its tenants by tokens served."""

    def __init__(self, fairness: Fairness) -> None:
        self._fairness = fairness
        self._queues: dict[str, _TenantQueue[W]] = {}
        self._heap: list[tuple[float, int, _TenantQueue[W]]] = []
        self.count = 0

    def add(self, order: int, waiter: W) -> None:
        tenant = waiter.tenant
        queue = self._queues.get(tenant)
        if queue is None:
            queue = self._queues[tenant] = _TenantQueue(tenant)
            heapq.heappush(self._heap, (self._fairness.of(tenant), order, queue))
        queue.members[order] = waiter
        self.count += 1

    def remove(self, order: int, waiter: W) -> None:
        del self._queues[waiter.tenant].members[order]
        self.count -= 1
        if len(self._heap) > _COMPACT_ABOVE and len(self._heap) > 2 * self.count:
            self._compact()

    def head(self) -> tuple[float, int, W] | None:
        """The count of the tenant whose turn it is, and its oldest request; None while all that wait are parked."""
        heap, fairness = self._heap, self._fairness
        while heap:
            count, order, queue = heap[0]
            members = queue.members
            if not members:
                heapq.heappop(heap)
                del self._queues[queue.tenant]
                continue
            oldest = next(iter(members))
            # The floor moves all the time and orders nobody anew: only those that were served have fallen behind.
            served = fairness.charged(queue.tenant, 0.0)
            if served <= count and oldest == order:
                return (served if served > fairness.floor else fairness.floor), oldest, members[oldest]
            # Counts and orders only grow, so an entry that is out of date stands too far in front, never too far back.
            heapq.heapreplace(heap, (count if count > served else served, oldest, queue))
        return None

    def park(self) -> _TenantQueue[W]:
        """Takes the tenant whose turn it is out of the heap, until it is put back."""
        queue = heapq.heappop(self._heap)[2]
        queue.is_parked = True
        return queue

    def put_back(self, queue: _TenantQueue[W]) -> None:
        """A tenant that was parked has its turns again, at the place that it had."""
        queue.is_parked = False
        if queue.members:
            heapq.heappush(self._heap, (self._fairness.of(queue.tenant), next(iter(queue.members)), queue))
        elif self._queues.get(queue.tenant) is queue:
            del self._queues[queue.tenant]

    def _compact(self) -> None:
        self._queues = {tenant: queue for tenant, queue in self._queues.items() if queue.members or queue.is_parked}
        self._heap = [
            (self._fairness.of(name), next(iter(queue.members)), queue)
            for name, queue in self._queues.items()
            if not queue.is_parked
        ]
        heapq.heapify(self._heap)


class _Lane(Generic[W]):
    """The requests of one lane, by priority class."""

    def __init__(self, key: LaneKey, fairness: Fairness, example: W) -> None:
        self.key = key
        self.example = example
        """Whoever was the first to wait here."""
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
        if not group.count:
            del self.classes[waiter.priority]
            self._priorities.remove(waiter.priority)

    def head(self) -> tuple[_Turn, W] | None:
        for priority in self._priorities:
            head = self.classes[priority].head()
            if head is not None:
                count, order, waiter = head
                return (priority, count, order), waiter
        return None


class WaitingLine(Generic[W]):
    """All that wait. Adding, taking and removing cost O(log tenants), however many wait."""

    def __init__(self) -> None:
        self._fairness = Fairness()
        self._models: dict[str, dict[LaneKey, _Lane[W]]] = {}
        self.crowd: Crowd[W] = Crowd()
        """The same requests."""
        self._counts: dict[str, Counts] = {}
        """Those of each model."""
        self._places: dict[W, tuple[int, _Lane[W]]] = {}
        """The order of each, and its lane."""
        self._next_order = 0
        self._mean_tokens = 0.0
        """Of those served lately."""
        self._parked: dict[str, list[tuple[_Class[W], _TenantQueue[W]]]] = {}
        self._parked_until: deque[tuple[float, str]] = deque()

    def __len__(self) -> int:
        return len(self._places)

    def kinds(self) -> list[tuple[W, int]]:
        """A request of each lane, which may have left it, and how many wait there. From any thread; for metrics."""
        # Copied in one step each: the line goes on meanwhile.
        lanes = [
            lane
            for model, of_model in self._models.copy().items()
            for key, lane in of_model.copy().items()
            if key.model == model
        ]
        return [(lane.example, sum(group.count for group in lane.classes.copy().values())) for lane in lanes]

    def has_lane(self, key: LaneKey) -> bool:
        """Whether somebody waits who is interchangeable with a request of this key."""
        return key in self._models.get(key.model, ())

    def before(self, waiter: W) -> int:
        """How many of its model would go before a request that comes now, those that come later included."""
        counts = self._counts.get(waiter.lane.model)
        if counts is None:
            return 0
        before = counts.before(waiter.priority, waiter.tenant)
        # Others catch up with a tenant that is ahead of them, whoever of theirs is there already or comes until then.
        # They are ahead themselves by half a request, on average.
        ahead = self._fairness.lead(waiter.tenant) / max(self._mean_tokens, 1.0) - 0.5
        return max(before, int(ahead * counts.tenants(waiter.priority))) if ahead > 0 else before

    def add(self, waiter: W) -> None:
        """Puts a request at the end of its tenant's queue."""
        key = waiter.lane
        model = key.model
        lanes = self._models.get(model)
        if lanes is None:
            lanes = self._models[model] = {}
        lane = lanes.get(key)
        if lane is None and len(lanes) >= _MOST_LANES:
            key = key._replace(constraint="mixed")
            lane = lanes.get(key)
        if lane is None:
            lane = lanes[key] = _Lane(key, self._fairness, waiter)
            for other in key.others:
                self._models.setdefault(other, {})[key] = lane
        self._next_order += 1
        self._places[waiter] = (self._next_order, lane)
        lane.add(self._next_order, waiter)
        self.crowd.add(waiter)
        counts = self._counts.get(model)
        if counts is None:
            counts = self._counts[model] = Counts()
        counts.add(waiter.priority, waiter.tenant)

    def remove(self, waiter: W) -> bool:
        """Takes a request out, and says whether it waited; one that did not changes nothing."""
        order, lane = self._places.pop(waiter, (0, None))
        if lane is None:
            return False
        lane.remove(order, waiter)
        self.crowd.remove(waiter)
        model = lane.key.model
        counts = self._counts[model]
        counts.remove(waiter.priority, waiter.tenant)
        if counts.is_empty:
            del self._counts[model]
        if not lane.classes:
            self._close(lane.key)
        if not self._places:
            self._fairness.settle()
        return True

    def _close(self, key: LaneKey) -> None:
        for model in (key.model, *key.others):
            del self._models[model][key]
            if not self._models[model]:
                del self._models[model]

    def serve(self, waiter: W) -> None:
        """Takes a request out because it is served, and charges its tenant."""
        tenant, tokens = waiter.tenant, waiter.tokens
        self._mean_tokens += _MEAN_WEIGHT * (tokens - self._mean_tokens) if self._mean_tokens else tokens
        self._fairness.charge(tenant, tokens)
        self.remove(waiter)

    def park(self, waiter: W, *, now: float) -> None:
        """The tenant whose turn it is in a lane has none there until it is put back, or a moment has passed.

        `waiter` is the request whose turn it is.
        """
        group = self._places[waiter][1].classes[waiter.priority]
        self._parked.setdefault(waiter.tenant, []).append((group, group.park()))
        self._parked_until.append((now + _PARKED_SECONDS, waiter.tenant))

    def is_parked(self, tenant: str) -> bool:
        """Whether a tenant has no turns in some lane."""
        return tenant in self._parked

    def put_back(self, tenant: str) -> None:
        """A tenant has its turns again; one that is not parked changes nothing."""
        for group, queue in self._parked.pop(tenant, ()):
            group.put_back(queue)

    def put_back_due(self, now: float) -> None:
        """Those who were parked a moment ago have their turns again."""
        while self._parked_until and self._parked_until[0][0] <= now:
            self.put_back(self._parked_until.popleft()[1])

    def put_back_all(self) -> None:
        """Everybody has turns again."""
        for tenant in tuple(self._parked):
            self.put_back(tenant)
        self._parked_until.clear()

    def first(self, models: Collection[str], *, skip: Collection[LaneKey] = ()) -> tuple[LaneKey, W] | None:
        """Whose turn it is among requests for these models, and the lane it waits in; None when nobody waits."""
        first: tuple[_Turn, W] | None = None
        found: LaneKey | None = None
        for model in models:
            lanes = self._models.get(model)
            if lanes is None:
                continue
            for lane in lanes.values():
                if skip and lane.key in skip:
                    continue
                head = lane.head()
                if head is not None and (first is None or head[0] < first[0]):
                    first, found = head, lane.key
        return None if first is None or found is None else (found, first[1])
