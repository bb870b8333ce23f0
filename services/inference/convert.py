"""Between the protos and the engine's plain values: every bound that needs no tokenizer is checked on the way in."""

from collections.abc import Sequence
from typing import Final, Literal

from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2
from tokenloom.router.v1 import router_pb2

from services.common.errors import MeshError, Reason
from services.inference.checks import check_integer, check_text, check_token_ids, invalid
from services.inference.convert_chat import chat_from_proto
from services.inference.convert_events import duration_to_proto
from services.inference.convert_sampling import sampling_from_proto, structured_output_from_proto
from services.inference.engine import Capability, EngineCard, Load
from services.inference.request import ChatMessage, ChatOptions, Generation

__all__ = [
    "check_model",
    "generation_from_proto",
    "load_to_proto",
    "model_card_to_proto",
    "priority_from_metadata",
    "timing_metadata",
    "tokenize_prompt_from_proto",
    "usage_metadata",
]

_MAX_MODEL_CHARACTERS: Final = 256
_MAX_CHOICES: Final = 128
_MAX_PRIORITY_CHARACTERS: Final = 11
_PRIORITIES: Final = (-(2**31), 2**31 - 1)
_MAX_SALT_CHARACTERS: Final = 256

_CAPABILITIES: Final = {
    Capability.GENERATE: inference_pb2.CAPABILITY_GENERATE,
    Capability.CHAT: inference_pb2.CAPABILITY_CHAT,
    Capability.EMBED: inference_pb2.CAPABILITY_EMBED,
    Capability.SCORE: inference_pb2.CAPABILITY_SCORE,
    Capability.TOOLS: inference_pb2.CAPABILITY_TOOLS,
    Capability.REASONING: inference_pb2.CAPABILITY_REASONING,
    Capability.STRUCTURED_OUTPUT: inference_pb2.CAPABILITY_STRUCTURED_OUTPUT,
    Capability.IMAGES: inference_pb2.CAPABILITY_IMAGES,
    Capability.AUDIO: inference_pb2.CAPABILITY_AUDIO,
    Capability.LOGPROBS: inference_pb2.CAPABILITY_LOGPROBS,
}


def generation_from_proto(
    request: pb.GenerateRequest,
    card: EngineCard,
    *,
    generation_id: str,
    priority: int = 0,
    traceparent: str = "",
    tenant: str = "",
) -> Generation:
    """What a request asks of the engine that `card` describes.

    Raises:
        MeshError: MODEL_NOT_FOUND; CONTEXT_LENGTH_EXCEEDED, where that is plain without a tokenizer; else
            INVALID_REQUEST with the field at fault; UNIMPLEMENTED for what the model can't do.
    """
    check_model(request.model, card)
    kind, prompt, chat = _prompt(request, card)
    structured = request.HasField("structured_output")
    generation = Generation(
        id=generation_id,
        model=request.model,
        prompt=prompt,
        kind=kind,
        sampling=sampling_from_proto(request.sampling, card),
        chat=chat,
        structured_output=structured_output_from_proto(request.structured_output, card) if structured else None,
        choices=_choices(request, card),
        echo=request.echo,
        cache_salt=_cache_salt(request.cache_salt),
        tenant=tenant,
        prompt_token_limit=_prompt_token_limit(request, card),
        add_special_tokens=not request.without_special_tokens,
        emitted_token_ids=list(request.emitted_token_ids),
        priority=priority,
        traceparent=traceparent,
    )
    _check_continuation(generation, card)
    return generation


def tokenize_prompt_from_proto(
    request: inference_pb2.TokenizeRequest, card: EngineCard
) -> tuple[str | Sequence[ChatMessage], ChatOptions]:
    """What a request wants tokenized, and how to render it; raises MeshError as generation_from_proto() does."""
    check_model(request.model, card)
    match request.WhichOneof("prompt"):
        case "text":
            return request.text, ChatOptions()
        case "chat":
            if request.without_special_tokens:
                raise invalid("without_special_tokens", "only of a text")
            return chat_from_proto(request.chat, card)
        case _:
            raise invalid("prompt", "one of text and chat is required", "missing_required_parameter")


def check_model(name: str, card: EngineCard) -> None:
    """Raises MeshError unless `name` is the engine's model."""
    if not name:
        raise invalid("model", "is required", "missing_required_parameter")
    if len(name) > _MAX_MODEL_CHARACTERS:
        raise invalid("model", f"at most {_MAX_MODEL_CHARACTERS} characters", "string_above_max_length")
    if name != card.model:
        raise MeshError(Reason.MODEL_NOT_FOUND, f"the model {name!r} does not exist", field="model")


def model_card_to_proto(card: EngineCard) -> inference_pb2.ModelCard:
    """What the model is and can do."""
    return inference_pb2.ModelCard(
        name=card.model,
        max_context_token_count=card.max_context_tokens,
        capabilities=sorted(_CAPABILITIES[capability] for capability in card.capabilities),
        vocabulary_size=card.vocabulary_size,
        embedding_dimension_count=card.embedding_dimensions,
        base_model=card.base_model,
    )


def load_to_proto(load: Load, state: router_pb2.WorkerState.ValueType, reason: str = "") -> router_pb2.LoadReport:
    """How the worker is, for the router; `reason` says in words why it takes no work."""
    report = router_pb2.LoadReport(
        running_count=load.running,
        waiting_count=load.waiting,
        kv_usage_ratio=load.kv_usage,
        pending_prefill_token_count=load.pending_prefill_tokens,
        prefill_tokens_per_second=load.prefill_tokens_per_second or 0.0,
        prefix_query_token_count=load.prefix_query_tokens,
        prefix_hit_token_count=load.prefix_hit_tokens,
        state=state,
        state_reason=reason,
        output_tokens_per_second=load.output_tokens_per_second,
    )
    if load.decode_step_seconds is not None:
        report.decode_step_duration.CopyFrom(duration_to_proto(load.decode_step_seconds))
    if load.decode_step_seconds_per_sequence is not None:
        report.decode_step_per_sequence_duration.CopyFrom(duration_to_proto(load.decode_step_seconds_per_sequence))
    return report


def priority_from_metadata(text: str) -> int:
    """The scheduling class that the edge writes, from the caller's key; 0 for whoever comes past the edge."""
    if not text.removeprefix("-").isdecimal() or len(text) > _MAX_PRIORITY_CHARACTERS:
        return 0
    return min(max(int(text), _PRIORITIES[0]), _PRIORITIES[1])


def timing_metadata(model: str, worker: str, timings: pb.Timings) -> tuple[tuple[str, str], ...]:
    """The trailing metadata that tells who answered a call, and where its time went, in microseconds."""
    return (
        ("x-tokenloom-usage-model", model),
        ("x-tokenloom-usage-worker", worker),
        ("x-tokenloom-usage-queue-us", str(timings.queue_duration.ToMicroseconds())),
        ("x-tokenloom-usage-prefill-us", str(timings.prefill_duration.ToMicroseconds())),
        ("x-tokenloom-usage-gpu-us", str(timings.gpu_duration.ToMicroseconds())),
    )


def usage_metadata(prompt: int, cached: int, output: int) -> tuple[tuple[str, str], ...]:
    """The trailing metadata that repeats a call's usage, in tokens."""
    return (
        ("x-tokenloom-usage-prompt-tokens", str(prompt)),
        ("x-tokenloom-usage-cached-tokens", str(cached)),
        ("x-tokenloom-usage-output-tokens", str(output)),
    )


def _prompt(
    request: pb.GenerateRequest, card: EngineCard
) -> tuple[Literal["text", "tokens", "chat"], str | Sequence[int] | Sequence[ChatMessage], ChatOptions]:
    kind = request.WhichOneof("prompt")
    if request.without_special_tokens and kind != "text":
        raise invalid("without_special_tokens", "only of a text prompt")
    match kind:
        case "text":
            if not request.text:
                raise invalid("text", "must not be empty")
            return "text", request.text, ChatOptions()
        case "token_ids":
            return "tokens", _token_ids(request, card), ChatOptions()
        case "chat":
            messages, options = chat_from_proto(request.chat, card)
            return "chat", messages, options
        case _:
            raise invalid("prompt", "one of text, token_ids and chat is required", "missing_required_parameter")


def _token_ids(request: pb.GenerateRequest, card: EngineCard) -> list[int]:
    ids = request.token_ids.ids
    if not ids:
        raise invalid("token_ids.ids", "at least one token", "empty_array")
    if not request.HasField("prompt_token_limit"):
        _check_fits("the prompt", len(ids), card)
    check_token_ids("token_ids.ids", ids, card.vocabulary_size)
    return list(ids)


def _choices(request: pb.GenerateRequest, card: EngineCard) -> int:
    # More than run at a time would wait for each other in the engine, in front of everybody else.
    most = min(_MAX_CHOICES, card.max_running)
    check_integer("choice_count", request.choice_count, high=most)
    choices = request.choice_count or 1
    if choices > 1 and request.sampling.HasField("temperature") and not request.sampling.temperature:
        raise invalid("choice_count", "greedy decoding (temperature 0) has one outcome only")
    return choices


def _cache_salt(salt: str) -> str:
    check_text("cache_salt", salt, _MAX_SALT_CHARACTERS)
    if not salt.isprintable():
        raise invalid("cache_salt", "only printable characters")
    return salt


def _prompt_token_limit(request: pb.GenerateRequest, card: EngineCard) -> int | None:
    if not request.HasField("prompt_token_limit"):
        return None
    check_integer("prompt_token_limit", request.prompt_token_limit, low=1, high=card.max_context_tokens - 1)
    return request.prompt_token_limit


def _check_continuation(generation: Generation, card: EngineCard) -> None:
    emitted, sampling = generation.emitted_token_ids, generation.sampling
    if not emitted:
        return
    _check_fits("what was emitted", len(emitted), card)
    check_token_ids("emitted_token_ids", emitted, card.vocabulary_size)
    inexact = {
        "choice_count": (generation.choices > 1, "only a single choice"),
        "sampling.prompt_logprob_count": (
            sampling.prompt_logprob_count is not None,
            "no log-probabilities of the prompt",
        ),
    }
    for field, (asked, message) in inexact.items():
        if asked:
            raise invalid(field, f"{message} can be continued")


def _check_fits(what: str, token_count: int, card: EngineCard) -> None:
    if token_count >= card.max_context_tokens:
        message = f"the model's context is {card.max_context_tokens} tokens, and {what} has {token_count}"
        raise MeshError(Reason.CONTEXT_LENGTH_EXCEEDED, message)
