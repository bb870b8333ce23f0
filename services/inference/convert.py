"""Between the protos and the engine's plain values: every bound that needs no tokenizer is checked on the way in."""

import math
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple

from google.protobuf.duration_pb2 import Duration
from tokenloom.inference.v1 import generation_pb2, inference_pb2
from tokenloom.router.v1 import router_pb2

from services.common.errors import MeshError, Reason
from services.inference.engine import (
    Capability,
    ChatMessage,
    EngineCard,
    FinishReason,
    Generation,
    Load,
    Sampling,
    Timings,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)

__all__ = [
    "check_model",
    "completed_to_proto",
    "delta_to_proto",
    "duration_to_proto",
    "generation_from_proto",
    "load_to_proto",
    "model_card_to_proto",
    "started_to_proto",
    "tokenize_prompt_from_proto",
]

_MAX_MODEL_CHARACTERS: Final = 256
_MAX_STOPS: Final = 16
_MAX_STOP_CHARACTERS: Final = 256
_MAX_STOP_TOKEN_IDS: Final = 64
_MAX_LOGIT_BIASES: Final = 1024
_MAX_LOGPROBS: Final = 20
_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})


class _Range(NamedTuple):
    low: float
    high: float
    above_low: bool = False
    """Whether `low` itself is out."""


_DECIMALS: Final = {
    "temperature": _Range(0, 2),
    "top_p": _Range(0, 1, above_low=True),
    "min_p": _Range(0, 1),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
    "repetition_penalty": _Range(0, 10, above_low=True),
}
_BIAS_RANGE: Final = _Range(-100, 100)
_OPTIONAL: Final = (*_DECIMALS, "top_k", "max_tokens", "min_tokens", "seed", "logprob_count")

_FINISH_REASONS: Final = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}
_CAPABILITIES: Final = {
    Capability.GENERATE: inference_pb2.CAPABILITY_GENERATE,
    Capability.CHAT: inference_pb2.CAPABILITY_CHAT,
    Capability.EMBED: inference_pb2.CAPABILITY_EMBED,
}


def generation_from_proto(
    request: generation_pb2.GenerateRequest,
    card: EngineCard,
    *,
    generation_id: str,
    priority: int = 0,
    traceparent: str = "",
) -> Generation:
    """What a request asks of the engine that `card` describes.

    Raises:
        MeshError: MODEL_NOT_FOUND; CONTEXT_LENGTH_EXCEEDED, where that is plain without a tokenizer; else
            INVALID_REQUEST with the field at fault.
    """
    check_model(request.model, card)
    kind, prompt = _prompt(request, card)
    sampling = _sampling(request.sampling)
    emitted = list(request.emitted_token_ids)
    _check_continuation(emitted, sampling, card)
    return Generation(
        id=generation_id,
        model=request.model,
        prompt=prompt,
        kind=kind,
        sampling=sampling,
        emitted_token_ids=emitted,
        priority=priority,
        traceparent=traceparent,
    )


def tokenize_prompt_from_proto(request: inference_pb2.TokenizeRequest, card: EngineCard) -> str | Sequence[ChatMessage]:
    """What a request wants tokenized; raises MeshError as generation_from_proto() does."""
    check_model(request.model, card)
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "chat":
            return _messages(request.chat)
        case _:
            raise _invalid("prompt", "one of text and chat is required", "missing_required_parameter")


def check_model(name: str, card: EngineCard) -> None:
    """Raises MeshError unless `name` is the engine's model."""
    if not name:
        raise _invalid("model", "is required", "missing_required_parameter")
    if len(name) > _MAX_MODEL_CHARACTERS:
        raise _invalid("model", f"at most {_MAX_MODEL_CHARACTERS} characters", "string_above_max_length")
    if name != card.model:
        raise MeshError(Reason.MODEL_NOT_FOUND, f"the model {name!r} does not exist", field="model")


def started_to_proto(model: str, prompt_tokens: int, cached_tokens: int) -> generation_pb2.Started:
    """The first event of a generation."""
    return generation_pb2.Started(model=model, prompt_token_count=prompt_tokens, cached_token_count=cached_tokens)


def delta_to_proto(text: str, token_ids: Iterable[int], logprobs: Iterable[TokenLogprobs]) -> generation_pb2.Delta:
    """More output."""
    return generation_pb2.Delta(text=text, token_ids=token_ids, logprobs=map(_logprobs_to_proto, logprobs))


def completed_to_proto(reason: FinishReason, usage: Usage, timings: Timings) -> generation_pb2.Completed:
    """The last event of a generation."""
    return generation_pb2.Completed(
        finish_reason=_FINISH_REASONS[reason],
        usage=generation_pb2.Usage(
            prompt_token_count=usage.prompt, cached_token_count=usage.cached, output_token_count=usage.output
        ),
        timings=generation_pb2.Timings(
            queue_duration=duration_to_proto(timings.queue),
            prefill_duration=duration_to_proto(timings.prefill),
            decode_duration=duration_to_proto(timings.decode),
        ),
    )


def model_card_to_proto(card: EngineCard) -> inference_pb2.ModelCard:
    """What the model is and can do."""
    return inference_pb2.ModelCard(
        name=card.model,
        max_context_token_count=card.max_context_tokens,
        capabilities=sorted(_CAPABILITIES[capability] for capability in card.capabilities),
        vocabulary_size=card.vocabulary_size,
    )


def load_to_proto(load: Load, state: router_pb2.WorkerState.ValueType) -> router_pb2.LoadReport:
    """How the worker is, for the router."""
    report = router_pb2.LoadReport(
        running_count=load.running,
        waiting_count=load.waiting,
        kv_usage_ratio=load.kv_usage,
        pending_prefill_token_count=load.pending_prefill_tokens,
        prefill_tokens_per_second=load.prefill_tokens_per_second or 0.0,
        prefix_query_token_count=load.prefix_query_tokens,
        prefix_hit_token_count=load.prefix_hit_tokens,
        state=state,
    )
    if load.decode_step_seconds is not None:
        report.decode_step_duration.CopyFrom(duration_to_proto(load.decode_step_seconds))
    if load.decode_step_seconds_per_sequence is not None:
        report.decode_step_per_sequence_duration.CopyFrom(duration_to_proto(load.decode_step_seconds_per_sequence))
    return report


def duration_to_proto(seconds: float) -> Duration:
    """A duration; what rounding made negative is zero."""
    whole, fraction = divmod(max(0.0, seconds), 1)
    return Duration(seconds=int(whole), nanos=int(fraction * 1e9))


def _prompt(
    request: generation_pb2.GenerateRequest, card: EngineCard
) -> tuple[Literal["text", "tokens", "chat"], str | Sequence[int] | Sequence[ChatMessage]]:
    match request.WhichOneof("prompt"):
        case "text":
            if not request.text:
                raise _invalid("text", "must not be empty", "invalid_value")
            return "text", request.text
        case "token_ids":
            ids = request.token_ids.ids
            if not ids:
                raise _invalid("token_ids.ids", "at least one token", "empty_array")
            _check_fits("the prompt", len(ids), card)
            return "tokens", list(ids)
        case "chat":
            return "chat", _messages(request.chat)
        case _:
            raise _invalid("prompt", "one of text, token_ids and chat is required", "missing_required_parameter")


def _messages(chat: generation_pb2.ChatPrompt) -> list[ChatMessage]:
    if not chat.messages:
        raise _invalid("chat.messages", "at least one message", "empty_array")
    for index, message in enumerate(chat.messages):
        if message.role not in _ROLES:
            roles = ", ".join(sorted(_ROLES))
            raise _invalid(f"chat.messages[{index}].role", f"one of {roles}", "invalid_value")
    return [ChatMessage(role=message.role, content=message.content, name=message.name) for message in chat.messages]


def _sampling(proto: generation_pb2.SamplingParameters) -> Sampling:
    given = {name: getattr(proto, name) for name in _OPTIONAL if proto.HasField(name)}  # type: ignore[arg-type]  # the stub lists the names one by one
    for name, bounds in _DECIMALS.items():
        if name in given:
            _check_decimal(f"sampling.{name}", given[name], bounds)
    _check_counts(given)
    _check_stops(proto)
    _check_biases(proto)
    return Sampling(
        **given,
        stop=tuple(proto.stop),
        stop_token_ids=tuple(proto.stop_token_ids),
        ignore_eos=proto.ignore_eos,
        logit_bias=dict(proto.logit_bias),
    )


def _check_decimal(field: str, value: float, bounds: _Range) -> None:
    if math.isnan(value):
        raise _invalid(field, "must be a number", "invalid_value")
    if value < bounds.low or (bounds.above_low and value == bounds.low):
        least = f"above {bounds.low:g}" if bounds.above_low else f"at least {bounds.low:g}"
        raise _invalid(field, f"must be {least}", "decimal_below_min_value")
    if value > bounds.high:
        raise _invalid(field, f"must be at most {bounds.high:g}", "decimal_above_max_value")


def _check_counts(given: dict[str, int]) -> None:
    most = given.get("max_tokens")
    if most is not None and most < 1:
        raise _invalid("sampling.max_tokens", "must be at least 1", "integer_below_min_value")
    if most is not None and given.get("min_tokens", 0) > most:
        raise _invalid("sampling.min_tokens", f"must be at most max_tokens, {most}", "integer_above_max_value")
    if given.get("logprob_count", 0) > _MAX_LOGPROBS:
        raise _invalid("sampling.logprob_count", f"must be at most {_MAX_LOGPROBS}", "integer_above_max_value")


def _check_stops(proto: generation_pb2.SamplingParameters) -> None:
    if len(proto.stop) > _MAX_STOPS:
        raise _invalid("sampling.stop", f"at most {_MAX_STOPS} strings", "array_above_max_length")
    for index, stop in enumerate(proto.stop):
        if not stop:
            raise _invalid(f"sampling.stop[{index}]", "must not be empty", "invalid_value")
        if len(stop) > _MAX_STOP_CHARACTERS:
            message = f"at most {_MAX_STOP_CHARACTERS} characters"
            raise _invalid(f"sampling.stop[{index}]", message, "string_above_max_length")
    if len(proto.stop_token_ids) > _MAX_STOP_TOKEN_IDS:
        raise _invalid("sampling.stop_token_ids", f"at most {_MAX_STOP_TOKEN_IDS} tokens", "array_above_max_length")


def _check_biases(proto: generation_pb2.SamplingParameters) -> None:
    if len(proto.logit_bias) > _MAX_LOGIT_BIASES:
        raise _invalid("sampling.logit_bias", f"at most {_MAX_LOGIT_BIASES} entries", "array_above_max_length")
    for token_id, bias in proto.logit_bias.items():
        _check_decimal(f"sampling.logit_bias[{token_id}]", bias, _BIAS_RANGE)


def _check_continuation(emitted: Sequence[int], sampling: Sampling, card: EngineCard) -> None:
    if not emitted:
        return
    _check_fits("what was emitted", len(emitted), card)
    if sampling.temperature > 0:
        message = "only greedy decoding (temperature 0) can be continued exactly"
        raise _invalid("sampling.temperature", message, "invalid_value")
    if sampling.logprob_count is not None:
        raise _invalid("sampling.logprob_count", "a continuation has no log-probabilities", "invalid_value")


def _check_fits(what: str, token_count: int, card: EngineCard) -> None:
    if token_count >= card.max_context_tokens:
        message = f"the model's context is {card.max_context_tokens} tokens, and {what} has {token_count}"
        raise MeshError(Reason.CONTEXT_LENGTH_EXCEEDED, message)


def _invalid(field: str, message: str, code: str) -> MeshError:
    return MeshError(Reason.INVALID_REQUEST, f"{field}: {message}", field=field, code=code)


def _logprobs_to_proto(logprobs: TokenLogprobs) -> generation_pb2.TokenLogprobs:
    return generation_pb2.TokenLogprobs(
        chosen=_logprob_to_proto(logprobs.chosen), alternatives=map(_logprob_to_proto, logprobs.alternatives)
    )


def _logprob_to_proto(logprob: TokenLogprob) -> generation_pb2.TokenLogprob:
    return generation_pb2.TokenLogprob(token_id=logprob.token_id, token=logprob.token, logprob=logprob.logprob)
