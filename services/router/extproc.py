"""The messages of Envoy's external processing, as the picker sends them."""

import base64
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import msgspec
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.type.v3 import http_status_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct

from services.common.errors import MeshError
from services.common.status import DETAILS_KEY, grpc_code, status_from_error
from services.common.typed_calls import TOLD_NAMESPACE

__all__ = [
    "CONTINUE_BODY",
    "CONTINUE_HEADERS",
    "CONTINUE_RESPONSE_BODY",
    "CONTINUE_RESPONSE_HEADERS",
    "CONTINUE_RESPONSE_TRAILERS",
    "CONTINUE_TRAILERS",
    "DESTINATION",
    "FAIRNESS_ID",
    "MODEL_NAME",
    "WAIT",
    "attributes_of",
    "body_pieces",
    "headers_of",
    "picked_in_body",
    "picked_in_headers",
    "refusal",
    "response_body_pieces",
    "rewritten",
    "served_of",
    "subset_of",
    "telling",
]

DESTINATION: Final = "x-gateway-destination-endpoint"
MODEL_NAME: Final = "x-gateway-model-name"
"""The header in which a gateway that shows no body may say which model it is for."""
FAIRNESS_ID: Final = "x-gateway-inference-fairness-id"
"""The header in which other gateways say whose request it is."""
_SERVED: Final = "x-gateway-destination-endpoint-served"
_LB_NAMESPACE: Final = "envoy.lb"
_SUBSET_NAMESPACE: Final = "envoy.lb.subset_hint"
_SUBSET_KEY: Final = "x-gateway-destination-endpoint-subset"
_ATTRIBUTES: Final = "envoy.filters.http.ext_proc"
_HEADER: Final = "request.headers['"
_HEADER_NAME: Final = slice(len(_HEADER), -len("']"))
# Envoy takes at most 64 KiB in one streamed piece.
_PIECE_BYTES: Final = 62_000
_OVERWRITE: Final = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD

# Longer than a request may wait; Envoy takes it only if it is no longer than its own bound.
_PATIENCE_SECONDS: Final = 120
WAIT: Final = ext_proc.ProcessingResponse(override_message_timeout=Duration(seconds=_PATIENCE_SECONDS))
"""The answer that asks Envoy for patience: the request waits for a worker."""
CONTINUE_HEADERS: Final = ext_proc.ProcessingResponse(request_headers=ext_proc.HeadersResponse())
CONTINUE_BODY: Final = ext_proc.ProcessingResponse(request_body=ext_proc.BodyResponse())
CONTINUE_TRAILERS: Final = ext_proc.ProcessingResponse(request_trailers=ext_proc.TrailersResponse())
CONTINUE_RESPONSE_HEADERS: Final = ext_proc.ProcessingResponse(response_headers=ext_proc.HeadersResponse())
CONTINUE_RESPONSE_BODY: Final = ext_proc.ProcessingResponse(response_body=ext_proc.BodyResponse())
CONTINUE_RESPONSE_TRAILERS: Final = ext_proc.ProcessingResponse(response_trailers=ext_proc.TrailersResponse())


def headers_of(message: Any) -> dict[str, str]:
    """The headers or trailers of a message; of a repeated one the last value. Bytes that are no text are replaced."""
    return {
        header.key: header.raw_value.decode(errors="replace") if header.raw_value else header.value
        for header in message.headers
    }


def attributes_of(message: Any) -> dict[str, str]:
    """The request headers that a gateway shows as attributes, `request.headers['NAME']`, where it shows no headers."""
    attributes = message.attributes.get(_ATTRIBUTES)
    if attributes is None:
        return {}
    fields = attributes.fields
    # Not by items(), which is Python of the library's.
    return {
        expression[_HEADER_NAME]: fields[expression].string_value
        for expression in fields
        if expression.startswith(_HEADER)
    }


def subset_of(message: Any) -> frozenset[str] | None:
    """The endpoints to pick from, where the gateway gave some; None when it gave no hint."""
    if not message.HasField("metadata_context"):
        return None
    metadata = message.metadata_context.filter_metadata
    if _SUBSET_NAMESPACE not in metadata:
        return None
    fields = metadata[_SUBSET_NAMESPACE].fields
    if _SUBSET_KEY not in fields:
        return None
    hint = fields[_SUBSET_KEY]
    listed = hint.string_value.split(",") if hint.HasField("string_value") else _strings(hint.list_value)
    return frozenset(endpoint.strip() for endpoint in listed if endpoint.strip())


def _strings(values: Any) -> list[str]:
    return [value.string_value for value in values.values]


def served_of(message: Any) -> str | None:
    """The endpoint that serves the request, where the gateway tells."""
    metadata = message.metadata_context.filter_metadata
    if _LB_NAMESPACE not in metadata or _SERVED not in metadata[_LB_NAMESPACE].fields:
        return None
    return metadata[_LB_NAMESPACE].fields[_SERVED].string_value or None


@lru_cache(maxsize=1024)
def picked_in_headers(endpoint: str) -> Any:
    """The answer to request headers that sends the request to `endpoint`."""
    return ext_proc.ProcessingResponse(
        request_headers=ext_proc.HeadersResponse(response=_to(endpoint)), dynamic_metadata=_metadata(endpoint)
    )


@lru_cache(maxsize=1024)
def picked_in_body(endpoint: str) -> Any:
    """The answer to a buffered request body that sends the request to `endpoint`."""
    return ext_proc.ProcessingResponse(
        request_body=ext_proc.BodyResponse(response=_to(endpoint)), dynamic_metadata=_metadata(endpoint)
    )


def rewritten(endpoint: str, body: bytes) -> Any:
    """The answer to a buffered request body that sends the request to `endpoint`, with another body."""
    response = _to(endpoint)
    response.body_mutation.body = body
    return ext_proc.ProcessingResponse(
        request_body=ext_proc.BodyResponse(response=response), dynamic_metadata=_metadata(endpoint)
    )


def telling(picked: Any, told: Mapping[str, str]) -> Any:
    """The answer that sends a request somewhere, and tells in metadata what our edge gives the client as headers."""
    answer = ext_proc.ProcessingResponse()
    # The same one is sent for other requests.
    answer.CopyFrom(picked)
    answer.dynamic_metadata.get_or_create_struct(TOLD_NAMESPACE).update(dict(told))
    return answer


def _to(endpoint: str) -> Any:
    return ext_proc.CommonResponse(
        header_mutation=ext_proc.HeaderMutation(set_headers=[_header(DESTINATION, endpoint)])
    )


def _metadata(endpoint: str) -> Struct:
    metadata = Struct()
    metadata.get_or_create_struct(_LB_NAMESPACE)[DESTINATION] = endpoint
    return metadata


def body_pieces(body: bytes, *, ended: bool) -> list[Any]:
    """The answers that hand a streamed request body on as it came."""
    return [ext_proc.ProcessingResponse(request_body=piece) for piece in _pieces(body, ended=ended)]


def response_body_pieces(body: bytes, *, ended: bool) -> list[Any]:
    """The answers that hand a streamed response body on as it came."""
    return [ext_proc.ProcessingResponse(response_body=piece) for piece in _pieces(body, ended=ended)]


def _pieces(body: bytes, *, ended: bool) -> list[Any]:
    starts = range(0, max(len(body), 1), _PIECE_BYTES)
    return [_piece(body[start : start + _PIECE_BYTES], ended=ended and start == starts[-1]) for start in starts]


def _piece(body: bytes, *, ended: bool) -> Any:
    streamed = ext_proc.StreamedBodyResponse(body=body, end_of_stream=ended)
    return ext_proc.BodyResponse(
        response=ext_proc.CommonResponse(body_mutation=ext_proc.BodyMutation(streamed_response=streamed))
    )


def refusal(error: MeshError, *, to_grpc: bool) -> Any:
    """The answer that ends the request with an error: a rich gRPC status, or OpenAI's JSON."""
    headers = []
    if error.retry_after_seconds is not None:
        headers.append(_header("retry-after", str(math.ceil(error.retry_after_seconds))))
    if to_grpc:
        # Binary metadata travels as base64 without padding.
        details = base64.b64encode(status_from_error(error).SerializeToString()).rstrip(b"=").decode()
        headers.append(_header(DETAILS_KEY, details))
        # Envoy makes the body of a local reply to a gRPC request its grpc-message.
        body = error.message.encode()
    else:
        headers.append(_header("content-type", "application/json"))
        body = msgspec.json.encode(error.http_body())
    return ext_proc.ProcessingResponse(
        immediate_response=ext_proc.ImmediateResponse(
            status=http_status_pb2.HttpStatus(code=error.row.http),
            headers=ext_proc.HeaderMutation(set_headers=headers),
            body=body,
            grpc_status=ext_proc.GrpcStatus(status=grpc_code(error).value[0]) if to_grpc else None,
            details=error.reason.value.lower(),
        )
    )


def _header(key: str, value: str) -> Any:
    return base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=key, raw_value=value.encode()), append_action=_OVERWRITE
    )
