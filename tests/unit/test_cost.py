"""The cost model, as tables."""

import random

import pytest

from services.router.correction import Correction, Delay
from services.router.cost import Demand, Forecast, Gauges, Rates, better, costs, outlook, predict

GAUGES = {
    "prefill_tokens_per_second": 1000.0,
    "decode_step_seconds": 0.010,
    "decode_step_per_sequence_seconds": 0.001,
    "max_running": 4,
}
DEMAND = Demand(prompt=500, output=100, output_weight=1.0)


@pytest.mark.parametrize(
    ("name", "change", "ttft", "tpot"),
    [
        ("idle", {}, 0.5 + 0.010, 0.010),
        ("two others decode", {"occupied": 2}, 0.5 + 0.012, 0.012),
        ("prefill is pending", {"backlog_tokens": 2000.0}, 2.0 + 0.5 + 0.010, 0.010),
        ("the last slot", {"occupied": 3, "service_seconds": 2.0}, 0.5 + 0.013, 0.013),
        ("no slot: one of four frees in a quarter", {"occupied": 4, "service_seconds": 2.0}, 0.5 + 0.5 + 0.013, 0.013),
        ("two before it", {"occupied": 6, "service_seconds": 2.0}, 1.5 + 0.5 + 0.013, 0.013),
        ("a hot card", {"slowdown": 1.5}, 1.5 * (0.5 + 0.010), 0.015),
        ("enough KV cache", {"kv_tokens": 1000, "kv_used_tokens": 400.0, "service_seconds": 2.0}, 0.51, 0.010),
        (
            "200 tokens of KV cache short",
            {"kv_tokens": 1000, "kv_used_tokens": 600.0, "service_seconds": 3.0},
            0.51 + 200 * 3.0 / 600,
            0.010,
        ),
    ],
)
def test_a_worker_costs_the_seconds_that_it_takes(
    name: str, change: dict[str, float], ttft: float, tpot: float
) -> None:
    predicted = predict(outlook(Gauges(**{**GAUGES, **change})), DEMAND, 0.0)  # type: ignore[arg-type]  # of a table
    assert predicted[:2] == pytest.approx((ttft, tpot)), name


@pytest.mark.parametrize(
    ("name", "change", "wait", "scarce"),
    [
        ("idle", {}, 0.0, 0.0),
        ("prefill is pending", {"backlog_tokens": 2000.0}, 2.0, 0.0),
        ("no slot", {"occupied": 4, "service_seconds": 2.0}, 0.5, 0.0),
        ("it is known when a slot is free", {"occupied": 4, "service_seconds": 2.0, "slot_seconds": 0.1}, 0.1, 0.0),
        ("much KV cache", {"kv_tokens": 8000, "kv_used_tokens": 6400.0, "service_seconds": 3.0}, 0.0, 0.0),
        ("just so much", {"kv_tokens": 8000, "kv_used_tokens": 6600.0, "service_seconds": 6.6}, 0.0, 0.2),
        ("the last of it", {"kv_tokens": 8000, "kv_used_tokens": 7300.0, "service_seconds": 7.3}, 0.0, 0.6),
        ("no KV cache", {"kv_tokens": 8000, "kv_used_tokens": 7500.0, "service_seconds": 7.5}, 0.1, 0.6),
    ],
)
def test_waiting_and_taking_the_last_kv_cache_cost_more_than_they_take_since_others_wait_behind(
    name: str, change: dict[str, float], wait: float, scarce: float
) -> None:
    ahead = outlook(Gauges(**{**GAUGES, **change}))  # type: ignore[arg-type]  # of a table
    ttft, tpot, cost, *_ = predict(ahead, DEMAND, 0.0)
    assert cost == pytest.approx(ttft + 2 * wait + scarce + 100 * tpot), name
    assert costs([ahead], DEMAND, 0.0) == pytest.approx([cost]), name


def test_what_is_cached_is_not_prefilled() -> None:
    ahead = outlook(Gauges(prefill_tokens_per_second=1000.0))
    cold, warm = (predict(ahead, Demand(500, 0), 0.0, cached)[0] for cached in (0, 400))
    assert cold - warm == pytest.approx(0.4)


def test_to_compute_what_another_worker_has_costs_more_than_it_takes() -> None:
    ahead = outlook(Gauges(prefill_tokens_per_second=1000.0))
    cold, warm = (predict(ahead, Demand(500, 0, known=400), 0.0, cached) for cached in (0, 400))
    assert cold[2] - warm[2] == pytest.approx(3.0 * 0.4)


def test_who_finds_its_prompt_cached_pays_for_others_in_the_line_as_little_as_it_prefills() -> None:
    idle, busy = (outlook(Gauges(prefill_tokens_per_second=1000.0, backlog_tokens=backlog)) for backlog in (0.0, 300.0))
    for cached, share in ((0.0, 1.0), (400.0, 0.2)):
        demand = Demand(500, 10, known=400)
        at_once, later = (predict(one, demand, 0.0, cached) for one in (idle, busy))
        assert later[0] - at_once[0] == pytest.approx(0.3)
        assert later[2] - at_once[2] == pytest.approx(0.3 * (1 + 2 * share))


def test_where_a_prompt_is_known_those_who_decode_there_count_for_more_than_else_and_a_slow_card_does_not() -> None:
    of = {"decode_step_per_sequence_seconds": 0.001, "max_running": 64}
    alone, crowd, slow = (
        outlook(Gauges(**{**GAUGES, **of, "occupied": count, "decode_step_seconds": step}))  # type: ignore[arg-type]  # of a table
        for count, step in ((0, 0.010), (20, 0.010), (0, 0.030))
    )
    for other, more in ((crowd, 0.020 * (1 + 0.6 * 100)), (slow, 0.020)):
        plain, known = (
            predict(other, demand, 0.0)[2] - predict(alone, demand, 0.0)[2]
            for demand in (Demand(500, 100), Demand(500, 100, known=400))
        )
        assert (plain, known) == pytest.approx((0.020, more))


def test_the_cost_of_many_is_that_of_each() -> None:
    rng = random.Random(7)
    outlooks = [
        outlook(Gauges(**{**GAUGES, "backlog_tokens": 900 * rng.random(), "occupied": rng.randrange(6)}))  # type: ignore[arg-type]  # of a table
        for _ in range(40)
    ]
    cached = [rng.choice([0.0, 100.0, 400.0]) for _ in outlooks]
    forecast = Forecast(outlooks, Demand(500, 80, max(cached), 0.01), 0.02, cached, None)
    assert forecast.costs() == pytest.approx([one[2] for one in forecast])


@pytest.mark.parametrize(("prefill", "decode"), [(1.0, 1.0), (2.0, 1.0), (1.0, 3.0)])
def test_what_was_learnt_corrects_predictions(prefill: float, decode: float) -> None:
    gauges = Gauges(**{**GAUGES, "prefill_factor": prefill, "decode_factor": decode})  # type: ignore[arg-type]  # of a table
    ttft, tpot, *_ = predict(outlook(gauges), DEMAND, 0.0)
    assert (ttft, tpot) == pytest.approx((0.5 * prefill + 0.010 * decode, 0.010 * decode))


def test_a_correction_follows_what_comes_true_and_long_times_count_most() -> None:
    correction = Correction()
    for _ in range(30):
        correction.learn(predicted=0.5, observed=1.0)
    assert correction.factor == pytest.approx(2.0, rel=0.05)
    correction.learn(predicted=0.001, observed=0.1)
    assert correction.factor == pytest.approx(2.0, rel=0.05)
    for _ in range(60):
        correction.learn(predicted=0.5, observed=0.5)
    assert correction.factor == pytest.approx(1.0, rel=0.05)


def test_a_worker_that_boasts_is_found_out_however_much() -> None:
    correction = Correction()
    for _ in range(20):
        correction.learn(predicted=0.0001, observed=1.0)
    assert correction.factor > 10


def test_a_delay_comes_with_the_first_token_once_and_has_no_part_in_what_prefill_takes() -> None:
    for backlog in (0.0, 1000.0):
        plain, late = (
            outlook(Gauges(prefill_tokens_per_second=1000.0, backlog_tokens=backlog, delay_seconds=delay))
            for delay in (0.0, 0.3)
        )
        for cached in (0.0, 400.0):
            before, after = (predict(one, Demand(500, 10, output_weight=1.0), 0.0, cached) for one in (plain, late))
            assert after[0] - before[0] == pytest.approx(0.3)
            assert after[2] - before[2] == pytest.approx(0.3)
        assert costs([late], DEMAND, 0.0) == pytest.approx([predict(late, DEMAND, 0.0)[2]])


@pytest.mark.parametrize(
    ("name", "observed", "after", "delay"),
    [
        ("nothing", [], 0.0, 0.0),
        ("as predicted", [0.0] * 20, 0.0, 0.0),
        ("one alone is half believed", [0.4], 0.0, 0.2),
        ("always", [0.4] * 60, 0.0, 0.4),
        ("not any more", [0.4] * 60 + [0.0] * 60, 0.0, 0.0),
        ("quicker than predicted", [-0.4] * 20, 0.0, 0.0),
        ("nothing for ten seconds", [0.4] * 60, 10.0, 0.2),
        ("nothing for minutes", [0.4] * 60, 300.0, 0.0),
    ],
)
def test_a_delay_follows_what_was_seen_and_is_forgotten_when_nothing_is(
    name: str, observed: list[float], after: float, delay: float
) -> None:
    learnt = Delay()
    for seconds in observed:
        learnt.learn(seconds, 100.0)
    assert learnt.seconds(100.0 + after) == pytest.approx(delay, abs=0.01), name


def test_the_backlog_melts_as_time_passes_and_not_below_nothing() -> None:
    ahead = outlook(Gauges(prefill_tokens_per_second=1000.0, backlog_tokens=1000.0, decode_step_seconds=0.01))
    ttfts = [predict(ahead, Demand(0, 0), elapsed)[0] for elapsed in (0.0, 0.6, 5.0)]
    assert ttfts == pytest.approx([1.01, 0.41, 0.01])


def test_a_worker_that_fails_half_of_its_requests_costs_twice() -> None:
    sound, shaky = (outlook(Gauges(failure_share=share)) for share in (0.0, 0.5))
    assert predict(shaky, DEMAND, 0.0)[2] == pytest.approx(2 * predict(sound, DEMAND, 0.0)[2])


def test_a_worker_that_has_measured_nothing_is_assumed_to_be_ordinary() -> None:
    ttft, tpot, *_ = predict(outlook(Gauges()), Demand(800, 0), 0.0)
    assert 0.01 < ttft < 1
    assert 0.001 < tpot < 0.1


@pytest.mark.parametrize(
    ("known", "measured", "expected"),
    [
        (None, (None, None, None), None),
        (Rates(100.0, 0.01, 0.001), (None, None, None), Rates(100.0, 0.01, 0.001)),
        (None, (100.0, 0.01, 0.001), Rates(100.0, 0.01, 0.001)),
        (Rates(100.0, 0.01, 0.001), (200.0, 0.02, 0.0005), Rates(200.0, 0.01, 0.0005)),
        (Rates(100.0, 0.01, 0.001), (50.0, 0.005, None), Rates(100.0, 0.005, 0.001)),
    ],
)
def test_a_worker_that_measured_nothing_is_taken_for_the_best_of_its_peers(
    known: Rates | None, measured: tuple[float | None, float | None, float | None], expected: Rates | None
) -> None:
    assert better(known, *measured) == expected
