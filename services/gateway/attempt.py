"""A generation's stay with one worker: the lease, the submission, and their spans."""

from collections.abc import Callable
from functools import lru_cache

from opentelemetry.trace import Span, SpanKind
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import worker_pb2
from tokenloom.router.v1 import router_pb2

from services.common import trace_words
from services.common.trace_spans import Recorded
from services.common.tracing import child_of, gen_ai, traceparent_of
from services.gateway.lease import Lease
from services.gateway.router_client import OnQueued, RouterClient
from services.gateway.stream import Stream
from services.gateway.worker_sessions import WorkerSessions

__all__ = ["Attempt"]


class Attempt:
    """One lease, from its grant until it is given back. Leave none open."""

    __slots__ = ("_abort", "_asked", "_parent", "_routers", "_span", "lease")

    def __init__(self, routers: RouterClient, lease: Lease, parent: Span, asked: tuple[str, str] | None) -> None:
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
            acquire.traceparent = traceparent_of(span)
            asked, lease = None, None
            try:
                lease = await routers.acquire(acquire, on_queued)
            finally:
                if type(span) is Recorded:
                    asked = _asked(request)
                    span.say(_acquired, asked, lease)
        return cls(routers, lease, parent, asked)

    def submit(
        self, workers: WorkerSessions, submission: worker_pb2.Submission, stream: Stream, *, number: int
    ) -> None:
        """Has the worker begin; `number` counts the attempts. Raises as `WorkerSessions.submit` does."""
        span = self._span = child_of(self._parent, "worker.generate", SpanKind.CLIENT)
        if type(span) is Recorded:
            asked = self._asked or _asked(submission.request)
            span.say(_submitted, *asked, self.lease.worker_id, number)
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


def _asked(request: pb.GenerateRequest) -> tuple[str, str]:
    """The operation, and the model."""
    return "chat" if request.HasField("chat") else "text_completion", request.model


def _acquired(asked: tuple[str, str], lease: Lease | None) -> bytes:
    if lease is None:
        return trace_words.said(gen_ai(*asked))
    return (
        _acquired_of(*asked, lease.worker_id)
        + trace_words.text("tokenloom.reason", lease.reason)
        + trace_words.fraction("tokenloom.queue_seconds", lease.queue_seconds)
    )


@lru_cache(1024)
def _acquired_of(operation: str, model: str, worker: str) -> bytes:
    return trace_words.said({**gen_ai(operation, model), "tokenloom.worker": worker})


@lru_cache(1024)
def _submitted(operation: str, model: str, worker: str, number: int) -> bytes:
    return trace_words.said({**gen_ai(operation, model), "tokenloom.worker": worker, "tokenloom.attempt": number})
