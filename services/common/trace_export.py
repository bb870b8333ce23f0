"""Sends spans to a backend; one that is away costs a bounded queue, and what is lost is counted."""

import os
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["Exporter", "Outbound", "SpanCounts"]

_QUEUE_SPANS: Final = 4096
# Encoding a span takes 40 us in which nothing else runs in a process.
_BATCH_SPANS: Final = 64
_EXPORT_SECONDS: Final = 2.0
_DELAY_MS: Final = 500
# What has become of this process's spans; there is one exporter in a process at most.
_counts: Final = Counter[str]()
_OUTCOMES: Final = ("exported", "failed", "dropped")


class SpanCounts(Collector):
    """What has become of this process's spans, for Prometheus."""

    def collect(self) -> Iterable[Metric]:
        """One counter; zeros where nothing is traced."""
        spans = CounterMetricFamily(
            "tokenloom_process_spans",
            "Spans that were exported, that the backend did not take, or that found the queue full.",
            labels=("outcome",),
        )
        for outcome in _OUTCOMES:
            spans.add_metric((outcome,), _counts[outcome])
        yield spans


class Exporter(OTLPSpanExporter):
    """Exports from the process that made it; a forked copy of gRPC hangs instead of sending."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` is `host:port`."""
        super().__init__(endpoint=endpoint, insecure=True, timeout=_EXPORT_SECONDS)
        self._home = os.getpid()
        self.taken = 0
        """Spans that it was given so far."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends a batch, or forgets it in a copy."""
        self.taken += len(spans)
        if os.getpid() != self._home:
            return SpanExportResult.SUCCESS
        result = super().export(spans)
        _counts["exported" if result is SpanExportResult.SUCCESS else "failed"] += len(spans)
        return result


class Outbound:
    """Spans on their way out: a bounded queue, which a thread empties in batches."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self._batches = BatchSpanProcessor(
            exporter,
            max_queue_size=_QUEUE_SPANS,
            schedule_delay_millis=_DELAY_MS,
            max_export_batch_size=_BATCH_SPANS,
        )
        self._given = 0

    def send(self, span: ReadableSpan) -> None:
        """Queues a span that is sampled; while the queue is full it is dropped."""
        # The library would write a log line for each.
        if self._given - self._exporter.taken >= _QUEUE_SPANS:
            _counts["dropped"] += 1
            return
        self._given += 1
        self._batches.on_end(span)

    def flush(self) -> bool:
        """Sends what is queued, for as long as the backend takes."""
        return self._batches.force_flush()

    def close(self, *, within: float) -> None:
        """Sends what is queued, for `within` seconds at most, and ends."""
        # The library's own flush takes its time limit for each batch, and each batch tries several times.
        flushing = threading.Thread(target=self._batches.force_flush, name="spans", daemon=True)
        flushing.start()
        flushing.join(within)
        # What is under way is broken off.
        self._exporter.shutdown()
        self._batches.shutdown()  # type: ignore[no-untyped-call]  # untyped upstream
