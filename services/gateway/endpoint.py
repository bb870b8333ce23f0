"""The life of one request for text, chat or legacy: decode, generate, answer."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
from tokenloom.inference.v1 import generation_pb2 as pb

from services.common.errors import MeshError
from services.gateway.caller import Caller
from services.gateway.convert import from_completion, in_openai_terms
from services.gateway.convert_chat import from_chat
from services.gateway.decoding import decode
from services.gateway.generation import Generation
from services.gateway.generator import Generator
from services.gateway.http import QUEUE_HEADER
from services.gateway.identity import Identity
from services.gateway.metrics import GatewayMetrics
from services.gateway.pieces import Ending, Prompt
from services.gateway.recording import describe, record, show_route
from services.gateway.rendering import DONE, Renderer, Show
from services.gateway.rendering_chat import ChatRenderer
from services.gateway.rendering_completion import CompletionRenderer
from services.gateway.request import Request
from services.gateway.response import Response
from services.gateway.schema import CompletionRequest, GenerationRequest
from services.gateway.schema_chat import ChatRequest
from services.gateway.together import together
from services.gateway.waiting import kept_alive, while_connected

__all__ = ["CHAT", "COMPLETIONS", "Endpoint", "Kind", "Limits"]

R = TypeVar("R", bound=GenerationRequest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind(Generic[R]):
    """What tells chat and legacy completions apart."""

    operation: str
    """`gen_ai.operation.name`"""
    shape: type[R]
    convert: Callable[[R], list[pb.GenerateRequest]]
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

    async def body_of(self, request: Request, caller: Caller) -> bytes:
        """The JSON of a request, unless its key has nothing left for any: nobody decodes what is refused anyway.

        Raises:
            MeshError: as `Request.json_body` does; RATE_LIMIT_EXCEEDED.
            ClientLeftError: the client left before the end.
        """
        body = await request.json_body(self.max_body_bytes)
        if caller.account is not None:
            caller.account.refuse_early()
        return body


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
        body = decode(await self._limits.body_of(request, caller), self._kind.shape)
        body.check()
        identity.check_model(body.model)
        generates = self._kind.convert(body)
        describe(self._kind.operation, body, caller)
        answer = _Answer(self._generator, self._metrics, body=body, response=response, identity=identity, caller=caller)
        renderers = self._renderers(body, caller, len(generates))
        with while_connected(request, response, self._limits.timeout_seconds):
            try:
                if body.stream:
                    with kept_alive(response, tell_queue=request.header(QUEUE_HEADER) == "1"):
                        await answer.stream(generates, renderers)
                else:
                    await answer.whole(generates, renderers)
            except MeshError as error:
                raise in_openai_terms(error) from error

    def _renderers(self, body: R, caller: Caller, prompts: int) -> list[Renderer]:
        created, choices = int(time.time()), body.n or 1
        return [
            self._kind.renderer(
                answer_id=caller.request_id,
                created=created,
                model=body.model,
                show=Show(
                    choices=choices,
                    first_index=number * choices,
                    usage=bool(body.stream_options and body.stream_options.include_usage),
                    token_ids=bool(body.return_token_ids),
                    names_as_ids=bool(body.return_tokens_as_token_ids),
                    reasoning=not (isinstance(body, ChatRequest) and body.include_reasoning is False),
                    echo=isinstance(body, CompletionRequest) and bool(body.echo),
                    scores=_wants_scores(body),
                ),
            )
            for number in range(prompts)
        ]


class _Answer:
    """One request's answer: one generation a prompt, all at the same time."""

    def __init__(
        self,
        generator: Generator,
        metrics: GatewayMetrics,
        *,
        body: GenerationRequest,
        response: Response,
        identity: Identity,
        caller: Caller,
    ) -> None:
        self._generator = generator
        self._metrics = metrics
        self._body = body
        self._response = response
        self._identity = identity
        self._caller = caller
        # Several generations write to one client: one at a time.
        self._turn = asyncio.Lock()

    async def stream(self, generates: Sequence[pb.GenerateRequest], renderers: Sequence[Renderer]) -> None:
        """Answers with events."""
        alone = len(generates) == 1
        pairs = zip(generates, renderers, strict=True)
        parts = await together([self._stream_one(*pair, alone=alone) for pair in pairs])
        last = b"".join(events for events, _ in parts)
        await self._response.end(last + renderers[0].usage([ending for _, ending in parts]) + DONE)

    async def whole(self, generates: Sequence[pb.GenerateRequest], renderers: Sequence[Renderer]) -> None:
        """Answers in one piece."""
        parts = await together([self._whole_one(*pair) for pair in zip(generates, renderers, strict=True)])
        choices = [choice for part, _, _ in parts for choice in part]
        body = renderers[0].whole(choices, parts[0][1], [ending for _, _, ending in parts])
        await self._response.send_json(200, msgspec.json.encode(body))

    async def _stream_one(
        self, generate: pb.GenerateRequest, renderer: Renderer, *, alone: bool
    ) -> tuple[bytes, Ending]:
        """Streams one generation; the last events of one that is `alone` are left to go out with the stream's end."""
        response = self._response
        async with self._generator.run(generate, self._caller, keep_ids=bool(self._body.return_token_ids)) as running:
            try:
                pieces = await running.take()
                show_route(running, response, self._identity)
                renderer.answered_by(running.model)
                head = renderer.first(running.prompt)
                async with self._turn:
                    if not response.started:
                        await response.start_events()
                while pieces:
                    head += renderer.pieces(pieces)
                    if running.ending is None or not alone:
                        async with self._turn:
                            await response.send_events(head)
                        head = b""
                        running.write_to(renderer.writer(response.write_events))
                    # Where the end is there already, so is all before it, and goes out with it.
                    pieces = await running.take()
                assert running.ending is not None
                last = head + renderer.last(running.ending)
                if alone:
                    return last, running.ending
                async with self._turn:
                    await response.send_events(last)
                return b"", running.ending
            finally:
                self._record(running, renderer)

    async def _whole_one(
        self, generate: pb.GenerateRequest, renderer: Renderer
    ) -> tuple[list[dict[str, Any]], Prompt | None, Ending]:
        async with self._generator.run(generate, self._caller, keep_ids=bool(self._body.return_token_ids)) as running:
            try:
                pieces = await running.take_whole()
                show_route(running, self._response, self._identity)
                renderer.answered_by(running.model)
                assert running.ending is not None
                return renderer.choices(pieces, running.prompt, running.ending), running.prompt, running.ending
            finally:
                self._record(running, renderer)

    def _record(self, running: Generation, renderer: Renderer) -> None:
        body = self._body
        record(
            running, body.model, self._response, self._metrics, answer_id=renderer.answer_id, streamed=bool(body.stream)
        )


def _wants_scores(body: GenerationRequest) -> bool:
    if isinstance(body, ChatRequest):
        return bool(body.logprobs)
    return isinstance(body, CompletionRequest) and body.logprobs is not None
