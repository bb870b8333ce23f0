"""What the Responses API answers, as the OpenAPI document tells of it."""

from typing import Any, Literal

from services.gateway.answers import ChosenToken, Count, Exact, Moment, Page, ReasoningTokens

__all__ = [
    "ItemList",
    "ResponseObject",
]


class CachedInput(Exact):
    """Of the input."""

    cached_tokens: Count
    cache_write_tokens: Count


class ResponseUsage(Exact):
    """What a response took."""

    input_tokens: Count
    input_tokens_details: CachedInput
    output_tokens: Count
    output_tokens_details: ReasoningTokens
    total_tokens: Count


class SaidText(Exact):
    """What the model says."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChosenToken]


class ThoughtText(Exact):
    """What the model thinks."""

    type: Literal["reasoning_text"]
    text: str


class _Item(Exact, tag_field="type"):
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


class Incomplete(Exact):
    """Why there is no more."""

    reason: str


class UsedReasoning(Exact):
    """How it was thought."""

    effort: str | None
    summary: str | None


class UsedText(Exact):
    """How it was written."""

    format: dict[str, Any]


class ResponseObject(Exact):
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


class ItemList(Page):
    """GET /v1/responses/{response_id}/input_items"""

    data: list[dict[str, Any]]
