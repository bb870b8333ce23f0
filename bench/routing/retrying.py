"""A gateway that tries again elsewhere what a worker failed, over a fleet of which a part fails everything."""

from collections.abc import Collection, Sequence
from typing import Any, Final, NamedTuple

from bench.routing.engine import Engine, EngineSpec, Job
from bench.routing.mesh import RouterUnderTest
from bench.routing.timeline import Timeline
from bench.routing.traces import Arrival

__all__ = ["Retried", "retried"]

_MOST_ATTEMPTS: Final = 3
_FAILS_AFTER_SECONDS: Final = 0.02


class Retried(NamedTuple):
    """What became of a trace."""

    requests: int
    attempts: int
    """Requests that a worker got."""
    served: int


class _Gateway:
    def __init__(self, router: RouterUnderTest, failing: Collection[str]) -> None:
        self.router = router
        self.attempts = self.served = 0
        self._failing = failing

    def send(self, arrival: Arrival, *, attempt: int = 1, excluded: frozenset[str] = frozenset()) -> None:
        def answered(ticket: Any) -> None:
            if ticket.error is not None:
                return
            self.attempts += 1
            name = ticket.lease.worker.worker_id
            if name in self._failing:
                job = Job(arrival.prompt_tokens, 0, (), lambda _: None, failed=True)
                again = (arrival, attempt + 1, excluded | {name})
                self.router.timeline.after(_FAILS_AFTER_SECONDS, lambda: self._failed(ticket, job, *again))
            else:
                self.router.engines[name].submit(Job(arrival.prompt_tokens, arrival.output_tokens, (), done(ticket)))

        def done(ticket: Any) -> Any:
            def complete(job: Job) -> None:
                self.served += 1
                self.router.finish(ticket, job)

            return complete

        self.router.ask(arrival, answered, attempt=attempt, excluded=excluded)

    def _failed(self, ticket: Any, job: Job, arrival: Arrival, attempt: int, excluded: frozenset[str]) -> None:
        self.router.finish(ticket, job)
        if attempt <= _MOST_ATTEMPTS:
            self.send(arrival, attempt=attempt, excluded=excluded)


def retried(specs: Sequence[EngineSpec], trace: Sequence[Arrival], failing: Collection[str], *, seed: int) -> Retried:
    """Plays a trace while some workers fail all that they get."""
    timeline = Timeline()
    engines = [Engine(spec, timeline) for spec in specs]
    gateway = _Gateway(RouterUnderTest(timeline, engines, seed=seed), failing)
    start = timeline.now
    for arrival in trace:
        timeline.at(start + arrival.at, lambda arrival=arrival: gateway.send(arrival))  # type: ignore[misc]
    timeline.run_until(start + trace[-1].at + 120.0)
    return Retried(len(trace), gateway.attempts, gateway.served)
