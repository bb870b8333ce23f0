"""The text of tokens in log-probabilities, as vLLM tells it, also where it was not asked for text."""

from collections.abc import Sequence
from typing import Any, Final

from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
from vllm.v1.engine.logprobs import LogprobsProcessor

__all__ = ["TokenTexts"]

_HALF: Final = "\N{REPLACEMENT CHARACTER}"


class TokenTexts:
    """Texts of single tokens by one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}
        # What tells it of a tokenizer is all that its texts come from.
        self._vllms: Any = LogprobsProcessor(
            tokenizer=tokenizer,
            logprobs=None,
            prompt_logprobs=None,
            cumulative_logprob=None,
            num_logprobs=None,
            num_prompt_logprobs=None,
        )

    def alone(self, token_id: int) -> str:
        """What it is by itself, with U+FFFD for a part of a character."""
        text = self._alone.get(token_id)
        if text is None:
            (text,) = convert_ids_list_to_tokens(self._tokenizer, [token_id])
            self._alone[token_id] = text
        return text

    def after(self, token_id: int, before: Sequence[int]) -> str:
        """What it adds to the tokens before it, of which vLLM looks at the last four.

        Empty where a character is not complete with it; the token that completes one has all of it.
        """
        text = self.alone(token_id)
        if not text.endswith(_HALF):
            return text
        corrected: str = self._vllms._correct_decoded_token(token_id, list(before))
        return corrected
