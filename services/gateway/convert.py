"""OpenAI request bodies as the mesh's own generate requests."""

from typing import Any

import msgspec
from tokenloom.inference.v1 import generation_pb2 as pb

from services.common.errors import MeshError, Reason
from services.gateway.schema import ChatRequest, CompletionRequest, GenerationRequest

__all__ = ["from_chat", "from_completion", "in_openai_terms"]

_MAX_PROMPT_TOKENS = 1 << 20
_COMPLETION_MAX_TOKENS = 16
"""What OpenAI's legacy completions do when max_tokens is not given."""
_OPENAI_NAMES = {"text": "prompt", "token_ids.ids": "prompt", "logprob_count": "logprobs"}
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


def from_chat(request: ChatRequest) -> pb.GenerateRequest:
    """A chat request.

    Raises:
        MeshError: INVALID_REQUEST.
    """
    generate = pb.GenerateRequest(model=request.model, sampling=_sampling(request))
    for message in request.messages:
        generate.chat.messages.add(role=message.role, content=message.text, name=message.name or "")
    if request.max_completion_tokens is not None:
        generate.sampling.max_tokens = request.max_completion_tokens
    if request.logprobs:
        generate.sampling.logprob_count = request.top_logprobs or 0
    return generate


def from_completion(request: CompletionRequest) -> pb.GenerateRequest:
    """A legacy completion request.

    Raises:
        MeshError: INVALID_REQUEST.
    """
    generate = pb.GenerateRequest(model=request.model, sampling=_sampling(request))
    prompt = _prompt(request.prompt)
    if isinstance(prompt, str):
        generate.text = prompt
    else:
        generate.token_ids.ids.extend(prompt)
    if request.max_tokens is None:
        generate.sampling.max_tokens = _COMPLETION_MAX_TOKENS
    if request.logprobs is not None:
        generate.sampling.logprob_count = request.logprobs
    return generate


def in_openai_terms(error: MeshError) -> MeshError:
    """An error of a worker's, whose fields are those of our own request, for a client that sent OpenAI's."""
    if error.field is None:
        return error
    field = error.field.removeprefix("sampling.").removeprefix("chat.")
    field = _OPENAI_NAMES.get(field, field)
    return MeshError(
        error.reason,
        error.message.replace(error.field, field),
        field=field,
        code=error.code,
        retry_after_seconds=error.retry_after_seconds,
    )


def _sampling(request: GenerationRequest) -> pb.SamplingParameters:
    values: dict[str, Any] = {name: getattr(request, name) for name in _SAME if getattr(request, name) is not None}
    if request.top_k is not None:
        # vLLM's API writes "all" as -1, too.
        values["top_k"] = max(request.top_k, 0)
    stop = request.stop
    sampling = pb.SamplingParameters(
        **values,
        stop=[stop] if isinstance(stop, str) else stop,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=request.ignore_eos,
    )
    for token_id, bias in (request.logit_bias or {}).items():
        sampling.logit_bias[_bias_id(token_id)] = bias
    return sampling


def _bias_id(token_id: str) -> int:
    if not token_id.isdecimal() or not token_id.isascii() or len(token_id) > 9:
        raise _refuse("logit_bias", f"logit_bias: {token_id[:20]!r} is not a token id")
    return int(token_id)


def _prompt(raw: object) -> str | list[int]:
    if raw is msgspec.UNSET or raw is None:
        raise MeshError(
            Reason.INVALID_REQUEST,
            "missing required parameter: prompt",
            field="prompt",
            code="missing_required_parameter",
        )
    if isinstance(raw, list) and len(raw) == 1 and isinstance(raw[0], str | list):
        raw = raw[0]
    if isinstance(raw, str):
        if not raw:
            raise _refuse("prompt", "prompt: must not be empty")
        return raw
    return _prompt_ids(raw)


def _prompt_ids(raw: object) -> list[int]:
    if not isinstance(raw, list):
        raise _refuse("prompt", "prompt: expected a text or a list of token ids", "invalid_type")
    if not raw:
        raise _refuse("prompt", "prompt: must not be empty", "empty_array")
    if len(raw) > _MAX_PROMPT_TOKENS:
        raise _refuse("prompt", f"prompt: at most {_MAX_PROMPT_TOKENS} token ids", "array_above_max_length")
    if all(isinstance(entry, str | list) for entry in raw):
        raise _refuse("prompt", "prompt: at most 1 prompt a request", "array_above_max_length")
    for entry in raw:
        if not isinstance(entry, int) or isinstance(entry, bool):
            raise _refuse("prompt", "prompt: expected a text or a list of token ids", "invalid_type")
        if not 0 <= entry < 2**31:
            raise _refuse("prompt", f"prompt: {entry} is not a token id")
    return raw


def _refuse(field: str, message: str, code: str = "invalid_value") -> MeshError:
    return MeshError(Reason.INVALID_REQUEST, message, field=field, code=code)
