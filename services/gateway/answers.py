"""What is answered, as the OpenAPI document tells of it: types for their JSON Schemas alone.

Answers are rendered without them, since that is faster; that each is as it is written here is tried out by
`bench/fuzz_api.py`, and in tests by `tests/contract/test_gateway_http.py`.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from services.gateway.pieces import FinishReason

__all__ = [
    "AuditTrail",
    "Batch",
    "BatchList",
    "ChatCompletion",
    "Completion",
    "Deleted",
    "Detokenized",
    "Embeddings",
    "Erased",
    "File",
    "FileList",
    "ItemList",
    "KeyList",
    "Model",
    "ModelList",
    "NewKey",
    "RequestList",
    "RequestRow",
    "Reranking",
    "ResponseObject",
    "Revoked",
    "Scores",
    "Tokenized",
    "UsageReport",
]

Count = Annotated[int, Meta(ge=0)]
Moment = Annotated[int, Meta(ge=0)]
"""Whole seconds since the epoch."""
Logprob = Annotated[float, Meta(le=0)]
Vector = Annotated[list[float], Meta(min_length=1)]


class _Exact(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    pass


class CachedTokens(_Exact):
    """Of the prompt."""

    cached_tokens: Count


class ReasoningTokens(_Exact):
    """Of the output."""

    reasoning_tokens: Count


class Usage(_Exact):
    """What an answer took."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


class PromptUsage(_Exact):
    """What an answer without output took."""

    prompt_tokens: Count
    total_tokens: Count


class RankedLogprob(_Exact):
    """A token that might have been there."""

    logprob: Logprob
    rank: Annotated[int, Meta(ge=1)] | None
    decoded_token: str


PromptLogprobs = list[dict[str, RankedLogprob] | None]
"""For each token of the prompt, by token id; null for the first one, which nothing predicts."""


class ScoredToken(_Exact):
    """A token and its probability."""

    token: str
    logprob: Logprob
    bytes: list[Annotated[int, Meta(ge=0, le=255)]]


class ChosenToken(ScoredToken):
    """A token of the output."""

    top_logprobs: list[ScoredToken]


class ChatLogprobs(_Exact):
    """The tokens of a choice."""

    content: list[ChosenToken]
    refusal: None


class MadeFunction(_Exact):
    """Which function, with what."""

    name: str
    arguments: str


class MadeCall(_Exact):
    """A call that the model made."""

    id: str
    type: Literal["function"]
    function: MadeFunction


class AnswerMessage(_Exact):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[MadeCall] | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChatChoice(_Exact):
    """One of the answers."""

    index: Count
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[Count] | UnsetType = UNSET


class ChatCompletion(_Exact):
    """POST /v1/chat/completions"""

    id: str
    object: Literal["chat.completion"]
    created: Moment
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[Count] | UnsetType = UNSET


class CompletionLogprobs(_Exact):
    """The tokens of a choice, column by column."""

    tokens: list[str]
    token_logprobs: list[Logprob | None]
    top_logprobs: list[dict[str, Logprob] | None]
    text_offset: list[Count]


class CompletionChoice(_Exact):
    """One of the answers."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    token_ids: list[Count] | UnsetType = UNSET
    prompt_token_ids: list[Count] | UnsetType | None = UNSET


class Completion(_Exact):
    """POST /v1/completions"""

    id: str
    object: Literal["text_completion"]
    created: Moment
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Embedding(_Exact):
    """One vector: its components, or these as base64 of 32-bit floats, little-endian."""

    object: Literal["embedding"]
    index: Count
    embedding: Vector | str


class Embeddings(_Exact):
    """POST /v1/embeddings"""

    id: str
    object: Literal["list"]
    created: Moment
    model: str
    data: list[Embedding]
    usage: PromptUsage


class RankedDocument(_Exact):
    """A text that was ranked."""

    text: str
    multi_modal: None


class Ranked(_Exact):
    """One of the best."""

    index: Count
    relevance_score: float
    document: RankedDocument | UnsetType = UNSET


class Reranking(_Exact):
    """POST /v1/rerank"""

    id: str
    model: str
    results: list[Ranked]
    usage: PromptUsage


class Score(_Exact):
    """How well two texts go together."""

    index: Count
    object: Literal["score"]
    score: float


class Scores(_Exact):
    """POST /v1/score"""

    id: str
    object: Literal["list"]
    created: Moment
    model: str
    data: list[Score]
    usage: PromptUsage


class Tokenized(_Exact):
    """POST /v1/tokenize"""

    count: Count
    max_model_len: Count
    tokens: list[Count]
    token_strs: list[str] | None


class Detokenized(_Exact):
    """POST /v1/detokenize"""

    prompt: str


class Model(_Exact):
    """GET /v1/models/{model}"""

    id: str
    object: Literal["model"]
    created: Moment
    owned_by: str
    max_model_len: Count


class ModelList(_Exact):
    """GET /v1/models"""

    object: Literal["list"]
    data: list[Model]


class CachedInput(_Exact):
    """Of the input."""

    cached_tokens: Count
    cache_write_tokens: Count


class ResponseUsage(_Exact):
    """What a response took."""

    input_tokens: Count
    input_tokens_details: CachedInput
    output_tokens: Count
    output_tokens_details: ReasoningTokens
    total_tokens: Count


class SaidText(_Exact):
    """What the model says."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChosenToken]


class ThoughtText(_Exact):
    """What the model thinks."""

    type: Literal["reasoning_text"]
    text: str


class _Item(_Exact, tag_field="type"):
    id: str
    status: Literal["in_progress", "completed", "incomplete"]


class MessageItem(_Item, tag="message"):
    """A message."""

    role: Literal["assistant"]
    content: list[SaidText]


class ThoughtItem(_Item, tag="reasoning"):
    """Thoughts."""

    summary: list[Any]
    content: list[ThoughtText]


class CallItem(_Item, tag="function_call"):
    """A call."""

    call_id: str
    name: str
    arguments: str


class Incomplete(_Exact):
    """Why there is no more."""

    reason: str


class UsedReasoning(_Exact):
    """How it was thought."""

    effort: str | None
    summary: str | None


class UsedText(_Exact):
    """How it was written."""

    format: dict[str, Any]


class ResponseObject(_Exact):
    """POST /v1/responses"""

    id: str
    object: Literal["response"]
    created_at: Moment
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool
    error: None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: Count | None
    metadata: dict[str, str]
    model: str
    output: list[MessageItem | ThoughtItem | CallItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: UsedReasoning
    service_tier: str
    store: bool
    temperature: float
    text: UsedText
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: Count
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class Page(_Exact):
    """What pages have in common."""

    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ItemList(Page):
    """GET /v1/responses/{response_id}/input_items"""

    data: list[dict[str, Any]]


class Deleted(_Exact):
    """What is gone."""

    id: str
    object: str
    deleted: Literal[True]


class File(_Exact):
    """GET /v1/files/{file_id}"""

    id: str
    object: Literal["file"]
    bytes: Count
    created_at: Moment
    expires_at: Moment | None
    filename: str
    purpose: str
    status: Literal["processed"]


class FileList(Page):
    """GET /v1/files"""

    data: list[File]


class RequestCounts(_Exact):
    """How many lines."""

    total: Count
    completed: Count
    failed: Count


class BatchErrors(_Exact):
    """What is wrong with the file."""

    object: Literal["list"]
    data: list[dict[str, Any]]


class Batch(_Exact):
    """GET /v1/batches/{batch_id}"""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: Moment
    expires_at: Moment
    in_progress_at: Moment | None
    finalizing_at: Moment | None
    completed_at: Moment | None
    failed_at: Moment | None
    expired_at: Moment | None
    cancelling_at: Moment | None
    cancelled_at: Moment | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(Page):
    """GET /v1/batches"""

    data: list[Batch]


class NewKey(_Exact):
    """POST /v1/admin/keys"""

    id: str
    key: str


class Revoked(_Exact):
    """DELETE /v1/admin/keys/{key_id}"""

    id: str
    revoked: Literal[True]


class Limits(_Exact):
    """What a key may use."""

    rpm: Count | None
    tpm: Count | None
    concurrency: Count | None
    budget: float | None


class Key(_Exact):
    """A key without its secret."""

    id: str
    name: str
    tenant: str
    models: list[str] | None
    endpoints: list[str] | None
    priority: int
    allow_degrade: bool
    admin: bool
    debug: bool
    limits: Limits
    created_at: float
    expires_at: float | None


class KeyList(_Exact):
    """GET /v1/admin/keys"""

    object: Literal["list"]
    data: list[Key]


class UsageLine(_Exact):
    """What a tenant used of a model in a month."""

    month: str
    tenant: str
    model: str
    requests: Count
    prompt_tokens: Count
    cached_tokens: Count
    output_tokens: Count
    gpu_seconds: float
    cost: float
    cost_per_1000_tokens: float
    cache_saved_gpu_seconds: float
    cache_saved_cost: float


class UsageReport(_Exact):
    """GET /v1/admin/usage"""

    object: Literal["list"]
    data: list[UsageLine]


class Erased(_Exact):
    """DELETE /v1/admin/usage"""

    tenant: str
    erased: Count


class Moved(_Exact):
    """How a request left a worker."""

    worker: str
    at_seconds: float
    emitted_tokens: Count
    cause: str


class RequestRow(_Exact):
    """GET /v1/admin/requests/{request_id}"""

    id: str
    request_id: str
    time: float
    month: str
    lane: Literal["openai", "typed"]
    endpoint: str
    tenant: str
    key_id: str
    model: str
    worker: str
    prompt_tokens: Count
    cached_tokens: Count
    output_tokens: Count
    ttft_seconds: float | None
    tpot_seconds: float | None
    queue_seconds: float | None
    prefill_seconds: float | None
    duration_seconds: float | None
    gpu_seconds: float
    outcome: str
    cost: float
    moves: list[Moved]


class RequestList(_Exact):
    """GET /v1/admin/requests"""

    object: Literal["list"]
    data: list[RequestRow]


class AuditEntry(_Exact):
    """Who did what."""

    id: Count
    time: float
    actor: str
    action: str
    target: str
    detail: Any


class AuditTrail(_Exact):
    """GET /v1/admin/audit"""

    object: Literal["list"]
    data: list[AuditEntry]
