"""What the router counts, for Prometheus."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.common.metrics import QUEUE_SECONDS, Spread, Tally
from services.router.admission import Admission
from services.router.fleet import Clock, Fleet
from services.router.policy import Policies
from services.router.slowness import slow_causes
from services.router.ticket import Ticket
from services.router.worker import Worker

__all__ = ["FleetCollector", "RouterMetrics"]

_DECISION_BUCKETS: Final = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3)


class RouterMetrics:
    """Counts decisions; the Observer of admission."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._decisions = Tally(
            "tokenloom_router_decisions",
            "Requests answered, by outcome: granted, or an error's reason.",
            "outcome",
            registry=registry,
        )
        self._decision_seconds = Spread(
            "tokenloom_router_decision_seconds", "Time that one pick took.", _DECISION_BUCKETS, registry=registry
        )
        self._queue_seconds = Spread(
            "tokenloom_router_queue_seconds", "Time from ask to answer.", QUEUE_SECONDS, registry=registry
        )

    def picked(self, seconds: float) -> None:
        """One pick took so long."""
        self._decision_seconds.observe(seconds, None)

    def decided(self, outcome: str, queue_seconds: float) -> None:
        """A request got its answer."""
        self._decisions.add(1.0, outcome)
        self._queue_seconds.observe(queue_seconds, None)


class FleetCollector(Collector):
    """The fleet as it is when it is asked for."""

    def __init__(self, fleet: Fleet, admission: Admission, policies: Policies, clock: Clock) -> None:
        self._fleet = fleet
        self._admission = admission
        self._policies = policies
        self._clock = clock

    def collect(self) -> Iterable[Metric]:
        """Workers by state, leases, requests that wait, and how far the mesh is degraded."""
        workers, now = self._fleet.workers, self._clock()
        by_state = GaugeMetricFamily("tokenloom_router_workers", "Registered workers, by state.", labels=["state"])
        states = [_state(worker, now) for worker in workers]
        for state in sorted({"ready", *states}):
            by_state.add_metric([state], states.count(state))
        yield by_state
        leases = sum(len(worker.leases) for worker in workers)
        yield GaugeMetricFamily("tokenloom_router_leases", "Leases that are out.", value=leases)
        waiting = self._admission.waiting_count
        yield GaugeMetricFamily("tokenloom_router_waiting_requests", "Requests that wait.", value=waiting)
        level = self._policies.degradation.level
        yield GaugeMetricFamily(
            "tokenloom_router_degradation_level", "0: not degraded, 1: short outputs, 2: refusing.", value=level
        )
        version = self._policies.version
        yield GaugeMetricFamily("tokenloom_router_policy_version", "Policies since the start, from 1.", value=version)
        yield from _of_pools(self._admission, self._fleet, workers)
        yield from _of_workers(workers, now)


def _of_pools(admission: Admission, fleet: Fleet, workers: Sequence[Worker]) -> Iterator[Metric]:
    served = {(worker.card.pool, model) for worker in workers for model in worker.card.models}
    counts, waits = dict.fromkeys(sorted(served), 0), dict.fromkeys(sorted(served), 0.0)
    for ticket, count, seconds in admission.kinds_waiting():
        for place in _places(ticket, fleet):
            counts[place] = counts.get(place, 0) + count
            waits[place] = max(waits.get(place, 0.0), seconds or 0.0)
    waiting = GaugeMetricFamily(
        "tokenloom_router_pool_waiting_requests",
        "Requests that wait and may go to a pool, by model; one that may go to several counts for each.",
        labels=("pool", "model"),
    )
    wait = GaugeMetricFamily(
        "tokenloom_router_pool_wait_seconds",
        "How long one more such request is predicted to wait; 0 while none does, or where nothing is known.",
        labels=("pool", "model"),
    )
    for place, count in counts.items():
        waiting.add_metric(place, count)
        wait.add_metric(place, max(0.0, waits[place]))
    yield waiting
    yield wait


def _places(ticket: Ticket, fleet: Fleet) -> set[tuple[str, str]]:
    """The pools that a request may go to, each with the model that it would be answered by there."""
    found: set[tuple[str, str]] = set()
    for way in ticket.ways:
        model, allowed = way.request.model or "", way.request.pools
        found.update((pool, model) for pool in fleet.pools_of(model) if allowed is None or pool in allowed)
    return found


# (name, meaning, value of a worker at a moment)
_OF_A_WORKER: Final[tuple[tuple[str, str, Callable[[Worker, float], float]], ...]] = (
    ("ready", "1 while a worker takes work.", lambda worker, now: float(worker.is_ready(now))),
    ("leases", "Leases that are out on a worker.", lambda worker, _: len(worker.leases)),
    (
        "token_seconds",
        "Time per output token that the next request is predicted to meet on a worker.",
        lambda worker, _: worker.outlook.token_seconds,
    ),
    (
        "slowdown_ratio",
        "Factor on every duration on a worker, from the state of its GPUs; 1 is none.",
        lambda worker, _: worker.condition.slowdown,
    ),
    (
        "prefill_correction_ratio",
        "Times to the first token on a worker, in relation to what was predicted from its own measurements.",
        lambda worker, _: worker.corrections[0],
    ),
    (
        "first_token_delay_seconds",
        "What times to the first token on a worker came out longer lately, however much there was to prefill.",
        lambda worker, _: worker.corrections[2],
    ),
    (
        "decode_correction_ratio",
        "Times per output token on a worker, in relation to what was predicted from its own measurements.",
        lambda worker, _: worker.corrections[1],
    ),
)


def _of_workers(workers: Sequence[Worker], now: float) -> Iterator[Metric]:
    for name, meaning, value_of in _OF_A_WORKER:
        gauge = GaugeMetricFamily(f"tokenloom_router_worker_{name}", meaning, labels=("worker", "pool"))
        for worker in workers:
            gauge.add_metric((worker.worker_id, worker.card.pool), value_of(worker, now))
        yield gauge
    slow = GaugeMetricFamily(
        "tokenloom_router_worker_slow",
        "1 for each cause for which requests take longer on a worker than they would elsewhere.",
        labels=("worker", "pool", "cause"),
    )
    pools = {worker.worker_id: worker.card.pool for worker in workers}
    for worker_id, causes in slow_causes(workers).items():
        for cause in causes:
            slow.add_metric((worker_id, pools[worker_id], cause), 1.0)
    yield slow


def _state(worker: Worker, now: float) -> str:
    name = worker.state_name if worker.blocked or worker.is_ready(now) else "silent"
    return name.replace(" ", "_")
