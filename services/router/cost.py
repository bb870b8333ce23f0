"""What a request would cost on a worker, in seconds. Pure functions of a snapshot."""

from collections.abc import Iterable
from typing import Final, NamedTuple

from services.common.policy import SloClass

__all__ = [
    "PRIOR",
    "Demand",
    "Gauges",
    "Outlook",
    "Prediction",
    "Rates",
    "against",
    "better",
    "outlook",
    "predict",
    "predict_all",
]

PRIOR_OUTPUT_TOKENS: Final = 128.0
_MOST_FAILURES: Final = 0.9
_TOLL: Final = 2.0
"""What a second of waiting behind others counts beyond itself.

Whoever looks at their own time alone crowds the fast card, where everybody behind them then waits, too (Pigou).
Counting the line more than once leaves the fast card to those who gain most by it: bench/routing shows how much.
"""


_TWICE: Final = 1.5
"""What a second of prefill counts beyond itself where another worker would not need it: others wait for it."""


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


class Outlook(NamedTuple):
    """What the next request meets on a worker; it changes with the worker, not with the request."""

    prefill_token_seconds: float
    """Prefill of one token."""
    backlog_seconds: float
    """Prefill that is before the request; it melts as time passes."""
    slot_seconds: float
    """Wait for a slot."""
    token_seconds: float
    """One decode step with the request in the batch: its TPOT."""
    kv_free_tokens: float
    """KV cache that nobody uses."""
    kv_token_seconds: float
    """Wait for each token of KV cache beyond that."""
    attempts: float
    """How often a request is tried here until it succeeds, on average."""


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


Prediction = tuple[float, float, float, float, float]
"""What a request would meet on a worker: the time to its first token (TTFT), the time per output token (TPOT), the
cost, the wait for a slot, all in seconds; and how many tokens of its prompt are cached there.

A plain tuple, since one is made for every worker at every decision.
"""


def outlook(gauges: Gauges, hope: Rates = PRIOR) -> Outlook:
    """What the next request meets on a worker with these gauges; `hope` stands for rates that it has not measured."""
    token = _decode_step(gauges, hope) * gauges.slowdown * gauges.decode_factor
    rate = gauges.prefill_tokens_per_second or hope.prefill_tokens_per_second
    prefill_token = gauges.slowdown * gauges.prefill_factor / rate
    service = gauges.service_seconds or PRIOR_OUTPUT_TOKENS * token
    return Outlook(
        prefill_token_seconds=prefill_token,
        backlog_seconds=gauges.backlog_tokens * prefill_token,
        slot_seconds=_slot_seconds(gauges, service),
        token_seconds=token,
        kv_free_tokens=max(0.0, gauges.kv_tokens - gauges.kv_used_tokens) if gauges.kv_tokens else float("inf"),
        # Sequences give back what they use within the time that they hold a slot.
        kv_token_seconds=service / max(gauges.kv_used_tokens, 1.0),
        attempts=1.0 / (1.0 - min(gauges.failure_share, _MOST_FAILURES)),
    )


def _slot_seconds(gauges: Gauges, service: float) -> float:
    too_many = gauges.occupied - gauges.max_running + 1
    if too_many <= 0:
        return 0.0
    return too_many * service / gauges.max_running if gauges.slot_seconds is None else gauges.slot_seconds


def _decode_step(gauges: Gauges, hope: Rates) -> float:
    base, more = gauges.decode_step_seconds, gauges.decode_step_per_sequence_seconds
    beside = min(gauges.occupied, gauges.max_running - 1)
    return (hope.decode_step_seconds if base is None else base) + beside * (
        hope.decode_step_per_sequence_seconds if more is None else more
    )


def predict(ahead: Outlook, demand: Demand, elapsed: float, cached: float = 0.0) -> Prediction:
    """What a request would meet, `elapsed` seconds after the outlook was taken, `cached` tokens of its prompt known.

    wait = backlog + wait for a slot + wait for KV cache
    TTFT = wait + uncached / prefill rate + one decode step
    cost = (TTFT + toll x wait + twice x prefill of what another worker knows + weight x output x TPOT) x attempts
    """
    return predict_all([ahead], demand, [elapsed], [cached])[0]


def predict_all(
    outlooks: Iterable[Outlook], demand: Demand, elapsed: Iterable[float], cached: Iterable[float]
) -> list[Prediction]:
    """The same for several workers at once, which is cheaper: this is where the time of a decision goes."""
    prompt, output, known, weight = demand
    total = prompt + output
    decoding = weight * output
    predictions = []
    for (prefill_token, backlog, slot, tpot, kv_free, kv_token, attempts), age, held in zip(
        outlooks, elapsed, cached, strict=True
    ):
        wait = slot
        if backlog > age:
            wait += backlog - age
        if total > kv_free:
            wait += (total - kv_free) * kv_token
        ttft = wait + (prompt - held) * prefill_token + tpot
        cost = (ttft + _TOLL * wait + _TWICE * (known - held) * prefill_token + decoding * tpot) * attempts
        predictions.append((ttft, tpot, cost, slot, held))
    return predictions


def against(slo: SloClass, prediction: Prediction, output: float) -> Prediction:
    """A prediction whose cost counts the seconds beyond a request's targets, too; `output` is in tokens.

    cost += weight x (TTFT beyond its target + output x TPOT beyond its target)
    """
    ttft, tpot, cost, slot, cached = prediction
    late = 0.0
    if slo.ttft_seconds is not None and ttft > slo.ttft_seconds:
        late += ttft - slo.ttft_seconds
    if slo.tpot_seconds is not None and tpot > slo.tpot_seconds:
        late += output * (tpot - slo.tpot_seconds)
    return ttft, tpot, cost + slo.weight * late, slot, cached
