"""Prompts as tokens, by vLLM's renderer and the model's own chat template."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vllm.renderers.params import ChatParams, TokenizeParams
from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin

from services.common.errors import MeshError, Reason
from services.inference.media_files import files_of
from services.inference.request import ChatMessage, ChatOptions, Generation
from services.inference.vllm_conversation import Disguise, to_openai, tool_to_openai
from services.inference.vllm_media import MediaReader, media_limits

__all__ = ["Prompts", "Rendered"]

# So little is rendered and tokenized within a millisecond. vLLM's thread for that costs each request two hand-overs,
# with the two threads competing for Python's lock: of many requests at once each takes longer by that.
_SHORT_CHARACTERS: Final = 1024
_SHORT_MESSAGES: Final = 16


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as tokens."""

    tokens: list[int]
    media: Mapping[str, Any] | None = None
    """vLLM's engine input with what it takes for the images and sounds in the prompt; None: there are none."""


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
        self._plain = TokenizeParams(max_total_tokens=None, add_special_tokens=True)
        self._rendered = TokenizeParams(max_total_tokens=None, add_special_tokens=False)
        self._backwards = TokenizeParams(max_total_tokens=None, needs_detokenization=True)
        self._special = _pattern(self._tokenizer)
        self._longest_token: int = getattr(self._tokenizer, "max_chars_per_token", 0)
        self.media_limits = media_limits(renderer)
        """Images and sounds that a prompt may have; none that the model doesn't take."""
        self._media = MediaReader(renderer) if self.media_limits else None
        # vLLM has copies of these for its threads and for this one; others only vLLM's own thread may use.
        self._at_once = isinstance(self._tokenizer, ThreadSafeHFTokenizerMixin)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered. Tokenizers that aren't Hugging Face's have a format built in."""
        return getattr(self._tokenizer, "chat_template", "built in") is not None

    def close(self) -> None:
        """Ends the threads that read files."""
        if self._media is not None:
            self._media.close()

    async def of_generation(self, generation: Generation) -> Rendered:
        """The prompt of a generation; raises MeshError as rendered() does."""
        prompt = generation.prompt
        if isinstance(prompt, str) and not generation.add_special_tokens:
            return Rendered(await self.plain_tokens(prompt))
        return await self.rendered(prompt, generation.chat)

    async def rendered(
        self, prompt: str | Sequence[int] | Sequence[ChatMessage], options: ChatOptions | None = None
    ) -> Rendered:
        """A prompt in any of its three forms; `options` say how to render a conversation.

        Raises:
            MeshError: it is too long whatever its tokens are (CONTEXT_LENGTH_EXCEEDED); the template refuses the
                conversation, there is no template, or an image or sound can't be taken (INVALID_REQUEST).
        """
        if isinstance(prompt, str):
            self._check_length("prompt", len(prompt))
            return Rendered(await self._encode(prompt, self._plain))
        messages = [message for message in prompt if isinstance(message, ChatMessage)]
        if messages:
            return await self._chat(messages, options or ChatOptions())
        return Rendered([token for token in prompt if isinstance(token, int)])

    def _check_length(self, field: str, characters: int) -> None:
        # A prompt of megabytes would keep the tokenizer busy for seconds just to be refused.
        if self._longest_token and characters > self._context_tokens * self._longest_token:
            raise MeshError(
                Reason.CONTEXT_LENGTH_EXCEEDED,
                f"this model's context is {self._context_tokens} tokens, which {characters} characters don't fit into",
                field=field,
            )

    async def _chat(self, messages: Sequence[ChatMessage], options: ChatOptions) -> Rendered:
        tokens = await self._chat_tokens(messages, options)
        if self._media is None or not (files := files_of(messages)):
            return Rendered(tokens)
        media = await self._media.prompt(tokens, files)
        return Rendered(list(media["prompt_token_ids"]), media)

    async def _chat_tokens(self, messages: Sequence[ChatMessage], options: ChatOptions) -> list[int]:
        if not self.has_chat_template:
            raise MeshError(Reason.INVALID_REQUEST, "this model has no chat template", field="messages")
        self._check_length("messages", sum(map(_characters, messages)))
        self._check_length(
            "chat.tools", sum(len(tool.parameters_json) + len(tool.description) for tool in options.tools)
        )
        disguise = Disguise(self._special)
        conversation = [to_openai(message, disguise) for message in messages]
        params = _chat_params(options, disguise)
        if self._at_once and _is_short(messages, options):
            _, prompt = self._renderer.render_messages(conversation, params)
        else:
            _, prompt = await self._renderer.render_messages_async(conversation, params)
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
        if self._at_once and len(text) <= _SHORT_CHARACTERS:
            prompt = self._renderer.tokenize_prompt({"prompt": text}, params)
        else:
            prompt = await self._renderer.tokenize_prompt_async({"prompt": text}, params)
        return list(prompt["prompt_token_ids"])


def _pattern(tokenizer: Any) -> re.Pattern[str] | None:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    spelled = sorted((token.content for token in added if token.special and token.content), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spelled))) if spelled else None


def _characters(message: ChatMessage) -> int:
    said = len(message.content) + len(message.reasoning) + sum(len(call.arguments_json) for call in message.tool_calls)
    return said + sum(len(part) for part in message.parts if isinstance(part, str))


def _is_short(messages: Sequence[ChatMessage], options: ChatOptions) -> bool:
    """Whether a template has little to do with a conversation, whatever it is."""
    if options.tools or options.template_arguments or len(messages) > _SHORT_MESSAGES:
        return False
    if any(message.parts or message.tool_calls for message in messages):
        return False
    return sum(map(_characters, messages)) <= _SHORT_CHARACTERS


def _chat_params(options: ChatOptions, disguise: Disguise) -> Any:
    arguments: dict[str, Any] = {
        **disguise.hide_in(dict(options.template_arguments)),
        "add_generation_prompt": options.generation_prompt,
        "continue_final_message": options.continue_final_message,
        "tools": disguise.hide_in([tool_to_openai(tool) for tool in options.tools]) if options.tools else None,
        "tokenize": False,
    }
    return ChatParams(chat_template_kwargs=arguments, tool_choice=options.tool_choice if options.tools else None)
