"""What operators are answered, as the OpenAPI document tells of it."""

from typing import Any, Literal

from services.gateway.answers import Count, Exact

__all__ = [
    "AuditTrail",
    "Erased",
    "KeyList",
    "NewKey",
    "RequestList",
    "RequestRow",
    "Revoked",
    "UsageReport",
]


class NewKey(Exact):
    """POST /v1/admin/keys"""

    id: str
    key: str


class Revoked(Exact):
    """DELETE /v1/admin/keys/{key_id}"""

    id: str
    revoked: Literal[True]


class Limits(Exact):
    """What a key may use."""

    rpm: Count | None
    tpm: Count | None
    concurrency: Count | None
    budget: float | None


class Key(Exact):
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


class KeyList(Exact):
    """GET /v1/admin/keys"""

    object: Literal["list"]
    data: list[Key]


class UsageLine(Exact):
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


class UsageReport(Exact):
    """GET /v1/admin/usage"""

    object: Literal["list"]
    data: list[UsageLine]


class Erased(Exact):
    """DELETE /v1/admin/usage"""

    tenant: str
    erased: Count


class Moved(Exact):
    """How a request left a worker."""

    worker: str
    at_seconds: float
    emitted_tokens: Count
    cause: str


class RequestRow(Exact):
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


class RequestList(Exact):
    """GET /v1/admin/requests"""

    object: Literal["list"]
    data: list[RequestRow]


class AuditEntry(Exact):
    """Who did what."""

    id: Count
    time: float
    actor: str
    action: str
    target: str
    detail: Any


class AuditTrail(Exact):
    """GET /v1/admin/audit"""

    object: Literal["list"]
    data: list[AuditEntry]
