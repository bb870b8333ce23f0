"""What answers to chat look like, whole and as server-sent events."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from services.gateway import rendering
from services.gateway.pieces import CallPiece, Ending, Piece, Prompt, TokenScore
from services.gateway.rendering import HOLE, Choice, Chunks, Show

__all__ = ["ChatRenderer"]


class ChatRenderer:
    """Chat completions."""

    def __init__(self, *, answer_id: str, created: int, model: str, show: Show) -> None:
        self._show = show
        self.answer_id = f"chatcmpl-{answer_id}"
        self._head = {"id": self.answer_id, "object": "chat.completion", "created": created, "model": model}
        self._made_chunks: Chunks | None = None

    def answered_by(self, model: str) -> None:
        """The model that answers."""
        self._head["model"] = model

    @property
    def _chunks(self) -> Chunks:
        # Answers in one piece have none.
        chunks = self._made_chunks
        if chunks is None:
            head = {**self._head, "object": "chat.completion.chunk"}
            chunks = self._made_chunks = Chunks(head, _choice(0, {"content": HOLE}), self._show)
        return chunks

    def first(self, prompt: Prompt | None) -> bytes:
        """The role of each choice."""
        more = {"prompt_token_ids": prompt.token_ids} if prompt and self._show.token_ids else {}
        roles = (_choice(index, {"role": "assistant", "content": ""}) for index in range(self._show.choices))
        return b"".join(self._chunks.event(role, **more) for role in roles)

    def pieces(self, pieces: Sequence[str | Piece]) -> bytes:
        """Text, thoughts, calls."""
        return b"".join(self._chunks.text(piece) if isinstance(piece, str) else self._piece(piece) for piece in pieces)

    def writer(self, write: Callable[[bytes], bool]) -> Callable[[str], bool]:
        """Text, written as it comes."""
        return self._chunks.writer(write)

    def last(self, ending: Ending) -> bytes:
        """The finish reason, unless each of several choices had its own."""
        if self._show.choices > 1:
            return b""
        return self._chunks.event(_choice(0, {}, finish_reason=ending.finish_reason, stop=ending.stop))

    def usage(self, endings: Iterable[Ending]) -> bytes:
        """The usage, if asked for."""
        return self._chunks.usage(endings)

    def choices(self, pieces: Iterable[str | Piece], prompt: Prompt | None, ending: Ending) -> list[dict[str, Any]]:
        """The choices in one piece."""
        del prompt
        return [self._whole_choice(choice) for choice in rendering.gather(pieces, ending, self._show)]

    def whole(
        self, choices: Sequence[dict[str, Any]], prompt: Prompt | None, endings: Sequence[Ending]
    ) -> dict[str, Any]:
        """The answer in one piece."""
        body = {**self._head, "choices": choices, "usage": rendering.usage(endings)}
        if (scores := rendering.prompt_logprobs(prompt)) is not None:
            body["prompt_logprobs"] = scores
        if prompt and self._show.token_ids:
            body["prompt_token_ids"] = prompt.token_ids
        return body

    def _piece(self, piece: Piece) -> bytes:
        if piece.finish_reason is not None:
            end = _choice(piece.choice, {}, finish_reason=piece.finish_reason, stop=piece.stop)
            return self._chunks.event(end)
        delta: dict[str, Any] = {}
        if piece.text:
            delta["content"] = piece.text
        if piece.reasoning and self._show.reasoning:
            delta |= _thought(piece.reasoning)
        if piece.calls:
            delta["tool_calls"] = [_call_piece(call) for call in piece.calls]
        if not delta and not piece.scores and not (self._show.token_ids and piece.token_ids):
            return b""
        choice = _choice(piece.choice, delta, logprobs=self._scores(piece.scores))
        if self._show.token_ids:
            choice["token_ids"] = piece.token_ids
        return self._chunks.event(choice)

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [_whole_call(call) for call in choice.calls]
        if choice.reasoning and self._show.reasoning:
            message |= _thought(choice.reasoning)
        body = {
            "index": choice.index,
            "message": message,
            "logprobs": self._scores(choice.scores),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop,
        }
        if self._show.token_ids:
            body["token_ids"] = choice.token_ids
        return body

    def _scores(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not scores or not self._show.scores:
            return None
        content = [
            {**self._score(score), "top_logprobs": [self._score(other) for other in score.alternatives]}
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _score(self, score: TokenScore) -> dict[str, Any]:
        return {
            "token": rendering.token_name(score, self._show),
            "logprob": rendering.logprob(score),
            "bytes": list(score.token.encode()),
        }


def _choice(
    index: int,
    delta: dict[str, Any],
    *,
    finish_reason: str | None = None,
    stop: str | int | None = None,
    logprobs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    if stop is not None:
        choice["stop_reason"] = stop
    return choice


def _thought(text: str) -> dict[str, str]:
    # The first is what vLLM calls it now, the second what it was called before and many clients still read.
    return {"reasoning": text, "reasoning_content": text}


def _call_piece(call: CallPiece) -> dict[str, Any]:
    function = {"arguments": call.arguments}
    if not call.name:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, **function}}


def _whole_call(call: CallPiece) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
