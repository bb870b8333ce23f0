"""What a worker asks of an engine, in plain values: neither gRPC nor vLLM is known here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal, Protocol

from services.common.errors import MeshError, Reason
from services.common.prefix import tenant_salt
from services.inference.cache_journal import CacheJournal

if TYPE_CHECKING:
    from services.inference.pooling import Pooler

__all__ = [
    "AdapterControl",
    "Capability",
    "ChatMessage",
    "ChatOptions",
    "Delta",
    "Engine",
    "EngineCard",
    "EngineLostError",
    "FinishReason",
    "Generation",
    "Load",
    "Media",
    "PromptEcho",
    "Sampling",
    "Sink",
    "StopCause",
    "StructuredOutput",
    "Timings",
    "TokenLogprob",
    "TokenLogprobs",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "Usage",
    "card_of",
    "cards_of",
]

StopCause = str | int
"""What stopped an output: a stop string, or a stop token."""


class EngineLostError(MeshError):
    """The engine died or hangs with this generation in it, which may or may not be the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.ENGINE_FAILED, message)


class FinishReason(Enum):
    """Why an output ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


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
class Media:
    """Something that is not text, sent along."""

    kind: Literal["image", "audio"]
    mime_type: str
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a function."""

    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message of a conversation."""

    role: str
    content: str
    name: str = ""
    parts: Sequence[str | Media] = ()
    """Content that is not only text; `content` is empty then."""
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str = ""
    reasoning: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that a model may call."""

    name: str
    description: str
    parameters_json: str
    strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How to render a conversation, beyond its messages."""

    tools: Sequence[Tool] = ()
    tool_choice: Literal["auto", "none", "required", "function"] = "auto"
    function_name: str = ""
    """The function, when the choice is "function"."""
    single_tool_call: bool = False
    template_arguments: Mapping[str, object] = field(default_factory=dict)
    generation_prompt: bool = True
    continue_final_message: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """A form that the output must have."""

    kind: Literal["json_schema", "json_object", "regex", "grammar", "choice"]
    value: str = ""
    """The schema, expression or grammar."""
    choices: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens and when to stop; the fields of the proto's SamplingParameters with their defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    """None: what the model's context leaves."""
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    seed: int | None = None
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprob_count: int | None = None
    """Alternatives to report for each output token; None reports no log-probabilities at all."""
    prompt_logprob_count: int | None = None
    bad_words: Sequence[str] = ()
    allowed_token_ids: Sequence[int] = ()
    keep_special_tokens: bool = False
    include_stop_string: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A request to generate, checked against every bound that needs no tokenizer."""

    id: str
    """The worker's own name for it, unique while it runs."""
    model: str
    prompt: str | Sequence[int] | Sequence[ChatMessage]
    """Text, token ids, or a conversation to render with the model's chat template."""
    kind: Literal["text", "tokens", "chat"]
    sampling: Sampling
    chat: ChatOptions = ChatOptions()
    """How to render a prompt of the kind "chat"."""
    structured_output: StructuredOutput | None = None
    choices: int = 1
    echo: bool = False
    cache_salt: str = ""
    """What the client asked for."""
    tenant: str = ""
    """Whose it is."""
    cache_tenant: str = ""
    """Whom alone what it leaves in caches is for; empty: everybody."""
    prompt_token_limit: int | None = None
    add_special_tokens: bool = True
    emitted_token_ids: Sequence[int] = ()
    """Output tokens that the client has already."""
    lost_engines: int = 0
    """Engines that were lost while they ran it."""
    priority: int = 0
    traceparent: str = ""

    @property
    def salt(self) -> str:
        """What keeps its part of a prefix cache apart from others."""
        return tenant_salt(self.cache_tenant, self.cache_salt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a generation; `output` counts the emitted tokens of a continuation, `prompt` doesn't."""

    prompt: int
    cached: int
    output: int
    reasoning: int = 0
    """How many of the output's tokens were thinking."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds that a generation spent waiting, on its prompt, and on its output."""

    queue: float
    prefill: float
    decode: float
    gpu: float = 0.0
    """Its part of the worker's time; engines leave that to services/inference/generations.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """The log-probability of one token."""

    token_id: int
    token: str
    logprob: float
    rank: int = 0
    """Among all tokens, from 1; 0: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """The log-probability of one output token and of its likeliest alternatives, most likely first."""

    chosen: TokenLogprob
    alternatives: Sequence[TokenLogprob]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """A piece of a function call; `id` and `name` come with the first piece of an index."""

    index: int
    id: str = ""
    name: str = ""
    arguments_json: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """Output that is more than text and tokens."""

    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    """One entry a token, or none at all."""
    choice: int = 0
    reasoning: str = ""
    tool_calls: Sequence[ToolCallDelta] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEcho:
    """What a client wants to know of its prompt."""

    token_ids: Sequence[int] = ()
    text: str = ""
    logprobs: Sequence[TokenLogprobs] = ()
    """One entry for each token but the first, or none at all."""


class Sink(Protocol):
    """Where an engine puts what a generation produces: started once, deltas, then one of completed and failed.

    Called on the event loop that submitted, and never after abort() has returned. The methods don't block and don't
    raise.
    """

    def started(self, prompt_tokens: int, cached_tokens: int, echo: PromptEcho | None = None) -> None: ...

    def delta(self, text: str, token_ids: Sequence[int]) -> None:
        """Text and tokens of the only choice, which are nearly all there is."""

    def rich_delta(self, delta: Delta) -> None:
        """Any other output."""

    def choice_ended(self, choice: int, reason: FinishReason, stop_cause: StopCause | None) -> None:
        """One of several choices is complete; after the last of them comes completed()."""

    def completed(
        self, reason: FinishReason, usage: Usage, timings: Timings, stop_cause: StopCause | None = None
    ) -> None: ...

    def failed(self, error: MeshError) -> None: ...


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
