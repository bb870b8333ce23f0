"""Between the protos of embeddings, scores and tokens and plain values; every bound without a tokenizer is checked."""

from collections.abc import Sequence
from typing import Final

from tokenloom.inference.v1 import generation_pb2, inference_pb2

from services.common.rpc import MAX_MESSAGE_BYTES
from services.inference.checks import check_count, check_integer, check_token_ids, invalid
from services.inference.convert import check_model
from services.inference.engine import Capability, EngineCard
from services.inference.pooling import Embedded, EmbedJob, Scored, ScoreJob, check_can, check_length

__all__ = [
    "check_detokenize",
    "embed_from_proto",
    "embedded_to_proto",
    "score_from_proto",
    "scored_to_proto",
]

_MAX_INPUTS: Final = 256
# What a worker may send in one message, with room for the rest of it.
_MAX_ANSWER_BYTES: Final = 4 * MAX_MESSAGE_BYTES - (64 << 10)
_BYTES_A_COMPONENT: Final = 4


def embed_from_proto(
    request: inference_pb2.EmbedRequest, card: EngineCard, *, job_id: str, traceparent: str = "", cache_tenant: str = ""
) -> EmbedJob:
    """What a request wants embedded by the engine that `card` describes.

    Raises:
        MeshError: MODEL_NOT_FOUND; UNIMPLEMENTED, the model does not embed; CONTEXT_LENGTH_EXCEEDED, where that is
            plain without a tokenizer; else INVALID_REQUEST with the field at fault.
    """
    check_model(request.model, card)
    check_can(card, Capability.EMBED)
    limit = _token_limit(request, card)
    field, inputs = _inputs(request, card, limited=limit is not None)
    dimensions = _dimensions(request, card)
    if len(inputs) * (dimensions or card.embedding_dimensions) * _BYTES_A_COMPONENT > _MAX_ANSWER_BYTES:
        most = _MAX_ANSWER_BYTES // (dimensions or card.embedding_dimensions) // _BYTES_A_COMPONENT
        raise invalid(field, f"at most {most} of this model's embeddings fit one answer", "array_above_max_length")
    return EmbedJob(
        id=job_id,
        inputs=inputs,
        field=field,
        dimensions=dimensions,
        token_limit=limit,
        keep_beginning=request.keep_beginning,
        traceparent=traceparent,
        cache_tenant=cache_tenant,
    )


def score_from_proto(
    request: inference_pb2.ScoreRequest, card: EngineCard, *, job_id: str, traceparent: str = "", cache_tenant: str = ""
) -> ScoreJob:
    """What a request wants scored; raises MeshError as embed_from_proto() does."""
    check_model(request.model, card)
    check_can(card, Capability.SCORE)
    if not request.query:
        raise invalid("query", "is required", "missing_required_parameter")
    texts = _texts(request.texts)
    limit = _token_limit(request, card)
    return ScoreJob(
        id=job_id,
        query=request.query,
        texts=texts,
        token_limit=limit,
        traceparent=traceparent,
        cache_tenant=cache_tenant,
    )


def check_detokenize(request: inference_pb2.DetokenizeRequest, card: EngineCard) -> None:
    """Raises MeshError unless the request's tokens can be turned into text."""
    check_model(request.model, card)
    check_length("token_ids", len(request.token_ids), card)
    check_token_ids("token_ids", request.token_ids, card.vocabulary_size)


def embedded_to_proto(embedded: Embedded) -> inference_pb2.EmbedResponse:
    """The answer to an Embed."""
    return inference_pb2.EmbedResponse(
        embeddings=[inference_pb2.Embedding(values=vector) for vector in embedded.vectors], usage=_usage(embedded)
    )


def scored_to_proto(scored: Scored) -> inference_pb2.ScoreResponse:
    """The answer to a Score."""
    return inference_pb2.ScoreResponse(scores=scored.scores, usage=_usage(scored))


def _usage(done: Embedded | Scored) -> generation_pb2.Usage:
    return generation_pb2.Usage(prompt_token_count=done.prompt_tokens, cached_token_count=done.cached_tokens)


def _inputs(
    request: inference_pb2.EmbedRequest, card: EngineCard, *, limited: bool
) -> tuple[str, Sequence[str | Sequence[int]]]:
    if request.texts and request.token_ids:
        raise invalid("token_ids", "give texts or token_ids, not both", "invalid_value")
    if not request.token_ids:
        return "texts", _texts(request.texts)
    check_count("token_ids", request.token_ids, _MAX_INPUTS, "inputs")
    inputs = [list(entry.ids) for entry in request.token_ids]
    for index, ids in enumerate(inputs):
        field = f"token_ids[{index}].ids"
        if not ids:
            raise invalid(field, "at least one token", "empty_array")
        if not limited:
            check_length(field, len(ids), card)
        check_token_ids(field, ids, card.vocabulary_size)
    return "token_ids", inputs


def _texts(texts: Sequence[str]) -> list[str]:
    if not texts:
        raise invalid("texts", "at least one text", "empty_array")
    check_count("texts", texts, _MAX_INPUTS, "texts")
    for index, text in enumerate(texts):
        if not text:
            raise invalid(f"texts[{index}]", "must not be empty")
    return list(texts)


def _token_limit(request: inference_pb2.EmbedRequest | inference_pb2.ScoreRequest, card: EngineCard) -> int | None:
    if not request.HasField("prompt_token_limit"):
        return None
    if request.prompt_token_limit < 1:
        raise invalid("prompt_token_limit", "must be at least 1", "integer_below_min_value")
    return min(request.prompt_token_limit, card.max_context_tokens)


def _dimensions(request: inference_pb2.EmbedRequest, card: EngineCard) -> int | None:
    if not request.HasField("dimension_count"):
        return None
    check_integer("dimension_count", request.dimension_count, low=1, high=card.embedding_dimensions)
    return request.dimension_count
