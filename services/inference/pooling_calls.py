"""The calls of a worker beside Generate: embeddings, scores, tokens; watched, counted, and stopped in time."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc.aio
from tokenloom.inference.v1 import inference_pb2

from services.common.errors import MeshError, Reason
from services.common.rpc import metadata_of
from services.inference import convert, convert_pooling
from services.inference.convert import usage_metadata
from services.inference.engine import Engine, card_of
from services.inference.gate import Gate
from services.inference.generations import Generations
from services.inference.pooling import Embedded, Pooler, Scored

__all__ = ["PoolingCalls"]

T = TypeVar("T", Embedded, Scored)
Context = grpc.aio.ServicerContext[Any, Any]


class PoolingCalls:
    """What InferenceService answers beside Generate. A call that is cancelled stops in the engine."""

    def __init__(self, gate: Gate, generations: Generations) -> None:
        self._gate = gate
        self._generations = generations
        self._running: dict[asyncio.Task[Any], MeshError | None] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    async def embed(self, request: inference_pb2.EmbedRequest, context: Context) -> inference_pb2.EmbedResponse:
        """One embedding a text."""

        def start(engine: Engine, **marks: str) -> Coroutine[Any, Any, Embedded]:
            job = convert_pooling.embed_from_proto(request, engine.card, **marks)
            return _pooler(engine).embed(job)

        return convert_pooling.embedded_to_proto(await self._call("embeddings", request.model, start, context))

    async def score(self, request: inference_pb2.ScoreRequest, context: Context) -> inference_pb2.ScoreResponse:
        """One score a text."""

        def start(engine: Engine, **marks: str) -> Coroutine[Any, Any, Scored]:
            job = convert_pooling.score_from_proto(request, engine.card, **marks)
            return _pooler(engine).score(job)

        return convert_pooling.scored_to_proto(await self._call("rerank", request.model, start, context))

    async def tokenize(self, request: inference_pb2.TokenizeRequest) -> inference_pb2.TokenizeResponse:
        """Tokenizes as Generate would."""
        engine = self._gate.engine
        prompt, chat = convert.tokenize_prompt_from_proto(request, card_of(engine, request.model))
        token_ids = await engine.tokenize(prompt, chat, special_tokens=not request.without_special_tokens)
        return inference_pb2.TokenizeResponse(
            token_ids=token_ids,
            max_context_token_count=engine.card.max_context_tokens,
            token_texts=await engine.token_texts(token_ids) if request.with_token_texts else (),
        )

    async def detokenize(self, request: inference_pb2.DetokenizeRequest) -> inference_pb2.DetokenizeResponse:
        """Turns tokens back into text."""
        engine = self._gate.engine
        convert_pooling.check_detokenize(request, engine.card)
        return inference_pb2.DetokenizeResponse(text=await engine.detokenize(list(request.token_ids)))

    async def wait_idle(self) -> None:
        """Returns once no call runs in the engine."""
        await self._idle.wait()

    def fail_all(self, error: MeshError) -> None:
        """Stops whatever runs and tells why."""
        for task in self._running:
            self._running[task] = error
            task.cancel()

    async def _call(
        self, operation: str, model: str, start: Callable[..., Coroutine[Any, Any, T]], context: Context
    ) -> T:
        left = context.time_remaining()
        if left is not None and left <= 0:
            raise MeshError(Reason.DEADLINE_EXCEEDED, "the deadline has passed already")
        metadata = metadata_of(context)
        request_id, traceparent = str(metadata.get("x-request-id", "")), str(metadata.get("traceparent", ""))
        metrics = self._generations.metrics
        try:
            with self._generations.spans.pooling(operation, model, request_id, traceparent) as span:
                engine = self._gate.admit()
                work = start(
                    engine,
                    job_id=self._generations.new_id(request_id),
                    traceparent=span.traceparent,
                    cache_tenant=self._generations.cache_tenant(str(metadata.get("x-tokenloom-tenant", ""))),
                )
                done = await self._run(work)
                span.pooled(done.prompt_tokens, done.cached_tokens)
        except MeshError as error:
            metrics.ended(error.reason.value.lower())
            raise
        except asyncio.CancelledError:
            metrics.ended("cancelled")
            raise
        metrics.pooled(operation, done.prompt_tokens, done.cached_tokens)
        context.set_trailing_metadata(usage_metadata(done.prompt_tokens, done.cached_tokens, 0))
        return done

    async def _run(self, work: Coroutine[Any, Any, T]) -> T:
        # In a task of its own, so that it can be failed with a reason while the call goes on to tell it.
        task = asyncio.create_task(work)
        self._running[task] = None
        self._idle.clear()
        try:
            return await task
        except asyncio.CancelledError:
            if (error := self._running[task]) is not None:
                raise error from None
            raise
        finally:
            del self._running[task]
            if not self._running:
                self._idle.set()


def _pooler(engine: Engine) -> Pooler:
    # Its card has said that it can.
    assert engine.pooler is not None
    return engine.pooler
