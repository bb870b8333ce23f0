"""Where requests go without a router: among those that were ready, evenly, and never beyond their room."""

from collections import Counter

import pytest

from services.gateway.placement import KnownWorker, Placement


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def worker(name: str, *, models: tuple[str, ...] = ("demo",), max_running: int = 8, leases: int = 0) -> KnownWorker:
    return KnownWorker(
        worker_id=name, endpoint=f"{name}:1", models=frozenset(models), max_running=max_running, leases=leases
    )


def placement(*workers: KnownWorker, targets: dict[str, tuple[str, ...]] | None = None) -> tuple[Placement, Clock]:
    clock = Clock()
    made = Placement(memory_seconds=60, clock=clock, seed=1)
    made.see(workers, targets or {})
    return made, clock


def placed(made: Placement, model: str = "demo", excluded: tuple[str, ...] = ()) -> str:
    place = made.place(model, excluded)
    if place is None:
        return ""
    made.took(place.worker_id)
    return place.worker_id


def test_requests_spread_and_stop_where_there_is_no_room() -> None:
    made, _ = placement(*(worker(f"w{index}", max_running=10) for index in range(4)))
    first = Counter(placed(made) for _ in range(20))
    assert max(first.values()) - min(first.values()) <= 2
    assert Counter(placed(made) for _ in range(20)) + first == dict.fromkeys(("w0", "w1", "w2", "w3"), 10)
    assert placed(made) == ""
    made.gave_back("w2")
    assert placed(made) == "w2"


def test_a_larger_worker_gets_more() -> None:
    made, _ = placement(worker("large", max_running=30), worker("small", max_running=10))
    counts = Counter(placed(made) for _ in range(20))
    assert counts["large"] == pytest.approx(15, abs=1)


def test_what_other_gateways_had_there_is_reckoned_with_and_our_own_is_not_counted_twice() -> None:
    made, _ = placement(worker("a", max_running=4))
    made.took("a")
    made.see([worker("a", max_running=4, leases=3)], {})
    assert [placed(made) for _ in range(2)] == ["a", ""]


def test_only_workers_with_the_model_and_none_that_failed_it() -> None:
    made, _ = placement(worker("a"), worker("b"), worker("c", models=("other",)))
    assert placed(made, excluded=("a",)) == "b"
    assert placed(made, excluded=("a", "b")) == ""
    assert placed(made, "other") == "c"
    assert placed(made, "nothing") == ""


def test_an_alias_goes_to_the_first_of_its_models_that_has_room() -> None:
    made, _ = placement(
        worker("a", models=("one",), max_running=1), worker("b", models=("two",)), targets={"chat": ("one", "two")}
    )
    first = made.place("chat")
    assert first is not None
    assert (first.worker_id, first.model) == ("a", "one")
    made.took("a")
    second = made.place("chat")
    assert second is not None
    assert (second.worker_id, second.model) == ("b", "two")


def test_what_was_seen_is_forgotten_after_a_while() -> None:
    made, clock = placement(worker("a"))
    clock.now += 59
    assert placed(made) == "a"
    clock.now += 2
    assert placed(made) == ""
