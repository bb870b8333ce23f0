"""What a worker asks of an engine that pools: embeddings and scores, in plain values."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from services.common.errors import MeshError, Reason
from services.inference.engine import Capability, EngineCard
from services.inference.serving_time import ServingTime

__all__ = ["EmbedJob", "Embedded", "Job", "Jobs", "Pooler", "ScoreJob", "Scored", "check_can", "check_length"]

_TASKS: Final = (Capability.GENERATE, Capability.EMBED, Capability.SCORE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What embedding and scoring have in common; checked against every bound that needs no tokenizer."""

    id: str
    """The worker's own name for it, unique while it runs."""
    token_limit: int | None = None
    """Keep only so many tokens of each input; None refuses one that is too long."""
    priority: int = 0
    traceparent: str = ""
    cache_tenant: str = ""
    """Whom what it leaves in caches serves; empty: everybody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedJob(Job):
    """Inputs to embed: all of them texts, or all of them token ids."""

    inputs: Sequence[str | Sequence[int]]
    field: str
    """The request's field that they come from."""
    dimensions: int | None = None
    """Components to keep; None keeps all."""
    keep_beginning: bool = False
    """Which end of an input `token_limit` keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreJob(Job):
    """Texts to compare with a query."""

    query: str
    texts: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """One vector an input, and what they cost in tokens."""

    vectors: Sequence[Sequence[float]]
    prompt_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One score a text, and what they cost in tokens."""

    scores: Sequence[float]
    prompt_tokens: int
    cached_tokens: int = 0


class Pooler(Protocol):
    """What embeds and scores in an engine. Cancelling a call stops its work in the engine."""

    async def embed(self, job: EmbedJob) -> Embedded:
        """One vector an input.

        Raises:
            MeshError: an input is too long (CONTEXT_LENGTH_EXCEEDED), a value doesn't fit this model
                (INVALID_REQUEST), too many jobs are there (NO_CAPACITY), the model doesn't embed (UNIMPLEMENTED), the
                engine is dead (ENGINE_FAILED, NO_READY_WORKER).
        """
        ...

    async def score(self, job: ScoreJob) -> Scored:
        """One score a text; raises MeshError as embed() does."""
        ...


def check_can(card: EngineCard, capability: Capability) -> None:
    """Raises MeshError (UNIMPLEMENTED) unless the engine's model can do it."""
    if capability not in card.capabilities:
        abilities = " and ".join(task.value for task in _TASKS if task in card.capabilities)
        message = f"the model {card.model!r} can {abilities}, not {capability.value}"
        raise MeshError(Reason.UNIMPLEMENTED, message, field="model")


def check_length(field: str, tokens: int, card: EngineCard) -> None:
    """Raises MeshError (CONTEXT_LENGTH_EXCEEDED) when an input has more tokens than the model takes."""
    if tokens > card.max_context_tokens:
        message = f"the model's context is {card.max_context_tokens} tokens, and {field} has {tokens}"
        raise MeshError(Reason.CONTEXT_LENGTH_EXCEEDED, message, field=field)


class Jobs:
    """The jobs that an engine has, each counted as one sequence whatever the number of its inputs."""

    def __init__(self, max_running: int, max_queued: int) -> None:
        """`max_queued` may wait beyond the `max_running` that run."""
        self._max_running = max_running
        self._most = max_running + max_queued
        self._count = 0
        self._serving_time = ServingTime()
        self.pending_tokens = 0
        """Tokens of inputs that are not computed yet."""

    @property
    def running(self) -> int:
        """Jobs that the engine works on."""
        return min(self._count, self._max_running)

    @property
    def waiting(self) -> int:
        """Jobs beyond those."""
        return self._count - self.running

    def served(self, seconds: float) -> None:
        """A job took so long."""
        self._serving_time.observe(seconds)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Counts a job for as long as the block.

        Raises:
            MeshError: NO_CAPACITY, too many are there.
        """
        if self._count >= self._most:
            raise self._serving_time.queue_full(waiting=self.waiting, max_running=self._max_running)
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1

    @contextmanager
    def tokens(self, count: int) -> Iterator[None]:
        """Counts tokens as pending for as long as the block."""
        self.pending_tokens += count
        try:
            yield
        finally:
            self.pending_tokens -= count
