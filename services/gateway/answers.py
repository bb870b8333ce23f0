"""What is answered, as the OpenAPI document tells of it: types for their JSON Schemas alone.

Answers are rendered without them, since that is faster; that each is as it is written here is tried out by
`bench/fuzz_api.py`, and in tests by `tests/contract/test_gateway_http.py`. Here is what models are asked for; the rest
is in `answers_responses.py`, `answers_files.py` and `answers_admin.py`.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from services.gateway.pieces import FinishReason

__all__ = [
    "ChatCompletion",
    "Completion",
    "Count",
    "Deleted",
    "Detokenized",
    "Embeddings",
    "Exact",
    "Logprob",
    "Model",
    "ModelList",
    "Moment",
    "Page",
    "Reranking",
    "Scores",
    "Tokenized",
]


Count = Annotated[int, Meta(ge=0)]
Moment = Annotated[int, Meta(ge=0)]
"""Whole seconds since the epoch."""
Logprob = Annotated[float, Meta(le=0)]
Vector = Annotated[list[float], Meta(min_length=1)]


class Exact(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """With these fields and no others."""


class CachedTokens(Exact):
    """Of the prompt."""

    cached_tokens: Count


class ReasoningTokens(Exact):
    """Of the output."""

    reasoning_tokens: Count


class Usage(Exact):
    """What an answer took."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


class PromptUsage(Exact):
    """What an answer without output took."""

    prompt_tokens: Count
    total_tokens: Count


class RankedLogprob(Exact):
    """A token that might have been there."""

    logprob: Logprob
    rank: Annotated[int, Meta(ge=1)] | None
    decoded_token: str


PromptLogprobs = list[dict[str, RankedLogprob] | None]
"""For each token of the prompt, by token id; null for the first one, which nothing predicts."""


class ScoredToken(Exact):
    """A token and its probability."""

    token: str
    logprob: Logprob
    bytes: list[Annotated[int, Meta(ge=0, le=255)]]


class ChosenToken(ScoredToken):
    """A token of the output."""

    top_logprobs: list[ScoredToken]


class ChatLogprobs(Exact):
    """The tokens of a choice."""

    content: list[ChosenToken]
    refusal: None


class MadeFunction(Exact):
    """Which function, with what."""

    name: str
    arguments: str


class MadeCall(Exact):
    """A call that the model made."""

    id: str
    type: Literal["function"]
    function: MadeFunction


class AnswerMessage(Exact):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[MadeCall] | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChatChoice(Exact):
    """One of the answers."""

    index: Count
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[Count] | UnsetType = UNSET


class ChatCompletion(Exact):
    """POST /v1/chat/completions"""

    id: str
    object: Literal["chat.completion"]
    created: Moment
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[Count] | UnsetType = UNSET


class CompletionLogprobs(Exact):
    """The tokens of a choice, column by column."""

    tokens: list[str]
    token_logprobs: list[Logprob | None]
    top_logprobs: list[dict[str, Logprob] | None]
    text_offset: list[Count]


class CompletionChoice(Exact):
    """One of the answers."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    token_ids: list[Count] | UnsetType = UNSET
    prompt_token_ids: list[Count] | UnsetType | None = UNSET


class Completion(Exact):
    """POST /v1/completions"""

    id: str
    object: Literal["text_completion"]
    created: Moment
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Embedding(Exact):
    """One vector: its components, or these as base64 of 32-bit floats, little-endian."""

    object: Literal["embedding"]
    index: Count
    embedding: Vector | str


class Embeddings(Exact):
    """POST /v1/embeddings"""

    id: str
    object: Literal["list"]
    created: Moment
    model: str
    data: list[Embedding]
    usage: PromptUsage


class RankedDocument(Exact):
    """A text that was ranked."""

    text: str
    multi_modal: None


class Ranked(Exact):
    """One of the best."""

    index: Count
    relevance_score: float
    document: RankedDocument | UnsetType = UNSET


class Reranking(Exact):
    """POST /v1/rerank"""

    id: str
    model: str
    results: list[Ranked]
    usage: PromptUsage


class Score(Exact):
    """How well two texts go together."""

    index: Count
    object: Literal["score"]
    score: float


class Scores(Exact):
    """POST /v1/score"""

    id: str
    object: Literal["list"]
    created: Moment
    model: str
    data: list[Score]
    usage: PromptUsage


class Tokenized(Exact):
    """POST /v1/tokenize"""

    count: Count
    max_model_len: Count
    tokens: list[Count]
    token_strs: list[str] | None


class Detokenized(Exact):
    """POST /v1/detokenize"""

    prompt: str


class Model(Exact):
    """GET /v1/models/{model}"""

    id: str
    object: Literal["model"]
    created: Moment
    owned_by: str
    max_model_len: Count


class ModelList(Exact):
    """GET /v1/models"""

    object: Literal["list"]
    data: list[Model]


class Page(Exact):
    """What pages have in common."""

    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(Exact):
    """What is gone."""

    id: str
    object: str
    deleted: Literal[True]
