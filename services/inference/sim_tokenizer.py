"""The tokenizer of the simulated engines, with the bounds of a model's context."""

from collections.abc import Sequence

from services.common.errors import MeshError, Reason
from services.inference import sim_text
from services.inference.engine import EngineCard
from services.inference.request import ChatMessage, ChatOptions

__all__ = ["SimTokenizer"]


class SimTokenizer:
    """Turns prompts into tokens and back for one simulated model."""

    def __init__(self, card: EngineCard, *, output_tokens: int = 0) -> None:
        """`output_tokens` of the model's context are what an output has at least."""
        self._card = card
        self._output_tokens = output_tokens

    def tokenize(self, prompt: str | Sequence[ChatMessage], chat: ChatOptions | None = None) -> list[int]:
        """The tokens of a text, or of a conversation.

        Raises:
            MeshError: CONTEXT_LENGTH_EXCEEDED, it is longer than the model takes, whatever its tokens are.
        """
        if isinstance(prompt, str):
            self._check_characters("prompt", len(prompt), what="the prompt")
            return sim_text.tokenize(prompt)
        self._check_characters("messages", sum(len(sim_text.said(each)) for each in prompt), what="the prompt")
        return sim_text.render_chat(prompt, chat)

    def tokens(self, text: str, field: str, *, limit: int | None = None) -> list[int]:
        """The tokens of a text, which is `field` in errors; one that is cut to a `limit` later may be of any length."""
        if limit is None:
            self._check_characters(field, len(text), what=field)
        return sim_text.tokenize(text)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens."""
        return sim_text.detokenize(token_ids)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token on its own."""
        return [sim_text.token_text(token_id) for token_id in token_ids]

    def _check_characters(self, field: str, characters: int, *, what: str) -> None:
        # Text that can't fit is refused before it is tokenized, which would hold everybody up.
        least = characters // sim_text.LONGEST_TOKEN
        if least + self._output_tokens > self._card.max_context_tokens:
            raise MeshError(
                Reason.CONTEXT_LENGTH_EXCEEDED,
                f"the model's context is {self._card.max_context_tokens} tokens, and {what} has at least {least}",
                field=field,
            )
