"""What the simulated engine makes of a request: the prompt's tokens and the output's end, or why it can't be done."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.common.errors import MeshError, Reason
from services.inference import sim_text
from services.inference.engine import EngineCard
from services.inference.output import FinishReason
from services.inference.request import ChatMessage, Generation
from services.inference.sim_tokenizer import SimTokenizer

__all__ = ["Output", "Planner"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What an output will be, which is settled when its request comes."""

    seed: int
    """What it is made of; see sim_text.output_seed()."""
    end: int
    """The position at which it ends."""
    reason: FinishReason


class Planner:
    """Plans requests to one simulated model."""

    def __init__(self, card: EngineCard, tokenizer: SimTokenizer, *, poison_text: str) -> None:
        """A prompt with `poison_text` in it kills the engine; empty: none does."""
        self._card = card
        self._tokenizer = tokenizer
        self._poison_text = poison_text

    def prompt_tokens(self, generation: Generation) -> list[int]:
        """The tokens of a prompt whose request can be done.

        Raises:
            MeshError: it can't, or a field has what isn't in the vocabulary.
        """
        _check_possible(generation)
        tokens = self._tokens(generation)
        self._check_ids(generation, tokens)
        return tokens

    def output(self, generation: Generation, tokens: Sequence[int], choice: int) -> Output:
        """What one of the choices will be, after a prompt of these tokens.

        Raises:
            MeshError: CONTEXT_LENGTH_EXCEEDED, it may be longer than what the prompt leaves.
        """
        limit, sampling = self._card.max_context_tokens, generation.sampling
        room = limit - len(tokens)
        least = max(sampling.max_tokens or 1, sampling.min_tokens, len(generation.emitted_token_ids))
        if least > room:
            raise MeshError(
                Reason.CONTEXT_LENGTH_EXCEEDED,
                f"the model's context is {limit} tokens; the prompt has {len(tokens)} and the output may have {least}",
                field="messages" if generation.kind == "chat" else "prompt",
            )
        seed = sim_text.output_seed(tokens, choice)
        if sampling.max_tokens is not None:
            return Output(seed=seed, end=sampling.max_tokens, reason=FinishReason.LENGTH)
        natural = max(sim_text.natural_length(seed), sampling.min_tokens)
        if sampling.ignore_eos or natural > room:
            return Output(seed=seed, end=room, reason=FinishReason.LENGTH)
        return Output(seed=seed, end=natural, reason=FinishReason.STOP)

    def is_poison(self, prompt: str | Sequence[int] | Sequence[ChatMessage]) -> bool:
        """Whether the engine dies of it."""
        poison = self._poison_text
        if not poison:
            return False
        texts = (
            [prompt]
            if isinstance(prompt, str)
            else [sim_text.said(part) for part in prompt if isinstance(part, ChatMessage)]
        )
        return any(poison in text for text in texts)

    def _tokens(self, generation: Generation) -> list[int]:
        prompt, limit = generation.prompt, generation.prompt_token_limit
        if isinstance(prompt, str):
            tokens = self._tokenizer.tokenize(prompt)
        elif generation.kind == "chat":
            messages = [part for part in prompt if isinstance(part, ChatMessage)]
            tokens = self._tokenizer.tokenize(messages, generation.chat)
        else:
            tokens = [part for part in prompt if isinstance(part, int)]
        return tokens if limit is None else tokens[-limit:]

    def _check_ids(self, generation: Generation, tokens: Sequence[int]) -> None:
        sampling = generation.sampling
        by_field: dict[str, Iterable[int]] = {
            "token_ids.ids": tokens,
            "emitted_token_ids": generation.emitted_token_ids,
            "sampling.stop_token_ids": sampling.stop_token_ids,
            "sampling.logit_bias": sampling.logit_bias,
        }
        for field, ids in by_field.items():
            highest = max(ids, default=0)
            if highest >= self._card.vocabulary_size:
                message = f"{field}: {highest} is not below the vocabulary's size, {self._card.vocabulary_size}"
                raise MeshError(Reason.INVALID_REQUEST, message, field=field)


def _check_possible(generation: Generation) -> None:
    # What it says is settled, so nothing can be kept from being said.
    impossible = {
        "sampling.bad_words": bool(generation.sampling.bad_words),
        "sampling.allowed_token_ids": bool(generation.sampling.allowed_token_ids),
        "structured_output": generation.structured_output is not None,
        "chat.tools": bool(generation.chat.tools),
        "chat.template_arguments_json": bool(generation.chat.template_arguments),
    }
    for field, asked in impossible.items():
        if asked:
            message = f"{field}: the simulated engine can't do that"
            raise MeshError(Reason.UNIMPLEMENTED, message, field=field)
