"""Sends spans to a backend; one that is away costs a bounded queue and nothing else, and what is lost is counted."""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from services.common.otlp import PASSING, channel_to, headers_of
from services.common.trace_spans import Recorded
from services.common.trace_wire import export_request, resource_message

__all__ = ["Outbound", "SpanCounts"]

_log = logging.getLogger(__name__)
_METHOD: Final = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_QUEUE_SPANS: Final = 4096
_QUEUE_SPANS_AWAY: Final = 1024
"""What is kept for a backend that takes nothing: the beginning of its absence."""
_BATCH_SPANS: Final = 512
# A span takes 4 us, and while some are written nothing else runs in a process: as many as delay a token by a quarter of
# a millisecond.
_SLICE_SPANS: Final = 64
_DELAY_SECONDS: Final = 0.5
_EXPORT_SECONDS: Final = 2.0
_FIRST_PAUSE_SECONDS: Final = 1.0
_LONGEST_PAUSE_SECONDS: Final = 30.0
_SHORTEST_CALL_SECONDS: Final = 0.05
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


@dataclass(frozen=True, slots=True)
class _Batch:
    """Requests that stand one behind the other are one request."""

    request: bytes
    spans: int


class Outbound:
    """Spans on their way out: a bounded queue, which a thread empties in batches.

    Many at a time are written by whoever ends the last of them: in a thread that runs on another core each would have
    to be fetched from there, which takes longer than to write it.

    While the backend takes nothing, one batch is offered again after pauses that grow to half a minute, and no other is
    written; what ends meanwhile waits in the queue and, once there is enough of it, no span is recorded any more.
    """

    def __init__(self, endpoint: str, resource: Mapping[str, Any]) -> None:
        """`endpoint` is `host:port`; `resource` has the attributes of the process."""
        self._resource = resource_message(resource)
        self._queue: deque[Recorded] = deque()
        self._slices: deque[_Batch] = deque()
        self._refused: _Batch | None = None
        self._is_away = False
        self._closing = threading.Event()
        self._ends_at = float("inf")
        self._channel = channel_to(endpoint)
        self._export: grpc.UnaryUnaryMultiCallable[bytes, ExportTraceServiceResponse] = self._channel.unary_unary(
            _METHOD, response_deserializer=ExportTraceServiceResponse.FromString
        )
        self._metadata = headers_of("traces")
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    def admits(self) -> bool:
        """Whether a span that begins now has a chance to be sent; one that has none is counted as dropped."""
        waiting = len(self._queue) + _SLICE_SPANS * len(self._slices)
        if waiting < _QUEUE_SPANS_AWAY or (waiting < _QUEUE_SPANS and not self._is_away):
            return True
        _counts["dropped"] += 1
        return False

    def send(self, span: Recorded) -> None:
        """Queues a span that has ended; while the queue is full it is dropped. From any thread."""
        queue = self._queue
        waiting = len(queue)
        if waiting + _SLICE_SPANS * len(self._slices) >= _QUEUE_SPANS:
            _counts["dropped"] += 1
            return
        queue.append(span)
        if waiting >= _SLICE_SPANS - 1:
            self._write()

    def close(self, *, within: float) -> None:
        """Sends what is queued, for `within` seconds at most, and ends."""
        self._ends_at = time.monotonic() + within
        self._closing.set()
        self._thread.join(within)
        # What is under way is broken off.
        self._channel.close()
        self._thread.join(1)
        _counts["dropped"] += len(self._queue) + sum(batch.spans for batch in self._slices.copy())
        self._queue.clear()
        self._slices.clear()

    def _run(self) -> None:
        pause = _DELAY_SECONDS
        while not self._closing.wait(pause):
            is_first = pause == _DELAY_SECONDS
            if self._send_queued():
                pause = _DELAY_SECONDS
            else:
                pause = _FIRST_PAUSE_SECONDS if is_first else min(2 * pause, _LONGEST_PAUSE_SECONDS)
        self._send_queued()
        if self._refused is not None:
            _counts["failed"] += self._refused.spans

    def _send_queued(self) -> bool:
        """Whether the backend took all there was."""
        while self._refused is not None or self._queue or self._slices:
            batch, self._refused = self._refused or self._batch(), None
            if batch.spans and not self._offer(batch):
                return False
        return True

    def _write(self) -> None:
        """Writes what has ended, a slice at most. From any thread: each span is taken by one of them."""
        spans = list[Recorded]()
        while self._queue and len(spans) < _SLICE_SPANS:
            try:
                spans.append(self._queue.popleft())
            except IndexError:  # another thread took the last one
                break
        if not spans:
            return
        try:
            self._slices.append(_Batch(export_request(self._resource, spans), len(spans)))
        except Exception:  # noqa: BLE001  # what others put into spans must not harm the request that ends the last one
            _log.exception("spans can't be written")
            _counts["dropped"] += len(spans)

    def _batch(self) -> _Batch:
        """What is sent at once; only its own thread asks."""
        self._write()
        slices, count = [], 0
        while self._slices and count < _BATCH_SPANS:
            taken = self._slices.popleft()
            slices.append(taken.request)
            count += taken.spans
        return _Batch(b"".join(slices), count)

    def _offer(self, batch: _Batch) -> bool:
        left = min(_EXPORT_SECONDS, self._ends_at - time.monotonic())
        if left < _SHORTEST_CALL_SECONDS:
            self._refused = batch
            return False
        try:
            answer = self._export(batch.request, timeout=left, metadata=self._metadata)
        except grpc.RpcError as error:
            self._note_failure(batch, error)
            return False
        if self._is_away:
            _log.info("spans are taken again")
            self._is_away = False
        rejected = min(answer.partial_success.rejected_spans, batch.spans)
        _counts["exported"] += batch.spans - rejected
        _counts["failed"] += rejected
        return True

    def _note_failure(self, batch: _Batch, error: Any) -> None:
        facts = {"status": error.code().name, "cause": error.details()}
        if error.code() in PASSING:
            if not self._is_away:
                _log.warning("spans are not taken", extra=facts)
            self._is_away, self._refused = True, batch
        else:
            _log.warning("spans were refused", extra={"spans": batch.spans, **facts})
            _counts["failed"] += batch.spans
