"""What vLLM is asked for, after every check that needs the prompt's tokens. Imports nothing of vLLM."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from services.common.errors import MeshError, Reason
from services.inference.engine import Generation, Sampling

__all__ = ["Limits", "Plan", "plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the loaded model can take."""

    context_tokens: int
    """Prompt and output together."""
    vocabulary: int
    """Token ids are below it."""
    logprobs: int = 20
    """Alternatives that can be reported for a token."""
    end_ids: frozenset[int] = frozenset()
    """The model's own end-of-sequence tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A generation that fits the model."""

    prompt_token_ids: Sequence[int]
    emitted_token_ids: Sequence[int]
    max_tokens: int
    """Bound of the whole output, emitted tokens included."""
    ended_by_token: bool
    """The last emitted token was an end-of-sequence or stop token: nothing is left to generate."""
    sampling: Sampling

    @property
    def tokens(self) -> list[int]:
        """What the engine computes first: the prompt and the output so far."""
        return [*self.prompt_token_ids, *self.emitted_token_ids]

    @property
    def remaining_tokens(self) -> int:
        """Most tokens that are still to be generated."""
        return 0 if self.ended_by_token else self.max_tokens - len(self.emitted_token_ids)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of vLLM's SamplingParams for what remains."""
        sampling = self.sampling
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "repetition_penalty": sampling.repetition_penalty,
            "max_tokens": self.remaining_tokens,
            "min_tokens": max(0, sampling.min_tokens - len(self.emitted_token_ids)),
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_token_ids),
            "seed": sampling.seed,
            "ignore_eos": sampling.ignore_eos,
            "logit_bias": dict(sampling.logit_bias) or None,
            "logprobs": sampling.logprob_count,
        }


def plan(generation: Generation, prompt: Sequence[int], limits: Limits) -> Plan:
    """Checks a generation against the model.

    Raises:
        MeshError: the prompt is too long (CONTEXT_LENGTH_EXCEEDED) or a value doesn't fit (INVALID_REQUEST); the
            field is named, and its bound.
    """
    sampling = generation.sampling
    field = "messages" if generation.kind == "chat" else "prompt"
    if not prompt:
        raise _invalid(field, f"{field} must have at least one token")
    _check_ids(field, prompt, limits)
    _check_ids("stop_token_ids", sampling.stop_token_ids, limits)
    _check_ids("logit_bias", sampling.logit_bias, limits)
    _check_ids("emitted_token_ids", generation.emitted_token_ids, limits)
    max_tokens = _bounded_output(field, len(prompt), sampling.max_tokens, limits)
    if sampling.min_tokens > max_tokens:
        raise _invalid("min_tokens", f"min_tokens must be at most {max_tokens}, got {sampling.min_tokens}")
    if sampling.logprob_count is not None and sampling.logprob_count > limits.logprobs:
        raise _invalid("logprob_count", f"logprob_count must be at most {limits.logprobs}")
    _check_continuation(generation, max_tokens)
    return Plan(
        prompt_token_ids=prompt,
        emitted_token_ids=generation.emitted_token_ids,
        max_tokens=max_tokens,
        ended_by_token=_ended(generation, limits),
        sampling=sampling,
    )


def _check_ids(field: str, ids: Iterable[int], limits: Limits) -> None:
    for token_id in ids:
        if not 0 <= token_id < limits.vocabulary:
            raise _invalid(field, f"{field} must be below {limits.vocabulary}, got the token id {token_id}")


def _bounded_output(field: str, prompt: int, asked: int | None, limits: Limits) -> int:
    room = limits.context_tokens - prompt
    least = 1 if asked is None else asked
    if least > room:
        raise MeshError(
            Reason.CONTEXT_LENGTH_EXCEEDED,
            f"this model's context is {limits.context_tokens} tokens, but {prompt + least} were asked for "
            f"({prompt} in the {field}, {least} of output)",
            field=field,
        )
    return room if asked is None else asked


def _check_continuation(generation: Generation, max_tokens: int) -> None:
    emitted, sampling = len(generation.emitted_token_ids), generation.sampling
    if not emitted:
        return
    if emitted > max_tokens:
        raise _invalid("emitted_token_ids", f"emitted_token_ids must be at most {max_tokens}, as many as max_tokens")
    inexact = {
        "a temperature above 0": sampling.temperature != 0,
        "log-probabilities": sampling.logprob_count is not None,
        # The engine would count the emitted tokens as prompt, to which these don't apply.
        "presence_penalty": sampling.presence_penalty != 0,
        "frequency_penalty": sampling.frequency_penalty != 0,
    }
    for what, asked in inexact.items():
        if asked:
            raise _invalid("emitted_token_ids", f"a generation with {what} can't be continued exactly")


def _ended(generation: Generation, limits: Limits) -> bool:
    if not generation.emitted_token_ids:
        return False
    sampling = generation.sampling
    ends = () if sampling.ignore_eos else limits.end_ids
    last = generation.emitted_token_ids[-1]
    return last in ends or last in sampling.stop_token_ids


def _invalid(field: str, message: str) -> MeshError:
    return MeshError(Reason.INVALID_REQUEST, message, field=field)
