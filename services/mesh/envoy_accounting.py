"""What the edge tells the gateway of each call of the typed lane once it is over, for limits and the usage ledger."""

from typing import Any, Final

from services.mesh.envoy_types import any_of

__all__ = ["MESSAGE_COUNTER", "accounting_cluster_name", "message_counter", "usage_log"]

MESSAGE_COUNTER: Final = "envoy.filters.http.grpc_stats"
# The gateway puts it on every call that it lets in; it begins with the gateway's name and a dot.
_ACCOUNT: Final = "x-tokenloom-account"
_USAGE: Final = (
    "prompt-tokens",
    "cached-tokens",
    "output-tokens",
    "model",
    "worker",
    "queue-us",
    "prefill-us",
    "gpu-us",
)
# Soon, so that what was reserved and not used is there for the next request.
_FLUSH: Final = "0.1s"
_BUFFER_BYTES: Final = 16 << 10
# A gateway that is started again is back before these are used up.
_RETRIES: Final = 100


def accounting_cluster_name(gateway: str) -> str:
    """The cluster that is a gateway's gRPC side."""
    return f"accounting-{gateway}"


def usage_log(gateway: str) -> dict[str, Any]:
    """The access log that goes to the gateway of this name: of the calls that it has let in."""
    is_its_own = {"name": _ACCOUNT, "string_match": {"prefix": f"{gateway}."}}
    return {
        "name": "envoy.access_loggers.http_grpc",
        "filter": {"header_filter": {"header": is_its_own}},
        "typed_config": any_of(
            "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
            common_config={
                "log_name": f"usage-{gateway}",
                "transport_api_version": "V3",
                "grpc_service": {"envoy_grpc": {"cluster_name": accounting_cluster_name(gateway)}},
                "buffer_flush_interval": _FLUSH,
                "buffer_size_bytes": _BUFFER_BYTES,
                "filter_state_objects_to_log": [MESSAGE_COUNTER],
                "grpc_stream_retry_policy": {"num_retries": _RETRIES},
            },
            additional_request_headers_to_log=[_ACCOUNT, "x-tokenloom-tenant", "x-tokenloom-key"],
            additional_response_headers_to_log=["grpc-status"],
            additional_response_trailers_to_log=["grpc-status", *(f"x-tokenloom-usage-{name}" for name in _USAGE)],
        ),
    }


def message_counter() -> dict[str, Any]:
    """Counts a call's messages: what is known of one that its client left before the worker could say what it took."""
    return any_of(
        "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig", emit_filter_state=True, stats_for_all_methods=False
    )
