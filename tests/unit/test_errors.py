"""What each reason is outside, row by row."""

import copy
import pickle

import grpc
import pytest

from services.common.errors import TABLE, MeshError, Reason

# reason, gRPC, HTTP, type, code: what clients rely on, written down a second time on purpose.
ROWS = [
    ("INVALID_REQUEST", "INVALID_ARGUMENT", 400, "invalid_request_error", "invalid_value"),
    ("CONTEXT_LENGTH_EXCEEDED", "INVALID_ARGUMENT", 400, "invalid_request_error", "context_length_exceeded"),
    ("INVALID_API_KEY", "UNAUTHENTICATED", 401, "invalid_request_error", "invalid_api_key"),
    ("PERMISSION_DENIED", "PERMISSION_DENIED", 403, "permission_error", "permission_denied"),
    ("MODEL_NOT_FOUND", "NOT_FOUND", 404, "invalid_request_error", "model_not_found"),
    ("NOT_FOUND", "NOT_FOUND", 404, "invalid_request_error", "not_found"),
    ("ALREADY_EXISTS", "ALREADY_EXISTS", 409, "invalid_request_error", "already_exists"),
    ("FAILED_PRECONDITION", "FAILED_PRECONDITION", 409, "invalid_request_error", "failed_precondition"),
    ("METHOD_NOT_ALLOWED", "UNIMPLEMENTED", 405, "invalid_request_error", "method_not_allowed"),
    ("REQUEST_TIMEOUT", "DEADLINE_EXCEEDED", 408, "invalid_request_error", "request_timeout"),
    ("REQUEST_TOO_LARGE", "RESOURCE_EXHAUSTED", 413, "invalid_request_error", "request_too_large"),
    ("UNSUPPORTED_MEDIA_TYPE", "INVALID_ARGUMENT", 415, "invalid_request_error", "unsupported_media_type"),
    ("RATE_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", 429, "rate_limit_error", "rate_limit_exceeded"),
    ("NO_CAPACITY", "RESOURCE_EXHAUSTED", 429, "rate_limit_error", "no_capacity"),
    ("NO_READY_WORKER", "UNAVAILABLE", 503, "server_error", "no_ready_worker"),
    ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", 504, "server_error", "deadline_exceeded"),
    ("ENGINE_FAILED", "INTERNAL", 500, "server_error", "engine_error"),
    ("UNIMPLEMENTED", "UNIMPLEMENTED", 400, "invalid_request_error", "unimplemented"),
    ("INTERNAL", "INTERNAL", 500, "server_error", "internal_error"),
    ("CANCELLED", "CANCELLED", 499, "invalid_request_error", "cancelled"),
]


@pytest.mark.parametrize(("reason", "code", "http", "type_", "openai_code"), ROWS)
def test_a_reason_has_its_row(reason: str, code: str, http: int, type_: str, openai_code: str) -> None:
    row = TABLE[Reason(reason)]

    assert (row.grpc, row.http, row.type, row.code) == (code, http, type_, openai_code)


def test_every_reason_has_a_row_here_and_in_the_table() -> None:
    assert {row[0] for row in ROWS} == {reason.value for reason in Reason} == {reason.value for reason in TABLE}


@pytest.mark.parametrize("reason", Reason)
def test_every_row_names_a_status_code_of_grpc(reason: Reason) -> None:
    assert TABLE[reason].grpc in grpc.StatusCode.__members__


def test_an_http_body_has_openais_shape() -> None:
    error = MeshError(Reason.INVALID_REQUEST, "temperature must be at most 2", field="temperature")

    assert error.http_body() == {
        "error": {
            "message": "temperature must be at most 2",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": "invalid_value",
        }
    }


def test_a_code_of_its_own_goes_before_the_rows() -> None:
    error = MeshError(Reason.INVALID_REQUEST, "no", code="missing_required_parameter")

    assert error.http_body()["error"]["code"] == "missing_required_parameter"
    assert error.http_body()["error"]["param"] is None


@pytest.mark.parametrize("rebuilt", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_survives_the_way_between_processes(rebuilt: object) -> None:
    error = MeshError(Reason.NO_CAPACITY, "full", field="n", code="c", retry_after_seconds=1.5)

    assert callable(rebuilt)
    again = rebuilt(error)

    assert isinstance(again, MeshError)
    assert vars(again) == vars(error)
    assert str(again) == "full"
