"""Pushes a process's Prometheus metrics over OTLP: what is registered for scrapes, and nothing else, retold."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Final

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1 import metrics_pb2 as pb
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Exemplar, Sample

from services.common.otlp import channel_to, headers_of
from services.common.settings import MetricsPushSettings
from services.common.tracing import resource_of

__all__ = ["otlp_of", "pushed", "unit_of"]

_log = logging.getLogger(__name__)
_METHOD: Final = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
_EXPORT_SECONDS: Final = 2.0
_CLOSING_SECONDS: Final = 2.0
# Writing a point takes some ten microseconds, and while some are written nothing else runs in a process.
_MOST_POINTS: Final = 128
_BREATH_SECONDS: Final = 0.0005
# The units of UCUM for the last words of names, which are the way that Prometheus has units.
_UNITS: Final = {
    "bytes_per_second": "By/s",
    "tokens_per_second": "{token}/s",
    "seconds": "s",
    "bytes": "By",
    "ratio": "1",
    "celsius": "Cel",
    "watts": "W",
    "joules": "J",
    "hertz": "Hz",
}


@contextmanager
def pushed(
    service: str, instance: str, settings: MetricsPushSettings | None, registry: CollectorRegistry
) -> Iterator[None]:
    """Pushes what `registry` has until the block is left, and once then; without settings, nothing.

    Nothing is kept for a backend that is away: the next push tells all there is.
    """
    if settings is None:
        yield
        return
    pusher = _Pusher(service, instance, settings, registry)
    try:
        yield
    finally:
        pusher.close()


def otlp_of(families: Iterable[Metric], *, began: int, now: int) -> Iterator[pb.Metric]:
    """Metrics as OTLP has them; times are ns since the epoch. Counts are since `began`.

    Prometheus, when it takes these over OTLP, gives them the names again that a scrape shows.
    """
    for family in families:
        # None of ours is a summary or anything rarer; a library's are told by their parts.
        metric = pb.Metric(name=family.name, description=family.documentation, unit=unit_of(family.name))
        if family.type == "counter":
            metric.sum.aggregation_temporality = pb.AGGREGATION_TEMPORALITY_CUMULATIVE
            metric.sum.is_monotonic = True
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    metric.sum.data_points.append(_number(sample, began, now))
        elif family.type == "histogram":
            metric.histogram.aggregation_temporality = pb.AGGREGATION_TEMPORALITY_CUMULATIVE
            metric.histogram.data_points.extend(_histograms(family.samples, began, now))
        elif family.type == "gauge":
            metric.gauge.data_points.extend(_number(sample, began, now) for sample in family.samples)
        else:
            yield from _parts(family, began, now)
            continue
        yield metric


def unit_of(name: str) -> str:
    """The unit that a name ends with; empty where it has none."""
    return next((unit for words, unit in _UNITS.items() if name.removesuffix("_total").endswith(f"_{words}")), "")


class _Pusher:
    def __init__(self, service: str, instance: str, settings: MetricsPushSettings, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._seconds = settings.seconds
        told = resource_of(service, instance).attributes
        self._resource = Resource(attributes=_attributes({name: str(value) for name, value in told.items()}))
        self._began = time.time_ns()
        self._channel = channel_to(settings.endpoint)
        self._export: grpc.UnaryUnaryMultiCallable[bytes, ExportMetricsServiceResponse] = self._channel.unary_unary(
            _METHOD, response_deserializer=ExportMetricsServiceResponse.FromString
        )
        self._metadata = headers_of("metrics")
        self._is_away = False
        self._has_closed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics push", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Pushes once more, for two seconds at most, and ends."""
        self._closing.set()
        self._thread.join(_CLOSING_SECONDS)
        self._has_closed = True
        self._channel.close()
        self._thread.join(1)

    def _run(self) -> None:
        while not self._closing.wait(self._seconds):
            self._push()
        self._push()

    def _push(self) -> None:
        for request in self._requests():
            if self._has_closed:
                return
            try:
                self._export(request, timeout=_EXPORT_SECONDS, metadata=self._metadata)
            except grpc.RpcError as error:
                self._note_failure(error)
                return
        if self._is_away:
            _log.info("metrics are taken again")
            self._is_away = False

    def _note_failure(self, error: Any) -> None:
        if not self._is_away:
            _log.warning("metrics are not taken", extra={"status": error.code().name, "cause": error.details()})
        self._is_away = True

    def _requests(self) -> Iterator[bytes]:
        points, metrics = 0, list[pb.Metric]()
        for metric in otlp_of(self._registry.collect(), began=self._began, now=time.time_ns()):
            metrics.append(metric)
            points += len(metric.sum.data_points) + len(metric.gauge.data_points) + len(metric.histogram.data_points)
            if points >= _MOST_POINTS:
                yield self._request(metrics)
                points, metrics = 0, []
                time.sleep(_BREATH_SECONDS)
        if metrics:
            yield self._request(metrics)

    def _request(self, metrics: list[pb.Metric]) -> bytes:
        group = pb.ResourceMetrics(resource=self._resource)
        group.scope_metrics.add(metrics=metrics).scope.name = "tokenloom"
        return ExportMetricsServiceRequest(resource_metrics=[group]).SerializeToString()


def _number(sample: Sample, began: int, now: int) -> pb.NumberDataPoint:
    point = pb.NumberDataPoint(
        attributes=_attributes(sample.labels),
        start_time_unix_nano=began,
        time_unix_nano=now,
        as_double=sample.value,
    )
    if sample.exemplar is not None:
        point.exemplars.append(_exemplar(sample.exemplar))
    return point


def _histograms(samples: Iterable[Sample], began: int, now: int) -> Iterator[pb.HistogramDataPoint]:
    """Each series, of its buckets, which Prometheus counts from the bottom and OTLP each for itself."""
    series = defaultdict[tuple[tuple[str, str], ...], list[Sample]](list)
    for sample in samples:
        if not sample.name.endswith("_created"):
            key = tuple((name, value) for name, value in sample.labels.items() if name != "le")
            series[key].append(sample)
    for labels, parts in series.items():
        buckets = [sample for sample in parts if sample.name.endswith("_bucket")]
        totals = [0.0, *(sample.value for sample in buckets)]
        yield pb.HistogramDataPoint(
            attributes=_attributes(dict(labels)),
            start_time_unix_nano=began,
            time_unix_nano=now,
            count=int(totals[-1]),
            sum=next((sample.value for sample in parts if sample.name.endswith("_sum")), None),
            explicit_bounds=[float(sample.labels["le"]) for sample in buckets[:-1]],
            bucket_counts=[int(above - below) for below, above in pairwise(totals)],
            exemplars=[_exemplar(sample.exemplar) for sample in buckets if sample.exemplar is not None],
        )


def _parts(family: Metric, began: int, now: int) -> Iterator[pb.Metric]:
    names = dict.fromkeys(sample.name for sample in family.samples if not sample.name.endswith("_created"))
    for name in names:
        points = [_number(sample, began, now) for sample in family.samples if sample.name == name]
        yield pb.Metric(name=name, description=family.documentation, gauge=pb.Gauge(data_points=points))


def _exemplar(exemplar: Exemplar) -> pb.Exemplar:
    told = dict(exemplar.labels)
    trace_id = bytes.fromhex(told.pop("trace_id", ""))
    at = int(float(exemplar.timestamp or 0) * 1e9)
    return pb.Exemplar(
        trace_id=trace_id, as_double=exemplar.value, time_unix_nano=at, filtered_attributes=_attributes(told)
    )


def _attributes(labels: dict[str, str]) -> list[KeyValue]:
    return [KeyValue(key=key, value=AnyValue(string_value=value)) for key, value in labels.items()]
