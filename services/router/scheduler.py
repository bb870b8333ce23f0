"""Which worker gets a request: the one pick behind both lanes."""

import random
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from services.router.cost import Demand, Prediction, against, predict
from services.router.fleet import Clock, Fleet
from services.router.memory import AnswerLengths, Prefixes
from services.router.request import Request
from services.router.worker import STALE_SECONDS, Worker

__all__ = ["OUTSIDE_POOL", "Decision", "Look", "Scheduler", "Verdict"]

# Costs closer than this are equal: what two equal workers measure of themselves differs by as much.
_TIE_SHARE: Final = 1.08
_TIE_SECONDS: Final = 0.0005
# A router that has just started does not know yet who is there.
_SETTLING_SECONDS: Final = 1.0
_FULL: Final = "full"
OUTSIDE_POOL: Final = "outside the pool"
"""Why a worker of another pool than the policy's is out of the question."""


class Verdict(Enum):
    """What becomes of a request."""

    PICKED = "picked"
    FULL = "full"
    NOT_READY = "not ready"
    UNKNOWN_MODEL = "unknown model"
    TOO_LONG = "too long"


Look = tuple[str, str, Prediction]
"""A worker that was looked at: its name, why it was out of the question (or nothing), and what was predicted."""

_NO_PREDICTION: Final = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What was decided and why.

    Attributes:
        verdict: what becomes of the request.
        worker: the worker picked, or None.
        prediction: what the request would meet there, or None.
        output_tokens: tokens of output that were expected.
        looked_at: every worker that was looked at.
        out: how many of these were out of the question, by reason.
    """

    verdict: Verdict
    worker: Worker | None = None
    prediction: Prediction | None = None
    output_tokens: float = 0.0
    looked_at: list[Look] = field(default_factory=list)
    out: dict[str, int] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """The decision in one line."""
        others = ", ".join(f"{count} {why}" for why, count in self.out.items())
        if self.prediction is None:
            return f"{self.verdict.value} ({others})" if others else self.verdict.value
        ttft, _, cost = self.prediction
        compared = len(self.looked_at) - sum(self.out.values())
        return (
            f"least predicted time of {compared}{f' ({others})' if others else ''}: "
            f"first token in {1000 * ttft:.1f} ms, whole answer in {cost:.2f} s"
        )


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

    def pick(self, request: Request, *, asked_at: float | None = None) -> Decision:
        """The worker with the least cost among those that take the request now; changes nothing.

        `asked_at` is when the request was made; a worker that registered since is a new process and not excluded.
        """
        now = self._clock()
        asked = now if asked_at is None else asked_at
        context = self._context(request)
        if context < 0:
            return Decision(verdict=Verdict.TOO_LONG)
        output = self._lengths.expected(request)
        prompt, (holder, held) = request.prompt_tokens, self._prefixes.holder(request)
        cold, warm = Demand(prompt, output, prompt + output), Demand(prompt - held, output, prompt + output)
        plain = not request.excluded and request.subset is None and context == 0 and not request.needs
        plain = plain and request.pools is None
        looked_at: list[Look] = []
        out: dict[str, int] = {}
        full, occupies = 0, request.occupies_slot
        open_to: list[Worker] = []
        predictions: list[Prediction] = []
        for worker in self._fleet.serving(request.model):
            name, why = worker.worker_id, ""
            if worker.blocked or now - worker.reported_at > STALE_SECONDS or not plain:
                why = self._obstacle(worker, request, context, now, asked)
            if not why and worker.full and occupies:
                full += 1
                looked_at.append((name, _FULL, _NO_PREDICTION))
                continue
            if why:
                out[why] = out.get(why, 0) + 1
                looked_at.append((name, why, _NO_PREDICTION))
                continue
            prediction = predict(worker.outlook, warm if name == holder else cold, now - worker.outlook_at)
            if request.slo is not None:
                prediction = against(request.slo, prediction, output)
            looked_at.append((name, why, prediction))
            open_to.append(worker)
            predictions.append(prediction)
        if full:
            out[_FULL] = full
        if not open_to:
            verdict = self._why_none(request, full=full > 0, now=now)
            return Decision(verdict=verdict, looked_at=looked_at, out=out)
        best = self._best(open_to, predictions)
        return Decision(
            verdict=Verdict.PICKED,
            worker=open_to[best],
            prediction=predictions[best],
            output_tokens=output,
            looked_at=looked_at,
            out=out,
        )

    def judge(self, request: Request, *, asked_at: float) -> Verdict:
        """Whether waiting makes sense: FULL when a worker would take the request once it has room."""
        now = self._clock()
        context = self._context(request)
        for worker in self._fleet.serving(request.model):
            if not self._obstacle(worker, request, context, now, asked_at):
                return Verdict.FULL
        return self._why_none(request, full=False, now=now)

    def retry_after_seconds(self, request: Request, *, waiting: int) -> float:
        """When a request that is refused now may have a chance: once those that wait have found a slot."""
        now = self._clock()
        output = self._lengths.expected(request)
        rate = sum(
            worker.card.max_running / max(worker.service_seconds(output), 0.001)
            for worker in self._fleet.serving(request.model)
            if worker.is_ready(now)
        )
        return min(60.0, max(1.0, (waiting + 1) / rate)) if rate > 0 else 5.0

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
        if worker.worker_id in request.excluded and worker.registered_at <= asked:
            return "excluded"
        return self._unfit(worker, request, context)

    def _unfit(self, worker: Worker, request: Request, context: int) -> str:
        if request.pools is not None and worker.card.pool not in request.pools:
            return OUTSIDE_POOL
        if request.subset is not None and worker.endpoint not in request.subset:
            return "outside the subset"
        if context and request.model is not None and worker.card.models[request.model] < context:
            return "context too short"
        if not worker.card.can(request.model, request.needs):
            return "not able to"
        return ""

    def _why_none(self, request: Request, *, full: bool, now: float) -> Verdict:
        if full:
            return Verdict.FULL
        if self._fleet.knows(request.model):
            return Verdict.NOT_READY
        populated_at = self._fleet.populated_at
        settled = populated_at is not None and now - populated_at > _SETTLING_SECONDS and not self._fleet.is_empty
        return Verdict.UNKNOWN_MODEL if settled else Verdict.NOT_READY

    def _best(self, open_to: list[Worker], predictions: list[Prediction]) -> int:
        costs = [prediction[2] for prediction in predictions]
        least = min(costs)
        bound = least * _TIE_SHARE + _TIE_SECONDS
        tied = [place for place, cost in enumerate(costs) if cost <= bound]
        if len(tied) == 1:
            return tied[0]
        first = int(self._rng.random() * len(tied))
        second = int(self._rng.random() * (len(tied) - 1))
        second += second >= first
        return min(tied[first], tied[second], key=lambda place: len(open_to[place].leases))
