"""A real OTLP gRPC receiver that keeps the spans it gets."""

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.support.waiting import wait_until

__all__ = ["ReceivedSpan", "Receiver", "otlp_receiver", "serving"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedSpan:
    """One span as it arrived."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    events: tuple[str, ...]


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Collects spans."""

    def __init__(self, *, refuses: bool) -> None:
        self.endpoint = ""
        self.calls = 0
        self._refuses = refuses
        self._lock = Lock()
        self._spans: list[ReceivedSpan] = []

    def Export(
        self,
        request: trace_service_pb2.ExportTraceServiceRequest,
        context: grpc.ServicerContext,
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Takes a batch, or refuses it for good."""
        self.calls += 1
        if self._refuses:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not these")
        received = [
            _received(span, _attributes(group.resource.attributes))
            for group in request.resource_spans
            for scope in group.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans += received
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id: str) -> list[ReceivedSpan]:
        """The spans of one trace so far."""
        with self._lock:
            return [span for span in self._spans if span.trace_id == trace_id]

    def edges(self, trace_id: str) -> set[tuple[str, str]]:
        """Parent and child of every edge of one trace, each as `service: name`."""
        spans = {span.span_id: span for span in self.trace(trace_id)}
        return {(_label(spans[span.parent_id]), _label(span)) for span in spans.values() if span.parent_id in spans}

    def wait_for(self, trace_id: str, names: set[str], *, within: float) -> None:
        """Until spans of these names are there."""
        wait_until(lambda: names <= {span.name for span in self.trace(trace_id)}, within=within)


@contextmanager
def serving(add: Callable[[grpc.Server], None], address: str) -> Iterator[str]:
    """Serves what `add` adds to the server until the block is left; yields where."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    add(server)
    port = server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=0.5).wait(2)


@contextmanager
def otlp_receiver(address: str = "127.0.0.1:0", *, refuses: bool = False) -> Iterator[Receiver]:
    """Receives spans at `receiver.endpoint` until the block is left."""
    receiver = Receiver(refuses=refuses)
    add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    with serving(partial(add, receiver), address) as receiver.endpoint:
        yield receiver


def _label(span: ReceivedSpan) -> str:
    return f"{span.service}: {span.name}"


def _received(span: Any, resource: dict[str, Any]) -> ReceivedSpan:
    return ReceivedSpan(
        service=str(resource.get("service.name", "")),
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        attributes=_attributes(span.attributes),
        events=tuple(event.name for event in span.events),
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in pairs}
