"""The router itself in virtual time: the very objects that its process uses, over simulated engines."""

import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from bench.routing.engine import Engine, Job
from bench.routing.policies import prefix_blocks
from bench.routing.timeline import Timeline
from bench.routing.traces import Arrival
from services.router.admission import Admission
from services.router.card import Card, Load, WorkerState
from services.router.decisions import Decisions
from services.router.fleet import Fleet
from services.router.memory import AnswerLengths
from services.router.policy import Policies
from services.router.prefixes import Prefixes
from services.router.request import Request
from services.router.scheduler import Scheduler
from services.router.ticket import Ticket
from services.router.worker import Outcome

__all__ = ["MODEL", "RouterUnderTest"]

MODEL: Final = "demo"
_REPORT_SECONDS: Final = 0.1
_CHECKS_A_REPORT: Final = 4
_CONTEXT: Final = 16_384

Said = Callable[[Engine, Load], Load | None]
"""What becomes of a report on its way: what the router is told, or nothing."""


class RouterUnderTest:
    """Fleet, scheduler and admission on a timeline, with a worker for each engine that reports as real ones do."""

    def __init__(
        self, timeline: Timeline, engines: Sequence[Engine], *, seed: int, said: Said | None = None, **settings: Any
    ) -> None:
        self.timeline = timeline
        self.engines = {engine.spec.name: engine for engine in engines}
        self.fleet = Fleet(timeline.clock)
        self._said = said or (lambda _, load: load)
        lengths, prefixes = AnswerLengths(), Prefixes()
        self.admission = Admission(
            fleet=self.fleet,
            scheduler=Scheduler(self.fleet, prefixes, lengths, clock=timeline.clock, rng=random.Random(seed)),
            policies=Policies(self.fleet, clock=timeline.clock),
            prefixes=prefixes,
            lengths=lengths,
            decisions=Decisions(),
            observer=_Nobody(),
            clock=timeline.clock,
            **{"max_waiting": 1024, "max_wait_seconds": 60.0, "ready_grace_seconds": 5.0, **settings},
        )
        for engine in engines:
            self._register(engine)
        self._keep_deadlines()

    def ask(self, arrival: Arrival, on_answer: Callable[[Ticket], None], **more: Any) -> Ticket:
        """Asks for a worker, as a gateway does; `more` is said of the request, too."""
        request = Request(
            model=MODEL,
            prompt_tokens=arrival.prompt_tokens,
            tenant=arrival.tenant,
            session=arrival.session,
            slo_class=arrival.slo_class,
            priority=arrival.priority,
            prefix_hashes=prefix_blocks(arrival),
            **more,
        )
        return self.admission.ask(request, on_answer)

    def finish(self, ticket: Ticket, job: Job) -> None:
        """Gives a worker back, with what a gateway says of how it went."""
        outcome = Outcome.FAILED if job.failed else Outcome.COMPLETED
        first = None if job.first_token_at is None else job.first_token_at - job.submitted_at
        self.admission.finish(
            ticket,
            outcome,
            output_tokens=job.made,
            first_token_seconds=first,
            prompt_tokens=job.prompt_tokens,
            cached_tokens=job.cached_tokens,
        )

    def _register(self, engine: Engine) -> None:
        spec = engine.spec
        card = Card(
            worker_id=spec.name,
            endpoint=f"10.0.0.1:{5000 + len(self.fleet.workers)}",
            models={MODEL: _CONTEXT},
            max_running=spec.max_running,
            kv_tokens=spec.kv_tokens,
            gpu_uuids=(spec.name,),
        )
        worker = self.fleet.register(card)
        told: tuple[int, int] = (-1, -1)
        checks = 0

        def check() -> None:
            nonlocal told, checks
            report = engine.report()
            checks += 1
            if (report.running, report.waiting) != told or checks >= _CHECKS_A_REPORT:
                told, checks = (report.running, report.waiting), 0
                load = self._said(engine, Load(state=WorkerState.READY, **report._asdict()))
                if load is not None:
                    self.fleet.report(worker, load)
            self.timeline.after(_REPORT_SECONDS / _CHECKS_A_REPORT, check)

        check()

    def _keep_deadlines(self) -> None:
        delay = self.admission.check_deadlines()
        self.timeline.after(min(0.05, delay if delay is not None else 0.05) + 0.001, self._keep_deadlines)


class _Nobody:
    """Counts nothing."""

    def picked(self, seconds: float) -> None:
        """Nothing."""

    def decided(self, outcome: str, queue_seconds: float) -> None:
        """Nothing."""
