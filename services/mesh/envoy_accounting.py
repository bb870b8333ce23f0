"""What the edge tells the gateway of each call of the typed lane once it is over, for limits and the usage ledger.

And that it has begun, where the gateway was not asked."""

from typing import Any, Final

from services.common.typed_calls import ACCOUNT_HEADER, EDGE_ACCOUNT
from services.mesh.envoy_types import any_of

__all__ = [
    "MESSAGE_COUNTER",
    "accounting_cluster_name",
    "accounting_listener",
    "gateway_cluster_name",
    "message_counter",
    "start_log",
    "usage_log",
]

MESSAGE_COUNTER: Final = "envoy.filters.http.grpc_stats"
_SAID: Final = (ACCOUNT_HEADER, "x-tokenloom-tenant", "x-tokenloom-key", "x-session-id", "traceparent")
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
# So much is kept for a gateway that is away, of either log, besides what waits in the connection.
_BUFFER_BYTES: Final = 256 << 10
# Not at once: the gateway's reading it would want the processor while the worker makes the first token. A killed edge
# takes with it what it has not told of yet.
_START_FLUSH: Final = "0.025s"
# A gateway that is started again is back before these are used up.
_RETRIES: Final = 100
# What connects to a gateway tries for minutes, more and more seldom up to this.
_ATTEMPTS: Final = 1000
_BACK_OFF: Final = {"base_interval": "0.05s", "max_interval": "0.2s"}


def accounting_cluster_name(gateway: str) -> str:
    """The cluster that is a gateway's gRPC side, and the listener inside the edge that stands before it."""
    return f"accounting-{gateway}"


def gateway_cluster_name(gateway: str) -> str:
    """The cluster that a connection ends in which the listener inside the edge has taken."""
    return f"{accounting_cluster_name(gateway)}-itself"


def usage_log(gateway: str) -> dict[str, Any]:
    """The access log that goes to the gateway of this name: of the calls that it has let in, once they are over."""
    return {
        "name": "envoy.access_loggers.http_grpc",
        "filter": _with_account(f"{gateway}."),
        "typed_config": _to(gateway, _FLUSH),
    }


def start_log(gateway: str) -> dict[str, Any]:
    """The log of calls that the edge has let in itself for the gateway of this name, when their worker gets them."""
    has_begun = {"log_type_filter": {"types": ["UpstreamPoolReady"]}}
    return {
        "name": "envoy.access_loggers.http_grpc",
        "filter": {"and_filter": {"filters": [has_begun, _with_account(f"{gateway}.{EDGE_ACCOUNT}")]}},
        "typed_config": _to(gateway, _START_FLUSH),
    }


def _with_account(prefix: str) -> dict[str, Any]:
    return {"header_filter": {"header": {"name": ACCOUNT_HEADER, "string_match": {"prefix": prefix}}}}


def _to(gateway: str, flush: str) -> dict[str, Any]:
    return any_of(
        "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
        common_config={
            "log_name": f"usage-{gateway}",
            "transport_api_version": "V3",
            "grpc_service": {"envoy_grpc": {"cluster_name": accounting_cluster_name(gateway)}},
            "buffer_flush_interval": flush,
            "buffer_size_bytes": _BUFFER_BYTES,
            "filter_state_objects_to_log": [MESSAGE_COUNTER],
            "grpc_stream_retry_policy": {"num_retries": _RETRIES},
        },
        additional_request_headers_to_log=[*_SAID],
        additional_response_headers_to_log=["grpc-status"],
        additional_response_trailers_to_log=["grpc-status", *(f"x-tokenloom-usage-{name}" for name in _USAGE)],
    )


def accounting_listener(gateway: str) -> dict[str, Any]:
    """A listener inside the edge, which holds what is told to a gateway until that is there."""
    proxy = any_of(
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        stat_prefix=accounting_cluster_name(gateway),
        cluster=gateway_cluster_name(gateway),
        max_connect_attempts=_ATTEMPTS,
        backoff_options=_BACK_OFF,
        idle_timeout="0s",
    )
    return {
        "name": accounting_cluster_name(gateway),
        "internal_listener": {},
        "ignore_global_conn_limit": True,
        "filter_chains": [{"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}]}],
    }


def message_counter() -> dict[str, Any]:
    """Counts a call's messages: what is known of one that its client left before the worker could say what it took."""
    return any_of(
        "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig", emit_filter_state=True, stats_for_all_methods=False
    )
