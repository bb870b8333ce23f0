"""Tenants beyond their share of the slots: who they are, and what is kept free of them."""

from typing import Any

import pytest

from services.common.errors import Reason
from services.router.promises import Promises
from services.router.request import Request
from services.router.shares import ModelShares, Shares
from services.router.ticket import Ticket
from services.router.waiting import LaneKey
from services.router.worker import Outcome
from tests.support.scheduling import Bench


def over(shares: Shares, tenant: str, slots: int, *, now: float = 0.0, waiting: bool = False) -> bool:
    return shares.left(tenant, slots, now, waiting=waiting) <= 0


def test_who_is_alone_has_everything() -> None:
    shares = Shares()
    shares.runs("only", 1000, 0.0)
    assert not over(shares, "only", 10)


@pytest.mark.parametrize(("others", "slots", "most"), [(1, 64, 44), (3, 64, 24), (9, 192, 28), (200, 64, 2)])
def test_beyond_its_share_and_what_chance_explains_a_tenant_is_over(others: int, slots: int, most: int) -> None:
    shares = Shares()
    for number in range(others):
        shares.runs(f"other-{number}", 1, 0.0)
    count = 0
    while not over(shares, "noisy", slots):
        shares.runs("noisy", 1, 0.0)
        count += 1
    assert count == most
    assert not over(shares, "other-0", slots)


def test_those_that_wait_count_where_it_is_asked_for() -> None:
    shares = Shares()
    shares.waits("noisy", 50, 0.0)
    shares.runs("quiet", 1, 0.0)
    assert over(shares, "noisy", 64, waiting=True)
    assert not over(shares, "noisy", 64, waiting=False)


def test_who_left_lately_still_has_a_share_and_later_has_none() -> None:
    shares = Shares()
    shares.runs("noisy", 50, 0.0)
    shares.runs("quiet", 1, 0.0)
    shares.runs("quiet", -1, 1.0)
    assert over(shares, "noisy", 64, now=10.9)
    assert not over(shares, "noisy", 64, now=11.1)
    shares.runs("noisy", -50, 12.0)
    assert not shares.is_idle(21.9)
    assert shares.is_idle(22.1)


def test_models_that_nobody_asks_for_any_more_are_forgotten() -> None:
    models = ModelShares()
    models.of("busy", 0.0).runs("tenant", 1, 0.0)
    for number in range(1000):
        models.of(f"nonsense-{number}", 0.0)
    assert len(models) <= 256
    models.of("busy", 0.0).runs("other", 60, 0.0)
    assert over(models.of("busy", 0.0), "other", 64)


def beside(*tenants: str) -> tuple[Bench, list[Ticket], list[Ticket]]:
    """One worker with 64 slots: one request of each tenant, then 64 of a noisy one."""
    bench = Bench()
    bench.worker("w0", max_running=64)
    quiet = [bench.ask(tenant=tenant, prompt_tokens=1) for tenant in tenants]
    return bench, quiet, [bench.ask(tenant="noisy", prompt_tokens=1, slo_class="batch") for _ in range(64)]


def granted(tickets: list[Ticket]) -> int:
    return sum(ticket.lease is not None for ticket in tickets)


def test_alone_a_tenant_gets_every_slot_and_beside_another_one_some_stay_free_of_it() -> None:
    _, _, noisy = beside()
    assert granted(noisy) == 64
    bench, _, noisy = beside("quiet")
    assert 40 <= granted(noisy) <= 48
    decision = noisy[44].decision
    assert decision is not None
    assert decision.reason == "full (1 kept for other tenants)"
    assert all(bench.ask(tenant="quiet", prompt_tokens=1).lease is not None for _ in range(10))


def test_what_was_kept_free_is_given_to_whoever_waits_once_the_others_have_been_away_for_10_s() -> None:
    bench, quiet, noisy = beside("quiet")
    bench.admission.finish(quiet[0], Outcome.COMPLETED, output_tokens=10)
    bench.pass_time(9.0)
    assert granted(noisy) < 48
    bench.pass_time(1.5)
    assert granted(noisy) == 64


def test_beyond_its_share_a_hurried_request_is_refused_where_its_tenants_own_do_not_end_in_time() -> None:
    bench = Bench()
    bench.worker("w0", max_running=16)
    for _ in range(5):
        bench.ask(tenant="noisy", prompt_tokens=1)
    # One more than there are slots may wait in the engine.
    for number in range(12):
        assert bench.ask(tenant=f"quiet-{number % 7}", prompt_tokens=1).lease is not None
    # A slot is free every 0.2 s, one of its own every 0.6 s; the class may wait for 0.4 s.
    over_its_share = bench.ask(tenant="noisy", prompt_tokens=1, slo_class="interactive")
    assert over_its_share.error is not None
    assert over_its_share.error.reason is Reason.NO_CAPACITY
    assert bench.ask(tenant="quiet-0", prompt_tokens=1, slo_class="interactive").is_waiting
    assert bench.ask(tenant="noisy", prompt_tokens=1).is_waiting


def test_a_tenant_that_leaves_room_does_not_hold_up_those_behind_it() -> None:
    bench = Bench(max_wait_seconds=1e6)
    bench.worker("w0", max_running=16)
    first = bench.ask(tenant="fair", prompt_tokens=1)
    noisy = [bench.ask(tenant="noisy", prompt_tokens=1, slo_class="batch") for _ in range(30)]
    fair = [first, *(bench.ask(tenant="fair", prompt_tokens=1, slo_class="batch") for _ in range(30))]
    most = granted(noisy)
    assert most == 14
    for number, ticket in enumerate(fair[:20]):
        before = granted(fair)
        bench.admission.finish(ticket, Outcome.COMPLETED, output_tokens=100)
        bench.pass_time(0.1)
        assert granted(fair) == before + 1 or number < 1
    assert granted(noisy) == most


def test_a_promise_is_due_at_its_time_and_in_its_class_alone() -> None:
    promises: Promises[Ticket] = Promises()
    tickets = {
        name: Ticket(Request(model=model, priority=priority), lambda _: None, asked_at=0.0, deadline=9.0)
        for name, model, priority in (("early", "a", 0), ("late", "a", 0), ("low", "a", 5), ("other", "b", 0))
    }
    for at, ticket in enumerate(tickets.values()):
        ticket.lane = LaneKey(ticket.request.model or "", None)
        promises.set(ticket, float(at))
    assert promises.overdue(("a", "b"), 0, -1.0) is None
    assert promises.overdue(("a", "b"), 0, 9.0) is tickets["early"]
    promises.drop(tickets["early"])
    promises.drop(tickets["early"])
    assert promises.overdue(("a",), 0, 0.5) is None
    assert promises.overdue(("a",), 0, 1.0) is tickets["late"]
    assert promises.overdue(("b",), 0, 9.0) is tickets["other"]
    assert promises.overdue(("a",), 5, 9.0) is tickets["low"]
    assert promises.overdue(("c",), 0, 9.0) is None


def test_who_is_overdue_goes_before_those_whose_turn_it_is() -> None:
    bench = Bench(max_wait_seconds=1e6)
    bench.worker("w0", max_running=1)
    running = bench.fill(tenant="filler")
    patient = [bench.ask(tenant="many", prompt_tokens=1) for _ in range(2)]
    newcomers = [bench.ask(tenant=f"new-{number}", prompt_tokens=1, slo_class="batch") for number in range(3)]
    bench.pass_time(9.9)
    for ticket in running:
        bench.admission.finish(ticket, Outcome.COMPLETED, output_tokens=100)
    assert [ticket.lease is not None for ticket in patient] == [True, False]
    # The standard class may wait for 10 s.
    bench.pass_time(0.2)
    bench.admission.finish(patient[0], Outcome.COMPLETED, output_tokens=100)
    assert patient[1].lease is not None
    assert all(ticket.is_waiting for ticket in newcomers)


def test_a_tenant_with_more_than_its_share_may_use_what_it_has_cached_but_not_spare_slots_of_others() -> None:
    bench = Bench()
    home = bench.worker("home", max_running=64)
    prompt: dict[str, Any] = {"prompt_tokens": 640, "prefix_hashes": tuple(range(10))}
    assert bench.ask(tenant="noisy", **prompt).lease is not None
    bench.ask(tenant="quiet", prompt_tokens=1)
    bench.pass_time(0.1)
    # Its prefill is not idle any more, so that what is left of it is kept for others.
    assert bench.ask(tenant="quiet", prompt_tokens=500).lease is not None
    assert not home.has_spare
    assert home.has_spare_slots
    requests = (
        Request(model="demo", tenant="noisy", **prompt),
        Request(model="demo", tenant="noisy", prompt_tokens=640),
    )
    picked = [bench.scheduler.pick(request, spare=True).worker for request in requests]
    assert picked == [home, None]
