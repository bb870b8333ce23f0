"""The life of one request that is answered in one piece and generates nothing: decode, call workers, answer."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from opentelemetry import trace
from tokenloom.inference.v1.inference_pb2 import EmbedRequest, ScoreRequest
from tokenloom.router.v1 import router_pb2

from services.common.errors import MeshError
from services.common.tracing import gen_ai
from services.gateway.caller import Caller
from services.gateway.decoding import decode
from services.gateway.endpoint import Limits
from services.gateway.identity import Identity
from services.gateway.metrics import GatewayMetrics
from services.gateway.request import Request
from services.gateway.response import Response
from services.gateway.together import together
from services.gateway.waiting import while_connected
from services.gateway.worker_calls import Work, WorkerCalls

__all__ = ["Ask", "Part", "UnaryEndpoint", "UnaryKind"]

# Calls that one request may have with workers at the same time.
_MOST_CALLS: Final = 8


class _Body(Protocol):
    model: str


R = TypeVar("R", bound=_Body)


class Ask:
    """Makes the calls of one request, and keeps count of what they cost."""

    def __init__(self, calls: WorkerCalls, caller: Caller, task: router_pb2.Task.ValueType) -> None:
        self._calls = calls
        self._caller = caller
        self._task = task
        self._room = asyncio.Semaphore(_MOST_CALLS)
        self.request_id = caller.request_id
        self.created = int(time.time())
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.worker_id = ""
        self.route = ""
        self.model = ""
        """The model that answered, by its own name; once a call was made."""

    @property
    def usage(self) -> dict[str, int]:
        """What the calls have cost, as OpenAI writes it."""
        return {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens}

    async def one(self, part: "Part") -> Any:
        """The answer to one call.

        Raises:
            MeshError: no worker, or the worker refuses; on the field that the client knows.
        """
        if self._caller.guard is not None and isinstance(part.request, EmbedRequest | ScoreRequest):
            await self._caller.guard.check_texts(part.request)
        async with self._room:
            work = Work(method=part.method, request=part.request, task=self._task, prompt_tokens=part.prompt_tokens)
            try:
                answer = await self._calls.call(work, self._caller)
            except MeshError as error:
                raise error.renamed(part.rename) from error
            finally:
                if work.lease is not None:
                    self.worker_id, self.route = work.lease.worker_id, work.lease.reason
                    self.model = work.lease.model
            if hasattr(answer, "usage"):
                self.prompt_tokens += answer.usage.prompt_token_count
                self.cached_tokens += answer.usage.cached_token_count
            return answer

    async def all(self, parts: Sequence["Part"]) -> list[Any]:
        """The answers to several calls; the first that fails ends the others."""
        return await together([self.one(part) for part in parts])


def _same(field: str) -> str:
    return field


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One call of a request."""

    method: str
    """The rpc of InferenceService."""
    request: Any
    prompt_tokens: int = 0
    """What it is thought to cost."""
    rename: Callable[[str], str] = _same
    """The client's name for a field of `request`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnaryKind(Generic[R]):
    """What tells such endpoints apart."""

    operation: str
    """`gen_ai.operation.name`"""
    shape: type[R]
    task: router_pb2.Task.ValueType
    answer: Callable[[R, Ask], Awaitable[Any]]
    """The answer's JSON; raises MeshError in terms of the client's request."""


class UnaryEndpoint(Generic[R]):
    """POST of one such endpoint."""

    def __init__(self, kind: UnaryKind[R], calls: WorkerCalls, metrics: GatewayMetrics, limits: Limits) -> None:
        self._kind = kind
        self._calls = calls
        self._metrics = metrics
        self._limits = limits

    async def __call__(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Answers one request.

        Raises:
            MeshError: it failed.
            ClientLeftError: the client left, and the work is stopped.
        """
        body = decode(await self._limits.body_of(request, caller), self._kind.shape)
        identity.check_model(body.model)
        ask = Ask(self._calls, caller, self._kind.task)
        self._describe(body)
        with while_connected(request, response, self._limits.timeout_seconds):
            try:
                answer = await self._kind.answer(body, ask)
            finally:
                self._record(body, ask, response)
            if identity.debug:
                response.add_header("x-tokenloom-worker", ask.worker_id)
                response.add_header("x-tokenloom-route", ask.route)
            if caller.account is not None:
                caller.account.settle("ok")
            await response.send_json(200, answer)

    def _describe(self, body: R) -> None:
        span = trace.get_current_span()
        if span.is_recording():
            span.update_name(f"{self._kind.operation} {body.model}")
            span.set_attributes(gen_ai(self._kind.operation, body.model))

    def _record(self, body: R, ask: Ask, response: Response) -> None:
        response.facts.update(model=body.model, worker=ask.worker_id)
        if ask.prompt_tokens:
            self._metrics.count_tokens(ask.model, ask.prompt_tokens, ask.cached_tokens, 0, lane="openai")
            response.facts.update(input_tokens=ask.prompt_tokens, cached_tokens=ask.cached_tokens)
            trace.get_current_span().set_attributes(
                {"gen_ai.usage.input_tokens": ask.prompt_tokens, "tokenloom.worker": ask.worker_id}
            )
