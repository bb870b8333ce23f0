"""One run: a trace over a fleet under a policy, and what its clients saw."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from bench.routing.engine import Engine, EngineSpec, Job
from bench.routing.mesh import RouterUnderTest
from bench.routing.policies import CHOICES
from bench.routing.timeline import Timeline
from bench.routing.traces import Arrival, Lengths, poisson
from services.mesh.bench_report import percentile as of_sorted

__all__ = ["TOKENLOOM", "Meanwhile", "Result", "Served", "capacity", "percentile", "run"]

TOKENLOOM: Final = "tokenloom"
_DRAIN_SECONDS: Final = 120.0

Meanwhile = Callable[[Timeline, dict[str, Engine], RouterUnderTest | None], None]


@dataclass(slots=True)
class Served:
    """What became of one request. Times are seconds; None where it did not come to that."""

    arrival: Arrival
    worker: str = ""
    waited: float = 0.0
    """In the router's line."""
    ttft: float | None = None
    tpot: float | None = None
    ended_at: float | None = None
    cached_tokens: int = 0
    refused_after: float | None = None
    retry_after: float | None = None


@dataclass(slots=True)
class Result:
    """What a run came to."""

    policy: str
    served: list[Served]
    seconds: float
    router: RouterUnderTest | None = None
    busy: dict[str, float] = field(default_factory=dict)

    def ttfts(self, *, tenant: str | None = None, since: float = 0.0) -> list[float]:
        """The times to first token, of those that arrived after `since`."""
        return [
            one.ttft
            for one in self.served
            if one.ttft is not None and one.arrival.at >= since and tenant in (None, one.arrival.tenant)
        ]

    def ttft(self, share: float, *, since: float = 0.0) -> float:
        """A percentile of the time to first token."""
        return percentile(self.ttfts(since=since), share)

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were cached."""
        done = [one for one in self.served if one.ttft is not None]
        return sum(one.cached_tokens for one in done) / max(1, sum(one.arrival.prompt_tokens for one in done))

    @property
    def imbalance(self) -> float:
        """Largest over mean share of time in which engines were busy."""
        return max(self.busy.values()) / max(1e-9, sum(self.busy.values()) / len(self.busy))

    def request_imbalance(self, *, since: float = 0.0) -> float:
        """Largest over mean count of requests of a worker."""
        counts = dict.fromkeys(self.busy, 0)
        for one in self.served:
            if one.worker and one.arrival.at >= since:
                counts[one.worker] += 1
        return max(counts.values()) / max(1e-9, sum(counts.values()) / len(counts))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least that share of them don't exceed; infinite where there is none."""
    return of_sorted(sorted(values), 100 * share) if values else float("inf")


def run(
    policy: str,
    specs: Sequence[EngineSpec],
    trace: Sequence[Arrival],
    *,
    seed: int = 1,
    meanwhile: Meanwhile | None = None,
    **settings: Any,
) -> Result:
    """Plays a trace. `meanwhile` may set things that happen to engines and router; `settings` are the router's."""
    timeline = Timeline()
    engines = [Engine(spec, timeline) for spec in specs]
    start = timeline.now
    play = _Mesh(timeline, engines, seed, settings) if policy == TOKENLOOM else _Direct(timeline, engines, policy, seed)
    if meanwhile is not None:
        meanwhile(timeline, {engine.spec.name: engine for engine in engines}, play.router)
    served = [Served(arrival) for arrival in trace]
    for one in served:
        timeline.at(start + one.arrival.at, lambda one=one: play.take(one))  # type: ignore[misc]
    last = trace[-1].at if trace else 0.0
    timeline.run_until(start + last)
    busy = {engine.spec.name: engine.busy_seconds for engine in engines}
    timeline.run_until(start + last + _DRAIN_SECONDS)
    return Result(policy, served, last, play.router, busy)


def _note(one: Served, engine: Engine, job: Job, arrived: float) -> None:
    assert job.first_token_at is not None
    assert job.ended_at is not None
    one.worker = engine.spec.name
    one.ttft = job.first_token_at - arrived
    one.tpot = (job.ended_at - job.first_token_at) / max(1, job.made - 1)
    one.ended_at = job.ended_at
    one.cached_tokens = job.cached_tokens


class _Direct:
    """A policy that picks at once; engines queue."""

    router = None

    def __init__(self, timeline: Timeline, engines: list[Engine], policy: str, seed: int) -> None:
        self._timeline = timeline
        self._engines = engines
        self._choose = CHOICES[policy](seed)

    def take(self, one: Served) -> None:
        arrival, now = one.arrival, self._timeline.now
        engine = self._engines[self._choose(arrival, self._engines)]
        done = lambda job: _note(one, engine, job, now)  # noqa: E731
        engine.submit(Job(arrival.prompt_tokens, arrival.output_tokens, arrival.hashes, done))


class _Mesh:
    """tokenloom."""

    def __init__(self, timeline: Timeline, engines: list[Engine], seed: int, settings: dict[str, Any]) -> None:
        self._timeline = timeline
        self.router = RouterUnderTest(timeline, engines, seed=seed, **settings)

    def take(self, one: Served) -> None:
        arrival, arrived = one.arrival, self._timeline.now

        def answered(ticket: Any) -> None:
            if ticket.error is not None:
                one.refused_after = self._timeline.now - arrived
                one.retry_after = ticket.error.retry_after_seconds
                return
            engine = self.router.engines[ticket.lease.worker.worker_id]
            one.waited = ticket.queue_seconds

            def done(job: Job) -> None:
                _note(one, engine, job, arrived)
                self.router.finish(ticket, job)

            engine.submit(Job(arrival.prompt_tokens, arrival.output_tokens, arrival.hashes, done))

        self.router.ask(arrival, answered)


def capacity(specs: Sequence[EngineSpec], *, lengths: Lengths = Lengths(), seconds: float = 120.0) -> float:  # noqa: B008
    """Requests a second that the fleet serves when no engine is ever idle: what load is a share of."""
    return sum(_saturated(spec, lengths, seconds) for spec in specs)


def _saturated(spec: EngineSpec, lengths: Lengths, seconds: float) -> float:
    timeline = Timeline()
    engine = Engine(spec, timeline)
    ended = 0
    supply = _endless(lengths)

    def next_one(job: Job | None) -> None:
        nonlocal ended
        ended += job is not None
        arrival = next(supply)
        engine.submit(Job(arrival.prompt_tokens, arrival.output_tokens, (), next_one))

    for _ in range(2 * spec.max_running):
        next_one(None)
    warm = seconds / 4
    timeline.run_until(timeline.now + warm)
    before = ended
    timeline.run_until(timeline.now + seconds)
    return (ended - before) / seconds


def _endless(lengths: Lengths) -> Iterator[Arrival]:
    seed = 100
    while True:
        yield from poisson(10.0, 200.0, seed=seed, lengths=lengths)
        seed += 1
