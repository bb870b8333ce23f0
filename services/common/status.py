"""MeshError as google.rpc.Status and back, with ErrorInfo, BadRequest and RetryInfo."""

from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyProto
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from services.common.errors import DOMAIN, TABLE, MeshError, Reason

__all__ = [
    "DETAILS_KEY",
    "REASON_OF_CODE",
    "abort",
    "error_from_call",
    "error_from_status",
    "grpc_code",
    "status_from_error",
]

DETAILS_KEY = "grpc-status-details-bin"
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
REASON_OF_CODE: Final[dict[str, Reason]] = {
    "INVALID_ARGUMENT": Reason.INVALID_REQUEST,
    "UNAUTHENTICATED": Reason.INVALID_API_KEY,
    "PERMISSION_DENIED": Reason.PERMISSION_DENIED,
    "NOT_FOUND": Reason.NOT_FOUND,
    "RESOURCE_EXHAUSTED": Reason.NO_CAPACITY,
    "UNAVAILABLE": Reason.NO_READY_WORKER,
    "DEADLINE_EXCEEDED": Reason.DEADLINE_EXCEEDED,
    "UNIMPLEMENTED": Reason.UNIMPLEMENTED,
    "CANCELLED": Reason.CANCELLED,
}


def grpc_code(error: MeshError) -> grpc.StatusCode:
    """The gRPC status code of an error."""
    return grpc.StatusCode[error.row.grpc]


def status_from_error(error: MeshError) -> status_pb2.Status:
    """The rich status of an error: one ErrorInfo, a BadRequest for a field, a RetryInfo when waiting helps."""
    status = status_pb2.Status(code=grpc_code(error).value[0], message=error.message)
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata={"code": error.code})
    ]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_seconds is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = AnyProto()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def error_from_status(status: status_pb2.Status) -> MeshError:
    """The error that a rich status tells of."""
    reason = REASON_OF_CODE.get(_CODES[status.code].name, Reason.INTERNAL) if status.code in _CODES else Reason.INTERNAL
    field = code = retry_after = None
    for packed in status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if packed.Unpack(info) and info.reason in TABLE:
            reason, code = Reason(info.reason), info.metadata.get("code")
        elif packed.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif packed.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    return MeshError(reason, status.message, field=field, code=code, retry_after_seconds=retry_after)


def error_from_call(error: grpc.aio.AioRpcError) -> MeshError:
    """The error that a failed call tells of; a transport failure has no details and is read off its code."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            return error_from_status(status_pb2.Status.FromString(value))
    reason = REASON_OF_CODE.get(error.code().name, Reason.INTERNAL)
    return MeshError(reason, error.details() or error.code().name)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: MeshError) -> None:
    """Ends a call with an error and its details. Never returns."""
    details = status_from_error(error).SerializeToString()
    trailing = [*(context.trailing_metadata() or ()), (DETAILS_KEY, details)]
    await context.abort(grpc_code(error), error.message, tuple(trailing))
