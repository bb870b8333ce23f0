"""How well the router picks, on traces in virtual time: a small and seeded part of bench/routing."""

from bench.routing.cases import EQUAL, UNEQUAL, best_hit_rate
from bench.routing.runs import TOKENLOOM, capacity, run
from bench.routing.traces import conversations, poisson


def test_on_unequal_cards_first_tokens_come_sooner_than_with_least_requests() -> None:
    trace = poisson(0.7 * capacity(UNEQUAL, seconds=40), 240, seed=5)
    ours, theirs = (run(policy, UNEQUAL, trace) for policy in (TOKENLOOM, "least requests"))
    assert len(ours.ttfts()) == len(trace)
    assert ours.ttft(0.95, since=30) <= 0.7 * theirs.ttft(0.95, since=30)
    assert ours.ttft(0.99, since=30) <= 0.65 * theirs.ttft(0.99, since=30)


def test_shared_beginnings_are_found_again_and_no_worker_is_crowded_for_it() -> None:
    trace = conversations(25.0, 60, seed=3)
    result = run(TOKENLOOM, EQUAL, trace)
    assert result.hit_rate >= 0.95 * best_hit_rate(trace)
    assert result.request_imbalance() <= 1.3


def test_a_run_can_be_repeated() -> None:
    trace = poisson(5.0, 30, seed=1)
    first, second = (run(TOKENLOOM, UNEQUAL, trace, seed=9).ttfts() for _ in range(2))
    assert first == second
