"""Where requests go while no router answers: among the workers known last, the less busy one of two."""

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Final

__all__ = ["KnownWorker", "Place", "Placement"]

_MEMORY_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownWorker:
    """A worker as the router showed it last.

    Attributes:
        worker_id: its name.
        endpoint: its gRPC address.
        models: what it serves.
        max_running: sequences that it runs at the same time.
        leases: requests that all gateways had on it.
    """

    worker_id: str
    endpoint: str
    models: frozenset[str]
    max_running: int
    leases: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """A worker to use, and the model to ask it for."""

    worker_id: str
    endpoint: str
    model: str


class Placement:
    """What is left of the router while it is away. Knows nothing of prefixes, rules and speeds; only who was ready."""

    def __init__(
        self,
        *,
        memory_seconds: float = _MEMORY_SECONDS,
        clock: Callable[[], float] = monotonic,
        seed: int | None = None,
    ) -> None:
        """What was seen counts for `memory_seconds`."""
        self._memory_seconds = memory_seconds
        self._clock = clock
        # Who gets a request is no secret.
        self._random = random.Random(seed)  # noqa: S311
        self._workers: list[KnownWorker] = []
        self._others: dict[str, int] = {}
        self._targets: Mapping[str, tuple[str, ...]] = {}
        self._in_flight: Counter[str] = Counter()
        self._seen_at: float | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether the fleet was seen lately."""
        return self._seen_at is not None and self._clock() - self._seen_at <= self._memory_seconds

    def see(self, workers: Iterable[KnownWorker], targets: Mapping[str, tuple[str, ...]]) -> None:
        """Takes in the workers that take work, and the models behind each alias."""
        self._workers = list(workers)
        self._targets = targets
        self._others = {
            worker.worker_id: max(0, worker.leases - self._in_flight[worker.worker_id]) for worker in self._workers
        }
        self._seen_at = self._clock()

    def took(self, worker_id: str) -> None:
        """A request of ours is on its way to a worker, whoever sent it there."""
        self._in_flight[worker_id] += 1

    def gave_back(self, worker_id: str) -> None:
        """It is over."""
        self._in_flight[worker_id] -= 1
        if self._in_flight[worker_id] <= 0:
            del self._in_flight[worker_id]

    def place(self, model: str, excluded: Collection[str] = ()) -> Place | None:
        """A worker with room for a request; None when none is known."""
        if not self.is_fresh:
            return None
        for name in self._targets.get(model) or (model,):
            open_to = [
                worker
                for worker in self._workers
                if name in worker.models and worker.worker_id not in excluded and self._busy(worker) < 1.0
            ]
            if open_to:
                chosen = min(self._random.sample(open_to, min(2, len(open_to))), key=self._busy)
                return Place(chosen.worker_id, chosen.endpoint, name)
        return None

    def _busy(self, worker: KnownWorker) -> float:
        return (self._in_flight[worker.worker_id] + self._others[worker.worker_id]) / max(1, worker.max_running)
