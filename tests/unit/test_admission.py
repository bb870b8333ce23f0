"""Who waits, in which order, and for how long."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from services.common.errors import Reason
from services.router.crowd import Counts, Crowd
from services.router.deadlines import Deadlines
from services.router.request import Request
from services.router.ticket import Ticket
from services.router.worker import Lease, Outcome
from tests.support.scheduling import Bench


def end(bench: Bench, ticket: Ticket) -> None:
    """The request is complete."""
    bench.admission.finish(ticket, Outcome.COMPLETED, output_tokens=100)


def serve_all(bench: Bench, running: list[Ticket], waiting: list[Ticket]) -> list[Ticket]:
    """Ends one request after the other until nobody waits; gives the order in which those who waited were served."""
    served: list[Ticket] = []
    running = list(running)
    while any(ticket.is_waiting for ticket in waiting):
        end(bench, running.pop(0))
        new = [ticket for ticket in waiting if ticket.lease is not None and ticket not in served]
        served += new
        running += new
    return served


def full_bench(**settings: object) -> tuple[Bench, list[Ticket]]:
    """One worker with two slots, both taken."""
    bench = Bench(**settings)
    bench.worker("w0", max_running=1)
    return bench, bench.fill(tenant="filler")


def test_requests_of_one_tenant_are_served_in_the_order_in_which_they_came() -> None:
    bench, running = full_bench()
    waiting = [bench.ask(slo_class="batch") for _ in range(5)]
    assert serve_all(bench, running, waiting) == waiting


def test_a_higher_class_goes_first() -> None:
    bench, running = full_bench()
    low, default, high = (bench.ask(priority=priority) for priority in (10, 0, -10))
    assert serve_all(bench, running, [low, default, high]) == [high, default, low]


def test_a_tenant_with_many_requests_does_not_hold_up_one_with_few() -> None:
    bench, running = full_bench()
    noisy = [bench.ask(tenant="noisy", slo_class="batch") for _ in range(50)]
    quiet = [bench.ask(tenant="quiet", slo_class="batch") for _ in range(2)]
    served = serve_all(bench, running, [*noisy, *quiet])
    assert max(served.index(ticket) for ticket in quiet) < 4


def test_tenants_share_in_tokens_not_in_requests() -> None:
    bench, running = full_bench(max_wait_seconds=1e6)
    large = [bench.ask(slo_class="batch", tenant="large", prompt_tokens=4000, max_output_tokens=1) for _ in range(20)]
    small = [bench.ask(slo_class="batch", tenant="small", prompt_tokens=400, max_output_tokens=1) for _ in range(200)]
    served = serve_all(bench, running, [*large, *small])[:55]
    tokens = Counter[str]()
    for ticket in served:
        tokens[ticket.tenant] += ticket.request.prompt_tokens
    assert tokens["large"] == pytest.approx(tokens["small"], rel=0.25)


def test_a_tenant_earns_no_credit_by_being_away() -> None:
    bench, running = full_bench(max_wait_seconds=1e6)
    early = [bench.ask(slo_class="batch", tenant="early") for _ in range(20)]
    for _ in range(10):
        end(bench, running.pop(0))
        running += [ticket for ticket in early if ticket.lease is not None and ticket not in running][-1:]
    late = [bench.ask(slo_class="batch", tenant="late") for _ in range(10)]
    still = [ticket for ticket in early if ticket.is_waiting]
    served = serve_all(bench, running, [*still, *late])
    assert {ticket.tenant for ticket in served[:4]} == {"early", "late"}
    assert Counter(ticket.tenant for ticket in served[:10])["late"] <= 6


def test_requests_that_may_not_go_to_the_free_worker_do_not_hold_up_the_rest() -> None:
    bench = Bench(max_wait_seconds=1e6)
    bench.worker("w0", max_running=1)
    bench.worker("w1", max_running=1)
    running = bench.fill()
    picky = [bench.ask(slo_class="batch", excluded=frozenset({"w0"})) for _ in range(30)]
    anybody = bench.ask(slo_class="batch")
    end(bench, next(t for t in running if t.lease is not None and t.lease.worker.worker_id == "w0"))
    assert anybody.lease is not None
    assert all(ticket.is_waiting for ticket in picky)


def test_beyond_the_bound_a_request_is_refused_with_the_time_to_come_back() -> None:
    bench, _ = full_bench(max_waiting=3)
    waiting = [bench.ask() for _ in range(3)]
    refused = bench.ask()
    assert all(ticket.is_waiting for ticket in waiting)
    assert refused.error is not None
    assert refused.error.reason is Reason.NO_CAPACITY
    # 128 tokens of 20.5 ms each hold the one slot; three and this one wait for it.
    assert refused.error.retry_after_seconds == pytest.approx(4 * 128 * 0.02, rel=0.05)


def test_the_time_to_come_back_follows_how_long_requests_take() -> None:
    bench, running = full_bench(max_waiting=0)
    bench.now += 10.0
    end(bench, running[0])
    bench.pass_time(0)
    bench.ask()
    refused = bench.ask()
    assert refused.error is not None
    assert refused.error.retry_after_seconds == pytest.approx(10.0)


def test_a_request_that_waits_is_granted_when_a_worker_registers() -> None:
    bench, _ = full_bench()
    ticket = bench.ask()
    bench.worker("w1")
    assert ticket.lease is not None
    assert ticket.lease.worker.worker_id == "w1"


def test_a_request_that_waits_is_granted_when_a_report_shows_room() -> None:
    bench = Bench()
    worker = bench.worker("w0", max_running=1)
    bench.report(worker, running=2)
    ticket = bench.ask()
    assert ticket.is_waiting
    bench.report(worker, running=0)
    assert ticket.lease is not None


def test_the_clients_deadline_and_the_routers_are_told_apart() -> None:
    bench, _ = full_bench(max_wait_seconds=10.0)
    hurried, patient = bench.ask(timeout_seconds=4.0), bench.ask(timeout_seconds=100.0)
    bench.pass_time(3.9)
    assert hurried.is_waiting
    bench.pass_time(0.2)
    assert hurried.error is not None
    assert hurried.error.reason is Reason.DEADLINE_EXCEEDED
    assert patient.is_waiting
    bench.pass_time(6.0)
    assert patient.error is not None
    assert patient.error.reason is Reason.NO_CAPACITY


def test_a_deadline_that_has_passed_is_refused_at_once() -> None:
    bench = Bench()
    bench.worker()
    error = bench.ask(timeout_seconds=0.0).error
    assert error is not None
    assert error.reason is Reason.DEADLINE_EXCEEDED


def test_with_nobody_ready_a_request_waits_for_the_grace_and_no_longer() -> None:
    bench = Bench(ready_grace_seconds=5.0)
    first = bench.ask()
    bench.pass_time(3.0)
    second = bench.ask()
    bench.pass_time(2.0)
    assert first.error is not None
    assert first.error.reason is Reason.NO_READY_WORKER
    assert first.error.retry_after_seconds is not None
    assert second.is_waiting
    bench.worker()
    assert second.lease is not None


def test_requests_that_wait_for_a_slot_are_refused_some_time_after_the_last_worker_is_gone() -> None:
    bench, _ = full_bench(ready_grace_seconds=5.0)
    ticket = bench.ask()
    bench.fleet.remove(bench.fleet.workers[0])
    for _ in range(40):
        bench.pass_time(0.25)
    assert ticket.error is not None
    assert ticket.error.reason is Reason.NO_READY_WORKER


def test_an_unknown_model_is_refused_at_once() -> None:
    bench = Bench()
    bench.worker()
    bench.pass_time(2.0)
    error = bench.ask("nonsense").error
    assert error is not None
    assert (error.reason, error.field) == (Reason.MODEL_NOT_FOUND, "model")


def test_a_subset_of_which_nobody_is_ready_is_refused_at_once() -> None:
    bench = Bench()
    bench.worker()
    error = bench.ask(subset=frozenset({"10.9.9.9:1"})).error
    assert error is not None
    assert error.reason is Reason.NO_READY_WORKER


def test_a_request_that_is_given_up_is_not_granted() -> None:
    bench, running = full_bench()
    gone, next_one = bench.ask(), bench.ask()
    bench.admission.finish(gone)
    end(bench, running[0])
    assert gone.lease is None
    assert next_one.lease is not None
    assert bench.admission.waiting_count == 0


def test_every_request_that_asks_is_answered_once() -> None:
    bench, running = full_bench()
    answers: list[Ticket] = []
    for number in range(50):
        request = Request(model="demo", tenant=f"t{number % 7}", priority=number % 3)
        bench.admission.ask(request, answers.append)
    serve_all(bench, running, [])
    while bench.admission.waiting_count:
        holders = [ticket for ticket in [*running, *answers] if isinstance(ticket.lease, Lease)]
        for ticket in holders:
            end(bench, ticket)
    assert len(answers) == len(set(answers)) == 50


def test_decisions_are_kept_by_request_and_forgotten_in_order() -> None:
    bench, _ = full_bench()
    bench.ask(request_id="r1", timeout_seconds=0.0)
    ticket = bench.ask(request_id="r1")
    bench.worker("w1")
    assert ticket.lease is not None
    records = bench.decisions.of("r1")
    assert [record.worker_id for record in records] == ["", "w1"]
    assert records[1].reason.startswith("least predicted time of 1 (1 full)")
    assert bench.decisions.of("unknown") == []


def test_a_line_through_which_many_have_passed_holds_no_trace_of_them() -> None:
    bench, running = full_bench()
    keeper = bench.ask(tenant="keeper", priority=1)
    for number in range(3000):
        bench.admission.finish(bench.ask(tenant=f"t{number}", priority=number % 2))
    assert bench.admission.waiting_count == 1
    end(bench, running[0])
    assert keeper.lease is not None


def test_a_request_that_would_wait_longer_than_its_class_allows_is_refused_at_once() -> None:
    bench, _ = full_bench()
    # The slot is free every 2.6 s.
    hurried = [bench.ask(slo_class="interactive") for _ in range(3)]
    assert [ticket.is_waiting for ticket in hurried] == [False] * 3
    error = hurried[0].error
    assert error is not None
    assert error.reason is Reason.NO_CAPACITY
    assert error.retry_after_seconds == pytest.approx(2.16, abs=0.05)
    standard = [bench.ask() for _ in range(6)]
    assert [ticket.is_waiting for ticket in standard] == [True] * 3 + [False] * 3
    error = standard[-1].error
    assert error is not None
    assert bench.ask(slo_class="batch").is_waiting


def test_a_burst_waits_for_prefill_where_slots_are_free_and_not_for_answers_to_end() -> None:
    bench = Bench()
    bench.worker("w0", max_running=64)
    # Each takes a tenth of a second of prefill; by then answers, of 128 tokens of 0.02 s, are far from over.
    burst = [bench.ask(prompt_tokens=800) for _ in range(60)]
    assert not [ticket.error for ticket in burst if ticket.error is not None]
    assert 0 < len([ticket for ticket in burst if ticket.is_waiting]) < 60
    _, seconds = bench.admission.outlook(burst[-1])
    assert seconds is not None
    assert seconds < 10


def test_who_has_begun_is_not_refused_for_what_it_might_wait() -> None:
    bench, _ = full_bench()
    waiting = [bench.ask(emitted_tokens=7, attempt=2) for _ in range(20)]
    assert [ticket.is_waiting for ticket in waiting] == [True] * 20


def test_a_deadline_that_can_not_be_met_is_told_at_once() -> None:
    bench, _ = full_bench()
    assert bench.ask(timeout_seconds=2.0).error is not None
    assert bench.ask(timeout_seconds=3.0).is_waiting


def test_who_waits_is_told_how_many_are_before_it_and_how_long_it_takes() -> None:
    bench, _ = full_bench()
    first, second = bench.ask(), bench.ask()
    before, seconds = bench.admission.outlook(first)
    assert before == 1
    assert seconds == pytest.approx(2 * 128 * 0.02, rel=0.05)
    quiet = bench.ask(tenant="quiet")
    assert second.is_waiting
    # Tenants take turns: of the other one's two, one goes before it.
    assert bench.admission.outlook(quiet)[0] == 2


def test_a_full_line_makes_room_for_a_higher_class_and_for_a_tenant_with_fewer_requests() -> None:
    bench, _ = full_bench(max_waiting=4, max_wait_seconds=1e6)
    noisy = [bench.ask(tenant="noisy", slo_class="batch") for _ in range(4)]
    quiet = bench.ask(tenant="quiet", slo_class="batch")
    assert quiet.is_waiting
    assert [ticket.is_waiting for ticket in noisy] == [True, True, True, False]
    urgent = [bench.ask(tenant="noisy", priority=-1, slo_class="batch") for _ in range(4)]
    assert [ticket.is_waiting for ticket in [*urgent, quiet]] == [True] * 4 + [False]
    assert bench.ask(tenant="quiet", slo_class="batch").error is not None
    assert bench.admission.waiting_count == 4


def test_a_low_class_gets_a_turn_in_ten_while_higher_ones_never_end() -> None:
    bench, running = full_bench(max_wait_seconds=1e6)
    low = [bench.ask(priority=5, slo_class="batch") for _ in range(3)]
    bench.pass_time(5.0)
    high = [bench.ask(slo_class="batch") for _ in range(40)]
    served = serve_all(bench, running, [*low, *high])
    places = [served.index(ticket) for ticket in low]
    assert 3 <= places[0] <= 11
    assert all(5 <= later - sooner <= 11 for sooner, later in pairwise(places))


def test_retries_beyond_a_tenth_of_the_requests_are_refused_and_begun_streams_are_not() -> None:
    bench = Bench()
    bench.worker("w0", max_running=4096)
    for _ in range(500):
        bench.ask()
    retries = [bench.ask(attempt=2) for _ in range(200)]
    granted = [ticket for ticket in retries if ticket.lease is not None]
    assert 50 <= len(granted) <= 100
    error = retries[-1].error
    assert error is not None
    assert (error.reason, error.code) == (Reason.NO_CAPACITY, "retry_budget_exhausted")
    assert bench.ask(attempt=2, emitted_tokens=7).lease is not None


def test_begun_streams_that_move_leave_the_retries_of_others_alone() -> None:
    bench = Bench()
    bench.worker("w0", max_running=4096)
    assert all(bench.ask(attempt=2, emitted_tokens=7).lease is not None for _ in range(200))
    assert bench.ask(attempt=2).lease is not None


def test_one_of_two_workers_that_fails_everything_is_left_alone_and_comes_back_slowly() -> None:
    bench = Bench()
    bad, good = bench.worker("bad", max_running=64), bench.worker("good", max_running=64)
    attempts = 0
    for _ in range(1000):
        ticket = bench.ask()
        while True:
            attempts += 1
            assert ticket.lease is not None
            failed = ticket.lease.worker is bad
            bench.admission.finish(ticket, Outcome.FAILED if failed else Outcome.COMPLETED, output_tokens=10)
            if not failed:
                break
            ticket = bench.ask(attempt=2, excluded=frozenset({"bad"}))
        bench.pass_time(0.02)
    assert attempts <= 1100
    for _ in range(5):
        bench.admission.finish(bench.ask(excluded=frozenset({"good"})), Outcome.FAILED)
    assert bad.blocked == "ejected"
    # It is well again.
    bench.pass_time(8)
    early = Counter(_who(bench) for _ in range(300))
    assert early["bad"] < 0.3 * early["good"]
    bench.pass_time(90)
    late = Counter(_who(bench) for _ in range(300))
    assert late["bad"] > 0.5 * late["good"]
    assert not good.blocked


def _who(bench: Bench) -> str:
    ticket = bench.ask()
    assert ticket.lease is not None
    bench.admission.finish(ticket, Outcome.COMPLETED, output_tokens=10)
    return ticket.lease.worker.worker_id


def test_never_more_than_half_of_the_workers_are_ejected() -> None:
    bench = Bench()
    workers = [bench.worker(f"w{number}", max_running=64) for number in range(5)]
    for _ in range(200):
        bench.admission.finish(bench.ask(), Outcome.FAILED)
        bench.pass_time(0.01)
    assert sum(worker.blocked == "ejected" for worker in workers) == 2


def test_the_crowd_agrees_with_counting() -> None:
    rng = random.Random(3)
    bench = Bench()
    crowd: Crowd[Ticket] = Crowd()
    members: list[Ticket] = []
    for _ in range(3000):
        if members and rng.random() < 0.45:
            crowd.remove(members.pop(rng.randrange(len(members))))
        else:
            request = Request(model="demo", tenant=f"t{rng.randrange(6)}", priority=rng.randrange(3))
            members.append(Ticket(request, lambda _: None, asked_at=bench.now, deadline=0.0))
            crowd.add(members[-1])
        lowest = max((member.priority for member in members), default=0)
        counts = Counter(member.tenant for member in members if member.priority == lowest)
        victim = crowd.makes_room(-1, "new")
        assert (victim is None) == (not members)
        if victim is not None:
            assert victim.priority == lowest
            assert counts[victim.tenant] == max(counts.values())


def test_counts_of_those_who_wait_agree_with_counting() -> None:
    rng = random.Random(4)
    counts = Counts()
    members: list[tuple[int, str]] = []
    for _ in range(3000):
        if members and rng.random() < 0.49:
            counts.remove(*members.pop(rng.randrange(len(members))))
        else:
            members.append((rng.randrange(3), f"t{rng.randrange(6)}"))
            counts.add(*members[-1])
        priority, tenant = rng.randrange(3), f"t{rng.randrange(7)}"
        beside = [one for one in members if one[0] == priority]
        tenants = {one[1] for one in beside}
        rounds = beside.count((priority, tenant)) + 1
        turns = min(len(beside), len(tenants | {tenant}) * rounds - 1)
        assert counts.before(priority, tenant) == sum(one[0] < priority for one in members) + turns
        assert counts.tenants(priority) == len(tenants)
        assert counts.is_empty == (not members)


def test_times_come_in_order_in_whatever_order_they_were_set() -> None:
    rng = random.Random(5)
    deadlines: Deadlines[int] = Deadlines()
    times: dict[int, float] = {}
    now = 0.0
    for number in range(5000):
        now += rng.random()
        one = rng.randrange(number + 1)
        if rng.random() < 0.3:
            deadlines.drop(one)
            times.pop(one, None)
        else:
            times[one] = now + rng.choice([5.0, 5.0, 5.0, 0.5, 60.0])
            deadlines.set(one, times[one])
        assert deadlines.next == min(times.values(), default=None)
        if rng.random() < 0.1:
            due = sorted((at, one) for one, at in times.items() if at <= now)
            assert deadlines.take_due(now) == [one for _, one in due]
            times = {one: at for one, at in times.items() if at > now}
        assert deadlines.is_empty == (not times)


def test_behind_one_long_prompt_a_request_waits_for_its_prefill_and_not_for_its_answer() -> None:
    bench = Bench()
    worker = bench.worker("w0", max_running=8)
    long = bench.ask(prompt_tokens=6000)
    assert long.lease is not None
    hurried = bench.ask(slo_class="interactive", prompt_tokens=10)
    assert hurried.is_waiting
    bench.now += 0.4
    bench.report(worker, running=1, pending_prefill_tokens=2000)
    assert hurried.lease is not None
