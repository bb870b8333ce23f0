"""A real OTLP gRPC receiver of metrics, and what Prometheus would make of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.metrics.v1 import metrics_pb2 as pb
from prometheus_client.parser import text_string_to_metric_families

from tests.support.otlp import serving

__all__ = ["MetricsReceiver", "Series", "metrics_receiver", "scraped", "series_of"]

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""The values of series, by name and labels, as a scrape shows them."""


class MetricsReceiver(metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps the latest that each process told of each metric."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.calls = 0
        self._lock = Lock()
        self._latest: dict[str, dict[str, pb.Metric]] = {}

    def Export(
        self,
        request: metrics_service_pb2.ExportMetricsServiceRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> metrics_service_pb2.ExportMetricsServiceResponse:
        """Takes some metrics of a process."""
        with self._lock:
            self.calls += 1
            for group in request.resource_metrics:
                about = {pair.key: pair.value.string_value for pair in group.resource.attributes}
                name = f"{about['service.name']}/{about['service.instance.id']}"
                known = self._latest.setdefault(name, {})
                known.update({metric.name: metric for scope in group.scope_metrics for metric in scope.metrics})
        return metrics_service_pb2.ExportMetricsServiceResponse()

    def latest(self) -> dict[str, dict[str, pb.Metric]]:
        """Metrics by name, of each `service/instance`."""
        with self._lock:
            return {process: dict(metrics) for process, metrics in self._latest.items()}


@contextmanager
def metrics_receiver(address: str = "127.0.0.1:0") -> Iterator[MetricsReceiver]:
    """Receives metrics at `receiver.endpoint` until the block is left."""
    receiver = MetricsReceiver()
    add: Any = metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server
    with serving(partial(add, receiver), address) as receiver.endpoint:
        yield receiver


def series_of(metric: pb.Metric) -> Series:
    """The series that Prometheus makes of a metric that it takes over OTLP."""
    if metric.HasField("sum"):
        assert metric.sum.is_monotonic
        return {(f"{metric.name}_total", _labels(point)): point.as_double for point in metric.sum.data_points}
    if metric.HasField("gauge"):
        return {(metric.name, _labels(point)): point.as_double for point in metric.gauge.data_points}
    series: Series = {}
    for point in metric.histogram.data_points:
        below = 0
        for bound, count in zip([*point.explicit_bounds, float("inf")], point.bucket_counts, strict=True):
            below += count
            series[f"{metric.name}_bucket", _labels(point) | {("le", str(float(bound)))}] = below
        series[f"{metric.name}_count", _labels(point)] = point.count
        series[f"{metric.name}_sum", _labels(point)] = point.sum
    return series


def scraped(page: str) -> Series:
    """The series of a page that a process serves, but for when each began."""
    return {
        (sample.name, frozenset((name, _bound(name, value)) for name, value in sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def _bound(name: str, value: str) -> str:
    return str(float(value)) if name == "le" else value


def _labels(point: Any) -> frozenset[tuple[str, str]]:
    return frozenset((pair.key, pair.value.string_value) for pair in point.attributes)
