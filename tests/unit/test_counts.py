"""Counters and histograms of what comes with every request, beside the library's own."""

import random

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.openmetrics.exposition import generate_latest

from services.common.metrics import Spread, Tally

BUCKETS = (0.001, 0.5, 2.5, 40.0)


def lines(registry: CollectorRegistry) -> list[str]:
    """What is told, but for when."""
    text = generate_latest(registry).decode()  # type: ignore[no-untyped-call]  # untyped upstream
    return [line.rsplit(" ", 1)[0] if " # {" in line else line for line in text.splitlines()]


def test_a_tally_tells_what_the_librarys_counter_does() -> None:
    own, library = CollectorRegistry(), CollectorRegistry()
    tally = Tally("things", "Things.", "kind", "lane", registry=own)
    counter = Counter("things", "Things.", ["kind", "lane"], registry=library)
    for kind, amount in (("a", 1.0), ("b", 2.5), ("a", 4.0), ("c", 0.0)):
        tally.add(amount, kind, "x")
        counter.labels(kind, "x").inc(amount)
    tally.mark({"trace_id": "1"}, "b", "x")
    counter.labels("b", "x").inc(1, exemplar={"trace_id": "1"})
    tally.add(1, "b", "x")
    assert lines(own) == lines(library)


@pytest.mark.parametrize("seed", range(3))
def test_a_spread_tells_what_the_librarys_histogram_does(seed: int) -> None:
    own, library, draw = CollectorRegistry(), CollectorRegistry(), random.Random(seed)
    spread = Spread("seconds", "Seconds.", BUCKETS, "model", registry=own)
    histogram = Histogram("seconds", "Seconds.", ["model"], buckets=BUCKETS, registry=library)
    values = [*BUCKETS, 0.0, 41.0, *(draw.uniform(0, 50) for _ in range(20))]
    for number, value in enumerate(values):
        exemplar = {"trace_id": f"{number:032x}"} if number % 3 else None
        spread.observe(value, exemplar, "m")
        histogram.labels("m").observe(value, exemplar)
    assert lines(own) == lines(library)
