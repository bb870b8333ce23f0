"""What vLLM is asked for, after every check that needs the prompt's tokens. Imports nothing of vLLM."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from services.common.errors import MeshError, Reason
from services.inference.request import Generation, Sampling

__all__ = ["EMITTED_ARGUMENT", "FORM_ARGUMENT", "SEEDED_ARGUMENT", "Limits", "Plan", "plan"]

EMITTED_ARGUMENT: Final = "tokenloom_emitted"
"""The extra argument that services.inference.vllm_emitted finds in the engine process: how many tokens of a request's
prompt were emitted elsewhere, and the penalties that are to count them."""
FORM_ARGUMENT: Final = "tokenloom_emitted_in_form"
"""The same for services.inference.vllm_emitted_form: how many there are for the form of the output to go through."""
SEEDED_ARGUMENT: Final = "tokenloom_emitted_seeded"
"""The same for services.inference.vllm_seeded: how many of them were drawn with the request's seed."""

_SEED_BITS: Final = (1 << 62) - 1
# Of log-probabilities of a prompt, the token itself counted: about a megabyte, which one message can carry.
_MAX_PROMPT_LOGPROBS: Final = 1 << 15


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
    end_id: int | None = None
    """The one of them that ends an output without being its stop cause."""
    counts_emitted: bool = True
    """The engine can count penalties and bad words over tokens that were emitted elsewhere."""
    continues_draws: bool = True
    """The engine can go on with what was drawn with a seed elsewhere."""
    placeholder_ids: frozenset[int] = frozenset()
    """Tokens that stand for images and sounds, and for nothing else."""


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
    choices: int = 1
    prompt_text: str = ""
    """The prompt, where the client wants it back."""
    stop_token_id: int | None = None
    """The last emitted token, where it is a stop token."""
    media: Mapping[str, Any] | None = None
    """vLLM's engine input for the prompt, where it has images or sounds."""

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
            "n": self.choices,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "max_tokens": self.remaining_tokens,
            "min_tokens": max(0, sampling.min_tokens - len(self.emitted_token_ids)),
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_token_ids),
            # vLLM takes -1 for no seed, and counts up from the seed for several choices.
            "seed": None if sampling.seed is None else sampling.seed & _SEED_BITS,
            "ignore_eos": sampling.ignore_eos,
            "logit_bias": dict(sampling.logit_bias) or None,
            "logprobs": sampling.logprob_count,
            "prompt_logprobs": sampling.prompt_logprob_count,
            "bad_words": list(sampling.bad_words) or None,
            "allowed_token_ids": list(sampling.allowed_token_ids) or None,
            "skip_special_tokens": not sampling.keep_special_tokens,
            "include_stop_str_in_output": sampling.include_stop_string,
            **self._penalties(),
            **self._of_emitted(),
        }

    def _of_emitted(self) -> dict[str, Any]:
        """What the engine process is told of tokens that were emitted elsewhere."""
        sampling, count = self.sampling, len(self.emitted_token_ids)
        if not count:
            return {}
        told: dict[str, Any] = {}
        if _counted_over_output(sampling):
            # All three, since their order matters.
            told[EMITTED_ARGUMENT] = {"count": count, **self._all_penalties()}
        if _is_seeded(sampling):
            told[SEEDED_ARGUMENT] = count
        return {"extra_args": told} if told else {}

    def _penalties(self) -> dict[str, Any]:
        counted_elsewhere = self.emitted_token_ids and _counted_over_output(self.sampling)
        return {} if counted_elsewhere else self._all_penalties()

    def _all_penalties(self) -> dict[str, Any]:
        sampling = self.sampling
        return {
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "repetition_penalty": sampling.repetition_penalty,
        }


def plan(generation: Generation, prompt: Sequence[int], limits: Limits, media: Mapping[str, Any] | None = None) -> Plan:
    """Checks a generation against the model. `media` is vLLM's engine input where the prompt has images or sounds.

    Raises:
        MeshError: the prompt is too long (CONTEXT_LENGTH_EXCEEDED) or a value doesn't fit (INVALID_REQUEST); the
            field is named, and its bound.
    """
    sampling = generation.sampling
    field = "messages" if generation.kind == "chat" else "prompt"
    if generation.prompt_token_limit is not None and len(prompt) > generation.prompt_token_limit:
        if media is not None:
            raise _invalid("prompt_token_limit", f"a prompt with images or sounds is not cut, and has {len(prompt)}")
        prompt = prompt[-generation.prompt_token_limit :]
    if not prompt:
        raise _invalid(field, "must have at least one token")
    _check_vocabulary(generation, field, prompt, limits)
    _check_placeholders(generation, field, () if media is not None else prompt, limits)
    max_tokens = _bounded_output(field, len(prompt), sampling.max_tokens, limits)
    if sampling.min_tokens > max_tokens:
        raise _invalid("sampling.min_tokens", f"must be at most {max_tokens}, got {sampling.min_tokens}")
    _check_logprobs(sampling, len(prompt), limits)
    _check_continuation(generation, max_tokens, limits)
    last = generation.emitted_token_ids[-1] if generation.emitted_token_ids else None
    return Plan(
        prompt_token_ids=prompt,
        emitted_token_ids=generation.emitted_token_ids,
        max_tokens=max_tokens,
        ended_by_token=_ended(last, sampling, limits),
        sampling=sampling,
        choices=generation.choices,
        stop_token_id=last if _ended(last, sampling, limits) and last != _end_id(sampling, limits) else None,
        media=media,
    )


def _check_vocabulary(generation: Generation, field: str, prompt: Sequence[int], limits: Limits) -> None:
    sampling = generation.sampling
    by_field: dict[str, Iterable[int]] = {
        field: prompt,
        "sampling.stop_token_ids": sampling.stop_token_ids,
        "sampling.logit_bias": sampling.logit_bias,
        "sampling.allowed_token_ids": sampling.allowed_token_ids,
        "emitted_token_ids": generation.emitted_token_ids,
    }
    for name, ids in by_field.items():
        for token_id in ids:
            if not 0 <= token_id < limits.vocabulary:
                raise _invalid(name, f"must be below {limits.vocabulary}, got the token id {token_id}")


def _check_placeholders(generation: Generation, field: str, prompt: Sequence[int], limits: Limits) -> None:
    # Engines look for the image that such a token stands for, and some die of not finding it.
    for name, ids in ((field, prompt), ("emitted_token_ids", generation.emitted_token_ids)):
        if found := limits.placeholder_ids.intersection(ids):
            raise _invalid(name, f"the token id {min(found)} stands for an image or sound, and there is none")


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


def _check_logprobs(sampling: Sampling, prompt: int, limits: Limits) -> None:
    for name in ("logprob_count", "prompt_logprob_count"):
        count = getattr(sampling, name)
        if count is not None and count > limits.logprobs:
            raise _invalid(f"sampling.{name}", f"must be at most {limits.logprobs}")
    count = sampling.prompt_logprob_count
    if count is not None and prompt * (count + 1) > _MAX_PROMPT_LOGPROBS:
        most = _MAX_PROMPT_LOGPROBS // prompt - 1
        bound = f"must be at most {most}" if most >= 0 else "can't be given"
        raise _invalid("sampling.prompt_logprob_count", f"{bound} for a prompt of {prompt} tokens")


def _check_continuation(generation: Generation, max_tokens: int, limits: Limits) -> None:
    emitted, sampling = len(generation.emitted_token_ids), generation.sampling
    if not emitted:
        return
    if emitted > max_tokens:
        raise _invalid("emitted_token_ids", f"must be at most {max_tokens}, as many as max_tokens")
    inexact = {
        "log-probabilities of the prompt": sampling.prompt_logprob_count is not None,
        "several choices": generation.choices > 1,
    }
    for what, asked in inexact.items():
        if asked:
            raise _invalid("emitted_token_ids", f"a generation with {what} can't be continued")
    # It would count the emitted tokens as prompt, to which these don't apply.
    unable = [] if limits.counts_emitted else _counted_over_output(sampling)
    if not limits.continues_draws and _is_seeded(sampling):
        unable.append("seed")
    if unable:
        # Another worker may well be able to.
        message = f"a generation with sampling.{unable[0]} can't be continued exactly by this engine"
        raise MeshError(Reason.NO_READY_WORKER, message, field="emitted_token_ids")


def _is_seeded(sampling: Sampling) -> bool:
    return sampling.seed is not None and sampling.temperature > 0


def _counted_over_output(sampling: Sampling) -> list[str]:
    """What is asked for that vLLM counts over an output alone; it counts a repetition penalty over the prompt too."""
    return [name for name in ("presence_penalty", "frequency_penalty", "bad_words") if getattr(sampling, name)]


def _ended(last: int | None, sampling: Sampling, limits: Limits) -> bool:
    ends = () if sampling.ignore_eos else limits.end_ids
    return last in ends or last in sampling.stop_token_ids


def _end_id(sampling: Sampling, limits: Limits) -> int | None:
    return None if sampling.ignore_eos else limits.end_id


def _invalid(field: str, message: str) -> MeshError:
    return MeshError(Reason.INVALID_REQUEST, f"{field}: {message}", field=field)
