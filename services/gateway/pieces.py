"""What a generation's output is made of, on its way from a worker to a client."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

__all__ = [
    "CallPiece",
    "Ending",
    "FinishReason",
    "Move",
    "Piece",
    "Prompt",
    "Spent",
    "TokenScore",
    "Totals",
    "left_lately",
]

_LATELY_SECONDS: Final = 5.0

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScore:
    """The log-probability of a token, and of the likeliest ones at its position."""

    token: str
    logprob: float
    token_id: int = 0
    rank: int = 0
    """Among all tokens, from 1; 0: not known."""
    alternatives: Sequence["TokenScore"] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPiece:
    """A piece of a function call. The first of an index has its id and name."""

    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A piece of output that is more than text."""

    text: str = ""
    choice: int = 0
    token_ids: Sequence[int] = ()
    scores: Sequence[TokenScore] = ()
    reasoning: str = ""
    calls: Sequence[CallPiece] = ()
    finish_reason: FinishReason | None = None
    """Set once, when one of several choices is complete."""
    stop: str | int | None = None
    """The stop string or stop token that ended the choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The prompt as the worker saw it, as far as it was asked for."""

    text: str = ""
    token_ids: Sequence[int] = ()
    scores: Sequence[TokenScore] = ()
    """Of each token but the first."""


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a complete generation ended, and what it cost in tokens."""

    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int = 0
    queue_seconds: float = 0.0
    """In the engine's queue."""
    prefill_seconds: float = 0.0
    gpu_seconds: float | None = 0.0
    """Its part of the worker's time; None: it was cut off before the worker said."""
    stop: str | int | None = None


@dataclass(slots=True)
class Totals:
    """What the generations of one request cost together."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    finish_reasons: list[FinishReason] = field(default_factory=list)

    def add(self, ending: Ending) -> None:
        """One more is complete."""
        self.prompt_tokens += ending.prompt_tokens
        self.cached_tokens += ending.cached_tokens
        self.output_tokens += ending.output_tokens
        self.reasoning_tokens += ending.reasoning_tokens
        self.finish_reasons.append(ending.finish_reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A worker that a generation was moved away from."""

    worker: str
    at_seconds: float
    """Since the generation began."""
    emitted_tokens: int
    cause: str


def left_lately(moves: Sequence[Move], now: float) -> list[str]:
    """The workers that a generation is not to be sent back to; `now` is in seconds since it began.

    Whoever left one longer ago may find a new process there, of which the router knows better by then.
    """
    return [move.worker for move in moves if now - move.at_seconds < _LATELY_SECONDS]


class Spent(msgspec.Struct, kw_only=True):
    """What one generation took. A request may have several."""

    worker: str
    model: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    gpu_seconds: float | None = None
    """None: the worker has not said."""
    running_seconds: float = 0.0
    """From the worker's grant to the end."""
    moves: Sequence[Move] = ()
