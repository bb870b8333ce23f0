"""MeshError as a gRPC status and back."""

import grpc
import grpc.aio
import pytest
from google.protobuf.any_pb2 import Any as AnyProto
from google.rpc import error_details_pb2, status_pb2

from services.common.errors import TABLE, MeshError, Reason
from services.common.status import DETAILS_KEY, error_from_call, error_from_status, grpc_code, status_from_error

FULLY = MeshError(Reason.NO_CAPACITY, "the mesh is full", field="n", code="special", retry_after_seconds=2.5)


@pytest.mark.parametrize("reason", Reason)
def test_each_reason_makes_the_round_trip(reason: Reason) -> None:
    error = MeshError(reason, "words")

    assert vars(error_from_status(status_from_error(error))) == vars(error)


def test_field_code_and_retry_make_the_round_trip() -> None:
    assert vars(error_from_status(status_from_error(FULLY))) == vars(FULLY)


@pytest.mark.parametrize("reason", Reason)
def test_a_status_has_the_code_of_its_row(reason: Reason) -> None:
    error = MeshError(reason, "words")

    assert grpc_code(error).name == TABLE[reason].grpc
    assert status_from_error(error).code == grpc_code(error).value[0]


def test_a_status_has_one_error_info_and_only_the_details_that_help() -> None:
    plain = status_from_error(MeshError(Reason.INVALID_API_KEY, "no"))
    full = status_from_error(FULLY)

    assert [detail.TypeName() for detail in plain.details] == ["google.rpc.ErrorInfo"]
    assert [detail.TypeName() for detail in full.details] == [
        "google.rpc.ErrorInfo",
        "google.rpc.BadRequest",
        "google.rpc.RetryInfo",
    ]
    info = error_details_pb2.ErrorInfo()
    assert full.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("NO_CAPACITY", "tokenloom")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_REQUEST),
        (grpc.StatusCode.UNAUTHENTICATED, Reason.INVALID_API_KEY),
        (grpc.StatusCode.PERMISSION_DENIED, Reason.PERMISSION_DENIED),
        (grpc.StatusCode.NOT_FOUND, Reason.NOT_FOUND),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.NO_CAPACITY),
        (grpc.StatusCode.UNAVAILABLE, Reason.NO_READY_WORKER),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED),
        (grpc.StatusCode.UNIMPLEMENTED, Reason.UNIMPLEMENTED),
        (grpc.StatusCode.CANCELLED, Reason.CANCELLED),
        (grpc.StatusCode.INTERNAL, Reason.INTERNAL),
        (grpc.StatusCode.UNKNOWN, Reason.INTERNAL),
        (grpc.StatusCode.DATA_LOSS, Reason.INTERNAL),
    ],
)
def test_a_status_without_details_is_read_off_its_code(code: grpc.StatusCode, reason: Reason) -> None:
    bare = status_pb2.Status(code=code.value[0], message="from elsewhere")
    call = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="from elsewhere")

    for error in (error_from_status(bare), error_from_call(call)):
        assert (error.reason, error.message) == (reason, "from elsewhere")


def test_a_failed_call_is_read_off_its_details() -> None:
    trailing = grpc.aio.Metadata((DETAILS_KEY, status_from_error(FULLY).SerializeToString()))
    call = grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), trailing, details="x")

    assert vars(error_from_call(call)) == vars(FULLY)


def test_a_reason_of_somebody_else_is_read_off_the_code() -> None:
    foreign = AnyProto()
    foreign.Pack(error_details_pb2.ErrorInfo(reason="CONSUMER_SUSPENDED", domain="googleapis.com"))
    status = status_pb2.Status(code=grpc.StatusCode.PERMISSION_DENIED.value[0], message="no", details=[foreign])

    assert error_from_status(status).reason is Reason.PERMISSION_DENIED


def test_a_code_that_does_not_exist_is_internal() -> None:
    assert error_from_status(status_pb2.Status(code=4711, message="?")).reason is Reason.INTERNAL
