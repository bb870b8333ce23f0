"""What answers to legacy completions look like, whole and as server-sent events."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from services.gateway import rendering
from services.gateway.pieces import Ending, Piece, Prompt, TokenScore
from services.gateway.rendering import HOLE, Choice, Chunks, Show

__all__ = ["CompletionRenderer"]


class CompletionRenderer:
    """Legacy completions."""

    def __init__(self, *, answer_id: str, created: int, model: str, show: Show) -> None:
        self._show = show
        self.answer_id = f"cmpl-{answer_id}"
        self._head = {"id": self.answer_id, "object": "text_completion", "created": created, "model": model}
        self._chunks = Chunks(self._head, _choice(show.first_index, HOLE), show)
        self._offsets = [0] * show.choices

    def answered_by(self, model: str) -> None:
        """The model that answers."""
        if model != self._head["model"]:
            self._head["model"] = model
            self._chunks = Chunks(self._head, _choice(self._show.first_index, HOLE), self._show)

    def first(self, prompt: Prompt | None) -> bytes:
        """The prompt, where it is echoed, and its tokens, where they are shown."""
        if prompt is None or not (self._show.echo or self._show.token_ids):
            return b""
        events = []
        for number in range(self._show.choices):
            scores = self._scores(number, _echoed(prompt)) if self._show.scores and self._show.echo else None
            text = prompt.text if self._show.echo else ""
            choice = _choice(self._show.first_index + number, text, logprobs=scores)
            if self._show.token_ids:
                choice |= {"prompt_token_ids": prompt.token_ids, "token_ids": []}
            events.append(self._chunks.event(choice))
        return b"".join(events)

    def pieces(self, pieces: Sequence[str | Piece]) -> bytes:
        """Text."""
        return b"".join(self._chunks.text(piece) if isinstance(piece, str) else self._piece(piece) for piece in pieces)

    def writer(self, write: Callable[[bytes], bool]) -> Callable[[str], bool]:
        """Text, written as it comes."""
        return self._chunks.writer(write)

    def last(self, ending: Ending) -> bytes:
        """The finish reason, unless each of several choices had its own."""
        if self._show.choices > 1:
            return b""
        return self._chunks.event(_choice(self._show.first_index, "", ending.finish_reason, ending.stop))

    def usage(self, endings: Iterable[Ending]) -> bytes:
        """The usage, if asked for."""
        return self._chunks.usage(endings)

    def choices(self, pieces: Iterable[str | Piece], prompt: Prompt | None, ending: Ending) -> list[dict[str, Any]]:
        """The choices in one piece."""
        gathered = rendering.gather(pieces, ending, self._show)
        return [self._whole_choice(number, choice, prompt) for number, choice in enumerate(gathered)]

    def whole(
        self, choices: Sequence[dict[str, Any]], prompt: Prompt | None, endings: Sequence[Ending]
    ) -> dict[str, Any]:
        """The answer in one piece."""
        del prompt
        return {**self._head, "choices": choices, "usage": rendering.usage(endings)}

    def _piece(self, piece: Piece) -> bytes:
        index = self._show.first_index + piece.choice
        if piece.finish_reason is not None:
            return self._chunks.event(_choice(index, "", piece.finish_reason, piece.stop))
        if not piece.text and not piece.scores and not (self._show.token_ids and piece.token_ids):
            return b""
        choice = _choice(index, piece.text, logprobs=self._scores(piece.choice, piece.scores))
        if self._show.token_ids:
            choice["token_ids"] = piece.token_ids
        return self._chunks.event(choice)

    def _whole_choice(self, number: int, choice: Choice, prompt: Prompt | None) -> dict[str, Any]:
        text, scores = choice.text, choice.scores
        if prompt is not None and self._show.echo:
            text, scores = prompt.text + text, [*_echoed(prompt), *scores]
        body = _choice(choice.index, text, choice.finish_reason, choice.stop, self._scores(number, scores))
        if (of_prompt := rendering.prompt_logprobs(prompt)) is not None and not self._show.echo:
            body["prompt_logprobs"] = of_prompt
        if self._show.token_ids:
            body["token_ids"] = choice.token_ids
            body["prompt_token_ids"] = prompt.token_ids if prompt else None
        return body

    def _scores(self, number: int, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not scores or not self._show.scores:
            return None
        offsets = []
        for score in scores:
            offsets.append(self._offsets[number])
            self._offsets[number] += len(score.token)
        return {
            "tokens": [rendering.token_name(score, self._show) for score in scores],
            "token_logprobs": [_known(score) for score in scores],
            "top_logprobs": [self._top(score) for score in scores],
            "text_offset": offsets,
        }

    def _top(self, score: TokenScore) -> dict[str, float] | None:
        if score.rank < 0:
            return None
        # Tokens may have the same text, and then the last one's value stays, as with vLLM's server.
        others = (other for other in score.alternatives if other.token_id != score.token_id)
        return {rendering.token_name(each, self._show): rendering.logprob(each) for each in (score, *others)}


_UNKNOWN_RANK = -1
"""Marks the first token of a prompt, which nothing predicted."""


def _echoed(prompt: Prompt) -> list[TokenScore]:
    # Workers score every token but the first: its text is what the others leave.
    first = prompt.text[: max(0, len(prompt.text) - sum(len(score.token) for score in prompt.scores))]
    token_id = prompt.token_ids[0] if prompt.token_ids else 0
    return [TokenScore(token=first, logprob=0.0, token_id=token_id, rank=_UNKNOWN_RANK), *prompt.scores]


def _known(score: TokenScore) -> float | None:
    return None if score.rank == _UNKNOWN_RANK else rendering.logprob(score)


def _choice(
    index: int,
    text: str,
    finish_reason: str | None = None,
    stop: str | int | None = None,
    logprobs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
    if stop is not None:
        choice["stop_reason"] = stop
    return choice
