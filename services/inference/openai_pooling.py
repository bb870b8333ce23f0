"""Embeddings from a server with OpenAI's API."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import msgspec

from services.common.errors import MeshError, Reason
from services.inference.engine import Capability, EngineCard
from services.inference.openai_tokens import decoded
from services.inference.openai_upstream import Upstream
from services.inference.pooling import Embedded, EmbedJob, Scored, ScoreJob, check_can

__all__ = ["UpstreamPooler"]

_RETRY_SECONDS: Final = 1.0


class _Vector(msgspec.Struct):
    index: int
    embedding: list[float]


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0


class _Answer(msgspec.Struct):
    data: list[_Vector]
    usage: _Usage = msgspec.field(default_factory=_Usage)


class UpstreamPooler:
    """Has a server embed. Cancelling a call hangs up."""

    def __init__(self, upstream: Upstream, card: EngineCard, model: str, max_queued: int) -> None:
        """`model` is the model's name there."""
        self._upstream = upstream
        self._card = card
        self._model = model
        self._most = card.max_running + max_queued
        self.count = 0
        """Jobs that are there."""

    async def embed(self, job: EmbedJob) -> Embedded:
        """One vector an input; see Pooler.embed."""
        check_can(self._card, Capability.EMBED)
        if job.token_limit is not None:
            message = "prompt_token_limit: the server behind this worker doesn't take it"
            raise MeshError(Reason.UNIMPLEMENTED, message, field="prompt_token_limit")
        body: dict[str, Any] = {"model": self._model, "input": list(job.inputs), "encoding_format": "float"}
        if job.dimensions is not None:
            body["dimensions"] = job.dimensions
        with self._one():
            answer = decoded(await self._upstream.post("/embeddings", body), _Answer)
        vectors = [each.embedding for each in sorted(answer.data, key=lambda each: each.index)]
        self._check(vectors, len(job.inputs), job.dimensions or self._card.embedding_dimensions)
        return Embedded(vectors=vectors, prompt_tokens=answer.usage.prompt_tokens)

    async def score(self, job: ScoreJob) -> Scored:
        """Never: OpenAI's API has no scores. Raises MeshError (UNIMPLEMENTED)."""
        del job
        raise MeshError(Reason.UNIMPLEMENTED, "the server behind this worker can't score", field="model")

    @staticmethod
    def _check(vectors: Sequence[Sequence[float]], count: int, dimensions: int) -> None:
        if len(vectors) != count or any(len(vector) != dimensions for vector in vectors):
            raise MeshError(Reason.ENGINE_FAILED, "the server behind this worker sends other embeddings than asked for")

    @contextmanager
    def _one(self) -> Iterator[None]:
        if self.count >= self._most:
            message = "the worker's queue is full"
            raise MeshError(Reason.NO_CAPACITY, message, retry_after_seconds=_RETRY_SECONDS)
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1
