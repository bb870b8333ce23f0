"""What is measured against a bar: figures of one seed, from traces in virtual time."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Final

from bench.routing.cases import EQUAL, UNEQUAL, best_hit_rate
from bench.routing.engine import Engine, EngineSpec
from bench.routing.policies import CHOICES
from bench.routing.retrying import retried
from bench.routing.runs import TOKENLOOM, Result, capacity, percentile, run
from bench.routing.traces import Arrival, conversations, noisy_tenant, poisson
from services.router.card import Load
from services.router.reading import Condition

__all__ = [
    "Figure",
    "calibration",
    "flood",
    "lies",
    "noisy",
    "overload",
    "recovery",
    "retries",
    "shared",
    "shared_unequal",
    "unequal",
]

Figure = tuple[str, float]
_WARM_SECONDS: Final = 30.0
_LINE_SECONDS: Final = 60.0
_NOT_A_NUMBER: Final = float("nan")
_NEVER: Final = float("inf")


@cache
def _capacity(specs: tuple[EngineSpec, ...]) -> float:
    return capacity(specs)


def unequal(seed: int, seconds: float) -> Iterator[Figure]:
    """Unequal cards, rates learnt on the way, nothing shared; at 70 % load five times as long, in a steady state."""
    # At 95 % of what the fleet can do round robin gives the slow cards more than they can, and has no steady state.
    for load, length, since in ((0.7, 5 * seconds, seconds), (0.95, seconds, _WARM_SECONDS)):
        trace = poisson(load * _capacity(UNEQUAL), length, seed=seed)
        ours, least, turns = (
            run(policy, UNEQUAL, trace, seed=seed) for policy in (TOKENLOOM, "least requests", "round robin")
        )
        where = f"{load:.0%} load"
        yield f"{where}: p95 over least requests", _ratio(ours, least, 0.95, since=since)
        yield f"{where}: p99 over least requests", _ratio(ours, least, 0.99, since=since)
        yield f"{where}: p95 over round robin", _ratio(ours, turns, 0.95, since=since)
        yield (
            f"{where}: the same if each were alone on the fast card",
            _alone(trace, since=since) / turns.ttft(0.95, since=since),
        )
        yield f"{where}: not served", len(trace) - len(ours.ttfts())


def _alone(trace: Sequence[Arrival], *, since: float) -> float:
    """The p95 that nobody can fall below."""
    fast = UNEQUAL[-1]
    late = [one.prompt_tokens for one in trace if one.at >= since]
    return percentile(late, 0.95) / fast.prefill_tokens_per_second + fast.decode_step_seconds


def _ratio(one: Result, other: Result, share: float, *, since: float = _WARM_SECONDS) -> float:
    return one.ttft(share, since=since) / other.ttft(share, since=since)


def calibration(seed: int, seconds: float) -> Iterator[Figure]:
    """The fast card throttles to half its speed; how long until the router reckons with that."""
    throttled_at, known = 60.0, _Rates()

    def meanwhile(timeline: Any, engines: dict[str, Engine], router: Any) -> None:
        fast = engines["fast"]
        begin = timeline.now
        timeline.at(begin + throttled_at, lambda: setattr(fast, "slowdown", 2.0))

        def look() -> None:
            known.look(timeline.now - begin, router.fleet.get("fast"), fast.spec)
            timeline.after(0.25, look)

        look()

    trace = poisson(0.5 * _capacity(UNEQUAL), max(seconds, 120.0), seed=seed)
    run(TOKENLOOM, UNEQUAL, trace, seed=seed, meanwhile=meanwhile)
    yield "s until prefill is known", known.until(known.prefill, throttled_at)
    yield "s until decoding is known", known.until(known.decoding, throttled_at)


class _Rates:
    """What the router takes a worker's speed for, over time."""

    def __init__(self) -> None:
        self.prefill: list[tuple[float, float]] = []
        self.decoding: list[tuple[float, float]] = []

    def look(self, at: float, worker: Any, spec: EngineSpec) -> None:
        beside = min(worker.occupied, spec.max_running - 1)
        step = spec.decode_step_seconds + beside * spec.per_sequence_seconds
        self.prefill.append((at, worker.outlook.prefill_token_seconds))
        self.decoding.append((at, worker.outlook.token_seconds / step))

    def until(self, values: Sequence[tuple[float, float]], changed_at: float) -> float:
        """Seconds from the change on until they are within a fifth of twice what they were, on average of 2 s."""
        before = [value for at, value in values if changed_at - 20 <= at < changed_at]
        target = 2 * sum(before) / len(before)
        for at, _ in values:
            window = [value for other, value in values if at <= other < at + 2.0]
            if at >= changed_at and abs(sum(window) / len(window) / target - 1) <= 0.2:
                return at - changed_at
        return float("inf")


def shared(seed: int, seconds: float) -> Iterator[Figure]:
    """Eight equal cards, conversations that begin with one of twelve system prompts."""
    trace = conversations(30.0, seconds, seed=seed)
    ours = run(TOKENLOOM, EQUAL, trace, seed=seed)
    yield "hit rate over the best possible", ours.hit_rate / best_hit_rate(trace)
    yield "requests of the busiest worker over the mean", ours.request_imbalance(since=_WARM_SECONDS)
    for policy in CHOICES:
        yield f"p90 over {policy}", _ratio(ours, run(policy, EQUAL, trace, seed=seed), 0.9)


def shared_unequal(seed: int, seconds: float) -> Iterator[Figure]:
    """Unequal cards, conversations that begin with one of twelve system prompts: a slow card may know most."""
    for rate in (8.0, 20.0):
        trace = conversations(rate, seconds, seed=seed)
        ours = run(TOKENLOOM, UNEQUAL, trace, seed=seed)
        yield f"{rate:g}/s: hit rate", ours.hit_rate
        yield f"{rate:g}/s: p50 in ms", 1000 * ours.ttft(0.5, since=_WARM_SECONDS)
        yield f"{rate:g}/s: p90 in ms", 1000 * ours.ttft(0.9, since=_WARM_SECONDS)
        yield f"{rate:g}/s: p99 in ms", 1000 * ours.ttft(0.99, since=_WARM_SECONDS)
        for policy in ("least requests", "prefix only"):
            yield f"{rate:g}/s: p90 over {policy}", _ratio(ours, run(policy, UNEQUAL, trace, seed=seed), 0.9)


def noisy(seed: int, seconds: float) -> Iterator[Figure]:
    """Nine tenants at a third of capacity, and one that sends fifty times what each of them does."""
    loud = noisy_tenant(_capacity(UNEQUAL) / 3, seconds, seed=seed)
    alone = run(TOKENLOOM, UNEQUAL, [one for one in loud if one.tenant != "noisy"], seed=seed)
    beside = run(TOKENLOOM, UNEQUAL, loud, seed=seed)
    noise = len(beside.ttfts(tenant="noisy", since=_WARM_SECONDS))
    beside.served = [one for one in beside.served if one.arrival.tenant != "noisy"]
    yield "the others' p99 over theirs alone", _ratio(beside, alone, 0.99)
    yield "Jain's index of what the others asked for and got", _jain(beside)
    yield "of the others refused", sum(one.refused_after is not None for one in beside.served)
    quiet = len(beside.ttfts(since=_WARM_SECONDS))
    yield "all that is served over capacity", (noise + quiet) / (seconds - _WARM_SECONDS) / _capacity(UNEQUAL)


def _jain(result: Result) -> float:
    asked, got = Counter[str](), Counter[str]()
    for one in result.served:
        asked[one.arrival.tenant] += one.arrival.output_tokens
        got[one.arrival.tenant] += one.arrival.output_tokens if one.ttft is not None else 0
    shares = [got[tenant] / asked[tenant] for tenant in asked]
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


def flood(seed: int, seconds: float) -> Iterator[Figure]:
    """The nine tenants, and twice the fleet's capacity of a lower class."""
    most = _capacity(UNEQUAL)
    normal = poisson(most / 3, seconds, seed=seed, tenants=9)
    low = [
        replace(one, tenant="low", priority=10, slo_class="batch") for one in poisson(2 * most, seconds, seed=seed + 1)
    ]
    alone = run(TOKENLOOM, UNEQUAL, normal, seed=seed)
    both = run(TOKENLOOM, UNEQUAL, _merged(normal, low), seed=seed, max_wait_seconds=_LINE_SECONDS)
    theirs = [one for one in both.served if one.arrival.priority]
    both.served = [one for one in both.served if not one.arrival.priority]
    yield "of the higher class refused", sum(one.ttft is None for one in both.served)
    yield "the higher class's p99 over theirs alone", _ratio(both, alone, 0.99)
    longest = max((one.refused_after or one.waited) for one in theirs)
    yield "longest wait of the lower class over the bound", longest / _LINE_SECONDS
    yield "of the lower class served a second", sum(one.ttft is not None for one in theirs) / seconds


def overload(seed: int, seconds: float) -> Iterator[Figure]:
    """Interactive requests of twenty tenants: what the fleet can do, and a multiple of that."""
    most = _capacity(UNEQUAL)
    at_capacity = run(TOKENLOOM, UNEQUAL, _interactive(most, seconds, seed), seed=seed)
    peak = max(most, _goodput(at_capacity, seconds))
    for factor in (2, 5, 10):
        result = run(TOKENLOOM, UNEQUAL, _interactive(factor * most, seconds, seed), seed=seed)
        late = [one.refused_after for one in result.served if one.refused_after is not None]
        yield f"{factor} x: served over peak", _goodput(result, seconds) / peak
        yield f"{factor} x: p99 of the admitted over that at capacity", _ratio(result, at_capacity, 0.99)
        yield f"{factor} x: ms until refused, p99", 1000 * percentile(late, 0.99)


def _interactive(rate: float, seconds: float, seed: int) -> list[Arrival]:
    return [replace(one, slo_class="interactive") for one in poisson(rate, seconds, seed=seed, tenants=20)]


def _goodput(result: Result, seconds: float) -> float:
    return len(result.ttfts(since=_WARM_SECONDS)) / (seconds - _WARM_SECONDS)


def recovery(seed: int, seconds: float) -> Iterator[Figure]:
    """Five times what the fleet can do for a while, then 70 % of it."""
    # Looked at are 5 s at a time, which have some 50 requests. "As before": within a quarter of the mean without the
    # overload. Of such 5 s one in nine is slower than that by itself, so that it is also told when they are within a
    # quarter of what the same requests take without the overload, where that is more.
    del seconds
    most, over, after = _capacity(UNEQUAL), 60.0, 60.0
    calm = _interactive(0.7 * most, over + after, seed)
    rush = [one for one in _interactive(4.3 * most, over, seed + 1) if one.at >= _WARM_SECONDS]
    undisturbed = run(TOKENLOOM, UNEQUAL, calm, seed=seed)
    usual = _mean(undisturbed.ttfts(since=_WARM_SECONDS))
    result = run(TOKENLOOM, UNEQUAL, _merged(calm, rush), seed=seed)
    begins = [over + half_seconds / 2 for half_seconds in range(int(2 * after) - 10)]
    seen = [(begin, _mean_from(result, begin), _mean_from(undisturbed, begin)) for begin in begins]
    back = (begin - over for begin, mean, _ in seen if mean <= 1.25 * usual)
    yield "s until nobody is refused and first tokens come as before", next(back, _NEVER)
    back = (begin - over for begin, mean, calmly in seen if mean <= 1.25 * max(usual, calmly))
    yield "s until they come as they would have without the overload", next(back, _NEVER)
    yield (
        "first tokens within 8 s over those without the overload",
        _mean([mean / calmly for begin, mean, calmly in seen if begin < over + 8.0 and mean < _NEVER]),
    )


def _mean_from(result: Result, begin: float) -> float:
    """Of the times to first token of those that come within 5 s; endless where one of them is refused."""
    window = [one.ttft for one in result.served if begin <= one.arrival.at < begin + 5.0]
    seen = [ttft for ttft in window if ttft is not None]
    return _mean(seen) if len(seen) == len(window) else _NEVER


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _merged(*traces: Sequence[Arrival]) -> list[Arrival]:
    return sorted((one for trace in traces for one in trace), key=lambda one: one.at)


def retries(seed: int, seconds: float) -> Iterator[Figure]:
    """One of two workers fails everything that it gets."""
    trace = poisson(0.6 * _capacity(EQUAL[:1]), seconds, seed=seed)
    result = retried(EQUAL[:2], trace, {EQUAL[0].name}, seed=seed)
    yield "attempts over requests", result.attempts / result.requests
    yield "share of requests served", result.served / result.requests


def lies(seed: int, seconds: float) -> Iterator[Figure]:
    """One of eight workers reports what is not so, or its GPU's telemetry does."""
    trace = poisson(0.6 * _capacity(EQUAL), seconds, seed=seed)
    liar = EQUAL[0].name

    def play(name: str, **more: Any) -> Iterator[Figure]:
        result = run(TOKENLOOM, EQUAL, trace, seed=seed, **more)
        yield f"{name}: busiest worker over the mean", result.request_imbalance(since=_WARM_SECONDS)
        yield f"{name}: not served", len(trace) - len(result.ttfts())

    yield from play("truth")
    yield from play("its reports stand still for 30 s", said=_frozen(liar, _WARM_SECONDS, 2 * _WARM_SECONDS))
    yield from play("it boasts", said=lambda engine, load: _boast(load) if engine.spec.name == liar else load)
    yield from play(
        "it reports nonsense", said=lambda engine, load: _nonsense(load) if engine.spec.name == liar else load
    )
    yield from play("its GPU is said to throttle", meanwhile=_heat(liar, Condition(slowdown=1.5)))


def _frozen(liar: str, begin: float, end: float) -> Any:
    last: list[Load] = []
    began: list[float] = []

    def said(engine: Engine, load: Load) -> Load:
        if engine.spec.name != liar:
            return load
        now = engine.now
        began[:] = began or [now]
        if not last or not begin <= now - began[0] < end:
            last[:] = [load]
        return last[0]

    return said


def _boast(load: Load) -> Load:
    return replace(
        load,
        running=0,
        waiting=0,
        kv_usage=0.0,
        pending_prefill_tokens=0,
        prefill_tokens_per_second=1e12,
        decode_step_seconds=1e-9,
        decode_step_per_sequence_seconds=0.0,
    )


def _nonsense(load: Load) -> Load:
    return replace(
        load,
        running=-5,
        kv_usage=_NOT_A_NUMBER,
        pending_prefill_tokens=-(10**12),
        prefill_tokens_per_second=_NOT_A_NUMBER,
        decode_step_seconds=float("inf"),
    )


def _heat(worker: str, condition: Condition) -> Any:
    def meanwhile(timeline: Any, engines: dict[str, Engine], router: Any) -> None:
        del engines
        timeline.after(_WARM_SECONDS, lambda: router.fleet.set_gpus({worker: condition}))

    return meanwhile
