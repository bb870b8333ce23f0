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
_RUNNING: Final = 0
_WAITING: Final = 1
_NOTHING: Final = (0, 0)


class Shares:
    """Counts each tenant's requests for one model: those that hold a slot, and those that wait. Times are seconds."""

    def __init__(self) -> None:
        self._there: dict[str, list[int]] = {}
        """How many of each tenant's hold a slot, and how many wait."""
        self._gone: OrderedDict[str, float] = OrderedDict()
        """Tenants that had something, and when it was over."""
        self._among = (0, 0)
        self._most = 0.0
        """What a tenant may have of so many slots among so many tenants, as it was reckoned last."""

    def waits(self, tenant: str, more: int, now: float) -> None:
        """So many more of a tenant's requests wait; fewer for -1."""
        self._count(tenant, _WAITING, more, now)

    def runs(self, tenant: str, more: int, now: float) -> None:
        """So many more of a tenant's requests hold a slot; fewer for -1."""
        self._count(tenant, _RUNNING, more, now)

    def starts(self, tenant: str) -> None:
        """One of a tenant's requests that waited holds a slot now."""
        counts = self._there[tenant]
        counts[_WAITING] -= 1
        counts[_RUNNING] += 1

    def is_idle(self, now: float) -> bool:
        """Whether nobody is there, and nobody was lately."""
        self._forget(now)
        return not self._there and not self._gone

    def left(self, tenant: str, slots: int, now: float, *, waiting: bool) -> float:
        """How many more requests of the tenant are within its share of `slots`; endless while it is alone.

        `waiting` counts those that wait, too: whoever asks now comes after them.
        """
        if self._gone:
            self._forget(now)
        counts = self._there.get(tenant, _NOTHING)
        present = len(self._there) + len(self._gone) + (counts is _NOTHING and tenant not in self._gone)
        if present < 2:
            return math.inf
        if self._among != (slots, present):
            share = slots / present
            self._most = share + max(_TOLERATED_SHARE * share, _TOLERATED_DEVIATIONS * math.sqrt(share))
            self._among = (slots, present)
        return self._most - (counts[_RUNNING] + counts[_WAITING] if waiting else counts[_RUNNING])

    def running(self, tenant: str) -> int:
        """How many of the tenant's requests hold a slot."""
        return self._there.get(tenant, _NOTHING)[_RUNNING]

    def _count(self, tenant: str, of: int, more: int, now: float) -> None:
        counts = self._there.get(tenant)
        if counts is None:
            counts = self._there[tenant] = [0, 0]
            self._gone.pop(tenant, None)
        counts[of] += more
        if not counts[_RUNNING] and not counts[_WAITING]:
            del self._there[tenant]
            self._gone[tenant] = now
            if len(self._gone) > _MOST_GONE:
                self._gone.popitem(last=False)

    def _forget(self, now: float) -> None:
        while self._gone and next(iter(self._gone.values())) < now - _PRESENT_SECONDS:
            self._gone.popitem(last=False)


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
