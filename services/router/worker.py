"""One registered worker: what it said, what was leased on it since, and what the next request meets on it."""

import asyncio
import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

from services.router.card import Card, Load, WorkerState, believable
from services.router.correction import Correction, Delay
from services.router.cost import NO_PREDICTION, PRIOR, Gauges, Outlook, Prediction, Rates, outlook
from services.router.ejection import Ejection
from services.router.reading import Condition
from services.router.request import Request
from services.router.usual import Usual

__all__ = ["STALE_SECONDS", "Lease", "Outcome", "Seen", "Worker"]

STALE_SECONDS: Final = 2.0
"""A worker that has not reported for so long is not ready until it does."""
# A request that was granted just before a report was written may not have reached the worker by then.
_SETTLE_SECONDS: Final = 0.010
_SERVICE_WEIGHT: Final = 0.1
_FAILURE_WEIGHT: Final = 0.2
_FAILURE_HALF_LIFE_SECONDS: Final = 10.0
_KV_NEARLY_FULL: Final = 0.9
# A worker is full with so much KV cache in use or promised: sequences that run must grow.
_KV_FULL: Final = 0.95
# With so much prefill to do it has enough: two or three reports come in that time, so that it does not run dry.
_BACKLOG_SECONDS: Final = 0.3
# How long it takes until a request arrives in an engine from the moment that a slot is free.
_GRANT_SECONDS: Final = 0.05
# Tenants that have more than their share already leave the rest of a worker to others, and its prefill nearly idle.
_SPARE_SHARE: Final = 0.5
_SPARE_BACKLOG_SECONDS: Final = 0.02
# A sequence that runs is half way through its output, on average.
_STILL_TO_COME: Final = 0.5
# Shorter answers say little about the time per token.
_LEAST_OUTPUT_TOKENS: Final = 8


class Outcome(Enum):
    """How a lease ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    REFUSED = "refused"
    FAILED = "failed"


# Looking a member up in its class takes longer than most that is done with it.
_COMPLETED: Final = Outcome.COMPLETED
_FAILED: Final = Outcome.FAILED


class Seen(NamedTuple):
    """What whoever held a lease saw of it."""

    output_tokens: int = 0
    first_token_seconds: float | None = None
    """From the grant on; None when there was none, or nobody looked."""
    prompt_tokens: int = 0
    """As the worker counted them; 0 where it has not said."""
    cached_tokens: int = 0
    """Of these, in its cache."""


@dataclass(slots=True, eq=False)
class Lease:
    """A worker's promise to one request, until it is released or the worker is lost."""

    worker: "Worker"
    request: Request
    granted_at: float
    output_tokens: float
    """What is expected."""
    prediction: Prediction | None = None
    """What it was predicted to meet."""
    corrections: tuple[float, float, float] = (1.0, 1.0, 0.0)
    """What the prediction had in it: factors of prefill and of decoding, and the delay in seconds."""
    uncached_tokens: float = field(init=False)
    """Tokens of the prompt that are to be prefilled."""
    ends_at: float = field(init=False)
    """When it should be over."""

    def __post_init__(self) -> None:
        ttft, tpot, _, _, cached, _ = self.prediction or NO_PREDICTION
        self.uncached_tokens = self.request.prompt_tokens - cached
        self.ends_at = self.granted_at + ttft + self.output_tokens * tpot


class Worker:
    """A registered worker. It lives as long as its registration; a new registration makes a new one.

    All times are seconds on the router's monotonic clock.
    """

    # Decisions go through many workers and touch little of each.
    __slots__ = (
        "_backlog",
        "_decode",
        "_delay",
        "_failure_at",
        "_failure_share",
        "_fresh",
        "_growth",
        "_hope",
        "_kv_used",
        "_lacks_kv",
        "_others",
        "_prefill",
        "_service_seconds",
        "admitted_ratio",
        "backlogged",
        "blocked",
        "card",
        "condition",
        "cordoned",
        "drained",
        "ejection",
        "endpoint",
        "full",
        "gone",
        "has_spare",
        "has_spare_slots",
        "leases",
        "load",
        "news",
        "outlook",
        "reported_at",
        "serving_since",
        "usual_step",
        "worker_id",
    )

    def __init__(self, card: Card, *, now: float, drained: bool, condition: Condition) -> None:
        self.card = card
        self.worker_id = card.worker_id
        self.endpoint = card.endpoint
        self.load = Load()
        self.serving_since = now
        """When it registered, or last became ready after it was not."""
        self.reported_at = now
        self.drained = drained
        self.cordoned = False
        self.condition = condition
        self.leases: set[Lease] = set()
        self.gone = False
        self.news = asyncio.Event()
        """Set when `drained` or `gone` changed, for whoever tells the worker."""
        self.blocked = ""
        """Why it takes no work at all; empty when it does."""
        self.full = False
        """Whether no more fits on it for now."""
        self.backlogged = False
        """Whether it has as much prefill before it as keeps it busy for a while."""
        self.has_spare = True
        """Whether it has capacity to spare for those who have more than their share already."""
        self.has_spare_slots = True
        """The same for a request that adds next to no prefill."""
        self.outlook: Outlook = outlook(Gauges(), now=now)
        self._hope = PRIOR
        self._others = 0
        self._backlog = 0.0
        self._kv_used = 0.0
        self._growth = 0.0
        self._lacks_kv = False
        self.usual_step = Usual()
        """What its decode steps with one sequence usually take."""
        self._prefill = Correction()
        self._decode = Correction()
        self._delay = Delay()
        self._fresh: deque[Lease] = deque()
        self._service_seconds: float | None = None
        self.ejection = Ejection()
        self.admitted_ratio = 1.0
        """Share of its requests that it gets after it failed some, 0 to 1."""
        self._failure_share = 0.0
        self._failure_at = now
        self._refresh(now)

    @property
    def occupied(self) -> int:
        """Sequences that it has or will have in a moment: our leases, and what others sent it."""
        return len(self.leases) + self._others

    @property
    def running_at_most(self) -> int:
        """Sequences that it can run at the same time: its slots, or fewer where KV cache is short."""
        slots = self.card.max_running
        return min(slots, self.occupied) if self._lacks_kv else slots

    @property
    def state_name(self) -> str:
        """Its state for people and metrics."""
        if self.drained:
            return "drained"
        if self.cordoned:
            return "cordoned"
        if self.condition.lost:
            return "gpu lost"
        return self.load.state.value

    def is_ready(self, now: float) -> bool:
        """Whether it takes work, full or not."""
        return not self.blocked and self.is_heard(now)

    def is_heard(self, now: float) -> bool:
        """Whether it has reported lately."""
        return now - self.reported_at <= STALE_SECONDS

    def excluded_reason(self, now: float) -> str:
        """Why it gets no work at all, in words; empty when it does."""
        return self.blocked or ("" if self.is_heard(now) else f"silent for {now - self.reported_at:.1f} s")

    def has_room(self, now: float) -> bool:
        """Whether it takes another request now."""
        # As is_ready() says, written out, since every decision asks.
        return not (self.full or self.backlogged or self.blocked) and now - self.reported_at <= STALE_SECONDS

    def service_seconds(self, expected_output: float) -> float:
        """How long a request holds a slot here: as measured, or as predicted where that is more."""
        # Those that are over first are the short ones, so what was measured is too little at first.
        predicted = expected_output * self.outlook.token_seconds
        return max(self._service_seconds or 0.0, predicted)

    def report(self, load: Load, now: float, hope: Rates = PRIOR) -> None:
        """Takes a report in. What it says of the work that we sent replaces what we guessed.

        `hope` stands for rates that the worker has not measured.
        """
        if load.state is WorkerState.READY and self.load.state is not WorkerState.READY:
            self.serving_since = now
        self.load = load = believable(load, self.card)
        self.reported_at = now
        if load.running and load.decode_step_seconds is not None:
            self.usual_step.observe(load.decode_step_seconds, now)
        self._hope = hope
        while self._fresh and self._fresh[0].granted_at < now - _SETTLE_SECONDS:
            self._fresh.popleft()
        on_the_way = sum(lease.uncached_tokens for lease in self._fresh if lease in self.leases)
        self._others = max(0, load.running + load.waiting - len(self.leases))
        if load.pending_prefill_tokens is None:
            self._melt(now)
        else:
            self._backlog = load.pending_prefill_tokens + on_the_way
        self._kv_used = load.kv_usage * self.card.kv_tokens + on_the_way
        if load.waiting and load.running < self.card.max_running:
            # They wait for KV cache, since slots are free, and what they need is not in use yet.
            self._kv_used += self._backlog
        self._refresh(now)

    def grant(self, lease: Lease) -> None:
        """Notes a lease, so that the next pick sees it before the worker reports it."""
        now = lease.granted_at
        self.leases.add(lease)
        self._fresh.append(lease)
        if len(self._fresh) > 2 * (self.card.max_running + self.card.headroom):
            self._fresh.popleft()
        self._melt(now)
        self._backlog += lease.uncached_tokens
        self._kv_used += lease.uncached_tokens
        self._growth += lease.output_tokens
        self._refresh_work(now)

    @property
    def corrections(self) -> tuple[float, float, float]:
        """How far predictions are off: factors of its prefill and of its decoding, and a delay in seconds."""
        return self._prefill.factor, self._decode.factor, self.outlook.delay_seconds

    def release(self, lease: Lease, outcome: Outcome, now: float, seen: Seen = Seen()) -> None:  # noqa: B008  # immutable
        """Ends a lease; one that is over already changes nothing."""
        if lease not in self.leases:
            return
        self.leases.remove(lease)
        self._growth = max(0.0, self._growth - lease.output_tokens) if self.leases else 0.0
        if outcome is _COMPLETED:
            self._learn(lease, now, seen)
            held = now - lease.granted_at
            before = self._service_seconds
            self._service_seconds = held if before is None else before + _SERVICE_WEIGHT * (held - before)
        if outcome is _COMPLETED or outcome is _FAILED:
            self._judge(failed=outcome is _FAILED, now=now)
        self._melt(now)
        if lease.granted_at > self.reported_at - _SETTLE_SECONDS:
            # No report has told of it yet, and now none will: its prompt waits for prefill no more.
            self._backlog = max(0.0, self._backlog - lease.uncached_tokens)
        self._refresh_work(now)

    def set_drained(self, drained: bool, now: float) -> None:
        """Takes it out of service or back, and has it told."""
        self.drained = drained
        self.news.set()
        self._refresh(now)

    def set_cordoned(self, cordoned: bool, now: float) -> None:
        """Takes it out of service or back, without a word to it."""
        self.cordoned = cordoned
        self._refresh(now)

    def set_condition(self, condition: Condition, now: float) -> None:
        """Takes in how its GPUs are."""
        self.condition = condition
        self._melt(now)
        self._refresh(now)

    def eject(self, now: float) -> None:
        """Takes it out of service for some seconds, since it fails what it gets."""
        self.ejection.eject(now)
        self._refresh(now)

    def leave(self) -> None:
        """It is lost: its leases vanish with it."""
        self.gone = True
        self.blocked = "gone"
        self.leases.clear()
        self._growth = 0.0
        self._fresh.clear()
        self.news.set()

    def _learn(self, lease: Lease, now: float, seen: Seen) -> None:
        first, predicted, held = seen.first_token_seconds, lease.prediction, now - lease.granted_at
        if first is None or predicted is None or not 0 <= first <= held:
            return
        prefill, decode, delay = lease.corrections
        ttft, tpot, _, slot, cached, _ = predicted
        if seen.prompt_tokens:
            # A cache that held more or less than was thought says nothing about speed.
            ttft += (cached - seen.cached_tokens) * self.outlook.prefill_token_seconds
        beside = slot + tpot
        plain = beside + max(0.0, ttft - beside - delay) / prefill
        self._learn_first(plain, first, now)
        if seen.output_tokens >= _LEAST_OUTPUT_TOKENS:
            self._decode.learn(predicted=tpot / decode, observed=(held - first) / (seen.output_tokens - 1))

    def _learn_first(self, predicted: float, observed: float, now: float) -> None:
        """Takes in a time to the first token, and what was predicted without corrections."""
        if self.load.prefill_tokens_per_second is not None:
            # It knows how fast it is, so that what it took longer is no matter of how much there was to do.
            self._delay.learn(observed - predicted, now)
            predicted += self._delay.seconds(now)
        self._prefill.learn(predicted=predicted, observed=observed)

    def _slot_seconds(self, occupied: int, now: float) -> float | None:
        """How long until one more request than those that it has could run; None where it is not to be told."""
        before = occupied - self.card.max_running + 1
        if before <= 0 or before > len(self.leases) or self.full:
            return None
        # What should be over and is not goes on for about as long as half an answer takes.
        overdue = _STILL_TO_COME * (self._service_seconds or 0.0)
        ends = [end if (end := lease.ends_at) > now else now + overdue for lease in self.leases]
        return (min(ends) if before == 1 else heapq.nsmallest(before, ends)[-1]) - now

    def _judge(self, *, failed: bool, now: float) -> None:
        self.ejection.note(failed=failed)
        share = self._failures(now) if self._failure_share else 0.0
        self._failure_share = share + _FAILURE_WEIGHT * (float(failed) - share)
        self._failure_at = now

    def _failures(self, now: float) -> float:
        return self._failure_share * math.exp2((self._failure_at - now) / _FAILURE_HALF_LIFE_SECONDS)

    def _melt(self, now: float) -> None:
        # Between two reports the backlog shrinks at the speed of prefill.
        self._backlog = max(0.0, (self.outlook.clear_at - now) / self.outlook.prefill_token_seconds)

    def _refresh(self, now: float) -> None:
        """Takes in all that follows from how it is."""
        self.blocked = self._obstacle()
        self._refresh_work(now)

    def _refresh_work(self, now: float) -> None:
        """Takes in what follows from the work that it has. This is written out: a decision does it twice."""
        if self.ejection.until is not None:
            # It comes back as time passes.
            self.admitted_ratio = self.ejection.admitted_ratio(now)
            self.blocked = self._obstacle()
        load, card, occupied = self.load, self.card, len(self.leases) + self._others
        slots, kv_tokens, kv_used = card.max_running, card.kv_tokens, self._kv_used
        # With its KV cache used up, the engine queues although slots are free.
        full = self._lacks_kv = (kv_tokens > 0 and kv_used >= _KV_FULL * kv_tokens) or (
            load.kv_usage >= _KV_NEARLY_FULL and load.waiting > card.headroom
        )
        if occupied >= slots and not full:
            # Whoever is granted too early waits in the engine, where no turns are taken and nobody is moved elsewhere.
            full = occupied >= slots + self._ahead()
        self.full = full
        backlog_seconds = self._backlog * self.outlook.prefill_token_seconds
        self.backlogged = backlog_seconds > _BACKLOG_SECONDS
        spare = occupied < _SPARE_SHARE * slots and not full and (not kv_tokens or kv_used < _SPARE_SHARE * kv_tokens)
        self.has_spare_slots = spare
        self.has_spare = spare and backlog_seconds <= _SPARE_BACKLOG_SECONDS
        self.outlook = outlook(
            # In the order of the fields of Gauges.
            (
                load.prefill_tokens_per_second,
                load.decode_step_seconds,
                load.decode_step_per_sequence_seconds,
                self._backlog,
                occupied,
                slots,
                kv_tokens,
                kv_used + _STILL_TO_COME * self._growth,
                self._service_seconds,
                None if full or occupied < slots else self._slot_seconds(occupied, now),
                self.condition.slowdown,
                self._prefill.factor,
                self._decode.factor,
                self._failures(now) if self._failure_share else 0.0,
                self._delay.seconds(now),
            ),
            self._hope,
            now,
        )

    def _obstacle(self) -> str:
        if self.gone:
            return "gone"
        if self.admitted_ratio == 0.0:
            return "ejected"
        if self.load.state is WorkerState.READY and not (self.drained or self.cordoned or self.condition.lost):
            return ""
        return self.state_name

    def _ahead(self) -> int:
        """Requests that may wait in its engine: those that begin before a grant that waits for a slot could arrive."""
        card, service = self.card, self._service_seconds
        return min(card.headroom, int(_GRANT_SECONDS * card.max_running / service)) if service else card.headroom
