"""What the router knows of what is cached where."""

import random

import pytest

from services.common.prefix import salt_of, token_block_hashes
from services.router.card import Card
from services.router.prefixes import BlockIndex, Prefixes
from services.router.reading import HEALTHY
from services.router.request import Request
from services.router.worker import Worker
from tests.support.scheduling import Bench


def worker(name: str = "w0", **card: int) -> Worker:
    """A worker."""
    known = Card(worker_id=name, endpoint="10.0.0.1:1", models={"demo": 8192}, max_running=8, **card)  # type: ignore[arg-type]  # of a table
    return Worker(known, now=0.0, drained=False, condition=HEALTHY)


def asking(hashes: list[int], **request: object) -> Request:
    """A request whose prompt has 64 tokens in each of these blocks."""
    return Request(model="demo", prompt_tokens=64 * len(hashes), prefix_hashes=tuple(hashes), **request)  # type: ignore[arg-type]


def test_of_each_worker_the_longest_common_beginning_is_known() -> None:
    index = BlockIndex()
    index.add("a", [1, 2, 3, 4], most=100)
    index.add("b", [1, 2, 9], most=100)
    index.add("c", [7], most=100)
    assert index.depths([1, 2, 3, 5]) == {"a": 3, "b": 2}
    assert index.depths([2, 3]) == {"a": 2, "b": 1}
    assert index.depths([]) == index.depths([100]) == {}


def test_the_index_agrees_with_sets() -> None:
    rng = random.Random(5)
    index, sets = BlockIndex(), {f"w{number}": set[int]() for number in range(70)}
    for _ in range(2000):
        name, block = rng.choice(list(sets)), rng.randrange(40)
        match rng.randrange(10):
            case 0:
                index.forget(name)
                sets[name].clear()
            case 1 | 2:
                index.drop(name, [block])
                sets[name].discard(block)
            case _:
                index.add(name, [block], most=1000)
                sets[name].add(block)
    for _ in range(200):
        asked = [rng.randrange(40) for _ in range(5)]
        expected = {}
        for name, blocks in sets.items():
            depth = next((place for place, block in enumerate(asked) if block not in blocks), len(asked))
            if depth:
                expected[name] = depth
        assert index.depths(asked) == expected


def test_beyond_its_bound_a_worker_forgets_what_was_not_used_for_longest_and_ends_before_beginnings() -> None:
    index = BlockIndex()
    index.add("a", [1, 2, 3, 4], most=8)
    index.add("a", [11, 12, 13, 14], most=8)
    index.add("a", [1, 2], most=8)
    index.add("a", [21, 22], most=8)
    assert index.count("a") <= 8
    assert index.depths([1, 2, 3, 4])["a"] == 2
    assert index.depths([11, 12, 13, 14])["a"] >= 2
    assert index.depths([21, 22])["a"] == 2


def test_what_a_worker_may_remember_follows_its_kv_cache() -> None:
    prefixes, small, large = Prefixes(), worker("small", kv_tokens=64 * 100), worker("large", kv_tokens=64 * 10_000)
    for start in range(0, 1000, 10):
        for one in (small, large):
            prefixes.note(asking(list(range(start, start + 10))), one)
    first = prefixes.cached(asking(list(range(10))))
    assert set(first) == {"large"}


def test_a_cache_that_holds_less_than_was_thought_is_taken_for_smaller() -> None:
    prefixes, one = Prefixes(), worker(kv_tokens=64 * 1000)
    for start in range(0, 1000, 10):
        request = asking(list(range(start, start + 10)))
        prefixes.note(request, one)
        prefixes.learn(request, one, expected=600.0, cached=0)
    assert not prefixes.cached(asking(list(range(500, 510))))
    assert prefixes.cached(asking(list(range(990, 1000))))


def test_what_a_worker_tells_counts_where_tokens_are_known() -> None:
    prefixes, one = Prefixes(), worker(block_tokens=16, kv_tokens=1600)
    tokens = tuple(range(100))
    hashes = token_block_hashes(tokens, 16, salt=salt_of("demo"))
    request = Request(model="demo", prompt_tokens=100, prompt_token_ids=tokens)
    prefixes.tell(one, 1, cleared=True, stored=hashes[:4], removed=[])
    assert prefixes.cached(request) == {"w0": 64.0}
    prefixes.tell(one, 2, cleared=False, stored=[], removed=hashes[2:4])
    assert prefixes.cached(request) == {"w0": 32.0}
    # The last token of a prompt is computed even when all of it is there.
    prefixes.tell(one, 3, cleared=False, stored=hashes, removed=[])
    whole = Request(model="demo", prompt_tokens=96, prompt_token_ids=tokens[:96])
    assert prefixes.cached(whole) == {"w0": 95.0}


@pytest.mark.parametrize("count", [0, 10])
def test_of_a_prompt_that_is_said_to_be_shorter_than_its_tokens_no_more_is_cached_than_it_has(count: int) -> None:
    bench = Bench()
    workers = [bench.worker(name, block_tokens=16) for name in ("w0", "w1")]
    tokens = tuple(range(100))
    stored = token_block_hashes(tokens, 16, salt=salt_of("demo"))
    bench.prefixes.tell(workers[0], 1, cleared=True, stored=stored, removed=[])
    for one in workers:
        bench.report(one, pending_prefill_tokens=1000)
    request = Request(model="demo", prompt_tokens=count, prompt_token_ids=tokens)
    decision = bench.scheduler.pick(request)
    assert decision.prediction is not None
    assert decision.prediction[0] > 0
    assert bench.prefixes.cached(request) == {"w0": count}


def test_after_a_gap_a_worker_is_not_believed_until_it_starts_from_nothing() -> None:
    prefixes, one = Prefixes(), worker(block_tokens=16)
    tokens = tuple(range(64))
    hashes = token_block_hashes(tokens, 16, salt=salt_of("demo"))
    request = Request(model="demo", prompt_tokens=64, prompt_token_ids=tokens)
    prefixes.tell(one, 1, cleared=False, stored=hashes, removed=[])
    assert prefixes.cached(request)
    prefixes.tell(one, 3, cleared=False, stored=hashes, removed=[])
    assert not prefixes.cached(request)
    prefixes.tell(one, 4, cleared=True, stored=hashes, removed=[])
    assert prefixes.cached(request)


@pytest.mark.parametrize("again", [True, False])
def test_a_new_process_of_a_name_has_nothing_cached(again: bool) -> None:
    prefixes, first = Prefixes(), worker()
    prefixes.note(asking([1, 2, 3]), first)
    if again:
        prefixes.note(asking([8, 9]), worker())
    else:
        prefixes.forget(first)
    assert prefixes.cached(asking([1, 2, 3])) == {}


def test_a_shared_beginning_draws_requests_to_one_worker_and_not_to_a_crowded_one() -> None:
    bench = Bench()
    for number in range(4):
        bench.worker(f"w{number}", max_running=64, kv_tokens=100_000)
    shared = list(range(50))
    first = bench.ask(prompt_tokens=3300, prefix_hashes=(*shared, 101))
    assert first.lease is not None
    home = first.lease.worker
    bench.admission.finish(first)
    bench.pass_time(1.0)
    assert {bench.pick(prompt_tokens=3300, prefix_hashes=(*shared, 102 + n)) for n in range(20)} == {home.worker_id}
    bench.report(home, pending_prefill_tokens=60_000)
    assert bench.pick(prompt_tokens=3300, prefix_hashes=(*shared, 200)) != home.worker_id


def test_a_decision_says_how_much_it_took_for_cached() -> None:
    bench = Bench()
    bench.worker("w0", kv_tokens=100_000)
    first = bench.ask(prompt_tokens=640, prefix_hashes=tuple(range(10)))
    bench.admission.finish(first)
    second = bench.ask(prompt_tokens=640, prefix_hashes=tuple(range(10)), request_id="r2")
    assert "610 tokens cached" in bench.reason(second)
    assert bench.decisions.of("r2")[0].looked_at[0][2][4] == pytest.approx(609.5, abs=1)
