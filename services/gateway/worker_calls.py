"""Single calls to picked workers, for what is answered in one piece: made anew elsewhere when the worker is lost."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

import grpc.aio
from opentelemetry import trace
from opentelemetry.trace import SpanKind
from tokenloom.inference.v1 import inference_pb2_grpc
from tokenloom.router.v1 import router_pb2

from services.common.errors import MeshError, Reason
from services.common.rpc import channel
from services.common.status import DETAILS_KEY, error_from_call
from services.common.trace_sampling import FAILOVER
from services.common.tracing import gen_ai, traceparent_of, tracer
from services.gateway.caller import Caller
from services.gateway.lease import Lease
from services.gateway.pieces import Spent
from services.gateway.router_client import RouterClient
from services.gateway.stream import WorkerLostError

__all__ = ["Work", "WorkerCalls"]

_log = logging.getLogger(__name__)
# As for generations: what has taken two workers down with it doesn't get a third, and so many that turn it away are
# reason enough to believe that another one would, too.
_MAX_VICTIMS: Final = 2
_MAX_MOVES: Final = 8
_TURNED_AWAY: Final = (Reason.NO_READY_WORKER, Reason.NO_CAPACITY)
# 256 embeddings of 16384 components.
_MAX_ANSWER_BYTES: Final = 16 << 20


@dataclass(kw_only=True)
class Work:
    """What is to be done on a worker, and what became of it."""

    method: str
    """The rpc of InferenceService."""
    request: Any
    """Its request; it names the model."""
    task: router_pb2.Task.ValueType
    prompt_tokens: int = 0
    """Tokens that the worker will compute, estimated."""
    model: str = field(init=False)
    """What the client asked for; a worker may know it by another name."""
    lease: Lease | None = field(default=None, init=False)
    """The worker that did it, or tried last."""

    def __post_init__(self) -> None:
        self.model = self.request.model


class WorkerCalls:
    """Calls InferenceService on workers that the router picks, over one channel a worker."""

    def __init__(self, routers: RouterClient, tasks: asyncio.TaskGroup) -> None:
        self._routers = routers
        self._tasks = tasks
        self._connections: dict[str, _Connection] = {}

    async def call(self, work: Work, caller: Caller) -> Any:
        """The answer to a call; a worker that is lost before it has answered is replaced by another one.

        Raises:
            MeshError: the key is over a limit, there is no worker, or the worker refuses.
        """
        if caller.account is not None:
            await caller.account.enter(model=work.model, prompt_tokens=work.prompt_tokens, output_tokens=0)
        began, answer = monotonic(), None
        try:
            answer = await self._call(work, caller)
            return answer
        finally:
            if caller.account is not None and work.lease is not None:
                # There may be several calls a request, and only who made them knows the last one.
                caller.account.add(_spent(work.lease, answer, began), is_complete=False)

    async def _call(self, work: Work, caller: Caller) -> Any:
        left: list[str] = []
        victims = 0
        while True:
            try:
                return await self._attempt(work, caller, left)
            except WorkerLostError as lost:
                assert work.lease is not None
                left.append(work.lease.worker_id)
                victims += lost.refusal is None
                _report(lost, work.lease.worker_id, caller)
                if lost.refusal is not None and len(left) >= _MAX_MOVES:
                    raise lost.refusal from lost
                if victims >= _MAX_VICTIMS:
                    raise MeshError(Reason.ENGINE_FAILED, "the worker that ran this request was lost") from lost

    async def _attempt(self, work: Work, caller: Caller, left: Sequence[str]) -> Any:
        async with AsyncExitStack() as held:
            lease = work.lease = await self._acquire(work, caller, left, held)
            try:
                answer = await self._ask(work, caller, lease)
            except WorkerLostError as lost:
                lease.outcome = _outcome(is_workers_fault=lost.refusal is None)
                raise
            except MeshError as error:
                lease.outcome = _outcome(is_workers_fault=error.row.http >= 500)
                raise
            lease.outcome = router_pb2.OUTCOME_COMPLETED
            return answer

    async def _acquire(self, work: Work, caller: Caller, left: Sequence[str], held: AsyncExitStack) -> Lease:
        asked = gen_ai(_operation(work), work.model)
        with tracer().start_as_current_span("router.acquire", kind=SpanKind.CLIENT, attributes=asked) as span:
            acquire = router_pb2.Acquire(
                request_id=caller.request_id,
                model=work.model,
                prompt_token_count=work.prompt_tokens,
                max_output_token_count=1,
                tenant_id=caller.tenant,
                priority=caller.priority,
                session_id=caller.session_id,
                excluded_worker_ids=left,
                traceparent=traceparent_of(span),
                task=work.task,
                attempt=len(left) + 1,
                slo_class=caller.slo_class,
            )
            lease = await held.enter_async_context(self._routers.lease(acquire))
            span.set_attributes({"tokenloom.worker": lease.worker_id, "tokenloom.reason": lease.reason})
            return lease

    async def _ask(self, work: Work, caller: Caller, lease: Lease) -> Any:
        name = f"worker.{work.method.lower()}"
        work.request.model = lease.model or work.model
        attributes = {**gen_ai(_operation(work), work.model), "tokenloom.worker": lease.worker_id}
        with tracer().start_as_current_span(name, kind=SpanKind.CLIENT, attributes=attributes) as span:
            # Metadata is ASCII, which names need not be.
            tenant = caller.tenant.encode("unicode_escape").decode()
            metadata = [("x-request-id", caller.request_id), ("x-tokenloom-tenant", tenant)]
            if traceparent := traceparent_of(span):
                metadata.append(("traceparent", traceparent))
            with self._open(lease.endpoint).in_use() as connection:
                stub = inference_pb2_grpc.InferenceServiceStub(connection)
                try:
                    return await getattr(stub, work.method)(_renamed(work.request, lease.model), metadata=metadata)
                except grpc.aio.AioRpcError as error:
                    raise _failure(error) from error

    def _open(self, endpoint: str) -> "_Connection":
        found = self._connections.get(endpoint)
        if found is None:
            found = self._connections[endpoint] = _Connection(endpoint)
        return found

    def keep(self, endpoints: set[str]) -> None:
        """Closes the channels to other workers than these, once they are idle."""
        for endpoint in self._connections.keys() - endpoints:
            if self._connections[endpoint].is_idle:
                self._tasks.create_task(self._connections.pop(endpoint).close())

    def close(self) -> None:
        """Closes every channel; calls on them are over."""
        for connection in self._connections.values():
            self._tasks.create_task(connection.close())
        self._connections.clear()


class _Connection:
    """A channel to one worker, and how many calls are on it."""

    def __init__(self, endpoint: str) -> None:
        self._channel = channel(endpoint, max_receive_bytes=_MAX_ANSWER_BYTES)
        self._calls = 0

    @property
    def is_idle(self) -> bool:
        """Whether no call is on it."""
        return self._calls == 0

    @contextmanager
    def in_use(self) -> Iterator[grpc.aio.Channel]:
        """The channel, not idle for as long as the block."""
        self._calls += 1
        try:
            yield self._channel
        finally:
            self._calls -= 1

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()


def _renamed(request: Any, model: str) -> Any:
    """The request for the model that the router chose, where the client named an alias."""
    if model in ("", request.model):
        return request
    copy = type(request)()
    copy.CopyFrom(request)
    copy.model = model
    return copy


def _failure(error: grpc.aio.AioRpcError) -> MeshError | WorkerLostError:
    told = error_from_call(error)
    if not any(key == DETAILS_KEY for key, _ in error.trailing_metadata() or ()):
        # No worker's answer is without its reason: it is gone.
        return WorkerLostError(f"{error.code().name}: {error.details()}")
    if told.reason in _TURNED_AWAY:
        return WorkerLostError(told.message, refusal=told)
    if told.reason is Reason.ENGINE_FAILED:
        return WorkerLostError(told.message)
    return told


def _spent(lease: Lease, answer: Any, began: float) -> Spent:
    now = monotonic()
    spent = Spent(
        worker=lease.worker_id,
        queue_seconds=lease.queue_seconds,
        running_seconds=now - lease.granted_at,
        ttft_seconds=None if answer is None else now - began,
    )
    if hasattr(answer, "usage"):
        spent.prompt_tokens = answer.usage.prompt_token_count
        spent.cached_tokens = answer.usage.cached_token_count
    return spent


def _operation(work: Work) -> str:
    return "embeddings" if work.method == "Embed" else work.method.lower()


def _outcome(*, is_workers_fault: bool) -> router_pb2.Outcome.ValueType:
    return router_pb2.OUTCOME_FAILED if is_workers_fault else router_pb2.OUTCOME_REFUSED


def _report(lost: WorkerLostError, worker_id: str, caller: Caller) -> None:
    _log.warning("worker left", extra={"worker": worker_id, "request": caller.request_id, "cause": str(lost)})
    trace.get_current_span().add_event(FAILOVER, {"tokenloom.worker": worker_id, "tokenloom.cause": str(lost)})
