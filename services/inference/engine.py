"""What a worker asks of an engine: neither gRPC nor vLLM is known here. What comes and goes: request.py, output.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal, Protocol

from services.inference.cache_journal import CacheJournal
from services.inference.output import Sink
from services.inference.request import ChatMessage, ChatOptions, Generation

if TYPE_CHECKING:
    from services.inference.pooling import Pooler

__all__ = [
    "AdapterControl",
    "Capability",
    "Engine",
    "EngineCard",
    "Load",
    "card_of",
    "cards_of",
]


class Capability(Enum):
    """Something that a model can do."""

    GENERATE = "generate"
    CHAT = "chat"
    EMBED = "embed"
    SCORE = "score"
    TOOLS = "tools"
    REASONING = "reasoning"
    STRUCTURED_OUTPUT = "structured_output"
    IMAGES = "images"
    AUDIO = "audio"
    LOGPROBS = "logprobs"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCard:
    """What an engine is; known once it has started."""

    kind: Literal["vllm", "sim", "openai"]
    model: str
    """The name that requests use."""
    max_context_tokens: int
    vocabulary_size: int
    """0: not known."""
    capabilities: frozenset[Capability]
    base_model: str = ""
    """The model that this one adapts; empty for the engine's own."""
    max_running: int
    """Sequences that it runs at the same time."""
    kv_cache_tokens: int
    """0: not known."""
    kv_block_tokens: int = 0
    """Tokens of one block of its prefix cache; 0: it tells nothing of it."""
    embedding_dimensions: int = 0
    """Components of its embeddings; 0 where it does not embed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How an engine is, this moment. Rates are measured, and None while nothing was measured."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    """0 to 1."""
    pending_prefill_tokens: int = 0
    prefill_tokens_per_second: float | None = None
    decode_step_seconds: float | None = None
    """A step with one sequence."""
    decode_step_seconds_per_sequence: float | None = None
    """What each further sequence adds."""
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    output_tokens_per_second: float = 0.0
    """Over the last seconds."""
    starts: int = 1
    """How often it was started: more than once when it died."""
    trouble: str = ""
    """Why it takes nothing, in words: it is dead, stalled or starts again, and submit() fails. Empty: it is well."""

    @property
    def alive(self) -> bool:
        """Whether it takes work."""
        return not self.trouble


class AdapterControl(Protocol):
    """Which LoRA adapters an engine serves."""

    @property
    def cards(self) -> Sequence[EngineCard]:
        """One for each of them."""
        ...

    async def load(self, name: str, path: str) -> EngineCard:
        """Serves the adapter in a folder as a model of its own.

        Raises:
            MeshError: INVALID_REQUEST, it can't be taken or doesn't fit; ALREADY_EXISTS; FAILED_PRECONDITION, the
                engine takes no more.
        """
        ...

    async def unload(self, name: str) -> None:
        """Serves an adapter no more; generations that use it go on. Raises MeshError (NOT_FOUND)."""
        ...


def cards_of(engine: "Engine") -> Sequence[EngineCard]:
    """An engine's own card, and those of its adapters."""
    return (engine.card, *(engine.adapters.cards if engine.adapters is not None else ()))


def card_of(engine: "Engine", model: str) -> EngineCard:
    """The card of one of an engine's models; its own where it has no such model."""
    card = engine.card
    return card if card.model == model else next((card for card in cards_of(engine) if card.model == model), card)


class Engine(Protocol):
    """One engine on one GPU (or group of them). An async context manager that starts and stops it."""

    @property
    def card(self) -> EngineCard: ...

    @property
    def load(self) -> Load: ...

    @property
    def cache_journal(self) -> CacheJournal:
        """What its prefix cache holds."""
        ...

    async def submit(self, generation: Generation, sink: Sink) -> None:
        """Starts a generation; returns when it is accepted, and everything else comes through the sink.

        Raises:
            MeshError: it can't be accepted: the prompt is too long (CONTEXT_LENGTH_EXCEEDED), a value doesn't fit this
                model (INVALID_REQUEST), too many wait (NO_CAPACITY), the engine is dead (ENGINE_FAILED).
        """
        ...

    def abort(self, generation_id: str) -> None:
        """Stops a generation; its sink hears nothing more. Unknown ids are ignored."""
        ...

    @property
    def adapters(self) -> "AdapterControl | None":
        """What loads and unloads adapters; None where the engine takes none."""
        ...

    @property
    def pooler(self) -> "Pooler | None":
        """What embeds and scores; None where the model does neither."""
        ...

    async def tokenize(
        self, prompt: str | Sequence[ChatMessage], chat: ChatOptions | None = None, *, special_tokens: bool = True
    ) -> list[int]:
        """The tokens of a text, or of a conversation rendered with the model's chat template.

        `chat` says how to render a conversation. `special_tokens`: with those that the tokenizer adds at the beginning
        of a text.
        """
        ...

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token on its own, with U+FFFD where it is part of a character."""
        ...

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens of the vocabulary, with U+FFFD where they end inside a character."""
        ...

    async def sleep(self, level: int) -> None:
        """Gives the GPU's memory back until wake(); nothing may run. Level 2 drops the weights, too.

        Raises:
            MeshError: FAILED_PRECONDITION, it can't.
        """
        ...

    async def wake(self) -> None:
        """Takes the memory again; nothing happens when it isn't asleep."""
        ...

    async def reload_weights(self, path: str) -> None:
        """Replaces the weights in place by those of the checkpoint `path`; empty: where the present ones came from.

        Nothing may run. What was cached of prompts is forgotten.

        Raises:
            MeshError: FAILED_PRECONDITION, the checkpoint can't be used; the present weights stay.
        """
        ...
