"""The registry: who is there, what they say, and what of it is believed."""

import math

import pytest

from services.common.errors import MeshError, Reason
from services.router.card import Card, Load, WorkerState, believable
from services.router.reading import Condition, GpuReading, condition_of, worst
from services.router.worker import Outcome
from tests.support.scheduling import Bench

CARD = Card(worker_id="w", endpoint="10.0.0.1:1", models={"demo": 4096}, max_running=8, kv_tokens=65_536)


@pytest.mark.parametrize(
    ("said", "believed"),
    [
        ({"prefill_tokens_per_second": math.nan}, {"prefill_tokens_per_second": None}),
        ({"prefill_tokens_per_second": math.inf}, {"prefill_tokens_per_second": None}),
        ({"prefill_tokens_per_second": -5.0}, {"prefill_tokens_per_second": None}),
        ({"prefill_tokens_per_second": 1e12}, {"prefill_tokens_per_second": None}),
        ({"prefill_tokens_per_second": 5e3}, {"prefill_tokens_per_second": 5e3}),
        ({"decode_step_seconds": 0.0}, {"decode_step_seconds": None}),
        ({"decode_step_seconds": math.nan}, {"decode_step_seconds": None}),
        ({"decode_step_per_sequence_seconds": -1.0}, {"decode_step_per_sequence_seconds": None}),
        ({"decode_step_per_sequence_seconds": 0.0}, {"decode_step_per_sequence_seconds": 0.0}),
        ({"kv_usage": math.nan}, {"kv_usage": 0.0}),
        ({"kv_usage": 17.0}, {"kv_usage": 1.0}),
        ({"kv_usage": -1.0}, {"kv_usage": 0.0}),
        ({"running": 10**12}, {"running": 0}),
        ({"waiting": -1}, {"waiting": 0}),
        ({"pending_prefill_tokens": 10**12}, {"pending_prefill_tokens": None}),
        ({"pending_prefill_tokens": 20_000}, {"pending_prefill_tokens": 20_000}),
    ],
)
def test_what_cannot_be_true_is_not_believed(said: dict[str, float], believed: dict[str, float | None]) -> None:
    load = believable(Load(**said), CARD)  # type: ignore[arg-type]  # of a table
    assert {key: getattr(load, key) for key in believed} == believed


def test_a_worker_that_claims_an_endless_queue_still_gets_its_share() -> None:
    bench = Bench()
    for name in ("liar", "honest"):
        bench.worker(name, max_running=64)
    liar = bench.fleet.get("liar")
    assert liar is not None
    bench.report(liar, running=10**12, pending_prefill_tokens=10**12)
    given = [bench.ask(prompt_tokens=100).lease for _ in range(40)]
    assert 15 <= sum(lease is not None and lease.worker is liar for lease in given) <= 25


def test_a_second_registration_of_a_name_replaces_the_first() -> None:
    bench = Bench()
    first = bench.worker("w0")
    ticket = bench.ask()
    second = bench.worker("w0")
    assert first.gone
    assert bench.fleet.workers == [second]
    assert not second.leases
    bench.fleet.remove(first)
    assert bench.fleet.workers == [second]
    bench.admission.finish(ticket, Outcome.COMPLETED)
    assert second.occupied == 0


def test_a_name_goes_to_another_address_only_once_the_first_has_fallen_silent() -> None:
    bench = Bench()
    bench.worker("w0")
    with pytest.raises(MeshError) as caught:
        bench.worker("w0", endpoint="10.0.0.2:5000")
    assert caught.value.reason is Reason.ALREADY_EXISTS
    bench.now += 2.5
    assert bench.worker("w0", endpoint="10.0.0.2:5000").endpoint == "10.0.0.2:5000"


def test_the_leases_of_a_lost_worker_vanish() -> None:
    bench = Bench()
    worker = bench.worker("w0")
    ticket = bench.ask()
    bench.fleet.remove(worker)
    assert not worker.leases
    bench.admission.finish(ticket)
    assert bench.fleet.workers == []


def test_a_drained_name_stays_drained_when_its_process_comes_back() -> None:
    bench = Bench()
    bench.worker("w0")
    assert bench.fleet.drain("w0", drained=True)
    assert bench.worker("w0").drained
    assert not bench.fleet.drain("nobody", drained=True)


def test_a_worker_that_has_not_reported_takes_no_work() -> None:
    bench = Bench()
    worker = bench.fleet.register(CARD)
    assert worker.blocked == "has not reported"
    bench.report(worker)
    assert worker.is_ready(bench.now)


def test_work_of_other_routers_counts_against_the_slots() -> None:
    bench = Bench()
    worker = bench.worker("w0", max_running=8)
    bench.ask()
    bench.report(worker, running=5, waiting=1)
    assert worker.occupied == 6
    bench.report(worker, running=1)
    assert worker.occupied == 1


def test_a_full_kv_cache_with_a_queue_in_the_engine_is_full() -> None:
    bench = Bench()
    worker = bench.worker("w0", max_running=8)
    bench.report(worker, running=3, waiting=3, kv_usage=0.95)
    assert worker.full
    bench.report(worker, running=3, waiting=3, kv_usage=0.5)
    assert not worker.full


def test_the_seconds_that_a_request_holds_a_slot_are_learned() -> None:
    bench = Bench()
    worker = bench.worker("w0")
    ticket = bench.ask()
    bench.now += 3.0
    bench.admission.finish(ticket, Outcome.COMPLETED)
    assert worker.service_seconds(100) == pytest.approx(3.0)


def test_a_burst_that_a_busy_machine_held_up_does_not_make_a_worker_slow_for_long_prompts() -> None:
    bench = Bench()
    worker = bench.worker("w0", max_running=64)
    burst = [bench.ask(prompt_tokens=20) for _ in range(32)]
    bench.now += 1.0
    for ticket in burst:
        bench.admission.finish(ticket, Outcome.COMPLETED, output_tokens=10, first_token_seconds=0.7, prompt_tokens=20)
    bench.report(worker)
    late = bench.ask(prompt_tokens=20)
    assert late.lease is not None
    assert late.lease.prediction is not None
    assert late.lease.prediction[0] == pytest.approx(0.7, abs=0.15)
    # At 10,000 tokens a second these take 0.2 s, and nobody has to wait in the router for that.
    assert all(bench.ask(prompt_tokens=200).lease is not None for _ in range(10))


def test_a_worker_that_was_late_gets_less_and_is_tried_again_when_time_has_passed() -> None:
    bench = Bench()
    late, prompt = bench.worker("late"), bench.worker("prompt")
    for _ in range(20):
        ticket = bench.ask(prompt_tokens=20, subset=frozenset({late.endpoint}))
        bench.now += 1.0
        bench.admission.finish(ticket, Outcome.COMPLETED, output_tokens=10, first_token_seconds=0.2, prompt_tokens=20)
    bench.report(late)
    bench.report(prompt)
    assert [lease.worker for _ in range(4) if (lease := bench.ask(prompt_tokens=20).lease)] == [prompt] * 4
    bench.pass_time(30)
    assert late in [lease.worker for _ in range(4) if (lease := bench.ask(prompt_tokens=20).lease)]


@pytest.mark.parametrize(
    ("reading", "slowdown"),
    [
        (GpuReading(), 1.0),
        (GpuReading(temperature_celsius=70, memory_used_share=0.85), 1.0),
        (GpuReading(temperature_celsius=90), 1.1),
        (GpuReading(degraded=True), 1.1),
        (GpuReading(throttle_reasons=("sw_power_cap",)), 1.05),
        (GpuReading(throttle_reasons=("sw_power_cap", "hw_thermal_slowdown"), temperature_celsius=95), 1.5),
        (GpuReading(memory_used_share=0.99), 1.1),
        (GpuReading(throttle_reasons=("gpu_idle",)), 1.0),
    ],
)
def test_heat_and_throttling_slow_a_worker_down(reading: GpuReading, slowdown: float) -> None:
    condition = condition_of(reading)
    assert not condition.lost
    assert condition.slowdown == pytest.approx(slowdown)


def test_a_group_of_gpus_is_as_slow_as_the_slowest_and_lost_with_any() -> None:
    assert worst([Condition(slowdown=1.2), Condition(lost=True)]) == Condition(lost=True, slowdown=1.2)
    assert worst([]) == Condition()


def test_a_report_says_who_takes_work() -> None:
    bench = Bench()
    worker = bench.worker("w0")
    bench.report(worker, state=WorkerState.DRAINING)
    assert (worker.blocked, worker.state_name) == ("draining", "draining")
