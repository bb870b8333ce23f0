"""The one error type of the mesh, and the one table that says what each reason is in gRPC and in HTTP."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

__all__ = ["DOMAIN", "RETRY_BUDGET_EXHAUSTED", "TABLE", "MeshError", "Reason", "ReasonRow"]

DOMAIN: Final = "tokenloom"
RETRY_BUDGET_EXHAUSTED: Final = "retry_budget_exhausted"
"""The `code` of a retry that is refused because too many requests fail; the first failure is the one to be told of."""


class Reason(StrEnum):
    """Why a request failed; the `reason` of its google.rpc.ErrorInfo."""

    INVALID_REQUEST = "INVALID_REQUEST"
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    INVALID_API_KEY = "INVALID_API_KEY"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    REQUEST_TIMEOUT = "REQUEST_TIMEOUT"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    UNSUPPORTED_MEDIA_TYPE = "UNSUPPORTED_MEDIA_TYPE"
    RATE_LIMIT_EXCEEDED = "RATE_LIMIT_EXCEEDED"
    NO_CAPACITY = "NO_CAPACITY"
    NO_READY_WORKER = "NO_READY_WORKER"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    ENGINE_FAILED = "ENGINE_FAILED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True)
class ReasonRow:
    """What a reason is outside: the gRPC status code's name, the HTTP status, and OpenAI's `type` and `code`."""

    grpc: str
    http: int
    type: str
    code: str


TABLE: Final[dict[Reason, ReasonRow]] = {
    Reason.INVALID_REQUEST: ReasonRow("INVALID_ARGUMENT", 400, "invalid_request_error", "invalid_value"),
    Reason.CONTEXT_LENGTH_EXCEEDED: ReasonRow(
        "INVALID_ARGUMENT", 400, "invalid_request_error", "context_length_exceeded"
    ),
    Reason.INVALID_API_KEY: ReasonRow("UNAUTHENTICATED", 401, "invalid_request_error", "invalid_api_key"),
    Reason.PERMISSION_DENIED: ReasonRow("PERMISSION_DENIED", 403, "permission_error", "permission_denied"),
    Reason.MODEL_NOT_FOUND: ReasonRow("NOT_FOUND", 404, "invalid_request_error", "model_not_found"),
    Reason.NOT_FOUND: ReasonRow("NOT_FOUND", 404, "invalid_request_error", "not_found"),
    Reason.ALREADY_EXISTS: ReasonRow("ALREADY_EXISTS", 409, "invalid_request_error", "already_exists"),
    Reason.FAILED_PRECONDITION: ReasonRow("FAILED_PRECONDITION", 409, "invalid_request_error", "failed_precondition"),
    Reason.METHOD_NOT_ALLOWED: ReasonRow("UNIMPLEMENTED", 405, "invalid_request_error", "method_not_allowed"),
    Reason.REQUEST_TIMEOUT: ReasonRow("DEADLINE_EXCEEDED", 408, "invalid_request_error", "request_timeout"),
    Reason.REQUEST_TOO_LARGE: ReasonRow("RESOURCE_EXHAUSTED", 413, "invalid_request_error", "request_too_large"),
    Reason.UNSUPPORTED_MEDIA_TYPE: ReasonRow(
        "INVALID_ARGUMENT", 415, "invalid_request_error", "unsupported_media_type"
    ),
    Reason.RATE_LIMIT_EXCEEDED: ReasonRow("RESOURCE_EXHAUSTED", 429, "rate_limit_error", "rate_limit_exceeded"),
    Reason.NO_CAPACITY: ReasonRow("RESOURCE_EXHAUSTED", 429, "rate_limit_error", "no_capacity"),
    Reason.NO_READY_WORKER: ReasonRow("UNAVAILABLE", 503, "server_error", "no_ready_worker"),
    Reason.DEADLINE_EXCEEDED: ReasonRow("DEADLINE_EXCEEDED", 504, "server_error", "deadline_exceeded"),
    Reason.ENGINE_FAILED: ReasonRow("INTERNAL", 500, "server_error", "engine_error"),
    Reason.UNIMPLEMENTED: ReasonRow("UNIMPLEMENTED", 400, "invalid_request_error", "unimplemented"),
    Reason.INTERNAL: ReasonRow("INTERNAL", 500, "server_error", "internal_error"),
    Reason.CANCELLED: ReasonRow("CANCELLED", 499, "invalid_request_error", "cancelled"),
}


class MeshError(Exception):
    """A request failed, and the client is told why.

    Attributes:
        reason: the row of TABLE.
        message: for people; names the field and the bound, never an address, a worker or a stack.
        field: the request's field that is at fault, or None.
        code: OpenAI's `code` where it says more than the reason's own, for example "missing_required_parameter".
        retry_after_seconds: when trying again may help, or None.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.code = code or TABLE[reason].code
        self.retry_after_seconds = retry_after_seconds

    def __reduce__(self) -> Any:
        # Exceptions are rebuilt from positional arguments, which would lose the rest on the way between processes.
        return _rebuild, (self.reason, self.message, self.field, self.code, self.retry_after_seconds)

    @property
    def row(self) -> ReasonRow:
        """What the reason is outside."""
        return TABLE[self.reason]

    def renamed(self, rename: Callable[[str], str]) -> "MeshError":
        """The same for whoever knows the field by another name, in the message, too."""
        if self.field is None:
            return self
        field = rename(self.field)
        message = self.message.replace(self.field, field)
        return _rebuild(self.reason, message, field, self.code, self.retry_after_seconds)

    def http_body(self) -> dict[str, dict[str, str | None]]:
        """The body of the HTTP answer, in OpenAI's shape."""
        return {
            "error": {"message": self.message, "type": self.row.type, "param": self.field, "code": self.code},
        }


def _rebuild(reason: Reason, message: str, field: str | None, code: str, retry_after: float | None) -> MeshError:
    return MeshError(reason, message, field=field, code=code, retry_after_seconds=retry_after)
