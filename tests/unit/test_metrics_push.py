"""Prometheus metrics as OTLP has them, and what it costs when nobody takes them."""

import socket
import time

from opentelemetry.proto.metrics.v1 import metrics_pb2 as pb
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Summary, generate_latest

from services.common.metrics_push import otlp_of, pushed, unit_of
from services.common.settings import MetricsPushSettings
from tests.support.otlp_metrics import Series, metrics_receiver, scraped, series_of
from tests.support.vocabulary import vocabulary
from tests.support.waiting import wait_until

# The unit of OTLP that each unit of the vocabulary is; what only counts something has none.
UNITS = {
    "seconds": "s",
    "bytes": "By",
    "bytes per second": "By/s",
    "tokens per second": "{token}/s",
    "ratio": "1",
    "degrees Celsius": "Cel",
    "watts": "W",
    "hertz": "Hz",
    "joules": "J",
}
TRACE = "0af7651916cd43dd8448eb211c80319c"


def registry() -> CollectorRegistry:
    """One of each kind, with and without labels."""
    made = CollectorRegistry()
    requests = Counter("requests_total", "Requests.", ["outcome"], registry=made)
    requests.labels("ok").inc(3)
    requests.labels("failed").inc()
    Gauge("memory_used_bytes", "Memory.", registry=made).set(1.5e9)
    took = Histogram("request_duration_seconds", "Time.", ["model"], buckets=(0.1, 1.0), registry=made)
    for seconds in (0.05, 0.1, 0.5, 7.0):
        took.labels("a").observe(seconds, exemplar={"trace_id": TRACE, "span": "x"})
    took.labels("b").observe(0.2)
    Histogram("empty_seconds", "Never.", buckets=(1.0,), registry=made)
    return made


def told_of(made: CollectorRegistry) -> Series:
    """What Prometheus makes of what is pushed."""
    told = [series_of(metric) for metric in otlp_of(made.collect(), began=1, now=2)]
    return {key: value for series in told for key, value in series.items()}


def test_what_is_pushed_becomes_the_series_that_a_scrape_shows() -> None:
    made = registry()
    assert told_of(made) == scraped(generate_latest(made).decode())


def test_units_times_and_meanings_are_told() -> None:
    metrics = {metric.name: metric for metric in otlp_of(registry().collect(), began=1, now=2)}
    told = {name: (metric.unit, metric.description) for name, metric in metrics.items()}
    assert told == {
        "requests": ("", "Requests."),
        "memory_used_bytes": ("By", "Memory."),
        "request_duration_seconds": ("s", "Time."),
        "empty_seconds": ("s", "Never."),
    }
    count = metrics["requests"].sum
    assert count.aggregation_temporality == pb.AGGREGATION_TEMPORALITY_CUMULATIVE
    assert {(point.start_time_unix_nano, point.time_unix_nano) for point in count.data_points} == {(1, 2)}


def test_exemplars_lead_to_their_traces() -> None:
    metrics = {metric.name: metric for metric in otlp_of(registry().collect(), began=1, now=2)}
    points = metrics["request_duration_seconds"].histogram.data_points
    assert [len(point.exemplars) for point in points] == [3, 0]
    last = points[0].exemplars[-1]
    assert (last.trace_id.hex(), last.as_double) == (TRACE, 7.0)
    assert [(pair.key, pair.value.string_value) for pair in last.filtered_attributes] == [("span", "x")]


def test_what_is_rare_is_told_by_its_parts() -> None:
    made = CollectorRegistry()
    Summary("reply_seconds", "Times.", registry=made).observe(2)
    Info("build", "Which.", registry=made).info({"version": "1"})
    assert told_of(made) == scraped(generate_latest(made).decode())


def test_the_unit_of_each_metric_is_the_vocabularys() -> None:
    told = {entry.name: unit_of(entry.name) for entry in vocabulary()}
    assert told == {entry.name: UNITS.get(entry.unit, "") for entry in vocabulary()}


def test_a_backend_that_never_answers_costs_two_seconds_at_the_end_and_no_thread() -> None:
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(1)
        settings = MetricsPushSettings(endpoint=f"127.0.0.1:{hole.getsockname()[1]}", seconds=0.5)
        with pushed("test", "test", settings, registry()):
            time.sleep(0.7)
            closing = time.monotonic()
    assert time.monotonic() - closing < 3


def test_a_backend_that_comes_back_is_told_all_there_is() -> None:
    with metrics_receiver() as gone:
        endpoint = gone.endpoint
    made = registry()
    with pushed("test", "one", MetricsPushSettings(endpoint=endpoint, seconds=0.5), made):
        time.sleep(0.7)
        with metrics_receiver(endpoint) as back:
            wait_until(lambda: "tokenloom-test/one" in back.latest(), within=10)
            found = back.latest()["tokenloom-test/one"]
    assert set(found) == {"requests", "memory_used_bytes", "request_duration_seconds", "empty_seconds"}


def test_the_last_push_is_made_at_the_end_in_requests_of_bounded_size() -> None:
    made = CollectorRegistry()
    for number in range(300):
        Gauge(f"metric_{number}", "One of many.", registry=made).set(number)
    with metrics_receiver() as receiver:
        with pushed("test", "one", MetricsPushSettings(endpoint=receiver.endpoint, seconds=3600), made):
            assert receiver.calls == 0
        assert receiver.calls == 3
        assert len(receiver.latest()["tokenloom-test/one"]) == 300
