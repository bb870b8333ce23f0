"""Why a worker is slow, told from what it and the others report."""

from statistics import median
from typing import Any

import pytest

from services.router.card import Card, Load, WorkerState
from services.router.reading import HEALTHY, Condition
from services.router.slowness import slow_causes, slow_reasons
from services.router.worker import Worker


def worker(name: str, *, models: tuple[str, ...] = ("demo",), condition: Condition = HEALTHY, **load: Any) -> Worker:
    card = Card(worker_id=name, endpoint="127.0.0.1:1", models=dict.fromkeys(models, 4096), max_running=8)
    made = Worker(card, now=0.0, drained=False, condition=condition)
    made.report(Load(state=WorkerState.READY, **{"decode_step_seconds": 0.010, **load}), 0.0)
    return made


def test_workers_that_are_alike_have_nothing_to_say() -> None:
    assert slow_reasons([worker("a"), worker("b", decode_step_seconds=0.019), worker("c")]) == {}


@pytest.mark.parametrize(
    ("cause", "load", "said"),
    [
        (
            "decoding",
            {"decode_step_seconds": 0.080},
            "a decode step takes 80.0 ms, 8.0 times as long as on the others (10.0 ms)",
        ),
        (
            "prefill",
            {"prefill_tokens_per_second": 500.0},
            "it prefills 500 tokens/s, 16.0 times fewer than the others (8000)",
        ),
        ("gpu", {"condition": Condition(slowdown=1.5)}, "the state of its GPU slows it by 50 %"),
        (
            "cache",
            {"kv_usage": 0.97, "waiting": 3, "running": 8},
            "its KV cache is 97 % full, so 3 requests wait in its engine",
        ),
    ],
)
def test_each_cause_is_told_of_the_worker_that_has_it_alone(cause: str, load: dict[str, Any], said: str) -> None:
    workers = [*(worker(name, prefill_tokens_per_second=8000.0) for name in "abc"), worker("slow", **load)]
    assert slow_reasons(workers) == {"slow": [said]}
    assert slow_causes(workers) == {"slow": {cause: said}}


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_a_worker_is_measured_by_the_middle_of_the_others(count: int) -> None:
    steps = [0.010 * (1 + index) for index in range(count)]
    found = slow_reasons([worker(f"w{index}", decode_step_seconds=step) for index, step in enumerate(steps)])
    for index, step in enumerate(steps):
        usual = median(steps[:index] + steps[index + 1 :])
        assert (f"w{index}" in found) == (step >= 2 * usual)
        if f"w{index}" in found:
            assert f"({1000 * usual:.1f} ms)" in found[f"w{index}"][0]


def test_a_worker_alone_is_compared_with_what_it_was_before() -> None:
    alone = worker("a")

    def report(step: float, now: float) -> None:
        alone.report(Load(state=WorkerState.READY, running=1, decode_step_seconds=step), now)

    for tenth in range(100):
        report(0.010, tenth / 4)
    report(0.030, 25.25)
    assert slow_reasons([alone]) == {"a": ["a decode step takes 30.0 ms, 3.0 times as long as usual (10.0 ms)"]}
    # After a while that is how it is.
    for second in range(1500):
        report(0.030, 26.0 + second)
    assert slow_reasons([alone]) == {}


def test_a_worker_that_has_just_begun_has_no_usual() -> None:
    alone = worker("a", running=1)
    alone.report(Load(state=WorkerState.READY, running=1, decode_step_seconds=0.5), 1.0)
    assert slow_reasons([alone]) == {}


def test_a_worker_is_compared_with_those_of_its_models_alone() -> None:
    assert slow_reasons([worker("a"), worker("b", models=("large",), decode_step_seconds=0.080)]) == {}


def test_a_worker_that_failed_requests_says_how_little_it_gets() -> None:
    failed = worker("a")
    failed.admitted_ratio = 0.25
    (reason,) = slow_reasons([failed])["a"]
    assert "25 % of its share" in reason
