"""What the router counts, for Prometheus."""

from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.router.admission import Admission
from services.router.fleet import Clock, Fleet
from services.router.policy import Policies
from services.router.worker import Worker

__all__ = ["FleetCollector", "RouterMetrics"]

_DECISION_BUCKETS: Final = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3)
_QUEUE_BUCKETS: Final = (0.0005, 0.001, 0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60)


class RouterMetrics:
    """Counts decisions; the Observer of admission."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._decisions = Counter(
            "tokenloom_router_decisions", "Requests answered, by outcome", ["outcome"], registry=registry
        )
        self._decision_seconds = Histogram(
            "tokenloom_router_decision_seconds", "Time that one pick took", buckets=_DECISION_BUCKETS, registry=registry
        )
        self._queue_seconds = Histogram(
            "tokenloom_router_queue_seconds", "Time from ask to answer", buckets=_QUEUE_BUCKETS, registry=registry
        )
        self._children: dict[str, Counter] = {}

    def picked(self, seconds: float) -> None:
        """One pick took so long."""
        self._decision_seconds.observe(seconds)

    def decided(self, outcome: str, queue_seconds: float) -> None:
        """A request got its answer."""
        child = self._children.get(outcome)
        if child is None:
            child = self._children[outcome] = self._decisions.labels(outcome)
        child.inc()
        self._queue_seconds.observe(queue_seconds)


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
        by_state = GaugeMetricFamily("tokenloom_router_workers", "Registered workers, by state", labels=["state"])
        states = [_state(worker, now) for worker in workers]
        for state in sorted({"ready", *states}):
            by_state.add_metric([state], states.count(state))
        yield by_state
        leases = sum(len(worker.leases) for worker in workers)
        yield GaugeMetricFamily("tokenloom_router_leases", "Leases that are out", value=leases)
        waiting = self._admission.waiting_count
        yield GaugeMetricFamily("tokenloom_router_waiting_requests", "Requests that wait", value=waiting)
        level = self._policies.degradation.level
        yield GaugeMetricFamily(
            "tokenloom_router_degradation_level", "0: not degraded, 1: short outputs, 2: refusing", value=level
        )
        version = self._policies.version
        yield GaugeMetricFamily("tokenloom_router_policy_version", "Policies since the start, from 1", value=version)


def _state(worker: Worker, now: float) -> str:
    name = worker.state_name if worker.blocked or worker.is_ready(now) else "silent"
    return name.replace(" ", "_")
