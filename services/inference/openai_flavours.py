"""What servers with OpenAI's API take beyond it, and what each is told of a generation."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Final

from services.common.settings_worker import UpstreamSettings
from services.inference.engine import Capability

__all__ = ["Flavour", "flavour_of"]

_OPENAI: Final[Mapping[str, str]] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "max_tokens": "max_tokens",
    "stop": "stop",
    "seed": "seed",
    "logit_bias": "logit_bias",
    "logprob_count": "logprobs",
}
# What an operator may say that a server takes, as the fields that it is for.
_FURTHER: Final[Mapping[str, str]] = {
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "repeat_penalty": "repetition_penalty",
    "min_tokens": "min_tokens",
    "ignore_eos": "ignore_eos",
    "stop_token_ids": "stop_token_ids",
    "bad_words": "bad_words",
    "allowed_token_ids": "allowed_token_ids",
    "chat_template_kwargs": "template_arguments",
}
_VLLM: Final[Mapping[str, str]] = {
    **_OPENAI,
    **{field: name for name, field in _FURTHER.items() if name != "repeat_penalty"},
    "include_stop_string": "include_stop_str_in_output",
    "cache_salt": "cache_salt",
    "prompt_token_limit": "truncate_prompt_tokens",
}
_LLAMA_SAMPLERS: Final[Mapping[str, str]] = {
    **_OPENAI,
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
_LLAMA_CPP: Final[Mapping[str, str]] = {
    **_LLAMA_SAMPLERS,
    "ignore_eos": "ignore_eos",
    "template_arguments": "chat_template_kwargs",
}
_LLAMA_CPP_PYTHON: Final[Mapping[str, str]] = {**_LLAMA_SAMPLERS, "min_tokens": "min_tokens"}

_PLAIN: Final = frozenset({Capability.GENERATE, Capability.CHAT})
_FULL: Final = _PLAIN | {Capability.LOGPROBS, Capability.STRUCTURED_OUTPUT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """What a server is known to take and to tell."""

    name: str
    parameters: Mapping[str, str]
    """Names there, by the field of Sampling, ChatOptions or Generation; a field that is not here is refused."""
    capabilities: Set[Capability]
    """What a model there can do when nobody says otherwise."""
    chat_forms: Set[str]
    """Kinds of StructuredOutput that it holds a conversation's answer to."""
    text_forms: Set[str] = frozenset()
    """The same of a text's continuation."""
    token_ids: bool = False
    """It tells the tokens of its output, so that it can go on elsewhere, and goes on with those of others."""
    token_prompts: bool = False
    """It takes prompts that are tokenized already."""
    choices: bool = True
    """It takes `n`."""
    open_ended: bool = False
    """A continuation of a text without max_tokens goes on as far as the context lasts."""
    has_tokenizer: bool = False
    """It has vLLM's /tokenize and /detokenize, and what its chat template is told."""
    counter: str = ""
    """The path that counts a text's tokens, where a stream's usage isn't told."""
    health: str = ""
    """The path that tells its health; empty: the models are asked for."""
    metrics: str = ""
    """The path of metrics with vLLM's names."""
    engine: str = ""
    """The path of what the engine itself answers between two steps, at no cost; empty: it has to generate."""
    step_tokens: int | None = None
    """Tokens of prompts that it computes in one step, unless it was told otherwise; None: not known."""
    is_free: bool = True
    """Whether a token now and then costs nobody money."""


_FLAVOURS: Final = {
    "openai": Flavour(
        name="openai",
        parameters=_OPENAI,
        capabilities=_PLAIN,
        chat_forms=frozenset({"json_schema", "json_object"}),
        token_prompts=True,
        is_free=False,
    ),
    "vllm": Flavour(
        name="vllm",
        parameters=_VLLM,
        capabilities=_FULL,
        chat_forms=frozenset({"json_schema", "json_object", "regex", "grammar", "choice"}),
        text_forms=frozenset({"json_schema", "json_object", "regex", "grammar", "choice"}),
        token_ids=True,
        token_prompts=True,
        open_ended=True,
        has_tokenizer=True,
        health="/health",
        metrics="/metrics",
        step_tokens=8192,
    ),
    "llama_cpp": Flavour(
        name="llama_cpp",
        parameters=_LLAMA_CPP,
        capabilities=_FULL,
        chat_forms=frozenset({"json_schema", "json_object"}),
        # It takes a response_format there, too, and does not keep to it.
        text_forms=frozenset({"json_schema"}),
        token_prompts=True,
        # It takes `n`, but its usage tells of one choice alone.
        choices=False,
        open_ended=True,
        health="/health",
        engine="/slots",
        step_tokens=2048,
    ),
    "llama_cpp_python": Flavour(
        name="llama_cpp_python",
        parameters=_LLAMA_CPP_PYTHON,
        capabilities=_FULL,
        chat_forms=frozenset({"json_schema", "json_object"}),
        choices=False,
        open_ended=True,
        counter="/extras/tokenize/count",
    ),
}


def flavour_of(settings: UpstreamSettings) -> Flavour:
    """What the server of these settings takes and tells."""
    known = _FLAVOURS[settings.flavour]
    further = {_FURTHER[name]: name for name in settings.parameters}
    capabilities = (
        known.capabilities if settings.capabilities is None else frozenset(map(Capability, settings.capabilities))
    )
    return replace(known, parameters={**known.parameters, **further}, capabilities=capabilities)
