"""The registry: the workers, by name and by model, and who wants to know when one changes."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from services.common.errors import MeshError, Reason
from services.router.card import Card, Load, WorkerState
from services.router.cost import PRIOR, Prediction, Rates, better
from services.router.reading import HEALTHY, Condition, worst
from services.router.request import Request
from services.router.worker import STALE_SECONDS, Lease, Outcome, Seen, Worker

__all__ = ["Clock", "Fleet", "Listener"]

Clock = Callable[[], float]
"""Seconds, monotonic."""
Listener = Callable[[Worker], None]

# Names of models whose workers are away: they are not unknown, only not there.
_REMEMBERED_MODELS: Final = 1024
_NOTHING: Final[frozenset[str]] = frozenset()
# A worker that is lost counts as missing for so long; after that the fleet is taken to be smaller.
_MISSED_SECONDS: Final = 600.0
_MOST_MISSED: Final = 4096


class Fleet:
    """The workers that are registered, now. Lost with the process, and rebuilt from registrations within a second."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._workers: dict[str, Worker] = {}
        self._by_model: dict[str, list[Worker]] = {}
        self._by_gpu: dict[str, list[Worker]] = {}
        self._contexts: dict[str, tuple[int, int]] = {}
        self._abilities: dict[str, frozenset[str]] = {}
        self._known: OrderedDict[str, set[str]] = OrderedDict()
        """Models that are or were served, with the pools that did."""
        self._missed: OrderedDict[str, float] = OrderedDict()
        """Workers that were lost, with the time since when."""
        self._drained: set[str] = set()
        self._cordoned: set[str] = set()
        self._conditions: dict[str, Condition] = {}
        self._hopes: dict[str, Rates] = {}
        self._sound_until: dict[str, float] = {}
        """Until when all workers of a model take work, as far as that is known."""
        self._listeners: tuple[Listener, ...] = ()
        self.differ_in_context = False
        """Whether some model has workers that take longer sequences than others of its do."""
        self.populated_at: float | None = None
        """When the first worker came; None before."""

    @property
    def workers(self) -> list[Worker]:
        """Every worker, by name."""
        # Copied in one step: metrics are read from another thread.
        return sorted(self._workers.copy().values(), key=lambda worker: worker.worker_id)

    @property
    def is_empty(self) -> bool:
        """Whether no worker is registered."""
        return not self._workers

    def get(self, worker_id: str) -> Worker | None:
        """The worker of that name."""
        return self._workers.get(worker_id)

    def serving(self, model: str | None) -> Sequence[Worker]:
        """The workers that serve a model; every worker for None."""
        return list(self._workers.values()) if model is None else self._by_model.get(model, ())

    def is_sound(self, model: str | None, now: float) -> bool:
        """Whether every worker of a model takes work, full or not, and as much as any other."""
        until = self._sound_until.get(model or "", -math.inf)
        if now <= until:
            return True
        workers = self.serving(model)
        if not workers or [worker for worker in workers if worker.blocked or worker.admitted_ratio != 1.0]:
            return False
        until = min([worker.reported_at for worker in workers]) + STALE_SECONDS
        if model:
            # Whatever else ends it comes with a change of a worker.
            self._sound_until[model] = until
        return now <= until

    def contexts(self, model: str) -> tuple[int, int]:
        """The shortest and the longest context among the model's workers, in tokens; zeros when there is none."""
        return self._contexts.get(model, (0, 0))

    def common_abilities(self, model: str | None) -> frozenset[str]:
        """What the model can do on each of its workers."""
        return self._abilities.get(model or "", _NOTHING)

    def knows(self, model: str | None) -> bool:
        """Whether a worker serves the model or has served it."""
        return model is None or model in self._by_model or model in self._known

    @property
    def known_models(self) -> list[str]:
        """The models that some worker serves or has served."""
        return list(self._known)

    def pools_of(self, model: str) -> tuple[str, ...]:
        """The pools with workers that serve the model or have served it."""
        # Copied in one step: metrics are read from another thread.
        return tuple(self._known.get(model, ()))

    def has_served(self, model: str, pool: str) -> bool:
        """Whether a worker of the pool serves the model or has served it."""
        return pool in self._known.get(model, ())

    def health(self, expected: int = 0) -> tuple[int, int]:
        """How many workers take work, of how many there should be: `expected`, or for 0 those that were there lately.

        Those that an operator took out of service are missed by nobody.
        """
        now = self._clock()
        while self._missed and next(iter(self._missed.values())) < now - _MISSED_SECONDS:
            self._missed.popitem(last=False)
        asleep = {name for name, worker in self._workers.items() if worker.load.state is WorkerState.ASLEEP}
        out = {*self._drained, *self._cordoned, *asleep}
        workers = [worker for worker in self._workers.values() if worker.worker_id not in out]
        healthy = sum(worker.is_ready(now) for worker in workers)
        if expected:
            return healthy, max(healthy, expected - len(out))
        return healthy, len(workers) + sum(name not in out for name in self._missed)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Calls `listener` with each worker that changed or went, until the returned function is called."""
        self._listeners = (*self._listeners, listener)
        return lambda: self._unsubscribe(listener)

    def _unsubscribe(self, listener: Listener) -> None:
        left = [*self._listeners]
        left.remove(listener)
        self._listeners = tuple(left)

    def register(self, card: Card) -> Worker:
        """Adds a worker. One of the same name is gone from then on.

        Raises:
            MeshError: ALREADY_EXISTS, that one is at another address and still heard of: two processes of one name
                would take it from each other for ever.
        """
        name, now = card.worker_id, self._clock()
        if self._is_taken(card, now):
            raise MeshError(Reason.ALREADY_EXISTS, "a live worker has this name", field="registration.worker_id")
        old = self._workers.pop(name, None)
        self._missed.pop(name, None)
        worker = Worker(card, now=now, drained=name in self._drained, condition=self._condition_of(card))
        if name in self._cordoned:
            worker.set_cordoned(True, now)
        self._workers[card.worker_id] = worker
        if self.populated_at is None:
            self.populated_at = now
        self._index()
        if old is not None:
            old.leave()
        self._changed(worker)
        return worker

    def remove(self, worker: Worker) -> None:
        """Takes a lost worker out; its leases vanish. One that was replaced is out already."""
        if self._workers.get(worker.worker_id) is not worker:
            return
        del self._workers[worker.worker_id]
        self._missed[worker.worker_id] = self._clock()
        if len(self._missed) > _MOST_MISSED:
            self._missed.popitem(last=False)
        self._index()
        worker.leave()
        self._changed(worker)

    def report(self, worker: Worker, load: Load) -> None:
        """Takes in how a worker is."""
        if not worker.gone:
            if load.card is not None:
                self._change(worker, load.card)
            worker.report(load, self._clock(), self._hope_of(worker))
            self._learn(worker)
            self._changed(worker)

    def drain(self, worker_id: str, drained: bool) -> bool:
        """Takes a worker out of service, or back; a new registration of the name stays out. False: not registered."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return False
        (self._drained.add if drained else self._drained.discard)(worker_id)
        worker.set_drained(drained, self._clock())
        self._changed(worker)
        return True

    def cordon(self, worker_id: str, cordoned: bool) -> bool:
        """Takes a worker out of service without telling it, or back; the name stays out. False: not registered."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return False
        (self._cordoned.add if cordoned else self._cordoned.discard)(worker_id)
        worker.set_cordoned(cordoned, self._clock())
        self._changed(worker)
        return True

    def set_gpus(self, conditions: dict[str, Condition]) -> None:
        """Takes in how GPUs are; those that are not mentioned stay as they were."""
        self._conditions.update(conditions)
        self._recheck(conditions)

    def forget_gpus(self, uuids: Iterable[str]) -> None:
        """Nothing is known of these GPUs any more, and what is not known costs nothing."""
        gone = [uuid for uuid in uuids if self._conditions.pop(uuid, None) is not None]
        self._recheck(gone)

    def grant(
        self, worker: Worker, request: Request, *, output_tokens: float, prediction: Prediction | None = None
    ) -> Lease:
        """Leases a worker to a request, which is predicted to meet that there."""
        lease = Lease(worker, request, self._clock(), output_tokens, prediction, worker.corrections)
        if request.occupies_slot:
            worker.grant(lease)
            self._changed(worker)
        return lease

    def release(self, lease: Lease, outcome: Outcome, seen: Seen = Seen()) -> None:  # noqa: B008  # immutable
        """Ends a lease; one whose worker is lost is over already."""
        if lease in lease.worker.leases:
            now = self._clock()
            lease.worker.release(lease, outcome, now, seen)
            if outcome is Outcome.FAILED and lease.worker.ejection.is_due and self._is_spared(lease.worker):
                lease.worker.eject(now)
            self._changed(lease.worker)

    def _change(self, worker: Worker, card: Card) -> None:
        dropped = worker.card.models.keys() - card.models.keys()
        worker.card = card
        self._index()
        for model in dropped - self._by_model.keys():
            # It is not away: it was taken out.
            self._known.pop(model, None)

    def _is_spared(self, worker: Worker) -> bool:
        # When most fail, it is not they who are at fault, and those that are left would not do.
        for model in worker.card.models:
            peers = self._by_model.get(model, ())
            if 2 * (1 + sum(peer.admitted_ratio == 0.0 for peer in peers)) > len(peers):
                return False
        return True

    def _hope_of(self, worker: Worker) -> Rates:
        return next((self._hopes[model] for model in worker.card.models if model in self._hopes), PRIOR)

    def _learn(self, worker: Worker) -> None:
        load = worker.load
        for model in worker.card.models:
            best = better(
                self._hopes.get(model),
                load.prefill_tokens_per_second,
                load.decode_step_seconds,
                load.decode_step_per_sequence_seconds,
            )
            if best is not None:
                self._hopes[model] = best

    def _index(self) -> None:
        self._by_model, self._by_gpu, self._contexts, self._abilities, self._sound_until = {}, {}, {}, {}, {}
        for worker in self._workers.values():
            for model in worker.card.models:
                self._by_model.setdefault(model, []).append(worker)
                self._known.setdefault(model, set()).add(worker.card.pool)
                self._known.move_to_end(model)
            for uuid in worker.card.gpu_uuids:
                self._by_gpu.setdefault(uuid, []).append(worker)
        self._hopes = {model: best for model, best in self._hopes.items() if model in self._by_model}
        for model, workers in self._by_model.items():
            contexts = [worker.card.models[model] for worker in workers]
            self._contexts[model] = (min(contexts), max(contexts))
            able = [worker.card.abilities.get(model, _NOTHING) for worker in workers]
            self._abilities[model] = able[0].intersection(*able[1:])
        self.differ_in_context = any(shortest != longest for shortest, longest in self._contexts.values())
        while len(self._known) > _REMEMBERED_MODELS:
            self._known.popitem(last=False)

    def _is_taken(self, card: Card, now: float) -> bool:
        worker = self._workers.get(card.worker_id)
        return worker is not None and worker.endpoint != card.endpoint and worker.is_heard(now)

    def _condition_of(self, card: Card) -> Condition:
        return worst([self._conditions.get(uuid, HEALTHY) for uuid in card.gpu_uuids])

    def _recheck(self, uuids: Iterable[str]) -> None:
        now = self._clock()
        for worker in {worker for uuid in uuids for worker in self._by_gpu.get(uuid, ())}:
            condition = self._condition_of(worker.card)
            if condition != worker.condition:
                worker.set_condition(condition, now)
                self._changed(worker)

    def _changed(self, worker: Worker) -> None:
        if worker.blocked or worker.admitted_ratio != 1.0:
            for model in worker.card.models:
                self._sound_until.pop(model, None)
        for listener in self._listeners:
            listener(worker)
