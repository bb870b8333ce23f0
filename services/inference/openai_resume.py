"""A generation that began elsewhere and goes on at a server that takes and tells tokens."""

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from services.common.errors import MeshError, Reason
from services.inference.engine import Capability, EngineCard
from services.inference.openai_flavours import Flavour
from services.inference.openai_request import Call, continued
from services.inference.openai_tokens import Tokens, decoded
from services.inference.openai_upstream import Upstream
from services.inference.output import FinishReason, StopCause
from services.inference.request import ChatMessage, Generation

__all__ = ["Resumption", "resumption"]


_TAIL_TOKENS: Final = 16
_MOST_BIAS: Final = 100


class Resumption(NamedTuple):
    """What is left to do."""

    call: Call
    prompt_tokens: int
    repeated: Sequence[int] = ()
    """Emitted tokens that the server says again: they end inside a character, and so none of their text was shown."""
    end: tuple[FinishReason, StopCause | None] | None = None
    """The output was complete already."""


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]


async def resumption(
    generation: Generation, tokens: Tokens, upstream: Upstream, flavour: Flavour, card: EngineCard
) -> Resumption:
    """How a generation goes on after the tokens that were emitted elsewhere.

    Only the server knows whether the last of them ended the output, and whether it would have said the same. So it is
    asked for that token again first; where it draws its tokens, it is made to say it.

    Raises:
        MeshError: NO_READY_WORKER, it can't go on here exactly; ENGINE_FAILED, the server says something else.
    """
    _check_exact(generation, flavour, card)
    prompt, emitted, sampling = (
        await _prompt_tokens(generation, tokens),
        generation.emitted_token_ids,
        generation.sampling,
    )
    if emitted[-1] in sampling.stop_token_ids and len(emitted) > sampling.min_tokens:
        end: tuple[FinishReason, StopCause | None] | None = (FinishReason.STOP, emitted[-1])
    else:
        again = continued(generation, prompt, emitted[:-1], flavour, tokens.model)
        end = await _ended(generation, again, upstream)
    whole = await _whole_characters(prompt, emitted, tokens)
    if whole < len(emitted) and sampling.temperature > 0:
        # Drawn again, the rest of the character might turn out another one.
        raise _inexact("a temperature above 0 that was cut inside a character")
    call = continued(generation, prompt, emitted[:whole], flavour, tokens.model)
    return Resumption(call, len(prompt), emitted[whole:], end)


async def _ended(generation: Generation, again: Call, upstream: Upstream) -> tuple[FinishReason, None] | None:
    """Whether the last token that was emitted was the output's end."""
    emitted, sampling = generation.emitted_token_ids, generation.sampling
    body = {**again.body, "max_tokens": 1, "min_tokens": int(len(emitted) <= sampling.min_tokens), "stream": False}
    if sampling.temperature > 0:
        body |= {"temperature": 0, "logit_bias": {str(emitted[-1]): _MOST_BIAS}}
    del body["stream_options"]
    (said,) = decoded(await upstream.post(again.path, body), _Answer).choices
    if list(said.token_ids or ()) != [emitted[-1]]:
        raise MeshError(Reason.ENGINE_FAILED, "the server behind this worker would have said something else")
    if said.finish_reason == "stop":
        return FinishReason.STOP, None
    if sampling.max_tokens is not None and len(emitted) >= sampling.max_tokens:
        return FinishReason.LENGTH, None
    return None


async def _whole_characters(prompt: Sequence[int], emitted: Sequence[int], tokens: Tokens) -> int:
    """How many of the emitted tokens end with a whole character."""
    for count in range(len(emitted), -1, -1):
        # A server that begins inside a character says the text before it, too.
        tail = [*prompt, *emitted[:count]][-_TAIL_TOKENS:]
        if not (await tokens.text(tail)).endswith("\ufffd"):
            return count
    raise _inexact("a prompt that ends inside a character")


async def _prompt_tokens(generation: Generation, tokens: Tokens) -> Sequence[int]:
    prompt = generation.prompt
    if isinstance(prompt, str):
        ids = await tokens.of(prompt, special_tokens=generation.add_special_tokens)
    elif generation.kind == "chat":
        messages = [each for each in prompt if isinstance(each, ChatMessage)]
        ids = await tokens.of(messages, options=generation.chat)
    else:
        ids = [each for each in prompt if isinstance(each, int)]
    limit = generation.prompt_token_limit
    return ids if limit is None else ids[-limit:]


def _check_exact(generation: Generation, flavour: Flavour, card: EngineCard) -> None:
    if not flavour.token_ids:
        raise _turned_away("emitted_token_ids: the server behind this worker takes and tells no tokens")
    sampling, chat = generation.sampling, generation.kind == "chat"
    inexact = {
        "a seed and a temperature above 0": sampling.seed is not None and sampling.temperature > 0,
        "a structured output": generation.structured_output is not None,
        "several choices": generation.choices > 1,
        # What was held back of a text for them, or of an answer for what reads it, is not known here.
        "stop strings": bool(sampling.stop),
        "functions to call": bool(generation.chat.tools),
        "thinking": chat and Capability.REASONING in card.capabilities,
        # The server would count the emitted tokens as prompt, to which these don't apply.
        "sampling.presence_penalty": sampling.presence_penalty != 0,
        "sampling.frequency_penalty": sampling.frequency_penalty != 0,
        "sampling.bad_words": bool(sampling.bad_words),
        "images or sound": chat and any(isinstance(each, ChatMessage) and each.parts for each in generation.prompt),
    }
    for what, asked in inexact.items():
        if asked:
            raise _inexact(what)


def _inexact(what: str) -> MeshError:
    return _turned_away(f"emitted_token_ids: a generation with {what} can't go on exactly behind this worker")


def _turned_away(message: str) -> MeshError:
    # Another worker of the model may well be able to, and gateways ask it then.
    return MeshError(Reason.NO_READY_WORKER, message, field="emitted_token_ids")
