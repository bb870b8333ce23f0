"""A router's inside without its network, on a clock that stands still until it is moved."""

import random
from typing import Any

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
from services.router.worker import Worker

__all__ = ["Bench"]


class Bench:
    """Fleet, scheduler and admission on one clock; also the observer that counts outcomes."""

    def __init__(self, **settings: Any) -> None:
        self.now = 100.0
        self.outcomes: list[str] = []
        self.fleet = Fleet(self.clock)
        self.prefixes, self.lengths, self.decisions = Prefixes(), AnswerLengths(), Decisions()
        self.scheduler = Scheduler(
            self.fleet, self.prefixes, self.lengths, clock=self.clock, rng=random.Random(settings.pop("seed", 1))
        )
        self.policies = Policies(self.fleet, settings.pop("policy", None), clock=self.clock)
        self.admission = Admission(
            fleet=self.fleet,
            scheduler=self.scheduler,
            policies=self.policies,
            prefixes=self.prefixes,
            lengths=self.lengths,
            decisions=self.decisions,
            observer=self,
            clock=self.clock,
            **{"max_waiting": 1000, "max_wait_seconds": 60.0, "ready_grace_seconds": 5.0, **settings},
        )

    def clock(self) -> float:
        """The time."""
        return self.now

    def picked(self, seconds: float) -> None:
        """Not counted."""

    def decided(self, outcome: str, queue_seconds: float) -> None:
        """Noted."""
        del queue_seconds
        self.outcomes.append(outcome)

    def worker(self, worker_id: str = "w0", *, models: dict[str, int] | None = None, **card: Any) -> Worker:
        """Registers a worker that is ready and idle."""
        before = self.fleet.get(worker_id)
        endpoint = before.endpoint if before else f"10.0.0.1:{5000 + len(self.fleet.workers)}"
        chosen = {"endpoint": endpoint, "max_running": 8, **card}
        worker = self.fleet.register(Card(worker_id=worker_id, models=models or {"demo": 8192}, **chosen))
        self.report(worker)
        return worker

    def report(self, worker: Worker, **load: Any) -> None:
        """Has a worker report."""
        speeds = {
            "prefill_tokens_per_second": 10_000.0,
            "decode_step_seconds": 0.02,
            "decode_step_per_sequence_seconds": 0.0005,
        }
        self.fleet.report(worker, Load(**{"state": WorkerState.READY, **speeds, **load}))

    def pass_time(self, seconds: float) -> None:
        """Moves the clock; every worker that is ready reports as before, and deadlines are kept."""
        self.now += seconds
        for worker in self.fleet.workers:
            if worker.load.state is not WorkerState.UNKNOWN:
                self.fleet.report(worker, worker.load)
        self.admission.check_deadlines()

    def pick(self, model: str | None = "demo", **request: Any) -> str:
        """The worker that a request would get; empty for none."""
        worker = self.scheduler.pick(Request(model=model, **request)).worker
        return worker.worker_id if worker else ""

    def ask(self, model: str | None = "demo", **request: Any) -> Ticket:
        """Asks for a worker."""
        return self.admission.ask(Request(model=model, **request), lambda _: None)

    def reason(self, ticket: Ticket) -> str:
        """The latest decision about a request, in words."""
        return self.decisions.of(ticket.request.request_id)[-1].reason

    def fill(self, **request: Any) -> list[Ticket]:
        """Asks until one finds no room, and takes that one back."""
        tickets = []
        while (ticket := self.ask(**request)).lease is not None:
            tickets.append(ticket)
        self.admission.finish(ticket)
        return tickets
