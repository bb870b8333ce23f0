"""What answers of the Responses API look like: one object, and the events that tell how it came to be."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from services.common.errors import MeshError
from services.gateway import rendering
from services.gateway.pieces import CallPiece, Ending, Piece, TokenScore
from services.gateway.schema_responses import NamedFunctionChoice, ResponsesRequest

__all__ = ["ResponsesRenderer"]

_encode: Final = msgspec.json.Encoder().encode


@dataclass(slots=True)
class _Item:
    """An output item that is being written."""

    kind: str
    id: str
    index: int
    """Among the output's items."""
    call: CallPiece | None = None
    parts: list[str] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


class ResponsesRenderer:
    """One answer. Make it write events, or let it take everything and ask for the object at the end."""

    def __init__(self, *, answer_id: str, created: float, request: ResponsesRequest) -> None:
        self.id = f"resp_{answer_id}"
        self.final: dict[str, Any] = {}
        """The response object, once it is complete."""
        self._suffix = answer_id
        self._request = request
        self._model = request.model
        self._created = created
        self._sequence = 0
        self._done: list[dict[str, Any]] = []
        self._open: _Item | None = None

    def first(self) -> bytes:
        """The events before any output."""
        started = self.body("in_progress")
        return self._event("response.created", response=started) + self._event("response.in_progress", response=started)

    def answered_by(self, model: str) -> None:
        """The model that answers, which may have another name than was asked for."""
        self._model = model

    def pieces(self, pieces: Iterable[str | Piece]) -> bytes:
        """The events of output."""
        return b"".join(self._text(piece) if isinstance(piece, str) else self._piece(piece) for piece in pieces)

    def writer(self, write: Callable[[bytes], bool]) -> Callable[[str], bool]:
        """Renders and writes plain text in one call; False, and nothing is done, when the client can't take it."""

        def write_text(text: str) -> bool:
            item = self._open
            if not text:
                return True
            if item is None or item.kind != "message":
                return False
            sequence = self._sequence
            if not write(self._delta(item, text, [])):
                self._sequence = sequence
                return False
            item.parts.append(text)
            return True

        return write_text

    def last(self, ending: Ending) -> bytes:
        """The events after all output."""
        status = _status(ending)
        closing = self._close(status)
        self.final = self.body(status, ending)
        return closing + self._event(f"response.{status}", response=self.final)

    def failed(self, error: MeshError) -> bytes:
        """The events of an answer that failed midway; what was said stays unfinished."""
        body = self.body("failed")
        body["error"] = {"code": "server_error", "message": error.message}
        return self._event("response.failed", response=body)

    def whole(self, pieces: Iterable[str | Piece], ending: Ending) -> dict[str, Any]:
        """The answer in one piece."""
        self.pieces(pieces)
        self._close(_status(ending))
        self.final = self.body(_status(ending), ending)
        return self.final

    def body(self, status: str, ending: Ending | None = None) -> dict[str, Any]:
        """The response object."""
        request = self._request
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._model,
            "output": list(self._done),
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": request.store is not False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": _format(request)},
            "tool_choice": _tool_choice(request),
            "tools": [_tool(tool) for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": _usage(ending) if ending else None,
            "user": request.user,
        }

    def _text(self, text: str, scores: Sequence[TokenScore] = ()) -> bytes:
        if not text and not scores:
            return b""
        opening, item = self._opened("message")
        logprobs = [_score(score) for score in scores]
        item.parts.append(text)
        item.scores += logprobs
        return opening + self._delta(item, text, logprobs)

    def _delta(self, item: _Item, text: str, logprobs: list[dict[str, Any]]) -> bytes:
        return self._event(
            "response.output_text.delta",
            item_id=item.id,
            output_index=item.index,
            content_index=0,
            delta=text,
            logprobs=list(map(_told, logprobs)),
        )

    def _piece(self, piece: Piece) -> bytes:
        events = b""
        if piece.reasoning and self._request.include_reasoning is not False:
            opening, item = self._opened("reasoning")
            item.parts.append(piece.reasoning)
            events += opening + self._event(
                "response.reasoning_text.delta",
                item_id=item.id,
                output_index=item.index,
                content_index=0,
                delta=piece.reasoning,
            )
        events += self._text(piece.text, piece.scores)
        for call in piece.calls:
            events += self._call(call)
        return events

    def _call(self, call: CallPiece) -> bytes:
        opening, item = self._opened("function_call", call)
        if not call.arguments:
            return opening
        item.parts.append(call.arguments)
        return opening + self._event(
            "response.function_call_arguments.delta",
            item_id=item.id,
            output_index=item.index,
            delta=call.arguments,
        )

    def _opened(self, kind: str, call: CallPiece | None = None) -> tuple[bytes, _Item]:
        item = self._open
        if item is not None and item.kind == kind and (call is None or not call.name):
            return b"", item
        closing = self._close()
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        item = self._open = _Item(kind, f"{prefix}_{self._suffix}_{len(self._done)}", len(self._done), call)
        events = self._event(
            "response.output_item.added", output_index=item.index, item=_item_body(item, "in_progress")
        )
        if kind != "function_call":
            events += self._event("response.content_part.added", **_at(item), part=_part(item))
        return closing + events, item

    def _close(self, status: str = "completed") -> bytes:
        item, self._open = self._open, None
        if item is None:
            return b""
        match item.kind:
            case "message":
                events = self._event(
                    "response.output_text.done", **_at(item), text=item.text, logprobs=list(map(_told, item.scores))
                ) + self._event("response.content_part.done", **_at(item), part=_part(item))
            case "reasoning":
                events = self._event("response.reasoning_text.done", **_at(item), text=item.text)
                events += self._event("response.content_part.done", **_at(item), part=_part(item))
            case _:
                events = self._event(
                    "response.function_call_arguments.done",
                    item_id=item.id,
                    output_index=item.index,
                    arguments=item.text,
                )
        body = _item_body(item, status)
        self._done.append(body)
        return events + self._event("response.output_item.done", output_index=item.index, item=body)

    def _event(self, kind: str, **fields: Any) -> bytes:
        sequence = self._sequence
        self._sequence += 1
        return (
            f"event: {kind}\ndata: ".encode() + _encode({"type": kind, "sequence_number": sequence, **fields}) + b"\n\n"
        )


def _status(ending: Ending) -> str:
    return "incomplete" if ending.finish_reason == "length" else "completed"


def _at(item: _Item) -> dict[str, Any]:
    return {"item_id": item.id, "output_index": item.index, "content_index": 0}


def _part(item: _Item) -> dict[str, Any]:
    if item.kind == "reasoning":
        return {"type": "reasoning_text", "text": item.text}
    return {"type": "output_text", "text": item.text, "annotations": [], "logprobs": item.scores}


def _item_body(item: _Item, status: str) -> dict[str, Any]:
    match item.kind:
        case "message":
            content = [_part(item)] if status != "in_progress" else []
            return {"type": "message", "id": item.id, "status": status, "role": "assistant", "content": content}
        case "reasoning":
            thoughts = [_part(item)] if status != "in_progress" else []
            return {"type": "reasoning", "id": item.id, "status": status, "summary": [], "content": thoughts}
    assert item.call is not None
    return {
        "type": "function_call",
        "id": item.id,
        "status": status,
        "call_id": item.call.id,
        "name": item.call.name,
        "arguments": item.text,
    }


def _score(score: TokenScore) -> dict[str, Any]:
    return {**_one_score(score), "top_logprobs": [_one_score(other) for other in score.alternatives]}


def _told(score: dict[str, Any]) -> dict[str, Any]:
    """A score as events have it: without bytes."""
    told = {name: score[name] for name in ("token", "logprob")}
    return {**told, "top_logprobs": [{name: top[name] for name in told} for top in score["top_logprobs"]]}


def _one_score(score: TokenScore) -> dict[str, Any]:
    return {"token": score.token, "logprob": rendering.logprob(score), "bytes": list(score.token.encode())}


def _usage(ending: Ending) -> dict[str, Any]:
    return {
        "input_tokens": ending.prompt_tokens,
        "input_tokens_details": {"cached_tokens": ending.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": ending.output_tokens,
        "output_tokens_details": {"reasoning_tokens": ending.reasoning_tokens},
        "total_tokens": ending.prompt_tokens + ending.output_tokens,
    }


def _format(request: ResponsesRequest) -> dict[str, Any]:
    form = request.text.format if request.text else None
    if form is None or form.type != "json_schema":
        return {"type": form.type if form else "text"}
    return {
        "type": "json_schema",
        "name": form.name,
        "schema": msgspec.json.decode(form.schema),
        "strict": form.strict,
        "description": form.description,
    }


def _tool_choice(request: ResponsesRequest) -> object:
    if isinstance(request.tool_choice, NamedFunctionChoice):
        return {"type": "function", "name": request.tool_choice.name}
    return request.tool_choice or "auto"


def _tool(tool: Any) -> dict[str, Any]:
    parameters = bytes(tool.parameters)
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": msgspec.json.decode(parameters) if parameters else None,
        "strict": tool.strict,
    }
