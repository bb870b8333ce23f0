"""Legacy completion requests as the mesh's own generate requests, and what both kinds of request share."""

import re
from typing import Any, Final

import msgspec
from tokenloom.inference.v1 import generation_pb2 as pb

from services.common.errors import MeshError
from services.gateway.decoding import invalid, is_given
from services.gateway.schema import CompletionRequest, GenerationRequest, StructuredOutputs

__all__ = ["from_common", "from_completion", "in_openai_terms"]

_MAX_PROMPT_TOKENS = 1 << 20
_MAX_PROMPTS: Final = 64
_COMPLETION_MAX_TOKENS = 16
"""What OpenAI's legacy completions do when max_tokens is not given."""
_OPENAI_NAMES = {
    "text": "prompt",
    "logprob_count": "logprobs",
    "prompt_logprob_count": "prompt_logprobs",
    "choice_count": "n",
    "include_stop_string": "include_stop_str_in_output",
    "prompt_token_limit": "truncate_prompt_tokens",
    "template_arguments_json": "chat_template_kwargs",
}
_OPENAI_PATHS: Final = (
    (re.compile(r"^token_ids\.ids"), "prompt"),
    (re.compile(r"^(messages\[\d+\])\.parts\b"), r"\1.content"),
    (re.compile(r"^(messages\[\d+\]\.content\[\d+\])\.image"), r"\1.image_url"),
    (re.compile(r"^(messages\[\d+\]\.content\[\d+\])\.audio"), r"\1.input_audio"),
    (re.compile(r"^(messages\[\d+\]\.tool_calls\[\d+\])\.(name|arguments)(?:_json)?$"), r"\1.function.\2"),
    (re.compile(r"^(tools\[\d+\])\.(name|description|parameters)(?:_json)?$"), r"\1.function.\2"),
    (re.compile(r"^tool_choice\.function_name$"), "tool_choice.function.name"),
    (re.compile(r"^tool_choice\.mode$"), "tool_choice"),
)
_SAME = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_tokens",
    "min_tokens",
    "seed",
)


def from_completion(request: CompletionRequest) -> list[pb.GenerateRequest]:
    """A legacy completion request: one generation a prompt.

    Raises:
        MeshError: INVALID_REQUEST.
    """
    return [_completion(request, prompt) for prompt in _prompts(request.prompt)]


def _completion(request: CompletionRequest, prompt: str | list[int]) -> pb.GenerateRequest:
    generate = from_common(request)
    if isinstance(prompt, str):
        generate.text = prompt
        generate.without_special_tokens = request.add_special_tokens is False
    else:
        generate.token_ids.ids.extend(prompt)
    if request.max_tokens is None:
        generate.sampling.max_tokens = max(_COMPLETION_MAX_TOKENS, request.min_tokens or 0)
    if request.logprobs is not None:
        generate.sampling.logprob_count = request.logprobs
    if request.echo:
        generate.echo = True
        if request.logprobs is not None:
            generate.sampling.prompt_logprob_count = request.logprobs
    return generate


def from_common(request: GenerationRequest) -> pb.GenerateRequest:
    """What both kinds of request share: a generate request that has no prompt yet.

    Raises:
        MeshError: INVALID_REQUEST.
    """
    generate = pb.GenerateRequest(
        model=request.model,
        sampling=_sampling(request),
        choice_count=request.n or 1,
        echo=bool(request.return_token_ids),
        cache_salt=request.cache_salt or "",
        structured_output=_form(request),
    )
    if request.truncate_prompt_tokens is not None:
        generate.prompt_token_limit = request.truncate_prompt_tokens
    return generate


def in_openai_terms(error: MeshError) -> MeshError:
    """An error of a worker's, whose fields are those of our own request, for a client that sent OpenAI's."""
    return error.renamed(_openai_name)


def _openai_name(name: str) -> str:
    field = name.removeprefix("sampling.").removeprefix("chat.")
    if field.partition(".")[0] == "structured_output":
        return "response_format"
    for pattern, theirs in _OPENAI_PATHS:
        field = pattern.sub(theirs, field)
    return _OPENAI_NAMES.get(field, field)


def _sampling(request: GenerationRequest) -> pb.SamplingParameters:
    values: dict[str, Any] = {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    if request.top_k is not None:
        # vLLM's API writes "all" as -1, too.
        values["top_k"] = max(request.top_k, 0)
    stop = request.stop
    sampling = pb.SamplingParameters(
        **values,
        stop=[stop] if isinstance(stop, str) else stop,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=bool(request.ignore_eos),
        prompt_logprob_count=request.prompt_logprobs,
        bad_words=request.bad_words,
        allowed_token_ids=request.allowed_token_ids,
        keep_special_tokens=request.skip_special_tokens is False,
        include_stop_string=bool(request.include_stop_str_in_output),
    )
    for token_id, bias in (request.logit_bias or {}).items():
        sampling.logit_bias[_bias_id(token_id)] = bias
    return sampling


def _bias_id(token_id: str) -> int:
    if not token_id.isdecimal() or not token_id.isascii() or len(token_id) > 9:
        raise invalid("logit_bias", f"logit_bias: {token_id[:20]!r} is not a token id")
    return int(token_id)


def _form(request: GenerationRequest) -> pb.StructuredOutput | None:
    form = request.response_format
    if request.structured_outputs is not None:
        return _vllm_form(request.structured_outputs)
    if form is not None and form.type == "json_object":
        return pb.StructuredOutput(json_object=pb.JsonObject())
    if form is not None and form.type == "json_schema" and form.json_schema is not None:
        return pb.StructuredOutput(json_schema=bytes(form.json_schema.schema).decode())
    return None


def _vllm_form(outputs: StructuredOutputs) -> pb.StructuredOutput:
    form = pb.StructuredOutput()
    if is_given(outputs.json):
        form.json_schema = bytes(outputs.json).decode()
    elif outputs.regex is not None:
        form.regex = outputs.regex
    elif outputs.grammar is not None:
        form.grammar = outputs.grammar
    elif outputs.choice is not None:
        form.choices.texts.extend(outputs.choice)
    else:
        form.json_object.SetInParent()
    return form


def _prompts(raw: object) -> list[str | list[int]]:
    if raw is msgspec.UNSET or raw is None:
        raise invalid("prompt", "missing required parameter: prompt", "missing_required_parameter")
    if isinstance(raw, list) and raw and all(isinstance(entry, str | list) for entry in raw):
        if len(raw) > _MAX_PROMPTS:
            raise invalid("prompt", f"prompt: at most {_MAX_PROMPTS} prompts a request", "array_above_max_length")
        return [_prompt(entry) for entry in raw]
    return [_prompt(raw)]


def _prompt(raw: object) -> str | list[int]:
    if isinstance(raw, str):
        if not raw:
            raise invalid("prompt", "prompt: must not be empty")
        return raw
    return _prompt_ids(raw)


def _prompt_ids(raw: object) -> list[int]:
    if not isinstance(raw, list):
        raise invalid("prompt", "prompt: expected a text or a list of token ids", "invalid_type")
    if not raw:
        raise invalid("prompt", "prompt: must not be empty", "empty_array")
    if len(raw) > _MAX_PROMPT_TOKENS:
        raise invalid("prompt", f"prompt: at most {_MAX_PROMPT_TOKENS} token ids", "array_above_max_length")
    for entry in raw:
        if not isinstance(entry, int) or isinstance(entry, bool):
            raise invalid("prompt", "prompt: expected a text or a list of token ids", "invalid_type")
        if not 0 <= entry < 2**31:
            raise invalid("prompt", f"prompt: {entry} is not a token id")
    return raw
