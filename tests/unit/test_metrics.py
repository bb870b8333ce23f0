"""Metrics that are plain numbers until somebody asks, beside those of the library."""

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from services.common.metrics import QUEUE_SECONDS, Spread

BOUNDS = (0.001, 0.01, 1.0, 80.0)


@pytest.mark.parametrize("seen", [(), (0.0,), (0.001, 0.0011, 1.0, 80.0, 80.1, 1e9)])
def test_a_spread_reads_as_the_librarys_histogram(seen: tuple[float, ...]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    spread = Spread("seconds", "How long.", BOUNDS, registry=ours)
    histogram = Histogram("seconds", "How long.", buckets=BOUNDS, registry=theirs)
    for value in seen:
        spread.observe(value, None)
        histogram.observe(value)
    assert generate_latest(ours) == generate_latest(theirs)


def test_each_bound_of_a_spread_has_its_own_bucket() -> None:
    registry = CollectorRegistry()
    spread = Spread("seconds", "How long.", QUEUE_SECONDS, registry=registry)
    for bound in QUEUE_SECONDS:
        spread.observe(bound, None)
    counts = [
        sample.value for metric in registry.collect() for sample in metric.samples if sample.name.endswith("bucket")
    ]
    assert counts == [*range(1, len(QUEUE_SECONDS) + 1), len(QUEUE_SECONDS)]
