"""What answers of either kind have in common: events, choices put together, usage, log-probabilities."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from services.gateway.pieces import CallPiece, Ending, FinishReason, Piece, Prompt, TokenScore

__all__ = ["DONE", "Choice", "Chunks", "Renderer", "Show", "gather", "prompt_logprobs", "token_name", "usage"]

DONE: Final = b"data: [DONE]\n\n"
HOLE: Final = "\x00"
"""Where a chunk's template has the text of the delta."""
_encode: Final = msgspec.json.Encoder().encode
_LOWEST: Final = -9999.0
"""What stands for a probability of 0, whose logarithm JSON can't say."""


class Show(msgspec.Struct, frozen=True, kw_only=True):
    """What the client wants to see beyond the text."""

    choices: int = 1
    first_index: int = 0
    """The index of the first choice, where a request has several prompts."""
    usage: bool = False
    """An event with the usage."""
    token_ids: bool = False
    names_as_ids: bool = False
    """Tokens of log-probabilities as `token_id:N`."""
    reasoning: bool = True
    echo: bool = False
    scores: bool = False


class Renderer(Protocol):
    """Renders one answer."""

    answer_id: str
    """As its client sees it."""

    def answered_by(self, model: str) -> None:
        """The model that answers, which may have another name than was asked for; before anything is rendered."""
        ...

    def first(self, prompt: Prompt | None) -> bytes:
        """The events before any output."""
        ...

    def pieces(self, pieces: Sequence[str | Piece]) -> bytes:
        """The events of output."""
        ...

    def writer(self, write: Callable[[bytes], bool]) -> Callable[[str], bool]:
        """Makes one function of rendering plain text and writing it: it is called for every token."""
        ...

    def last(self, ending: Ending) -> bytes:
        """The events after all output, usage and [DONE] not included."""
        ...

    def usage(self, endings: Iterable[Ending]) -> bytes:
        """The event with the usage of all prompts together, if it was asked for."""
        ...

    def choices(self, pieces: Iterable[str | Piece], prompt: Prompt | None, ending: Ending) -> list[dict[str, Any]]:
        """The choices of an answer in one piece."""
        ...

    def whole(
        self, choices: Sequence[dict[str, Any]], prompt: Prompt | None, endings: Sequence[Ending]
    ) -> dict[str, Any]:
        """The answer in one piece."""
        ...


class Chunks:
    """The events of one answer. A delta is two constant halves around a JSON string, since there are so many."""

    def __init__(self, head: dict[str, Any], hole: dict[str, Any], show: Show) -> None:
        self._head = head
        self._show = show
        # What all events have is rendered once: the head without its brace.
        self._prefix = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._suffix = b'],"usage":null}\n\n' if show.usage else b"]}\n\n"
        before, after = self.event(hole).split(_encode(HOLE))
        self._before, self._after = before, after

    def event(self, choice: dict[str, Any], **more: Any) -> bytes:
        """One event with one choice."""
        if not more:
            return self._prefix + _encode(choice) + self._suffix
        chunk = {**self._head, "choices": [choice], **more}
        if self._show.usage:
            chunk["usage"] = None
        return b"data: " + _encode(chunk) + b"\n\n"

    def text(self, text: str) -> bytes:
        """The event of plain text; none where there is no text."""
        return self._before + _encode(text) + self._after if text else b""

    def writer(self, write: Callable[[bytes], bool]) -> Callable[[str], bool]:
        """Renders and writes in one call."""
        before, after, encode = self._before, self._after, _encode

        def write_text(text: str) -> bool:
            return not text or write(before + encode(text) + after)

        return write_text

    def usage(self, endings: Iterable[Ending]) -> bytes:
        """The event with the usage, if it was asked for."""
        if not self._show.usage:
            return b""
        return b"data: " + _encode({**self._head, "choices": [], "usage": usage(endings)}) + b"\n\n"


@dataclass(slots=True)
class Choice:
    """A choice in one piece."""

    index: int
    text: str = ""
    reasoning: str = ""
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    scores: list[TokenScore] = field(default_factory=list)
    calls: list[CallPiece] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


def gather(pieces: Iterable[str | Piece], ending: Ending, show: Show) -> list[Choice]:
    """The choices of a complete generation."""
    choices = [Choice(index=show.first_index + number) for number in range(show.choices)]
    texts: list[list[str]] = [[] for _ in choices]
    thoughts: list[list[str]] = [[] for _ in choices]
    for piece in pieces:
        if isinstance(piece, str):
            texts[0].append(piece)
            continue
        choice = choices[piece.choice]
        texts[piece.choice].append(piece.text)
        thoughts[piece.choice].append(piece.reasoning)
        choice.scores += piece.scores
        choice.token_ids += piece.token_ids
        choice.calls += piece.calls
        if piece.finish_reason is not None:
            choice.finish_reason, choice.stop = piece.finish_reason, piece.stop
    for choice, text, thought in zip(choices, texts, thoughts, strict=True):
        choice.text, choice.reasoning = "".join(text), "".join(thought)
        choice.calls = _joined(choice.calls)
    if len(choices) == 1:
        choices[0].finish_reason, choices[0].stop = ending.finish_reason, ending.stop
    return choices


def usage(endings: Iterable[Ending]) -> dict[str, Any]:
    """What an answer cost."""
    prompt = output = cached = reasoning = 0
    for ending in endings:
        prompt += ending.prompt_tokens
        output += ending.output_tokens
        cached += ending.cached_tokens
        reasoning += ending.reasoning_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def token_name(score: TokenScore, show: Show) -> str:
    """How a token is written among log-probabilities."""
    return f"token_id:{score.token_id}" if show.names_as_ids else score.token


def logprob(score: TokenScore) -> float:
    """A log-probability that JSON can say."""
    return max(score.logprob, _LOWEST)


def prompt_logprobs(prompt: Prompt | None) -> list[dict[str, Any] | None] | None:
    """The prompt's log-probabilities in vLLM's shape: nothing for the first token, then by token id."""
    if prompt is None or not prompt.scores:
        return None
    return [None, *({str(other.token_id): _ranked(other) for other in _with_chosen(score)} for score in prompt.scores)]


def _with_chosen(score: TokenScore) -> list[TokenScore]:
    others = [other for other in score.alternatives if other.token_id != score.token_id]
    return [score, *others]


def _ranked(score: TokenScore) -> dict[str, Any]:
    return {"logprob": logprob(score), "rank": score.rank or None, "decoded_token": score.token}


def _joined(pieces: Sequence[CallPiece]) -> list[CallPiece]:
    by_index: dict[int, list[CallPiece]] = {}
    for piece in pieces:
        by_index.setdefault(piece.index, []).append(piece)
    return [
        CallPiece(index=index, id=parts[0].id, name=parts[0].name, arguments="".join(part.arguments for part in parts))
        for index, parts in sorted(by_index.items())
    ]
