"""What an engine says of a generation, in plain values, and where it puts them."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from services.common.errors import MeshError, Reason

__all__ = [
    "Delta",
    "EngineLostError",
    "FinishReason",
    "PromptEcho",
    "Sink",
    "StopCause",
    "Timings",
    "TokenLogprob",
    "TokenLogprobs",
    "ToolCallDelta",
    "Usage",
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
