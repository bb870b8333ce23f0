"""A generation's stay with one worker: the lease, the submission, and their spans."""

from collections.abc import Callable, Mapping
from typing import Final

from opentelemetry.trace import Span, SpanKind
from opentelemetry.util.types import AttributeValue
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import worker_pb2
from tokenloom.router.v1 import router_pb2

from services.common.tracing import child_of, gen_ai, traceparent_of
from services.gateway.lease import Lease
from services.gateway.router_client import OnQueued, RouterClient
from services.gateway.stream import Stream
from services.gateway.worker_sessions import WorkerSessions

__all__ = ["Attempt"]

_NOTHING: Final[Mapping[str, AttributeValue]] = {}


class Attempt:
    """One lease, from its grant until it is given back. Leave none open."""

    __slots__ = ("_abort", "_asked", "_parent", "_routers", "_span", "lease")

    def __init__(self, routers: RouterClient, lease: Lease, parent: Span, asked: Mapping[str, AttributeValue]) -> None:
        self._routers: RouterClient | None = routers
        self._parent = parent
        self._asked = asked
        self.lease = lease
        self._abort: Callable[[], None] | None = None
        self._span: Span | None = None

    @classmethod
    async def begin(
        cls,
        routers: RouterClient,
        acquire: router_pb2.Acquire,
        parent: Span,
        request: pb.GenerateRequest,
        on_queued: OnQueued | None,
    ) -> "Attempt":
        """Acquires a worker for a request; its spans are `parent`'s. Raises as `RouterClient.acquire` does."""
        with child_of(parent, "router.acquire", SpanKind.CLIENT) as span:
            asked = _gen_ai(request) if span.is_recording() else _NOTHING
            span.set_attributes(asked)
            acquire.traceparent = traceparent_of(span)
            lease = await routers.acquire(acquire, on_queued)
            if asked:
                told: dict[str, AttributeValue] = {
                    "tokenloom.worker": lease.worker_id,
                    "tokenloom.reason": lease.reason,
                    "tokenloom.queue_seconds": lease.queue_seconds,
                }
                span.set_attributes(told)
        return cls(routers, lease, parent, asked)

    def submit(
        self, workers: WorkerSessions, submission: worker_pb2.Submission, stream: Stream, *, number: int
    ) -> None:
        """Has the worker begin; `number` counts the attempts. Raises as `WorkerSessions.submit` does."""
        span = self._span = child_of(self._parent, "worker.generate", SpanKind.CLIENT)
        if span.is_recording():
            told = dict(self._asked or _gen_ai(submission.request))
            told["tokenloom.worker"] = self.lease.worker_id
            told["tokenloom.attempt"] = number
            span.set_attributes(told)
        submission.traceparent = traceparent_of(span)
        self._abort = workers.submit(self.lease.endpoint, submission, stream)

    def close(self) -> None:
        """Stops what still runs, and gives the lease back, once. Say before that in the lease how it went."""
        routers, self._routers = self._routers, None
        if routers is None:
            return
        try:
            if self._abort is not None:
                self._abort()
        finally:
            if self._span is not None:
                self._span.end()
            routers.give_back(self.lease)


def _gen_ai(request: pb.GenerateRequest) -> dict[str, AttributeValue]:
    return gen_ai("chat" if request.HasField("chat") else "text_completion", request.model)
