"""What is answered about files and batches, as the OpenAPI document tells of it."""

from typing import Any, Literal

from services.gateway.answers import Count, Exact, Moment, Page

__all__ = [
    "Batch",
    "BatchList",
    "File",
    "FileList",
]


class File(Exact):
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


class RequestCounts(Exact):
    """How many lines."""

    total: Count
    completed: Count
    failed: Count


class BatchErrors(Exact):
    """What is wrong with the file."""

    object: Literal["list"]
    data: list[dict[str, Any]]


class Batch(Exact):
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
