"""Which worker gets a request: the one pick behind both lanes."""

import random
from collections.abc import Iterable, Sequence
from enum import Enum
from itertools import islice
from typing import Final, NamedTuple

from services.common.policy import STANDARD
from services.router.cost import Demand, Forecast, Prediction, is_late
from services.router.fleet import Clock, Fleet
from services.router.looks import Looks, Step
from services.router.memory import AnswerLengths
from services.router.prefixes import Prefixes
from services.router.request import Request
from services.router.worker import STALE_SECONDS, Worker

__all__ = ["OUTSIDE_POOL", "Capacity", "Decision", "Scheduler", "Verdict"]

# Costs closer than this are equal: what two equal workers measure of themselves differs by as much.
_TIE_SHARE: Final = 1.04
_TIE_SECONDS: Final = 0.0005
# A router that has just started does not know yet who is there.
_SETTLING_SECONDS: Final = 1.0
_FULL: Final = "full"
_KEPT: Final = "kept for other tenants"
_BACKLOGGED: Final = "busy for a while"
# How long what was reckoned of all workers holds.
_RATE_SECONDS: Final = 0.05
_MOST_RATES: Final = 1024
_RETURNING: Final = "returning"
# Of more workers so many are compared, from a random place on: the best of these is nearly as good as the best of all.
_MOST_COMPARED: Final = 64
OUTSIDE_POOL: Final = "outside the pool"
"""Why a worker of another pool than the policy's is out of the question."""


class Verdict(Enum):
    """What becomes of a request."""

    PICKED = "picked"
    FULL = "full"
    NOT_READY = "not ready"
    UNKNOWN_MODEL = "unknown model"
    TOO_LONG = "too long"
    UNABLE = "unable"


# Looking a member up in its class takes longer than most that is done with it.
_PICKED: Final = Verdict.PICKED
_WAIT: Final = Verdict.FULL

_NOBODY: Final = Looks((), (), (), (), (), count=0)


class Decision(NamedTuple):
    """What was decided and why.

    Attributes:
        verdict: what becomes of the request.
        worker: the worker picked, or None.
        prediction: what the request would meet there, or None.
        output_tokens: tokens of output that were expected.
        looked_at: every worker that was looked at.
    """

    verdict: Verdict
    worker: Worker | None = None
    prediction: Prediction | None = None
    output_tokens: float = 0.0
    looked_at: Looks = _NOBODY

    @property
    def out(self) -> dict[str, int]:
        """How many of these were out of the question, by reason."""
        return self.looked_at.out

    @property
    def reason(self) -> str:
        """The decision in one line."""
        others = ", ".join(f"{count} {why}" for why, count in self.out.items())
        if self.prediction is None:
            return f"{self.verdict.value} ({others})" if others else self.verdict.value
        ttft, tpot, _, _, cached, delay = self.prediction
        late = (
            f" ({1000 * delay:.1f} ms of it learnt: first tokens there came late)" if is_late(self.prediction) else ""
        )
        return (
            f"least predicted time of {self.looked_at.compared}{f' ({others})' if others else ''}: "
            f"first token in {1000 * ttft:.1f} ms{late}, whole answer in {ttft + self.output_tokens * tpot:.2f} s"
            f"{f', {cached:.0f} tokens cached' if cached else ''}"
        )


class Capacity(NamedTuple):
    """What the workers of a model have together."""

    at: float
    """When it was looked at, in seconds."""
    requests_per_second: float
    """How many find a slot in a second while none is free; 0 while nobody is ready."""
    slots: int
    """How many run at the same time."""
    free_slots: int
    """How many of these are free."""
    prefill_tokens_per_second: float


def _free_slots(workers: Iterable[Worker], now: float) -> int:
    # Most are full when this is asked.
    taking = [worker for worker in workers if not worker.full]
    return sum(max(0, worker.card.max_running - worker.occupied) for worker in taking if worker.is_ready(now))


# What is asked: the request, now, when it was made, the context that it needs, whether every worker may have it, and
# whether only those with capacity to spare. Plain tuples, these two, since they are made for every decision.
_Ask = tuple[Request, float, float, int, bool, bool]
# What is found: those that are left; names and reasons of those that are out of the question; the steps that took
# others out; and whether somebody would take it later.
_Found = tuple[list[Worker], Sequence[str], Sequence[str], list[Step], bool]


class Scheduler:
    """Picks workers by predicted seconds."""

    def __init__(
        self, fleet: Fleet, prefixes: Prefixes, lengths: AnswerLengths, *, clock: Clock, rng: random.Random
    ) -> None:
        self._fleet = fleet
        self._prefixes = prefixes
        self._lengths = lengths
        self._clock = clock
        self._rng = rng
        self._capacities: dict[str, Capacity] = {}

    def pick(self, request: Request, *, asked_at: float | None = None, spare: bool = False) -> Decision:
        """The worker with the least cost among those that take the request now; changes nothing.

        `asked_at` is when the request was made; a worker that registered or became ready since is not excluded: what
        was wrong with it is over.
        `spare`: only workers with capacity to spare are taken, the rest being kept for others.
        """
        now = self._clock()
        asked = now if asked_at is None else asked_at
        context = self._context(request)
        if context < 0:
            return Decision(verdict=Verdict.TOO_LONG)
        output = self._lengths.expected(request)
        plain = not request.excluded and request.subset is None and context == 0
        plain = plain and request.pools is None
        plain = plain and (not request.needs or request.needs <= self._fleet.common_abilities(request.model))
        workers = self._fleet.serving(request.model)
        sound = self._fleet.is_sound(request.model, now)
        ask = (request, now, asked, context, plain and sound, spare)
        some = self._some(workers, request) if plain and len(workers) > _MOST_COMPARED else workers
        found = self._sort_out(some, ask)
        if not found[0] and plain and len(workers) > _MOST_COMPARED:
            some, found = workers, self._sort_out(workers, ask)
        open_to, names, reasons, steps, full = found
        if not sound and [worker for worker in open_to if worker.admitted_ratio != 1.0]:
            open_to = self._without_returning(open_to, steps)
        if not open_to:
            looks = Looks(names, reasons, steps, (), (), count=len(some))
            return Decision(self._why_none(request, full=full, now=now), looked_at=looks)
        forecast = self._forecast(open_to, request, output, now)
        best = self._best(open_to, forecast.costs()) if len(open_to) > 1 else 0
        looks = Looks(names, reasons, steps, open_to, forecast, count=len(some))
        return Decision(_PICKED, open_to[best], forecast[best], output, looks)

    def _some(self, workers: Sequence[Worker], request: Request) -> Sequence[Worker]:
        """The workers that are compared of very many: some, and those who know the prompt."""
        start = int(self._rng.random() * len(workers))
        some = workers[start : start + _MOST_COMPARED]
        some = [*some, *workers[: _MOST_COMPARED - len(some)]]
        known = (self._fleet.get(name) for name in islice(self._prefixes.cached(request), _MOST_COMPARED))
        return [*some, *(one for one in known if one is not None and one not in some)]

    def _sort_out(self, workers: Sequence[Worker], ask: _Ask) -> _Found:
        """Who of these may have the request now, and why the others may not."""
        request, now, asked, context, every, spare = ask
        names: Sequence[str] = ()
        reasons: Sequence[str] = ()
        steps: list[Step] = []
        fit = workers
        if not every:
            whys = [self._obstacle(worker, request, context, now, asked) for worker in workers]
            fit = [worker for worker, why in zip(workers, whys, strict=True) if not why]
            names = [worker.worker_id for worker, why in zip(workers, whys, strict=True) if why]
            reasons = [why for why in whys if why]
        if not request.occupies_slot:
            return [*fit], names, reasons, steps, False
        open_to = [worker for worker in fit if not worker.full]
        if len(open_to) < len(fit):
            steps.append((fit, open_to, _FULL))
        if spare:
            before, open_to = open_to, self._spared(open_to, request)
            steps.append((before, open_to, _KEPT))
        if open_to and open_to[0].backlogged and all(worker.backlogged for worker in open_to):
            # Nobody would begin with it soon, and who does first is not known yet.
            before, open_to = open_to, []
            steps.append((before, open_to, _BACKLOGGED))
        return open_to, names, reasons, steps, len(open_to) < len(fit)

    def _spared(self, workers: Sequence[Worker], request: Request) -> list[Worker]:
        """Those that have capacity to spare for a tenant with more than its share.

        Where most of the prompt is cached it takes little of what is kept for others; anywhere else it would take more.
        """
        cached = self._prefixes.cached(request)
        return [
            worker
            for worker in workers
            if worker.has_spare
            or (worker.has_spare_slots and 2.0 * cached.get(worker.worker_id, 0.0) > request.prompt_tokens)
        ]

    def _without_returning(self, open_to: list[Worker], steps: list[Step]) -> list[Worker]:
        """Leaves out workers that return from an ejection, as often as they are not to be picked yet."""
        kept = [
            worker for worker in open_to if worker.admitted_ratio == 1.0 or self._rng.random() < worker.admitted_ratio
        ]
        if not kept:
            return open_to
        steps.append((open_to, kept, _RETURNING))
        return kept

    def _forecast(self, workers: list[Worker], request: Request, output: float, now: float) -> Forecast:
        cached = self._prefixes.cached(request)
        slo = request.slo or STANDARD
        known = max(cached.values()) if cached else 0.0
        demand = Demand(request.prompt_tokens, output, known, slo.output_weight)
        held = [cached.get(worker.worker_id, 0.0) for worker in workers] if cached else ()
        return Forecast([worker.outlook for worker in workers], demand, now, held, request.slo)

    def judge(self, request: Request, *, asked_at: float) -> Verdict:
        """Whether waiting makes sense: FULL when a worker would take the request once it has room."""
        now = self._clock()
        context = self._context(request)
        for worker in self._fleet.serving(request.model):
            if not self._obstacle(worker, request, context, now, asked_at):
                return _WAIT
        return self._why_none(request, full=False, now=now)

    def capacity(self, request: Request) -> Capacity:
        """What the workers that are ready have for requests like this one; it may be a moment old."""
        now, model = self._clock(), request.model or ""
        known = self._capacities.get(model)
        if known is not None and now - known.at < _RATE_SECONDS:
            return known
        output = self._lengths.expected(request)
        ready = [worker for worker in self._fleet.serving(request.model) if worker.is_ready(now)]
        found = Capacity(
            now,
            sum(worker.running_at_most / max(worker.service_seconds(output), 0.001) for worker in ready),
            sum(worker.card.max_running for worker in ready),
            _free_slots(ready, now),
            sum(1 / worker.outlook.prefill_token_seconds for worker in ready),
        )
        if len(self._capacities) > _MOST_RATES:
            self._capacities.clear()
        self._capacities[model] = found
        return found

    def slots(self, request: Request, now: float) -> int:
        """How many requests like this one run at the same time, on all that are ready; it may be a moment old."""
        known = self._capacities.get(request.model or "")
        return known.slots if known is not None and now - known.at < _RATE_SECONDS else self.capacity(request).slots

    def free_slots(self, request: Request) -> int:
        """How many requests like this one the workers that are ready have slots for, this moment."""
        return _free_slots(self._fleet.serving(request.model), self._clock())

    def _context(self, request: Request) -> int:
        """Tokens of context that a worker must have: 0 when all have it, -1 when none can.

        An estimate never refuses: the worker with the longest context counts exactly.
        """
        if request.model is None:
            return 0
        shortest, longest = self._fleet.contexts(request.model)
        if request.prompt_tokens < shortest or not longest:
            return 0
        if request.prompt_tokens < longest:
            return request.prompt_tokens + 1
        return -1 if request.exact else longest

    def _obstacle(self, worker: Worker, request: Request, context: int, now: float, asked: float) -> str:
        if worker.blocked:
            return worker.blocked
        if now - worker.reported_at > STALE_SECONDS:
            return "silent"
        if worker.worker_id in request.excluded and worker.serving_since <= asked:
            return "excluded"
        return self._unfit(worker, request, context)

    def _unfit(self, worker: Worker, request: Request, context: int) -> str:
        if request.pools is not None and worker.card.pool not in request.pools:
            return OUTSIDE_POOL
        if request.subset is not None and worker.endpoint not in request.subset:
            return "outside the subset"
        if context and request.model is not None and worker.card.models[request.model] < context:
            return "context too short"
        if request.needs and not worker.card.can(request.model, request.needs):
            return "not able to"
        return ""

    def _why_none(self, request: Request, *, full: bool, now: float) -> Verdict:
        if full:
            return Verdict.FULL
        serving = self._fleet.serving(request.model)
        if serving and not any(worker.card.can(request.model, request.needs) for worker in serving):
            return Verdict.UNABLE
        if self._fleet.knows(request.model):
            return Verdict.NOT_READY
        populated_at = self._fleet.populated_at
        settled = populated_at is not None and now - populated_at > _SETTLING_SECONDS and not self._fleet.is_empty
        return Verdict.UNKNOWN_MODEL if settled else Verdict.NOT_READY

    def _best(self, open_to: list[Worker], costs: list[float]) -> int:
        least = min(costs)
        bound = least * _TIE_SHARE + _TIE_SECONDS
        tied = [place for place, cost in enumerate(costs) if cost <= bound]
        if len(tied) == 1:
            return tied[0]
        first = int(self._rng.random() * len(tied))
        second = int(self._rng.random() * (len(tied) - 1))
        second += second >= first
        return min(tied[first], tied[second], key=lambda place: open_to[place].occupied)
