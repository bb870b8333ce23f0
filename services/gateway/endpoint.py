"""The life of one request for text, chat or legacy: decode, generate, answer."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Generic, TypeVar

import msgspec
from opentelemetry import trace
from tokenloom.inference.v1 import generation_pb2 as pb

from services.common.errors import MeshError
from services.gateway.convert import from_chat, from_completion, in_openai_terms
from services.gateway.generation import Caller, Generation, Generator
from services.gateway.http import Request, Response, while_connected
from services.gateway.identity import Identity
from services.gateway.metrics import GatewayMetrics
from services.gateway.rendering import DONE, ChatRenderer, CompletionRenderer, Renderer
from services.gateway.schema import ChatRequest, CompletionRequest, GenerationRequest, decode

__all__ = ["CHAT", "COMPLETIONS", "Endpoint", "Kind", "Limits"]

R = TypeVar("R", bound=GenerationRequest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind(Generic[R]):
    """What tells chat and legacy completions apart."""

    operation: str
    """`gen_ai.operation.name`"""
    shape: type[R]
    convert: Callable[[R], pb.GenerateRequest]
    renderer: Callable[..., Renderer]


CHAT = Kind(operation="chat", shape=ChatRequest, convert=from_chat, renderer=ChatRenderer)
COMPLETIONS = Kind(
    operation="text_completion", shape=CompletionRequest, convert=from_completion, renderer=CompletionRenderer
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may take."""

    max_body_bytes: int
    timeout_seconds: float


class Endpoint(Generic[R]):
    """POST /v1/chat/completions or /v1/completions."""

    def __init__(self, kind: Kind[R], generator: Generator, metrics: GatewayMetrics, limits: Limits) -> None:
        self._kind = kind
        self._generator = generator
        self._metrics = metrics
        self._limits = limits

    async def __call__(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Answers one request.

        Raises:
            MeshError: it failed; what was sent so far stays unfinished.
            ClientLeftError: the client left, and the generation is stopped.
        """
        body = decode(await request.json_body(self._limits.max_body_bytes), self._kind.shape)
        identity.check_model(body.model)
        generate = self._kind.convert(body)
        self._describe(body)
        renderer = self._kind.renderer(
            answer_id=caller.request_id,
            created=int(time.time()),
            model=body.model,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
        )
        async with (
            while_connected(request, response, self._limits.timeout_seconds),
            self._generator.run(generate, caller) as generation,
        ):
            try:
                await self._answer(body, generation, renderer, response, identity)
            except MeshError as error:
                raise in_openai_terms(error) from error
            finally:
                self._record(generation, body.model, response)

    async def _answer(
        self, body: R, generation: Generation, renderer: Renderer, response: Response, identity: Identity
    ) -> None:
        first = await generation.take()
        if identity.debug:
            response.add_header("x-tokenloom-worker", generation.worker_id)
            response.add_header("x-tokenloom-route", generation.route)
        if body.stream:
            await _stream(first, generation, renderer, response)
        else:
            await _whole(first, generation, renderer, response)

    def _describe(self, body: R) -> None:
        span = trace.get_current_span()
        if span.is_recording():
            span.update_name(f"{self._kind.operation} {body.model}")
            wanted: dict[str, Any] = {
                "gen_ai.operation.name": self._kind.operation,
                "gen_ai.provider.name": "tokenloom",
                "gen_ai.request.model": body.model,
                "gen_ai.request.stream": bool(body.stream),
                "gen_ai.request.max_tokens": body.max_tokens,
                "gen_ai.request.temperature": body.temperature,
                "gen_ai.request.top_p": body.top_p,
            }
            span.set_attributes({key: value for key, value in wanted.items() if value is not None})

    def _record(self, generation: Generation, model: str, response: Response) -> None:
        span, facts = trace.get_current_span(), response.facts
        facts.update(model=model, worker=generation.worker_id)
        ending, first_at, last_at = generation.ending, generation.first_token_at, monotonic()
        if first_at is not None:
            seconds = first_at - generation.started_at
            self._metrics.time_to_first_token.observe(seconds)
            span.set_attribute("gen_ai.response.time_to_first_chunk", seconds)
            facts["ttft_ms"] = round(1000 * seconds, 1)
        if ending is None:
            return
        self._metrics.count_tokens(ending.prompt_tokens, ending.cached_tokens, ending.output_tokens)
        facts.update(
            input_tokens=ending.prompt_tokens, cached_tokens=ending.cached_tokens, output_tokens=ending.output_tokens
        )
        if first_at is not None and ending.output_tokens > 1:
            facts["tpot_ms"] = round(1000 * (last_at - first_at) / (ending.output_tokens - 1), 2)
        span.set_attributes(
            {
                "gen_ai.response.finish_reasons": [ending.finish_reason],
                "gen_ai.usage.input_tokens": ending.prompt_tokens,
                "gen_ai.usage.output_tokens": ending.output_tokens,
                "gen_ai.usage.cache_read.input_tokens": ending.cached_tokens,
                "tokenloom.worker": generation.worker_id,
            }
        )


async def _stream(texts: list[str], generation: Generation, renderer: Renderer, response: Response) -> None:
    await response.start_events()
    head = renderer.first()
    while texts:
        scores = generation.take_scores()
        events = renderer.scored("".join(texts), scores) if scores else renderer.deltas(texts)
        await response.send_events(head + events)
        head = b""
        if not scores:
            generation.write_to(renderer.writer(response.write_events))
        texts = await generation.take()
    assert generation.ending is not None
    await response.send_events(head + renderer.last(generation.ending) + DONE)
    await response.end()


async def _whole(texts: list[str], generation: Generation, renderer: Renderer, response: Response) -> None:
    parts: list[str] = []
    scores = generation.take_scores()
    while texts:
        parts += texts
        texts = await generation.take()
        scores += generation.take_scores()
    assert generation.ending is not None
    await response.send_json(200, msgspec.json.encode(renderer.whole("".join(parts), scores, generation.ending)))
