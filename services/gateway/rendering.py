"""What answers look like: OpenAI's chat and legacy completion objects, whole and as server-sent events."""

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import msgspec

from services.gateway.stream import Ending, TokenScore

__all__ = ["DONE", "ChatRenderer", "CompletionRenderer", "Renderer"]

DONE: Final = b"data: [DONE]\n\n"
_encode: Final = msgspec.json.Encoder().encode
# Where a chunk's template has the text of the delta.
_HOLE: Final = "\x00"


class Renderer(Protocol):
    """Renders one answer."""

    def first(self) -> bytes:
        """The event before any text."""
        ...

    def deltas(self, texts: Sequence[str]) -> bytes:
        """The events of text deltas."""
        ...

    def writer(self, write: Callable[[bytes], bool]) -> Callable[[str], bool]:
        """Makes one function of rendering a delta and writing it: it is called for every token."""
        ...

    def scored(self, text: str, scores: Sequence[TokenScore]) -> bytes:
        """The event of text with log-probabilities."""
        ...

    def last(self, ending: Ending) -> bytes:
        """The events after all text, [DONE] not included."""
        ...

    def whole(self, text: str, scores: Sequence[TokenScore], ending: Ending) -> dict[str, Any]:
        """The answer in one piece."""
        ...


class _Chunks:
    """The events of one answer. A delta is two constant halves around a JSON string, since there are so many."""

    def __init__(self, head: dict[str, Any], hole: dict[str, Any], *, include_usage: bool) -> None:
        self._head = head
        self._include_usage = include_usage
        before, after = self.event(hole).split(_encode(_HOLE))
        self._before, self._between, self._after = before, after + before, after

    def event(self, choice: dict[str, Any]) -> bytes:
        """One event with one choice."""
        chunk = {**self._head, "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return b"data: " + _encode(chunk) + b"\n\n"

    def texts(self, texts: Sequence[str]) -> bytes:
        """One event for each text that isn't empty."""
        if len(texts) == 1:
            return self._before + _encode(texts[0]) + self._after if texts[0] else b""
        encoded = [_encode(text) for text in texts if text]
        return self._before + self._between.join(encoded) + self._after if encoded else b""

    def writer(self, write: Callable[[bytes], bool]) -> Callable[[str], bool]:
        """Renders and writes in one call."""
        before, after, encode = self._before, self._after, _encode

        def write_text(text: str) -> bool:
            return not text or write(before + encode(text) + after)

        return write_text

    def usage(self, ending: Ending) -> bytes:
        """The event with the usage, if it was asked for."""
        if not self._include_usage:
            return b""
        return b"data: " + _encode({**self._head, "choices": [], "usage": _usage(ending)}) + b"\n\n"


class ChatRenderer:
    """Chat completions."""

    def __init__(self, *, answer_id: str, created: int, model: str, include_usage: bool) -> None:
        self._head = {"id": f"chatcmpl-{answer_id}", "object": "chat.completion", "created": created, "model": model}
        head = {**self._head, "object": "chat.completion.chunk"}
        self._chunks = _Chunks(head, _chat_choice({"content": _HOLE}), include_usage=include_usage)

    def first(self) -> bytes:
        """The role."""
        return self._chunks.event(_chat_choice({"role": "assistant", "content": ""}))

    def deltas(self, texts: Sequence[str]) -> bytes:
        """Text."""
        return self._chunks.texts(texts)

    def writer(self, write: Callable[[bytes], bool]) -> Callable[[str], bool]:
        """Text, written as it comes."""
        return self._chunks.writer(write)

    def scored(self, text: str, scores: Sequence[TokenScore]) -> bytes:
        """Text with log-probabilities."""
        return self._chunks.event(_chat_choice({"content": text}, logprobs=_chat_scores(scores)))

    def last(self, ending: Ending) -> bytes:
        """The finish reason, and the usage if asked for."""
        finish = self._chunks.event(_chat_choice({}, finish_reason=ending.finish_reason))
        return finish + self._chunks.usage(ending)

    def whole(self, text: str, scores: Sequence[TokenScore], ending: Ending) -> dict[str, Any]:
        """The answer in one piece."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": _chat_scores(scores),
            "finish_reason": ending.finish_reason,
        }
        return {**self._head, "choices": [choice], "usage": _usage(ending)}


class CompletionRenderer:
    """Legacy completions."""

    def __init__(self, *, answer_id: str, created: int, model: str, include_usage: bool) -> None:
        self._head = {"id": f"cmpl-{answer_id}", "object": "text_completion", "created": created, "model": model}
        self._chunks = _Chunks(self._head, _completion_choice(_HOLE), include_usage=include_usage)
        self._offset = 0

    def first(self) -> bytes:
        """Nothing."""
        return b""

    def deltas(self, texts: Sequence[str]) -> bytes:
        """Text."""
        return self._chunks.texts(texts)

    def writer(self, write: Callable[[bytes], bool]) -> Callable[[str], bool]:
        """Text, written as it comes."""
        return self._chunks.writer(write)

    def scored(self, text: str, scores: Sequence[TokenScore]) -> bytes:
        """Text with log-probabilities."""
        return self._chunks.event(_completion_choice(text, logprobs=self._scores(scores)))

    def last(self, ending: Ending) -> bytes:
        """The finish reason, and the usage if asked for."""
        return self._chunks.event(_completion_choice("", ending.finish_reason)) + self._chunks.usage(ending)

    def whole(self, text: str, scores: Sequence[TokenScore], ending: Ending) -> dict[str, Any]:
        """The answer in one piece."""
        choice = _completion_choice(text, ending.finish_reason, self._scores(scores))
        return {**self._head, "choices": [choice], "usage": _usage(ending)}

    def _scores(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not scores:
            return None
        offsets = []
        for score in scores:
            offsets.append(self._offset)
            self._offset += len(score.token)
        return {
            "tokens": [score.token for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [{other.token: other.logprob for other in score.alternatives} for score in scores],
            "text_offset": offsets,
        }


def _chat_choice(
    delta: dict[str, Any], *, finish_reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _completion_choice(
    text: str, finish_reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _chat_scores(scores: Sequence[TokenScore]) -> dict[str, Any] | None:
    if not scores:
        return None
    content = [{**_score(score), "top_logprobs": [_score(other) for other in score.alternatives]} for score in scores]
    return {"content": content, "refusal": None}


def _score(score: TokenScore) -> dict[str, Any]:
    return {"token": score.token, "logprob": score.logprob, "bytes": list(score.token.encode())}


def _usage(ending: Ending) -> dict[str, Any]:
    return {
        "prompt_tokens": ending.prompt_tokens,
        "completion_tokens": ending.output_tokens,
        "total_tokens": ending.prompt_tokens + ending.output_tokens,
        "prompt_tokens_details": {"cached_tokens": ending.cached_tokens},
    }
