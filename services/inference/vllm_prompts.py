"""Prompts as tokens, by vLLM's renderer and the model's own chat template."""

import re
import secrets
from collections.abc import Sequence
from typing import Any

from vllm.renderers.params import ChatParams, TokenizeParams

from services.common.errors import MeshError, Reason
from services.inference.engine import ChatMessage, Generation

__all__ = ["Prompts"]


class Prompts:
    """Tokenizes texts, and conversations after rendering them.

    What a message says stays text: a special token that is spelled out in it, `<|im_end|>` for example, is tokenized as
    the characters that it is, so nobody can speak in another role's name. In a plain text prompt, which has no roles,
    special tokens count.
    """

    def __init__(self, renderer: Any, *, context_tokens: int) -> None:
        """`renderer` is vLLM's."""
        self._renderer = renderer
        self._tokenizer = renderer.get_tokenizer()
        self._context_tokens = context_tokens
        self._chat = ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": False})
        self._plain = TokenizeParams(max_total_tokens=None, add_special_tokens=True)
        self._rendered = TokenizeParams(max_total_tokens=None, add_special_tokens=False)
        self._backwards = TokenizeParams(max_total_tokens=None, needs_detokenization=True)
        self._special = _pattern(self._tokenizer)
        self._longest_token: int = getattr(self._tokenizer, "max_chars_per_token", 0)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered. Tokenizers that aren't Hugging Face's have a format built in."""
        return getattr(self._tokenizer, "chat_template", "built in") is not None

    async def generation_tokens(self, generation: Generation) -> list[int]:
        """The tokens of what a generation continues; raises MeshError as tokens() does."""
        prompt = generation.prompt
        if isinstance(prompt, str) and not generation.add_special_tokens:
            return await self.plain_tokens(prompt)
        return await self.tokens(prompt)

    async def tokens(self, prompt: str | Sequence[int] | Sequence[ChatMessage]) -> list[int]:
        """The tokens of a prompt in any of its three forms.

        Raises:
            MeshError: it is too long whatever its tokens are (CONTEXT_LENGTH_EXCEEDED); the template refuses the
                conversation, or there is no template (INVALID_REQUEST).
        """
        if isinstance(prompt, str):
            self._check_length("prompt", len(prompt))
            return await self._encode(prompt, self._plain)
        messages = [message for message in prompt if isinstance(message, ChatMessage)]
        if messages:
            return await self._chat_tokens(messages)
        return [token for token in prompt if isinstance(token, int)]

    def _check_length(self, field: str, characters: int) -> None:
        # A prompt of megabytes would keep the tokenizer busy for seconds just to be refused.
        if self._longest_token and characters > self._context_tokens * self._longest_token:
            raise MeshError(
                Reason.CONTEXT_LENGTH_EXCEEDED,
                f"this model's context is {self._context_tokens} tokens, which {characters} characters don't fit into",
                field=field,
            )

    async def _chat_tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        if not self.has_chat_template:
            raise MeshError(Reason.INVALID_REQUEST, "this model has no chat template", field="messages")
        self._check_length("messages", sum(len(message.content) for message in messages))
        disguise = _Disguise(self._special)
        conversation = [_openai(message, disguise) for message in messages]
        _, prompt = await self._renderer.render_messages_async(conversation, self._chat)
        if "prompt_token_ids" in prompt:
            return list(prompt["prompt_token_ids"])
        tokens: list[int] = []
        for text, is_plain in disguise.lift(prompt["prompt"]):
            if is_plain:
                tokens += self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            elif text:
                tokens += await self._encode(text, self._rendered)
        return tokens

    async def plain_tokens(self, text: str) -> list[int]:
        """The tokens of a text alone, without those that the tokenizer adds; raises MeshError as tokens() does."""
        self._check_length("prompt", len(text))
        return await self._encode(text, self._rendered)

    async def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens."""
        prompt = await self._renderer.tokenize_prompt_async({"prompt_token_ids": list(token_ids)}, self._backwards)
        return str(prompt["prompt"])

    async def _encode(self, text: str, params: Any) -> list[int]:
        prompt = await self._renderer.tokenize_prompt_async({"prompt": text}, params)
        return list(prompt["prompt_token_ids"])


class _Disguise:
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

    def _mark(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"\ue000{self._secret}{len(self._hidden) - 1:x}\ue001"

    def lift(self, rendered: str) -> list[tuple[str, bool]]:
        """Pieces of the rendered text, and whether each is to be tokenized without special tokens."""
        if not self._hidden:
            return [(rendered, False)]
        pieces = re.split(f"\ue000{self._secret}([0-9a-f]+)\ue001", rendered)
        return [(self._hidden[int(piece, 16)], True) if i % 2 else (piece, False) for i, piece in enumerate(pieces)]


def _pattern(tokenizer: Any) -> re.Pattern[str] | None:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    spelled = sorted((token.content for token in added if token.special and token.content), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spelled))) if spelled else None


def _openai(message: ChatMessage, disguise: _Disguise) -> dict[str, str]:
    rendered = {"role": message.role, "content": disguise.hide(message.content)}
    if message.name:
        rendered["name"] = disguise.hide(message.name)
    return rendered
