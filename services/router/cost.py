"""What a request would cost on a worker, in seconds. Pure functions of a snapshot."""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, overload

from services.common.policy import SloClass

__all__ = [
    "NO_PREDICTION",
    "PRIOR",
    "Demand",
    "Forecast",
    "GaugeValues",
    "Gauges",
    "Outlook",
    "Prediction",
    "Rates",
    "against",
    "better",
    "costs",
    "costs_where_known",
    "is_late",
    "outlook",
    "predict",
]

PRIOR_OUTPUT_TOKENS: Final = 128.0
_MOST_FAILURES: Final = 0.9
_ENDLESS: Final = float("inf")
_TOLL: Final = 2.0
"""What a second of waiting behind others counts beyond itself.

Whoever looks at their own time alone crowds the fast card, where everybody behind them then waits, too (Pigou).
Counting the line more than once leaves the fast card to those who gain most by it: bench/routing shows how much.
"""
_TWICE: Final = 2.0
"""What a second of prefill counts beyond itself where another worker would not need it: others wait for it."""
_COMPANY: Final = 0.6
"""What a second counts by which those who decode on a worker slow down a request that some worker knows the prompt of.

What is cached draws all who know it to the same worker. Only what others add counts: with what the worker takes alone,
all who know something would be drawn to the fast card, whoever has it cached.
"""
_SCARCE_SHARE: Final = 1 / 8
"""Of a worker's KV cache, what is not given away without counting it.

Who takes the last of it keeps everybody out until it is given back. Those with short prompts lose most by that: they
would be served at once here, and wait for long prompts where they go instead.
"""


class Rates(NamedTuple):
    """How fast a worker is."""

    prefill_tokens_per_second: float
    decode_step_seconds: float
    """With one sequence."""
    decode_step_per_sequence_seconds: float
    """What each further sequence adds."""


PRIOR: Final = Rates(8_000.0, 0.020, 0.0002)
"""What is assumed while no worker of a model has measured anything: a small model on a mid-range card."""


def better(one: Rates | None, prefill: float | None, step: float | None, per_sequence: float | None) -> Rates | None:
    """The best of what is known of a model's workers, and of what one of them has measured; None while nothing is.

    This is what a worker that has measured nothing is taken for: it is only measured once it is picked, and a
    pessimist would never pick it.
    """
    if prefill is None and step is None:
        return one
    known = one or Rates(prefill or PRIOR[0], step or PRIOR[1], per_sequence if per_sequence is not None else PRIOR[2])
    return Rates(
        max(known.prefill_tokens_per_second, prefill or 0.0),
        min(known.decode_step_seconds, step or known.decode_step_seconds),
        known.decode_step_per_sequence_seconds
        if per_sequence is None
        else min(known.decode_step_per_sequence_seconds, per_sequence),
    )


class Gauges(NamedTuple):
    """A worker at one moment, as far as cost depends on it.

    Attributes:
        prefill_tokens_per_second: measured prefill speed; None while unknown.
        decode_step_seconds: measured decode step with one sequence; None while unknown.
        decode_step_per_sequence_seconds: what each further sequence adds; None while unknown.
        backlog_tokens: prompt tokens accepted and not prefilled, those of fresh leases included.
        occupied: sequences that run, wait or are about to arrive.
        max_running: sequences that run at the same time.
        kv_tokens: tokens of KV cache; 0 where it is not known.
        kv_used_tokens: of these, in use or promised.
        service_seconds: how long a sequence holds its slot; None while unknown.
        slot_seconds: how long the next request waits for a slot; None where it is to be reckoned from the counts.
        slowdown: factor on every duration, from the state of its GPUs.
        prefill_factor: factor on times of prefill, learnt from times to first token that came out otherwise.
        decode_factor: the same for decoding, learnt from times per output token.
        failure_share: share of its recent leases that it failed, 0 to 1.
        delay_seconds: what times to first token came out longer, however much there was to prefill.
    """

    prefill_tokens_per_second: float | None = None
    decode_step_seconds: float | None = None
    decode_step_per_sequence_seconds: float | None = None
    backlog_tokens: float = 0.0
    occupied: int = 0
    max_running: int = 1
    kv_tokens: int = 0
    kv_used_tokens: float = 0.0
    service_seconds: float | None = None
    slot_seconds: float | None = None
    slowdown: float = 1.0
    prefill_factor: float = 1.0
    decode_factor: float = 1.0
    failure_share: float = 0.0
    delay_seconds: float = 0.0


GaugeValues = tuple[
    float | None,
    float | None,
    float | None,
    float,
    int,
    int,
    int,
    float,
    float | None,
    float | None,
    float,
    float,
    float,
    float,
    float,
]
"""Gauges, or the same as a plain tuple."""


class Outlook(NamedTuple):
    """What the next request meets on a worker; it changes with the worker, not with the request."""

    prefill_token_seconds: float
    """Prefill of one token."""
    clear_at: float
    """When the prefill that is before the request is done."""
    slot_seconds: float
    """Wait for a slot."""
    token_seconds: float
    """One decode step with the request in the batch: its TPOT."""
    kv_free_tokens: float
    """KV cache that nobody uses."""
    kv_spare_tokens: float
    """Of this, what can be taken without making it scarce."""
    kv_token_seconds: float
    """Time until a token of KV cache is given back, and so the wait for each that is not free."""
    attempts: float
    """How often a request is tried here until it succeeds, on average."""
    delay_seconds: float = 0.0
    """What the first token takes beyond all that is reckoned here."""
    company_seconds: float = 0.0
    """Of a decode step, what those who are there already add to it."""


class Demand(NamedTuple):
    """A request as far as cost depends on it, in tokens."""

    prompt: float
    """Tokens of the prompt."""
    output: float
    """Tokens of output to expect."""
    known: float = 0.0
    """Tokens of the prompt that the worker which has most of them has cached."""
    output_weight: float = 0.0
    """How much a second of decoding counts, against one before the first token."""


Prediction = tuple[float, float, float, float, float, float]
"""What a request would meet on a worker: the time to its first token (TTFT), the time per output token (TPOT), the
cost, the wait for a slot, all in seconds; how many tokens of its prompt are cached there; and how many seconds of the
TTFT are there only because the worker's first tokens came late lately.

A plain tuple, since one is made for every worker at every decision.
"""

NO_PREDICTION: Final[Prediction] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
# A smaller part of the time to the first token has hardly moved it.
_LATE_SHARE: Final = 0.05
_LATE_SECONDS: Final = 0.001


def is_late(prediction: Prediction) -> bool:
    """Whether it says more than it would if the worker's first tokens had not come late lately."""
    return prediction[5] >= _LATE_SECONDS and prediction[5] >= _LATE_SHARE * prediction[0]


def outlook(gauges: GaugeValues, hope: Rates = PRIOR, now: float = 0.0) -> Outlook:
    """What the next request meets on a worker with these gauges, taken at `now` on a clock in seconds.

    `hope` stands for rates that it has not measured. Two are made for every decision, so this is written out.
    """
    (
        rate,
        step,
        more,
        backlog,
        occupied,
        slots,
        kv,
        kv_used,
        service,
        slot,
        slowdown,
        prefill_factor,
        decode_factor,
        failure_share,
        delay,
    ) = gauges
    if step is None:
        step = hope.decode_step_seconds
    if more is None:
        more = hope.decode_step_per_sequence_seconds
    too_many = occupied - slots + 1
    company = (slots - 1 if too_many > 0 else occupied) * more
    token = (step + company) * slowdown * decode_factor
    prefill_token = slowdown * prefill_factor / (rate or hope.prefill_tokens_per_second)
    service = service or PRIOR_OUTPUT_TOKENS * token
    if too_many <= 0:
        slot = 0.0
    elif slot is None:
        slot = too_many * service / slots
    kv_free = kv - kv_used if kv else _ENDLESS
    kv_spare = kv_free - _SCARCE_SHARE * kv
    fields = (
        prefill_token,
        now + backlog * prefill_token,
        slot,
        token,
        kv_free if kv_free > 0.0 else 0.0,
        kv_spare if kv_spare > 0.0 else 0.0,
        # Sequences give back what they use within the time that they hold a slot.
        service / (kv_used if kv_used > 1.0 else 1.0),
        1.0 / (1.0 - min(failure_share, _MOST_FAILURES)) if failure_share else 1.0,
        delay,
        company * slowdown * decode_factor,
    )
    # Outlook(*fields), in half the time.
    return tuple.__new__(Outlook, fields)


def predict(ahead: Outlook, demand: Demand, now: float, cached: float = 0.0) -> Prediction:
    """What a request would meet at `now`, on the clock of the outlook, `cached` tokens of its prompt known.

    wait = backlog + wait for a slot + wait for KV cache
    TTFT = wait + uncached / prefill rate + one decode step + delay
    cost = (TTFT + toll x wait + time until scarce KV cache is given back + twice x prefill of what another worker knows
            + weight x output x TPOT + what company slows down where something is known) x attempts

    Of the backlog the toll is only for the share of the prompt that is not cached: whoever prefills little holds up
    nobody behind it.
    """
    prefill_token, clear_at, slot, tpot, kv_free, kv_spare, kv_token, attempts, delay, company = ahead
    prompt, output, known, weight = demand
    backlog = clear_at - now if clear_at > now else 0.0
    wait = slot + backlog
    total = prompt + output
    if total > kv_free:
        wait += (total - kv_free) * kv_token
    ttft = wait + (prompt - cached) * prefill_token + tpot + delay
    again = (known - cached) * prefill_token
    scarce = (total - kv_spare) * kv_token if total > kv_spare else 0.0
    toll = _TOLL * (wait - backlog * cached / prompt if cached else wait)
    if known:
        toll += _COMPANY * output * company
    cost = (ttft + toll + scarce + _TWICE * again + weight * output * tpot) * attempts
    return ttft, tpot, cost, slot, cached, delay


def costs(outlooks: Iterable[Outlook], demand: Demand, now: float) -> list[float]:
    """The cost on each of several workers, as `predict` has it, where nobody knows anything of the prompt.

    This is where the time of a decision goes, so it is written out.
    """
    prompt, output, _, weight = demand
    total, steps, waits = prompt + output, 1.0 + weight * output, 1.0 + _TOLL
    return [
        attempts
        * (
            prompt * prefill_token
            + delay
            + steps * tpot
            + waits * (slot + (clear_at - now if clear_at > now else 0.0))
            + (
                (waits * (total - kv_free if total > kv_free else 0.0) + total - kv_spare) * kv_token
                if total > kv_spare
                else 0.0
            )
        )
        for prefill_token, clear_at, slot, tpot, kv_free, kv_spare, kv_token, attempts, delay, _ in outlooks
    ]


def costs_where_known(outlooks: Iterable[Outlook], demand: Demand, now: float, cached: Iterable[float]) -> list[float]:
    """The same where somebody does; `cached` has the tokens of the prompt that each worker has."""
    prompt, output, known, weight = demand
    total, steps, waits = prompt + output, 1.0 + weight * output, 1.0 + _TOLL
    prefill, less, company, toll = prompt + _TWICE * known, 1.0 + _TWICE, _COMPANY * output, _TOLL / prompt
    return [
        attempts
        * (
            (prefill - less * tokens) * prefill_token
            + delay
            + steps * tpot
            + company * beside
            + waits * slot
            + ((waits - toll * tokens) * (clear_at - now) if clear_at > now else 0.0)
            + (
                (waits * (total - kv_free if total > kv_free else 0.0) + total - kv_spare) * kv_token
                if total > kv_spare
                else 0.0
            )
        )
        for (
            (prefill_token, clear_at, slot, tpot, kv_free, kv_spare, kv_token, attempts, delay, beside),
            tokens,
        ) in zip(outlooks, cached, strict=True)
    ]


def against(slo: SloClass, prediction: Prediction, output: float) -> Prediction:
    """A prediction whose cost counts the seconds beyond a request's targets, too; `output` is in tokens.

    cost += weight x (TTFT beyond its target + output x TPOT beyond its target)
    """
    ttft, tpot, cost, slot, cached, delay = prediction
    late = 0.0
    if slo.ttft_seconds is not None and ttft > slo.ttft_seconds:
        late += ttft - slo.ttft_seconds
    if slo.tpot_seconds is not None and tpot > slo.tpot_seconds:
        late += output * (tpot - slo.tpot_seconds)
    return ttft, tpot, cost + slo.weight * late, slot, cached, delay


class Forecast(Sequence[Prediction]):
    """What a request would meet on each of several workers. Only what is looked at is reckoned: few ask why."""

    __slots__ = ("_cached", "_demand", "_now", "_outlooks", "_slo")

    def __init__(
        self, outlooks: Sequence[Outlook], demand: Demand, now: float, cached: Sequence[float], slo: SloClass | None
    ) -> None:
        """`cached` has the tokens of the prompt that each worker has, or is empty: none has any."""
        self._outlooks = outlooks
        self._demand = demand
        self._now = now
        self._cached = cached
        self._slo = slo if slo is not None and (slo.ttft_seconds, slo.tpot_seconds) != (None, None) else None

    def costs(self) -> list[float]:
        """The cost on each worker."""
        if self._slo is not None:
            return [one[2] for one in self]
        if self._demand.known:
            return costs_where_known(self._outlooks, self._demand, self._now, self._cached)
        return costs(self._outlooks, self._demand, self._now)

    def __len__(self) -> int:
        return len(self._outlooks)

    @overload
    def __getitem__(self, place: int) -> Prediction: ...
    @overload
    def __getitem__(self, place: slice) -> list[Prediction]: ...
    def __getitem__(self, place: int | slice) -> Prediction | list[Prediction]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        one = predict(self._outlooks[place], self._demand, self._now, self._cached[place] if self._cached else 0.0)
        return one if self._slo is None else against(self._slo, one, self._demand.output)
