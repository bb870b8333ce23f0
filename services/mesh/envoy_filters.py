"""What happens to a request on its way through the edge, and which routes want it."""

from base64 import b64encode
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Final, Literal

from services.common.allowed_models import MODELS_HEADER
from services.common.priority import PRIORITY_HEADER
from services.common.status import DETAILS_KEY
from services.common.typed_calls import REMEMBER_HEADER, TOLD_NAMESPACE
from services.mesh.envoy_accounting import MESSAGE_COUNTER, message_counter, start_log
from services.mesh.envoy_fallback import destination_filter
from services.mesh.envoy_memory import IS_UNKNOWN, KEY_MEMORY, key_memory
from services.mesh.envoy_replies import error_body_script
from services.mesh.envoy_types import any_of
from services.mesh.rest import PUBLIC_SERVICES, descriptor_set

__all__ = ["MAX_BODY_BYTES", "SHOWN_TO_PICKER", "Right", "for_grpc", "for_rest", "http_filters"]

# Filters run in this order on a request and in the opposite one on its answer.
_ERROR_BODY: Final = "tokenloom.error_body"
_GRPC_WEB: Final = "envoy.filters.http.grpc_web"
_AUTHORIZATION: Final = "envoy.filters.http.ext_authz"
_TRANSCODER: Final = "envoy.filters.http.grpc_json_transcoder"
_PICKER: Final = "envoy.filters.http.ext_proc"
_BUFFER: Final = "envoy.filters.http.buffer"

MAX_BODY_BYTES: Final = 4 << 20

# Every route says in its metadata which right it needs, and which form its errors have.
_NAMESPACE: Final = "tokenloom"
_CHECK_HEADERS: Final = [
    {"key": f"x-tokenloom-{key}", "value": f"%METADATA(ROUTE:{_NAMESPACE}:{key})%"} for key in ("right", "form")
]
_REFUSAL_HEADERS: Final = ("content-type", "retry-after", DETAILS_KEY)
_ABOUT_LIMITS: Final = [{"prefix": "x-ratelimit-"}]
_AUTHORIZATION_TIMEOUT: Final = "2s"
# A router that says nothing for so long hangs, and the fallback takes the request; for those who come later the health
# check of the picker's cluster finds that out. However many come at once, a router reads them and says at once whom it
# lets wait, for others or for its own time, and may then take longer than a request may wait in its queue.
_PICK_TIMEOUT: Final = "0.25s"
# Where there is no fallback, giving up helps nobody.
_ONLY_PICK_TIMEOUT: Final = "1s"
_LONGEST_PICK_TIMEOUT: Final = "130s"
# The picker is shown the body alone, in one message, with these headers of the request as attributes beside it.
SHOWN_TO_PICKER: Final = (
    "content-type",
    "grpc-encoding",
    "grpc-timeout",
    "x-session-id",
    "x-slo-class",
    PRIORITY_HEADER,
)
"""The headers among them that clients set."""
_PICKER_READS: Final = (
    ":path",
    *SHOWN_TO_PICKER,
    "x-request-id",
    "x-tokenloom-debug",
    "x-tokenloom-degrade",
    MODELS_HEADER,
    "x-tokenloom-priority",
    "x-tokenloom-tenant",
)


class Right(StrEnum):
    """What a key must allow."""

    INFERENCE = "inference"
    MODELS = "models"
    TELEMETRY = "telemetry"
    ADMIN = "admin"

    def metadata(self, form: Literal["grpc", "rest"]) -> dict[str, Any]:
        """The metadata of a route that needs it."""
        return {"filter_metadata": {_NAMESPACE: {"right": self.value, "form": form}}}


def http_filters(fallback: str | None, gateways: Sequence[str]) -> list[dict[str, Any]]:
    """The filter chain. What is disabled here is enabled by the routes that want it.

    `fallback`: where requests go that the picker can't be asked about; None: nowhere. `gateways`: the names of those
    that are told how calls went.
    """
    preset = [] if fallback is None else [{"name": "tokenloom.fallback", "typed_config": destination_filter(fallback)}]
    return [
        {"name": _ERROR_BODY, "disabled": True, "typed_config": _error_body()},
        {"name": _GRPC_WEB, "typed_config": any_of("envoy.extensions.filters.http.grpc_web.v3.GrpcWeb")},
        {"name": KEY_MEMORY, "disabled": True, "typed_config": key_memory(gateways)},
        {"name": _AUTHORIZATION, "disabled": True, "typed_config": _authorization()},
        {"name": _TRANSCODER, "disabled": True, "typed_config": _transcoder()},
        *preset,
        {"name": MESSAGE_COUNTER, "disabled": True, "typed_config": message_counter()},
        {
            "name": _PICKER,
            "disabled": True,
            "typed_config": _picker(_ONLY_PICK_TIMEOUT if fallback is None else _PICK_TIMEOUT),
        },
        {"name": _BUFFER, "disabled": True, "typed_config": _buffer()},
        {"name": "envoy.filters.http.router", "typed_config": _router(gateways)},
    ]


def for_grpc(*, picked: bool) -> dict[str, Any]:
    """The filters of a gRPC route."""
    return {
        _AUTHORIZATION: _ENABLED,
        **({KEY_MEMORY: _ENABLED, MESSAGE_COUNTER: _ENABLED, _PICKER: _ENABLED, _BUFFER: _ENABLED} if picked else {}),
    }


def for_rest(*, picked: bool) -> dict[str, Any]:
    """The filters of a REST route of a gRPC service."""
    return {**for_grpc(picked=picked), _TRANSCODER: _ENABLED, _ERROR_BODY: _ENABLED}


_ENABLED: Final = any_of("envoy.config.route.v3.FilterConfig", config={})


def _error_body() -> dict[str, Any]:
    return any_of(
        "envoy.extensions.filters.http.lua.v3.Lua", default_source_code={"inline_string": error_body_script()}
    )


def _authorization() -> dict[str, Any]:
    return any_of(
        "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
        transport_api_version="V3",
        http_service={
            "server_uri": {"uri": "http://gateway", "cluster": "gateway", "timeout": _AUTHORIZATION_TIMEOUT},
            "path_prefix": "/authz",
            "authorization_request": {"headers_to_add": _CHECK_HEADERS},
            "authorization_response": {
                "allowed_upstream_headers": {"patterns": [{"prefix": "x-tokenloom-"}]},
                "allowed_client_headers": {"patterns": [{"exact": name} for name in _REFUSAL_HEADERS] + _ABOUT_LIMITS},
                "allowed_client_headers_on_success": {"patterns": _ABOUT_LIMITS},
                # What the memory before this filter learns from.
                "dynamic_metadata_from_headers": {"patterns": [{"prefix": "x-tokenloom-"}, {"exact": REMEMBER_HEADER}]},
            },
        },
        filter_enabled_metadata=IS_UNKNOWN,
        # Never the content type: to a check of type application/grpc Envoy itself would answer that the gateway is away
        # with HTTP 200 and a gRPC status, and take that for a yes.
        allowed_headers={"patterns": [{"exact": "authorization"}, {"exact": "x-request-id"}]},
        # The gateway being away is no verdict on the key.
        status_on_error={"code": "ServiceUnavailable"},
        failure_mode_allow=False,
    )


def _transcoder() -> dict[str, Any]:
    return any_of(
        "envoy.extensions.filters.http.grpc_json_transcoder.v3.GrpcJsonTranscoder",
        proto_descriptor_bin=b64encode(descriptor_set()).decode(),
        services=[service.full_name for service in PUBLIC_SERVICES],
        print_options={
            "preserve_proto_field_names": True,
            "stream_newline_delimited": True,
            "stream_sse_style_delimited": True,
        },
        match_incoming_request_route=True,
        convert_grpc_status=True,
        request_validation_options={"reject_unknown_method": True, "reject_unknown_query_parameters": True},
    )


def _picker(timeout: str) -> dict[str, Any]:
    return any_of(
        "envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
        grpc_service={"envoy_grpc": {"cluster_name": "picker"}},
        processing_mode={
            "request_header_mode": "SKIP",
            "request_body_mode": "BUFFERED",
            "request_trailer_mode": "SKIP",
            "response_header_mode": "SKIP",
            "response_body_mode": "NONE",
            # The router hears of the end, and of the usage that the trailers carry.
            "response_trailer_mode": "SEND",
        },
        message_timeout=timeout,
        max_message_timeout=_LONGEST_PICK_TIMEOUT,
        request_attributes=[f"request.headers['{name}']" for name in _PICKER_READS],
        metadata_options={"receiving_namespaces": {"untyped": ["envoy.lb", TOLD_NAMESPACE]}},
        failure_mode_allow=True,
    )


def _router(gateways: Sequence[str]) -> dict[str, Any]:
    return any_of(
        "envoy.extensions.filters.http.router.v3.Router",
        suppress_envoy_headers=True,
        upstream_log=[start_log(name) for name in gateways],
        upstream_log_options={"flush_upstream_log_on_upstream_stream": True},
    )


def _buffer() -> dict[str, Any]:
    # The headers stay here until the body is picked for; with them alone the host would be chosen too early.
    return any_of("envoy.extensions.filters.http.buffer.v3.Buffer", max_request_bytes=MAX_BODY_BYTES)
