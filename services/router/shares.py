"""Whether a tenant has more than its fair share of a model's slots while others are there, for whom some stay free."""

import math
from collections import OrderedDict
from typing import Final

__all__ = ["ModelShares", "Shares"]

# Whoever was there so recently may come back any moment, and is to find room.
_PRESENT_SECONDS: Final = 10.0
_MOST_GONE: Final = 4096
# Tenants that are alike differ by chance: by so much of a share, or so many standard deviations of a small one.
_TOLERATED_SHARE: Final = 0.25
_TOLERATED_DEVIATIONS: Final = 2.0
_MOST_MODELS: Final = 256


class Shares:
    """Counts each tenant's requests for one model: those that hold a slot, and those that wait. Times are seconds."""

    def __init__(self) -> None:
        self._running: dict[str, int] = {}
        self._waiting: dict[str, int] = {}
        self._there: dict[str, int] = {}
        """The sum of both."""
        self._gone: OrderedDict[str, float] = OrderedDict()
        """Tenants that had something, and when it was over."""

    def waits(self, tenant: str, more: int, now: float) -> None:
        """So many more of a tenant's requests wait; fewer for -1."""
        self._count(self._waiting, tenant, more, now)

    def runs(self, tenant: str, more: int, now: float) -> None:
        """So many more of a tenant's requests hold a slot; fewer for -1."""
        self._count(self._running, tenant, more, now)

    def starts(self, tenant: str) -> None:
        """One of a tenant's requests that waited holds a slot now."""
        _add(self._waiting, tenant, -1)
        _add(self._running, tenant, 1)

    def is_idle(self, now: float) -> bool:
        """Whether nobody is there, and nobody was lately."""
        self._forget(now)
        return not self._there and not self._gone

    def is_over(self, tenant: str, slots: int, now: float, *, waiting: bool, after: int = 0) -> bool:
        """Whether one more request of the tenant is beyond its share of `slots`; never while it is alone.

        `waiting` counts those that wait, too: whoever asks now comes after them. `after`: so many more of its requests
        hold a slot by then.
        """
        self._forget(now)
        present = len(self._there) + len(self._gone) + (tenant not in self._there and tenant not in self._gone)
        if present < 2:
            return False
        share = slots / present
        count = after + self._running.get(tenant, 0) + (self._waiting.get(tenant, 0) if waiting else 0)
        return count >= share + max(_TOLERATED_SHARE * share, _TOLERATED_DEVIATIONS * math.sqrt(share))

    def _count(self, counts: dict[str, int], tenant: str, more: int, now: float) -> None:
        _add(counts, tenant, more)
        if _add(self._there, tenant, more):
            self._gone.pop(tenant, None)
            return
        self._gone[tenant] = now
        self._gone.move_to_end(tenant)
        if len(self._gone) > _MOST_GONE:
            self._gone.popitem(last=False)

    def _forget(self, now: float) -> None:
        while self._gone and next(iter(self._gone.values())) < now - _PRESENT_SECONDS:
            self._gone.popitem(last=False)


def _add(counts: dict[str, int], tenant: str, more: int) -> bool:
    left = counts.get(tenant, 0) + more
    if left > 0:
        counts[tenant] = left
    else:
        counts.pop(tenant, None)
    return left > 0


class ModelShares:
    """The shares of each model that is asked for."""

    def __init__(self) -> None:
        self._models: dict[str, Shares] = {}

    def __len__(self) -> int:
        return len(self._models)

    def of(self, model: str, now: float) -> Shares:
        """A model's; new where nobody asked for it lately."""
        shares = self._models.get(model)
        if shares is None:
            if len(self._models) >= _MOST_MODELS:
                # Names that nobody serves come and go.
                self._models = {name: one for name, one in self._models.items() if not one.is_idle(now)}
            shares = self._models[model] = Shares()
        return shares
