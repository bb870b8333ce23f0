"""The text of a generation that goes on elsewhere: byte for byte what one engine would have streamed."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from vllm import SamplingParams
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from services.inference.vllm_params import Plan

__all__ = ["Replay"]


class Replay:
    """Detokenizes a continuation with vLLM's own detokenizer, after taking it through the tokens emitted so far.

    How much text a client has seen is a function of the tokens that it has: all of it but what may still become a stop
    string, or is half a character. So the replayed tokens' text is dropped, and what follows continues it exactly.
    """

    def __init__(self, tokenizer: Any, plan: Plan) -> None:
        params = SamplingParams(
            stop=list(plan.sampling.stop),
            min_tokens=plan.sampling.min_tokens,
            max_tokens=plan.max_tokens,
            skip_special_tokens=not plan.sampling.keep_special_tokens,
            include_stop_str_in_output=plan.sampling.include_stop_string,
        )
        # All that a detokenizer reads of a request.
        request = SimpleNamespace(
            request_id="", sampling_params=params, prompt_token_ids=list(plan.prompt_token_ids), prompt_embeds=None
        )
        self._detokenizer: Any = IncrementalDetokenizer.from_new_request(tokenizer, request)
        # One that is complete already ended the output, and the client has all of its text.
        self.stop_string: str | None = self._detokenizer.update(list(plan.emitted_token_ids), False)
        self._next_text(finished=False)

    def feed(self, token_ids: Sequence[int], finish_reason: str | None) -> tuple[str, Sequence[int], str | None]:
        """What new tokens add: the text, those of the tokens that count, and why the output ended, if it did."""
        before = self._detokenizer.num_output_tokens()
        self.stop_string = self._detokenizer.update(list(token_ids), finish_reason == "stop")
        if self.stop_string is not None:
            finish_reason = "stop"
        count = self._detokenizer.num_output_tokens() - before
        return self._next_text(finished=finish_reason is not None), token_ids[:count], finish_reason

    def _next_text(self, *, finished: bool) -> str:
        text: str = self._detokenizer.get_next_output_text(finished, True)
        return text
