"""Which worker a request gets."""

from collections import Counter
from typing import Any

import pytest

from services.router import wire
from services.router.card import WorkerState
from services.router.reading import Condition
from services.router.request import Request
from services.router.scheduler import Verdict
from services.router.worker import Outcome
from tests.support.scheduling import Bench


def test_of_a_busy_and_an_idle_worker_the_idle_one_is_picked() -> None:
    bench = Bench()
    busy, _ = bench.worker("busy"), bench.worker("idle")
    bench.report(busy, running=6, pending_prefill_tokens=4000)
    assert {bench.pick(prompt_tokens=100) for _ in range(20)} == {"idle"}


def test_one_lease_is_enough_to_make_a_worker_busy() -> None:
    bench = Bench()
    bench.worker("w0")
    bench.worker("w1")
    first, second = (bench.ask(prompt_tokens=2000) for _ in range(2))
    assert first.lease is not None
    assert second.lease is not None
    assert first.lease.worker is not second.lease.worker


def test_a_worker_that_has_measured_nothing_is_tried_before_a_busy_one_that_has() -> None:
    bench = Bench()
    busy, fresh = bench.worker("busy"), bench.worker("fresh")
    bench.report(busy, decode_step_seconds=0.001, running=1)
    unmeasured: dict[str, float | None] = dict.fromkeys(
        ["prefill_tokens_per_second", "decode_step_seconds", "decode_step_per_sequence_seconds"]
    )
    bench.fleet.register(fresh.card)
    bench.report(bench.fleet.get("fresh") or fresh, **unmeasured)
    assert {bench.pick() for _ in range(20)} == {"fresh"}


def test_a_burst_between_two_reports_spreads_over_the_workers() -> None:
    bench = Bench()
    for number in range(4):
        bench.worker(f"w{number}", max_running=64)
    given = Counter(bench.ask(prompt_tokens=50).lease.worker.worker_id for _ in range(80))  # type: ignore[union-attr]
    assert all(19 <= count <= 21 for count in given.values())


def test_a_report_written_just_before_a_grant_does_not_hide_it() -> None:
    bench = Bench()
    first, second = bench.worker("w0"), bench.worker("w1")
    lease = bench.ask(prompt_tokens=4000).lease
    assert lease is not None
    bench.now += 0.001
    for worker in (first, second):
        bench.report(worker)
    assert bench.pick(prompt_tokens=100) != lease.worker.worker_id


def test_unequal_workers_get_work_by_their_speed() -> None:
    bench = Bench()
    for name, factor in (("slow", 1.0), ("fast", 2.0)):
        worker = bench.worker(name, max_running=256)
        bench.report(
            worker,
            prefill_tokens_per_second=5_000.0 * factor,
            decode_step_seconds=0.02 / factor,
            decode_step_per_sequence_seconds=0.002 / factor,
        )
    given = Counter(bench.ask(prompt_tokens=20).lease.worker.worker_id for _ in range(90))  # type: ignore[union-attr]
    assert given["fast"] > 1.7 * given["slow"]


def test_a_worker_with_a_hot_card_gets_less() -> None:
    bench = Bench()
    bench.worker("hot", gpu_uuids=("GPU-1",))
    bench.worker("cool", gpu_uuids=("GPU-2",))
    bench.fleet.set_gpus({"GPU-1": Condition(slowdown=1.5), "GPU-2": Condition()})
    assert {bench.pick(prompt_tokens=100) for _ in range(20)} == {"cool"}


def test_a_worker_that_fails_what_it_gets_is_avoided_and_forgiven_in_time() -> None:
    bench = Bench()
    bench.worker("black-hole")
    bench.worker("sound")
    for _ in range(4):
        ticket = bench.ask(excluded=frozenset({"sound"}))
        bench.admission.finish(ticket, Outcome.FAILED)
    assert {bench.pick() for _ in range(20)} == {"sound"}
    bench.pass_time(120)
    assert {bench.pick() for _ in range(50)} == {"black-hole", "sound"}


def test_equal_workers_are_picked_at_random() -> None:
    bench = Bench()
    for number in range(4):
        bench.worker(f"w{number}")
    assert len({bench.pick() for _ in range(100)}) == 4


def test_a_session_returns_to_the_worker_that_has_its_prefix_unless_that_costs_more() -> None:
    bench = Bench()
    bench.worker("w0", max_running=64)
    bench.worker("w1", max_running=64)
    first = bench.ask(prompt_tokens=3000, session="s", tenant="t")
    assert first.lease is not None
    home = first.lease.worker
    bench.admission.finish(first, Outcome.COMPLETED)
    bench.pass_time(1)
    assert {bench.pick(prompt_tokens=3100, session="s", tenant="t") for _ in range(20)} == {home.worker_id}
    bench.report(home, pending_prefill_tokens=20_000)
    assert bench.pick(prompt_tokens=3100, session="s", tenant="t") != home.worker_id


@pytest.mark.parametrize(
    ("state", "why"), [(WorkerState.DRAINING, "draining"), (WorkerState.UNAVAILABLE, "unavailable")]
)
def test_a_worker_that_takes_no_work_gets_none(state: WorkerState, why: str) -> None:
    bench = Bench()
    out = bench.worker("out")
    bench.worker("in")
    bench.report(out, state=state)
    decision = bench.scheduler.pick(Request(model="demo"))
    assert decision.worker is not None
    assert decision.worker.worker_id == "in"
    assert decision.out == {why: 1}


def test_a_drained_worker_gets_nothing_until_it_is_undrained() -> None:
    bench = Bench()
    bench.worker("w0")
    bench.fleet.drain("w0", drained=True)
    assert bench.scheduler.pick(Request(model="demo")).verdict is Verdict.NOT_READY
    bench.fleet.drain("w0", drained=False)
    assert bench.pick() == "w0"


def test_a_silent_worker_gets_nothing_until_it_reports_again() -> None:
    bench = Bench()
    worker = bench.worker("w0")
    bench.now += 2.1
    assert bench.scheduler.pick(Request(model="demo")).out == {"silent": 1}
    bench.report(worker)
    assert bench.pick() == "w0"


def test_a_lost_gpu_takes_its_workers_out() -> None:
    bench = Bench()
    bench.worker("w0", gpu_uuids=("GPU-1", "GPU-2"))
    bench.fleet.set_gpus({"GPU-2": Condition(lost=True)})
    assert bench.scheduler.pick(Request(model="demo")).out == {"gpu lost": 1}
    bench.fleet.forget_gpus(["GPU-2"])
    assert bench.pick() == "w0"


def test_only_workers_of_the_model_are_looked_at() -> None:
    bench = Bench()
    bench.worker("w0", models={"demo": 8192})
    bench.worker("w1", models={"other": 8192})
    assert bench.pick("other") == "w1"
    assert bench.pick(None) in {"w0", "w1"}


def test_excluded_workers_and_those_outside_the_subset_are_not_picked() -> None:
    bench = Bench()
    first, second = bench.worker("w0"), bench.worker("w1")
    assert bench.pick(excluded=frozenset({"w0"})) == "w1"
    assert bench.pick(subset=frozenset({first.endpoint})) == "w0"
    assert bench.pick(subset=frozenset({first.endpoint, second.endpoint}), excluded=frozenset({"w0"})) == "w1"
    assert bench.pick(subset=frozenset()) == ""


def test_a_worker_that_became_ready_since_a_request_left_it_is_not_excluded_any_more() -> None:
    bench = Bench()
    worker = bench.worker("w0")
    ticket = bench.ask(excluded=frozenset({"w0"}))
    assert ticket.is_waiting
    bench.pass_time(0.1)
    bench.report(worker, state=WorkerState.UNAVAILABLE)
    assert ticket.is_waiting
    bench.pass_time(0.1)
    bench.report(worker)
    assert ticket.lease is not None


def test_a_long_prompt_goes_where_the_context_is_long_enough() -> None:
    bench = Bench()
    bench.worker("short", models={"demo": 1000})
    bench.worker("long", models={"demo": 8000})
    assert {bench.pick(prompt_tokens=1000) for _ in range(20)} == {"long"}
    assert bench.scheduler.pick(Request(model="demo", prompt_tokens=8000, exact=True)).verdict is Verdict.TOO_LONG
    # An estimate may be wrong, and the worker counts exactly.
    assert bench.pick(prompt_tokens=8000) == "long"


def test_an_unknown_model_is_told_from_one_whose_workers_are_away() -> None:
    bench = Bench()
    worker = bench.worker("w0", models={"away": 100})
    bench.worker("w1")
    assert bench.scheduler.pick(Request(model="nonsense")).verdict is Verdict.NOT_READY
    bench.pass_time(1.5)
    bench.fleet.remove(worker)
    assert bench.scheduler.pick(Request(model="nonsense")).verdict is Verdict.UNKNOWN_MODEL
    assert bench.scheduler.pick(Request(model="away")).verdict is Verdict.NOT_READY


def test_a_decision_is_explained_in_one_line() -> None:
    bench = Bench()
    bench.worker("w0")
    bench.fleet.drain("w0", drained=True)
    bench.worker("w1")
    bench.worker("w2")
    reason = bench.scheduler.pick(Request(model="demo", prompt_tokens=1000)).reason
    assert reason == "least predicted time of 2 (1 drained): first token in 120.0 ms, whole answer in 2.68 s"


def test_a_decision_says_how_much_of_a_prediction_is_there_since_first_tokens_came_late() -> None:
    bench = Bench()
    bench.worker("w0")
    assert "late" not in bench.scheduler.pick(Request(model="demo", prompt_tokens=1000)).reason
    for _ in range(60):
        ticket = bench.ask(prompt_tokens=1000)
        bench.pass_time(0.45)  # 0.12 s are predicted
        bench.admission.finish(ticket, Outcome.COMPLETED, output_tokens=1, first_token_seconds=0.45)
    bench.ask(prompt_tokens=1000, request_id="r")
    (record,) = bench.decisions.of("r")
    ((_, _, prediction),) = record.looked_at
    whole, late = prediction[0], prediction[5]
    assert 0.15 < late < 0.34
    assert whole - late == pytest.approx(0.12, abs=0.05)
    said = (
        f"first token in {1000 * whole:.1f} ms ({1000 * late:.1f} ms of it learnt: first tokens there came late), whole"
    )
    assert said in record.reason
    (candidate,) = wire.decision(record, bench.clock).candidates
    assert candidate.predicted_delay_duration.ToNanoseconds() / 1e9 == pytest.approx(late, abs=1e-6)


def test_a_full_worker_is_not_picked_for_work_but_for_a_question() -> None:
    bench = Bench()
    bench.worker("w0", max_running=1)
    bench.fill()
    assert bench.scheduler.pick(Request(model="demo")).verdict is Verdict.FULL
    assert bench.pick(occupies_slot=False) == "w0"


def test_a_request_goes_only_where_its_model_can_do_what_it_needs() -> None:
    bench = Bench()
    bench.worker("embeds", abilities={"demo": frozenset({"embed"})})
    bench.worker("writes", abilities={"demo": frozenset({"generate", "tools"})})
    assert {bench.pick(needs=frozenset({"generate"})) for _ in range(20)} == {"writes"}
    assert {bench.pick(needs=frozenset({"embed"})) for _ in range(20)} == {"embeds"}
    nowhere = bench.scheduler.pick(Request(model="demo", needs=frozenset({"audio"})))
    assert nowhere.out == {"not able to": 2}
    assert nowhere.verdict is Verdict.UNABLE


def test_of_very_many_workers_some_are_compared_and_the_only_one_with_room_is_found_all_the_same() -> None:
    bench = Bench()
    workers = [bench.worker(f"w{number}", max_running=1) for number in range(200)]
    decision = bench.scheduler.pick(Request(model="demo"))
    assert len(decision.looked_at) == 64
    assert len({bench.pick() for _ in range(200)}) > 50
    for worker in workers:
        bench.report(worker, running=0 if worker.worker_id == "w17" else 2)
    assert {bench.pick() for _ in range(20)} == {"w17"}


def test_of_very_many_workers_those_that_know_the_prompt_are_compared() -> None:
    bench = Bench()
    for number in range(200):
        bench.worker(f"w{number}", max_running=8, kv_tokens=100_000)
    asked: dict[str, Any] = {"prompt_tokens": 4000, "prefix_hashes": tuple(range(60))}
    first = bench.ask(**asked)
    assert first.lease is not None
    bench.admission.finish(first, Outcome.COMPLETED, output_tokens=10)
    bench.pass_time(1.0)
    assert {bench.pick(**asked) for _ in range(20)} == {first.lease.worker.worker_id}


def test_what_was_decided_is_kept_in_its_record_and_not_with_the_granted_request() -> None:
    bench = Bench()
    for number in range(3):
        bench.worker(f"w{number}")
    ticket = bench.ask(request_id="r1")
    assert bench.reason(ticket).startswith("least predicted time of 3: ")
    assert ticket.decision is None
    assert len(bench.decisions.of("r1")[0].looked_at) == 3
