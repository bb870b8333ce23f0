"""Late binding: a request gets a worker the moment one has room for it, waits for that, or is told why not."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from services.common.errors import RETRY_BUDGET_EXHAUSTED, MeshError, Reason
from services.router.choosing import Chooser
from services.router.deadlines import Deadlines
from services.router.decisions import Decisions
from services.router.fleet import Clock, Fleet
from services.router.memory import AnswerLengths
from services.router.policy import Policies
from services.router.prefixes import Prefixes
from services.router.promises import Promises
from services.router.refusals import Refusals, check
from services.router.request import Request
from services.router.retry_budget import RetryBudget
from services.router.scheduler import Decision, Scheduler, Verdict
from services.router.shares import ModelShares
from services.router.slowness import slow_reasons
from services.router.ticket import Settle, State, Ticket
from services.router.turns import Turns
from services.router.waiting import WaitingLine
from services.router.worker import Lease, Outcome, Seen, Worker

__all__ = ["Admission", "Observer"]

_RECHECK_SECONDS: Final = 1.0
_SLOW_SECONDS: Final = 1.0
# Looking a member up in its class takes longer than most that is done with it.
_FULL: Final = Verdict.FULL
_WAITING: Final = State.WAITING
_GRANTED: Final = State.GRANTED
_OVER: Final = State.OVER
_COMPLETED: Final = Outcome.COMPLETED


class Observer(Protocol):
    """Who counts what is decided."""

    def picked(self, seconds: float) -> None:
        """One pick took so long."""

    def decided(self, outcome: str, queue_seconds: float) -> None:
        """A request got its answer after so long: "granted", "withdrawn" or the reason of its refusal."""


class Admission:
    """Answers every request once: with a lease, or with an error. Leases end with `finish`, or with their worker."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        scheduler: Scheduler,
        policies: Policies,
        prefixes: Prefixes,
        lengths: AnswerLengths,
        decisions: Decisions,
        observer: Observer,
        clock: Clock,
        max_waiting: int,
        max_wait_seconds: float,
        ready_grace_seconds: float,
    ) -> None:
        self._fleet = fleet
        self._slow: Mapping[str, Sequence[str]] = {}
        self._slow_until = -math.inf
        self._scheduler = scheduler
        self._chooser = Chooser(scheduler)
        self._policies = policies
        self._prefixes = prefixes
        self._lengths = lengths
        self._decisions = decisions
        self._observer = observer
        self._clock = clock
        self._max_waiting = max_waiting
        self._max_wait_seconds = max_wait_seconds
        self._ready_grace_seconds = ready_grace_seconds
        self._line: WaitingLine[Ticket] = WaitingLine()
        self._shares = ModelShares()
        self._refusals = Refusals(
            scheduler,
            self._line,
            max_waiting=max_waiting,
            max_wait_seconds=max_wait_seconds,
            ready_grace_seconds=ready_grace_seconds,
        )
        self._deadlines: Deadlines[Ticket] = Deadlines()
        self._promises: Promises[Ticket] = Promises()
        self._sooner = asyncio.Event()
        self._due_at = math.inf
        """When deadlines are looked at next."""
        self._budget = RetryBudget()
        self._turns = Turns(
            self._line, self._promises, left=self._left, pick=self._pick, serve=self._serve, clock=clock
        )
        fleet.subscribe(self._on_change)

    @property
    def waiting_count(self) -> int:
        """How many wait."""
        return len(self._line)

    @property
    def waiting_tenants(self) -> Counter[str]:
        """How many of each tenant wait."""
        return self._line.crowd.by_tenant

    def kinds_waiting(self) -> list[tuple[Ticket, int, float | None]]:
        """A ticket for each kind of requests that wait, how many they are, and how many seconds one more would wait.

        None where that is not known. From any thread; for metrics.
        """
        kinds, of_model = self._line.kinds(), Counter[str]()
        for ticket, count in kinds:
            of_model[ticket.lane.model] += count
        return [
            (ticket, count, self._refusals.expected_wait(ticket, of_model[ticket.lane.model]))
            for ticket, count in kinds
        ]

    def outlook(self, ticket: Ticket) -> tuple[int, float | None]:
        """How many go before a ticket that has just begun to wait, and how many seconds that takes, if it is known."""
        before = max(0, self._line.before(ticket) - 1)
        return before, self._refusals.expected_wait(ticket, before)

    def ask(self, request: Request, settle: Settle, *, most_others: int = 0) -> Ticket:
        """Asks for a worker. `settle` is called once, maybe before this returns, unless `finish` comes first.

        `most_others`: how many further workers the ticket shall name.
        """
        now = self._clock()
        allowed = request.timeout_seconds
        wait = self._max_wait_seconds if allowed is None else min(allowed, self._max_wait_seconds)
        ticket = Ticket(request, settle, asked_at=now, deadline=now + wait, most_others=most_others)
        try:
            check(request)
            self._check_budget(request)
            ticket.resolve(self._policies.resolve(request))
            if request.occupies_slot:
                ticket.shares = self._shares.of(ticket.ways[0].request.model or "", now)
            ticket.join(by_length=self._fleet.differ_in_context, modest=self._left(ticket, now, waiting=True) <= 0)
        except MeshError as error:
            self._refuse(ticket, error)
            return ticket
        if request.occupies_slot and self._line.has_lane(ticket.lane):
            # Those before it found no room, so there is none for it either.
            self._queue_behind(ticket, now)
        else:
            self._try(ticket, now)
        return ticket

    def _check_budget(self, request: Request) -> None:
        if request.attempt <= 1:
            self._budget.earn()
        elif not request.emitted_tokens and not self._budget.draw():
            raise MeshError(
                Reason.NO_CAPACITY,
                "too many requests fail to try this one again",
                code=RETRY_BUDGET_EXHAUSTED,
                retry_after_seconds=1.0,
            )

    def why_slow(self, worker: Worker) -> Sequence[str]:
        """Why requests take longer on a worker than they would elsewhere, in words; nothing where they do not.

        It may be a second old.
        """
        now = self._clock()
        if now >= self._slow_until:
            # For traces, which a second is soon enough for.
            self._slow, self._slow_until = slow_reasons(self._fleet.workers), now + _SLOW_SECONDS
        return self._slow.get(worker.worker_id, ())

    def finish(
        self,
        ticket: Ticket,
        outcome: Outcome = Outcome.CANCELLED,
        *,
        output_tokens: int = 0,
        first_token_seconds: float | None = None,
        prompt_tokens: int = 0,
        cached_tokens: int = 0,
    ) -> None:
        """Ends a lease, or takes a request that is no longer wanted out of the line; a second call changes nothing."""
        state, ticket.state = ticket.state, _OVER
        if state is _GRANTED and ticket.lease is not None:
            now = self._clock()
            if ticket.shares is not None:
                ticket.shares.runs(ticket.tenant, -1, now)
            if self._line.is_parked(ticket.tenant) and self._left(ticket, now) > 0:
                self._line.put_back(ticket.tenant)
            if outcome is _COMPLETED:
                self._lengths.note(ticket.lease.request, output_tokens)
            seen = Seen(output_tokens, first_token_seconds, prompt_tokens, cached_tokens)
            self._learn(ticket.lease, seen)
            self._fleet.release(ticket.lease, outcome, seen)
        elif state is _WAITING:
            self._leave_line(ticket)
            self._observer.decided("withdrawn", self._clock() - ticket.asked_at)

    def served(self, ticket: Ticket, endpoint: str) -> None:
        """A gateway says who serves a request: another one than was picked, where that one could not be reached."""
        lease = ticket.lease
        if ticket.state is not _GRANTED or lease is None or lease.worker.endpoint == endpoint:
            return
        self._fleet.release(lease, Outcome.FAILED)
        for worker in self._fleet.workers:
            if worker.endpoint == endpoint:
                ticket.lease = self._fleet.grant(worker, lease.request, output_tokens=lease.output_tokens)
                return

    def _others(self, decision: Decision, most: int) -> list[str]:
        others = [(prediction[2], name) for name, why, prediction in decision.looked_at if not why]
        workers = (self._fleet.get(name) for _, name in sorted(others))
        return [one.endpoint for one in workers if one is not None and one is not decision.worker][:most]

    def _left(self, ticket: Ticket, now: float, *, waiting: bool = False) -> float:
        """How many more requests its tenant may have run, `waiting` counting those that wait; the rest is to leave
        room for others.
        """
        shares = ticket.shares
        if shares is None:
            return math.inf
        return shares.left(ticket.tenant, self._scheduler.slots(ticket.ways[0].request, now), now, waiting=waiting)

    def _learn(self, lease: Lease, seen: Seen) -> None:
        if seen.prompt_tokens:
            expected = lease.prediction[4] if lease.prediction else 0.0
            self._prefixes.learn(lease.request, lease.worker, expected=expected, cached=seen.cached_tokens)

    def check_deadlines(self) -> float | None:
        """Answers those who have waited too long; gives the seconds until there is more to do, None for never."""
        now = self._clock()
        for ticket in self._deadlines.take_due(now):
            self._reconsider(ticket, now)
        upcoming = self._deadlines.next
        self._due_at = math.inf if upcoming is None else upcoming
        return None if upcoming is None else max(0.0, upcoming - now)

    async def keep_deadlines(self) -> None:
        """Runs until cancelled: answers everybody in time."""
        while True:
            delay = self.check_deadlines()
            self._sooner.clear()
            try:
                async with asyncio.timeout(delay):
                    await self._sooner.wait()
            except TimeoutError:
                continue

    def refuse_all(self, error: MeshError) -> None:
        """Answers everybody who waits with an error: the router stops."""
        for ticket in self._deadlines.take_due(float("inf")):
            self._refuse(ticket, error)

    def _try(self, ticket: Ticket, now: float) -> None:
        decision = self._pick(ticket, spare=ticket.modest and self._left(ticket, now) <= 0)
        if decision.worker is not None:
            self._grant(ticket, decision)
        else:
            self._wait_or_refuse(ticket, decision.verdict, now)

    def _may_wait_for_ready(self, ticket: Ticket) -> bool:
        # A subset was chosen by a gateway that knows its endpoints: if none of them is ready, it is told so.
        return ticket.request.subset is None and self._ready_grace_seconds > 0

    def _pick(self, ticket: Ticket, *, spare: bool) -> Decision:
        """Picks for a request; `spare`: only a worker that has capacity to spare."""
        started = time.perf_counter()
        decision, ticket.way = self._chooser.pick(ticket.ways, asked_at=ticket.asked_at, spare=spare)
        ticket.decision = decision
        self._observer.picked(time.perf_counter() - started)
        return decision

    def _queue_behind(self, ticket: Ticket, now: float) -> None:
        verdict = self._chooser.judge(ticket.ways, asked_at=ticket.asked_at)
        self._wait_or_refuse(ticket, verdict, now)

    def _wait_or_refuse(self, ticket: Ticket, verdict: Verdict, now: float) -> None:
        if verdict is _FULL:
            self._wait(ticket, now, check_at=now + max(self._ready_grace_seconds, _RECHECK_SECONDS))
        elif verdict is Verdict.NOT_READY and self._may_wait_for_ready(ticket):
            ticket.unready_since = now
            self._wait(ticket, now, check_at=now + min(self._ready_grace_seconds, _RECHECK_SECONDS))
        else:
            self._refuse(ticket, self._refusals.because(verdict, ticket))

    def _wait(self, ticket: Ticket, now: float, *, check_at: float) -> None:
        if ticket.deadline <= now:
            self._refuse(ticket, self._refusals.too_late(ticket))
            return
        self._refusals.note(ticket.ways[0].request)
        wait = self._refusals.expected_wait(ticket, self._line.before(ticket))
        allowed = self._refusals.allowed_wait(ticket, now)
        if wait is not None and wait > allowed and not ticket.request.emitted_tokens:
            # It would wait in vain, and take a place from those who need not. Who has begun does not wait in vain.
            self._refuse(
                ticket,
                self._refusals.too_late(ticket) if wait > ticket.deadline - now else self._refusals.no_capacity(ticket),
            )
            return
        if len(self._line) >= self._max_waiting and not self._make_room(ticket):
            self._refuse(ticket, self._refusals.no_capacity(ticket))
            return
        ticket.state = _WAITING
        ticket.tokens = ticket.request.prompt_tokens + self._lengths.expected(ticket.ways[0].request)
        self._line.add(ticket)
        self._promises.set(ticket, now + allowed)
        if ticket.shares is not None:
            ticket.shares.waits(ticket.tenant, 1, now)
        self._look_again(ticket, check_at)

    def _make_room(self, ticket: Ticket) -> bool:
        victim = self._line.crowd.makes_room(ticket.priority, ticket.tenant) if self._max_waiting else None
        if victim is not None:
            self._refuse(victim, self._refusals.no_capacity(victim))
        return victim is not None

    def _look_again(self, ticket: Ticket, at: float) -> None:
        at = min(at, ticket.deadline)
        self._deadlines.set(ticket, at)
        if at < self._due_at:
            self._due_at = at
            self._sooner.set()

    def _reconsider(self, ticket: Ticket, now: float) -> None:
        verdict = self._chooser.judge(ticket.ways, asked_at=ticket.asked_at)
        if now >= ticket.deadline:
            late = verdict is Verdict.FULL or self._refusals.is_clients_deadline(ticket)
            self._refuse(ticket, self._refusals.too_late(ticket) if late else self._refusals.because(verdict, ticket))
        elif verdict is Verdict.FULL:
            ticket.unready_since = None
            self._look_again(ticket, now + max(self._ready_grace_seconds, _RECHECK_SECONDS))
        elif verdict is Verdict.NOT_READY:
            self._reconsider_unready(ticket, now)
        else:
            self._refuse(ticket, self._refusals.because(verdict, ticket))

    def _reconsider_unready(self, ticket: Ticket, now: float) -> None:
        since = ticket.unready_since = now if ticket.unready_since is None else ticket.unready_since
        until = since + self._ready_grace_seconds
        if now >= until:
            self._refuse(ticket, self._refusals.because(Verdict.NOT_READY, ticket))
        else:
            self._look_again(ticket, min(until, now + _RECHECK_SECONDS))

    def _on_change(self, worker: Worker) -> None:
        if worker.gone:
            self._prefixes.forget(worker)
        self._turns.fill(worker)

    def _serve(self, ticket: Ticket, decision: Decision) -> None:
        self._deadlines.drop(ticket)
        self._promises.drop(ticket)
        self._line.serve(ticket)
        self._grant(ticket, decision)

    def _grant(self, ticket: Ticket, decision: Decision) -> None:
        worker, request = decision.worker, ticket.way.request
        assert worker is not None
        now, has_waited = self._clock(), ticket.is_waiting
        ticket.state = _GRANTED
        ticket.queue_seconds = now - ticket.asked_at
        ticket.lease = self._fleet.grant(
            worker, request, output_tokens=decision.output_tokens, prediction=decision.prediction
        )
        if ticket.most_others:
            ticket.others = self._others(decision, ticket.most_others)
        if ticket.shares is not None:
            if has_waited:
                ticket.shares.starts(ticket.tenant)
            else:
                ticket.shares.runs(ticket.tenant, 1, now)
        self._prefixes.note(request, worker)
        self._decisions.add(ticket.record(at=now))
        self._observer.decided("granted", ticket.queue_seconds)
        ticket.settle(ticket)
        # A ticket may live for long, and a fleet may be large.
        ticket.decision = None

    def _refuse(self, ticket: Ticket, error: MeshError) -> None:
        self._leave_line(ticket)
        ticket.state = State.REFUSED
        ticket.queue_seconds = self._clock() - ticket.asked_at
        ticket.error = error
        self._decisions.add(ticket.record(at=self._clock(), refusal=error.message))
        self._observer.decided(error.reason.value.lower(), ticket.queue_seconds)
        ticket.settle(ticket)

    def _leave_line(self, ticket: Ticket) -> None:
        self._deadlines.drop(ticket)
        self._promises.drop(ticket)
        if self._line.remove(ticket) and ticket.shares is not None:
            ticket.shares.waits(ticket.tenant, -1, self._clock())
