"""Conversations as chat templates know them, with what clients said kept from being taken for more than text."""

import json
import re
import secrets
from typing import Any

from services.inference.request import ChatMessage, Media, Tool

__all__ = ["Disguise", "to_openai", "tool_to_openai"]

# vLLM wants either a file or a name for it.
_PLACE = "place"


class Disguise:
    """Special tokens in what messages say, hidden from the template and the tokenizer.

    Each becomes a mark that nobody can guess, and that is replaced after rendering; so templates that trim or search
    what was said still do.
    """

    def __init__(self, special: re.Pattern[str] | None) -> None:
        self._special = special
        self._secret = secrets.token_hex(8)
        self._hidden: list[str] = []

    def hide(self, text: str) -> str:
        """The text with marks in place of special tokens."""
        return text if self._special is None else self._special.sub(self._mark, text)

    def hide_in(self, value: Any) -> Any:
        """A value as JSON has them, with marks in its texts; names are texts, too."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, list):
            return [self.hide_in(each) for each in value]
        if isinstance(value, dict):
            return {self.hide(name): self.hide_in(each) for name, each in value.items()}
        return value

    def _mark(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"\ue000{self._secret}{len(self._hidden) - 1:x}\ue001"

    def lift(self, rendered: str) -> list[tuple[str, bool]]:
        """Pieces of the rendered text, and whether each is to be tokenized without special tokens."""
        if not self._hidden:
            return [(rendered, False)]
        pieces = re.split(f"\ue000{self._secret}([0-9a-f]+)\ue001", rendered)
        return [(self._hidden[int(piece, 16)], True) if i % 2 else (piece, False) for i, piece in enumerate(pieces)]


def to_openai(message: ChatMessage, disguise: Disguise) -> dict[str, Any]:
    """A message as vLLM's renderer takes it."""
    rendered: dict[str, Any] = {"role": message.role, "content": disguise.hide(message.content)}
    if message.parts:
        rendered["content"] = [_part(part, disguise) for part in message.parts]
    if message.name:
        rendered["name"] = disguise.hide(message.name)
    if message.reasoning:
        rendered["reasoning"] = disguise.hide(message.reasoning)
    if message.tool_call_id:
        rendered["tool_call_id"] = disguise.hide(message.tool_call_id)
    if message.tool_calls:
        rendered["content"] = rendered["content"] or None
        rendered["tool_calls"] = [
            {
                "id": disguise.hide(call.id),
                "type": "function",
                # What JSON escapes is text again once a template has it.
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(disguise.hide_in(json.loads(call.arguments_json))),
                },
            }
            for call in message.tool_calls
        ]
    return rendered


def _part(part: str | Media, disguise: Disguise) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": disguise.hide(part)}
    # Only its place in the prompt: what vLLM finds here it would read itself, and without our bounds.
    if part.kind == "image":
        return {"type": "image_url", "image_url": None, "uuid": _PLACE}
    return {"type": "audio_url", "audio_url": None, "uuid": _PLACE}


def tool_to_openai(tool: Tool) -> dict[str, Any]:
    """A tool as vLLM's server gives it to a chat template: what the client left out is null, but for `strict`."""
    function: dict[str, Any] = {
        "name": tool.name,
        "description": tool.description or None,
        "parameters": json.loads(tool.parameters_json) if tool.parameters_json else None,
    }
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}
