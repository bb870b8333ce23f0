"""What a model writes in a chat, told apart into thinking, answer and function calls by vLLM's own parsers.

They are what `vllm serve` uses, and are fed as it feeds them, but a token at a time: so how far a parser is depends on
the tokens alone, and a generation that goes on elsewhere goes on exactly there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from services.inference.output import Delta, ToolCallDelta
from services.inference.vllm_params import Plan
from services.inference.vllm_replay import Replay

if TYPE_CHECKING:
    from services.inference.vllm_parsing import Reading

__all__ = ["Reader"]


@dataclass(slots=True)
class _Piece:
    """What some tokens brought."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCallDelta] | None = None

    def add(self, message: Any, *, is_single: bool) -> None:
        """Takes in what vLLM's parser says of one more token."""
        if message is None:
            return
        self.text += message.content or ""
        self.reasoning += message.reasoning or ""
        for call in message.tool_calls or ():
            if not (is_single and call.index):
                self._add_call(call)

    def _add_call(self, call: Any) -> None:
        function = call.function
        name, arguments = (function.name, function.arguments) if function is not None else (None, None)
        new = ToolCallDelta(index=call.index, id=call.id or "", name=name or "", arguments_json=arguments or "")
        if self.calls is None:
            self.calls = []
        last = self.calls[-1] if self.calls else None
        if last is not None and last.index == new.index and not new.id and not new.name:
            self.calls[-1] = replace(last, arguments_json=last.arguments_json + new.arguments_json)
        else:
            self.calls.append(new)


class Reader:
    """Reads one choice of an output. Its text is made here too, a token at a time."""

    def __init__(self, parser: Any, reading: "Reading", plan: Plan, tokenizer: Any) -> None:
        """Goes through the emitted tokens of `plan`; the client has all that they brought."""
        self._parser = parser
        self._reading = reading
        self._prompt = list(plan.prompt_token_ids)
        self._replay = Replay(tokenizer, replace(plan, emitted_token_ids=()))
        self._token_ids: list[int] = []
        self._calls = False
        self.feed(plan.emitted_token_ids, None)

    @property
    def stop_string(self) -> str | None:
        """What ended the output, if that was a stop string."""
        return self._replay.stop_string

    @property
    def reasoning_tokens(self) -> int:
        """How many tokens so far were thinking, as vLLM counts them."""
        counted: int = self._parser.count_reasoning_tokens(tuple(self._token_ids))
        return counted

    def feed(self, token_ids: Sequence[int], reason: str | None) -> tuple[Delta, str | None]:
        """What new tokens bring, and why the output ended, if it did: vLLM's reasons, and "tool_calls"."""
        piece, taken = _Piece(), len(self._token_ids)
        for index, token_id in enumerate(token_ids):
            last = index + 1 == len(token_ids)
            ended = self._step([token_id], reason if last else None, piece)
            if ended is not None:
                return self._delta(piece, taken), self._reason(ended)
        if not token_ids and reason is not None:
            reason = self._step([], reason, piece)
        return self._delta(piece, taken), None if reason is None else self._reason(reason)

    def _step(self, token_ids: list[int], reason: str | None, piece: _Piece) -> str | None:
        text, counted, reason = self._replay.feed(token_ids, reason)
        self._token_ids += counted
        message = self._parser.parse_delta(
            text, list(counted), self._reading.request, self._prompt, finished=reason is not None
        )
        if message is not None and message.tool_calls:
            self._calls = True
        piece.add(message, is_single=self._reading.is_single)
        return reason

    def _delta(self, piece: _Piece, taken: int) -> Delta:
        return Delta(
            text=piece.text,
            reasoning=piece.reasoning,
            tool_calls=piece.calls or (),
            token_ids=self._token_ids[taken:],
        )

    def _reason(self, reason: str) -> str:
        # As vLLM's server streams it: a function that had to be called is no news.
        return "tool_calls" if reason == "stop" and self._calls and not self._reading.is_named else reason
