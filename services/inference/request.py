"""What is asked of an engine, in plain values: neither gRPC nor vLLM is known here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from services.common.prefix import tenant_salt

__all__ = [
    "ChatMessage",
    "ChatOptions",
    "Generation",
    "Media",
    "Sampling",
    "StructuredOutput",
    "Tool",
    "ToolCall",
]


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
