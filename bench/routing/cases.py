"""The cases that are measured, each as rows of a table: what is compared, and what it came to."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from bench.routing.engine import BLOCK_TOKENS, EngineSpec
from bench.routing.policies import CHOICES
from bench.routing.runs import TOKENLOOM, Result, capacity, percentile, run
from bench.routing.traces import Arrival, bursts, conversations, noisy_tenant, poisson

__all__ = ["CASES", "EQUAL", "UNEQUAL", "Row", "best_hit_rate", "unequal"]

UNEQUAL: Final = (
    EngineSpec(name="large-0"),
    EngineSpec(name="large-1"),
    EngineSpec(
        name="fast",
        prefill_tokens_per_second=8_000.0 * 2.2,
        decode_step_seconds=0.022 / 2.2,
        per_sequence_seconds=0.0004 / 2.2,
        kv_tokens=48_000,
    ),
)
"""Two cards with much memory, and one 2.2 times as fast with little: as 45, 45 and 24 GB leave beside a model."""
EQUAL: Final = tuple(EngineSpec(name=f"equal-{number}") for number in range(8))
_POLICIES: Final = (TOKENLOOM, *CHOICES)
_WARM_SECONDS: Final = 30.0


class Row(NamedTuple):
    """One line of a table."""

    case: str
    policy: str
    p50: float
    """Time to first token, in seconds, as the others are."""
    p95: float
    p99: float
    tpot: float
    """Mean seconds per output token."""
    hit_rate: float
    imbalance: float
    """Requests of the busiest worker, over the mean."""
    refused: int


def _row(case: str, result: Result) -> Row:
    paces = [one.tpot for one in result.served if one.tpot]
    return Row(
        case=case,
        policy=result.policy,
        p50=result.ttft(0.5, since=_WARM_SECONDS),
        p95=result.ttft(0.95, since=_WARM_SECONDS),
        p99=result.ttft(0.99, since=_WARM_SECONDS),
        tpot=sum(paces) / max(1, len(paces)),
        hit_rate=result.hit_rate,
        imbalance=result.request_imbalance(since=_WARM_SECONDS),
        refused=sum(one.refused_after is not None for one in result.served),
    )


def _compare(case: str, specs: Sequence[EngineSpec], trace: Sequence[Arrival], seed: int) -> Iterator[Row]:
    for policy in _POLICIES:
        yield _row(case, run(policy, specs, trace, seed=seed))


def unequal(seed: int, seconds: float) -> Iterator[Row]:
    """Unequal cards, mixed lengths, nothing shared: at 30, 70 and 95 % of what the fleet can do."""
    most = capacity(UNEQUAL)
    for load in (0.3, 0.7, 0.95):
        yield from _compare(f"unequal, {load:.0%} load", UNEQUAL, poisson(load * most, seconds, seed=seed), seed)


def burst(seed: int, seconds: float) -> Iterator[Row]:
    """Unequal cards in bursts of three times the mean."""
    trace = bursts(0.5 * capacity(UNEQUAL), seconds, seed=seed)
    yield from _compare("unequal, bursts at 50% load", UNEQUAL, trace, seed)


def equal(seed: int, seconds: float) -> Iterator[Row]:
    """Equal cards with little to do: where routing can't help much."""
    trace = poisson(0.2 * capacity(EQUAL), seconds, seed=seed)
    yield from _compare("equal, 20% load", EQUAL, trace, seed)


def shared(seed: int, seconds: float) -> Iterator[Row]:
    """Eight equal cards, conversations of several turns that begin with one of twelve system prompts."""
    trace = conversations(30.0, seconds, seed=seed)
    yield from _compare(f"shared prefixes (best {best_hit_rate(trace):.3f})", EQUAL, trace, seed)


def noisy(seed: int, seconds: float) -> Iterator[Row]:
    """Nine tenants at a third of the fleet's capacity, with and without one who sends fifty times what each does."""
    rate = capacity(UNEQUAL) / 3
    loud = noisy_tenant(rate, seconds, seed=seed)
    alone = [arrival for arrival in loud if arrival.tenant != "noisy"]
    yield _row("nine tenants alone", run(TOKENLOOM, UNEQUAL, alone, seed=seed))
    result = run(TOKENLOOM, UNEQUAL, loud, seed=seed)
    result.served = [one for one in result.served if one.arrival.tenant != "noisy"]
    yield _row("the nine beside a noisy one", result)


def overload(seed: int, seconds: float) -> Iterator[Row]:
    """Interactive requests, from what the fleet can do to ten times that."""
    most = capacity(UNEQUAL)
    for factor in (1, 2, 5, 10):
        trace = poisson(factor * most, seconds, seed=seed, tenants=20)
        asked = [replace(arrival, slo_class="interactive") for arrival in trace]
        result = run(TOKENLOOM, UNEQUAL, asked, seed=seed)
        late = [one.refused_after for one in result.served if one.refused_after is not None]
        served = len(result.ttfts()) / seconds
        case = (
            f"{factor} x capacity: {served:.1f}/s served, refused within {percentile(late, 0.99) if late else 0:.3f} s"
        )
        yield _row(case, result)


def best_hit_rate(trace: Sequence[Arrival]) -> float:
    """The share of prompt tokens that one endless cache would have had: no placement can do better."""
    seen: set[int] = set()
    cached = total = 0
    for arrival in trace:
        known = arrival.hashes[: arrival.prompt_tokens // BLOCK_TOKENS]
        found = next((place for place, block in enumerate(known) if block not in seen), len(known))
        cached += min(found, (arrival.prompt_tokens - 1) // BLOCK_TOKENS) * BLOCK_TOKENS
        total += arrival.prompt_tokens
        seen.update(arrival.hashes)
    return cached / max(1, total)


CASES: Final = {
    "unequal": unequal,
    "burst": burst,
    "equal": equal,
    "shared": shared,
    "noisy": noisy,
    "overload": overload,
}
