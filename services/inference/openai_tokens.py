"""Tokens and texts as a server with OpenAI's API has them, as far as it tells."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import msgspec

from services.common.errors import MeshError, Reason
from services.inference.openai_answer import Told
from services.inference.openai_flavours import Flavour
from services.inference.openai_request import message_to_openai, tool_to_openai
from services.inference.openai_upstream import Upstream
from services.inference.request import ChatMessage, ChatOptions, Generation

__all__ = ["Tokens", "decoded", "estimate"]

T = TypeVar("T")

_CHARACTERS_A_TOKEN: Final = 4
_AT_A_TIME: Final = 4
_REMEMBERED: Final = 65_536


class _Tokenized(msgspec.Struct):
    tokens: list[int]


class _Text(msgspec.Struct):
    prompt: str


class _Count(msgspec.Struct):
    count: int


class Tokens:
    """Asks a server for tokens and texts."""

    def __init__(self, upstream: Upstream, flavour: Flavour, model: str) -> None:
        self._upstream = upstream
        self._flavour = flavour
        self.model = model
        self._texts: OrderedDict[int, str] = OrderedDict()

    async def of(
        self,
        prompt: str | Sequence[ChatMessage],
        *,
        special_tokens: bool = True,
        options: ChatOptions = ChatOptions(),  # noqa: B008  # it is frozen
    ) -> list[int]:
        """The tokens of a text, or of a conversation in the server's chat template.

        Raises:
            MeshError: UNIMPLEMENTED, the server does not tell; or it refuses.
        """
        self._check()
        body: dict[str, Any] = {"model": self.model}
        if isinstance(prompt, str):
            body |= {"prompt": prompt, "add_special_tokens": special_tokens}
        else:
            body |= {
                "messages": list(map(message_to_openai, prompt)),
                "add_generation_prompt": options.generation_prompt,
                "continue_final_message": options.continue_final_message,
            }
            if options.tools:
                body["tools"] = list(map(tool_to_openai, options.tools))
            if options.template_arguments:
                body["chat_template_kwargs"] = dict(options.template_arguments)
        return decoded(await self._upstream.post("/tokenize", body, at_root=True), _Tokenized).tokens

    async def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens. Raises MeshError as of() does."""
        self._check()
        body = {"model": self.model, "tokens": list(token_ids)}
        return decoded(await self._upstream.post("/detokenize", body, at_root=True), _Text).prompt

    async def texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token on its own. Raises MeshError as of() does."""
        self._check()
        new = [token_id for token_id in dict.fromkeys(token_ids) if token_id not in self._texts]
        known = {token_id: self._texts[token_id] for token_id in set(token_ids) - set(new)}
        few = asyncio.Semaphore(_AT_A_TIME)

        async def ask(token_id: int) -> None:
            async with few:
                known[token_id] = self._texts[token_id] = await self.text([token_id])

        try:
            async with asyncio.TaskGroup() as tasks:
                for token_id in new:
                    tasks.create_task(ask(token_id))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        while len(self._texts) > _REMEMBERED:
            self._texts.popitem(last=False)
        return [known[token_id] for token_id in token_ids]

    async def count(self, generation: Generation, said: str, told: Told) -> tuple[int, int]:
        """Tokens of prompt and output where no usage is told: counted by the server, or estimated."""
        path = self._flavour.counter
        if not path:
            return estimate(generation), told.ids or told.pieces
        prompt, output = [
            decoded(await self._upstream.post(path, {"model": self.model, "input": text}, at_root=True), _Count).count
            for text in (_prompt_text(generation), said)
        ]
        return prompt, output

    def _check(self) -> None:
        if not self._flavour.has_tokenizer:
            raise MeshError(Reason.UNIMPLEMENTED, "the server behind this worker doesn't tell of tokens")


def decoded(answer: bytes, shape: type[T]) -> T:
    """A server's answer; raises MeshError (ENGINE_FAILED) when it makes no sense."""
    try:
        return msgspec.json.decode(answer, type=shape)
    except msgspec.DecodeError as error:
        raise MeshError(Reason.ENGINE_FAILED, "the server behind this worker answers something else") from error


def estimate(generation: Generation) -> int:
    """About how many tokens a prompt has; of tokens exactly."""
    if generation.kind == "tokens":
        return len(generation.prompt)
    return len(_prompt_text(generation)) // _CHARACTERS_A_TOKEN + 1


def _prompt_text(generation: Generation) -> str:
    prompt = generation.prompt
    if isinstance(prompt, str):
        return prompt
    return "\n".join(
        message.content + "".join(part for part in message.parts if isinstance(part, str))
        for message in prompt
        if isinstance(message, ChatMessage)
    )
