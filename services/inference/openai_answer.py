"""The stream of a server with OpenAI's API, as output: its chunks decoded, and what they say of tokens."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from services.inference.output import Delta, FinishReason, StopCause, TokenLogprob, TokenLogprobs, ToolCallDelta

__all__ = ["Chunk", "ChunkChoice", "ChunkError", "Told", "decode_chunk", "delta_of", "finish_of"]


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function | None = None


class _ChunkDelta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class ChunkChoice(msgspec.Struct):
    """A piece of one choice, of a conversation's answer or of a text's continuation."""

    index: int = 0
    text: str | None = None
    delta: _ChunkDelta | None = None
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _OutputDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _OutputDetails | None = None


class ChunkError(msgspec.Struct):
    """What went wrong, as servers tell it, in an answer or within a stream."""

    message: str = ""
    param: str | None = None
    code: int | str | None = None
    type: str | None = None


class Chunk(msgspec.Struct):
    """One event of a stream."""

    choices: list[ChunkChoice] = []
    usage: _Usage | None = None
    prompt_token_ids: list[int] | None = None
    error: ChunkError | None = None


_decoder: Final = msgspec.json.Decoder(Chunk)
_FINISH_REASONS: Final = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    # Something cut the text.
    "content_filter": FinishReason.LENGTH,
}


def decode_chunk(data: bytes) -> Chunk:
    """One event. Raises msgspec.DecodeError."""
    return _decoder.decode(data)


def finish_of(choice: ChunkChoice) -> tuple[FinishReason, StopCause | None] | None:
    """Why a choice ended; None for a reason that is none of a complete output."""
    reason = _FINISH_REASONS.get(choice.finish_reason or "")
    return None if reason is None else (reason, choice.stop_reason)


def delta_of(choice: ChunkChoice, alternatives: int = 0) -> Delta:
    """What a piece adds; it may be nothing. `alternatives`: how many of each token's were asked for."""
    said = choice.delta or _ChunkDelta()
    token_ids = choice.token_ids or ()
    return Delta(
        text=choice.text or said.content or said.refusal or "",
        token_ids=token_ids,
        logprobs=_logprobs(choice.logprobs, token_ids, alternatives),
        choice=choice.index,
        reasoning=said.reasoning or said.reasoning_content or "",
        tool_calls=[_call(call) for call in said.tool_calls or ()],
    )


def _call(call: _Call) -> ToolCallDelta:
    function = call.function or _Function()
    return ToolCallDelta(
        index=call.index, id=call.id or "", name=function.name or "", arguments_json=function.arguments or ""
    )


def _logprobs(told: dict[str, Any] | None, token_ids: Sequence[int], count: int) -> Sequence[TokenLogprobs]:
    if not told:
        return ()
    if (content := told.get("content")) is not None:
        entries = [(each["token"], each["logprob"], _pairs(each.get("top_logprobs"))) for each in content]
        # llama.cpp's server tells them here alone.
        token_ids = token_ids or [each.get("id", 0) for each in content]
    else:
        tops = told.get("top_logprobs") or [None] * len(told["tokens"])
        entries = [
            # The first token of an echo has none.
            (token, logprob or 0.0, list((top or {}).items()))
            for token, logprob, top in zip(told["tokens"], told["token_logprobs"], tops, strict=True)
        ]
    # Ids are told of the tokens that were chosen alone.
    ids = token_ids if len(token_ids) == len(entries) else [0] * len(entries)
    return [
        TokenLogprobs(
            chosen=TokenLogprob(token_id=token_id, token=token, logprob=logprob),
            alternatives=[
                TokenLogprob(token_id=token_id if other == token else 0, token=other, logprob=value)
                for other, value in sorted(others, key=lambda pair: -pair[1])[:count]
            ],
        )
        for token_id, (token, logprob, others) in zip(ids, entries, strict=True)
    ]


def _pairs(tops: list[dict[str, Any]] | None) -> list[tuple[str, float]]:
    return [(each["token"], each["logprob"]) for each in tops or ()]


class Told:
    """What a stream has told of tokens so far."""

    def __init__(self) -> None:
        self.prompt: int | None = None
        """Tokens of the prompt; None: not told."""
        self.prompt_token_ids: Sequence[int] = ()
        self.cached = 0
        self.output: int | None = None
        self.reasoning = 0
        self.pieces = 0
        """Pieces of output, each of one token or more."""
        self.ids = 0
        """Tokens of the output that were told."""

    def take(self, chunk: Chunk) -> None:
        """Takes in what a chunk says beside its output."""
        ids = chunk.prompt_token_ids or next((each.prompt_token_ids for each in chunk.choices), None)
        if ids:
            self.prompt_token_ids = ids
        usage = chunk.usage
        if usage is None:
            return
        if usage.prompt_tokens is not None:
            self.prompt = usage.prompt_tokens
        if usage.completion_tokens is not None:
            self.output = usage.completion_tokens
        if usage.prompt_tokens_details is not None:
            self.cached = usage.prompt_tokens_details.cached_tokens or 0
        if usage.completion_tokens_details is not None:
            self.reasoning = usage.completion_tokens_details.reasoning_tokens or 0

    def add(self, delta: Delta) -> None:
        """Counts a piece of output."""
        self.pieces += 1
        self.ids += len(delta.token_ids)
