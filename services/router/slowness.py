"""Why requests take longer on one worker than they would elsewhere, in words for people."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Final

from services.router.worker import Worker

__all__ = ["slow_causes", "slow_reasons"]

# Cards of one fleet are unequal, and measurements differ: what is less than this is no news.
_MUCH: Final = 2.0
# Short prompts are prefilled at a lower rate than long ones, wherever they go.
_VERY_MUCH: Final = 4.0
# A decode step below this is fast whatever others do.
_LEAST_STEP_SECONDS: Final = 0.002
_KV_NEARLY_FULL: Final = 0.9
_ByModel = Mapping[str, Sequence[float]]
"""What workers measured, sorted, by model."""


def slow_reasons(workers: Sequence[Worker]) -> Mapping[str, list[str]]:
    """The causes for each worker that is slow, by its name; a worker that is not has no entry."""
    return {worker_id: list(causes.values()) for worker_id, causes in slow_causes(workers).items()}


def slow_causes(workers: Sequence[Worker]) -> Mapping[str, Mapping[str, str]]:
    """The same by cause: gpu, decoding, prefill, cache or failures."""
    steps: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    for worker in workers:
        step, rate = worker.load.decode_step_seconds, worker.load.prefill_tokens_per_second
        for model in worker.card.models:
            if step is not None:
                steps.setdefault(model, []).append(step)
            if rate is not None:
                rates.setdefault(model, []).append(rate)
    for values in (*steps.values(), *rates.values()):
        values.sort()
    found = {worker.worker_id: _causes(worker, steps, rates) for worker in workers}
    return {worker_id: causes for worker_id, causes in found.items() if causes}


def _causes(worker: Worker, steps: _ByModel, rates: _ByModel) -> dict[str, str]:
    causes = {
        "gpu": _of_gpu(worker),
        "decoding": _of_decoding(worker, steps),
        "prefill": _of_prefill(worker, rates),
        "cache": _of_cache(worker),
        "failures": _of_failures(worker),
    }
    return {cause: words for cause, words in causes.items() if words}


def _others(worker: Worker, own: float, measured: _ByModel) -> float | None:
    """The middle of what the other workers of its model measured, where there are any: of its first model that has."""
    for model in worker.card.models:
        values = measured[model]
        count = len(values) - 1
        if count:
            at = bisect_left(values, own)
            # The list without its own entry, which is not made anew for each worker.
            low, high = (count - 1) // 2, count // 2
            return (values[low + (low >= at)] + values[high + (high >= at)]) / 2
    return None


def _of_gpu(worker: Worker) -> str:
    slowdown = worker.condition.slowdown
    return f"the state of its GPU slows it by {100 * (slowdown - 1):.0f} %" if slowdown >= 1.1 else ""


def _of_decoding(worker: Worker, steps: _ByModel) -> str:
    own = worker.load.decode_step_seconds
    if own is None or own < _MUCH * _LEAST_STEP_SECONDS:
        return ""
    # Where there are no others, or all have become slow, what it took before tells.
    for usual, where in ((_others(worker, own, steps), "on the others"), (worker.usual_step.seconds, "usual")):
        if usual is not None and own >= _MUCH * max(usual, _LEAST_STEP_SECONDS):
            times = f"{own / usual:.1f} times as long as {where}"
            return f"a decode step takes {1000 * own:.1f} ms, {times} ({1000 * usual:.1f} ms)"
    return ""


def _of_prefill(worker: Worker, rates: _ByModel) -> str:
    own = worker.load.prefill_tokens_per_second
    usual = None if own is None else _others(worker, own, rates)
    if own is None or usual is None or usual < _VERY_MUCH * own:
        return ""
    return f"it prefills {own:.0f} tokens/s, {usual / own:.1f} times fewer than the others ({usual:.0f})"


def _of_cache(worker: Worker) -> str:
    load = worker.load
    if not load.waiting or load.kv_usage < _KV_NEARLY_FULL:
        return ""
    return f"its KV cache is {100 * load.kv_usage:.0f} % full, so {load.waiting} requests wait in its engine"


def _of_failures(worker: Worker) -> str:
    if not 0 < worker.admitted_ratio < 1:
        return ""
    share = 100 * worker.admitted_ratio
    return f"it failed requests and gets only {share:.0f} % of its share until it has proved itself"
