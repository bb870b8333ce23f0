"""Where a request of the typed lane goes while the router can't be asked: to any worker that the configuration names.

The workers' cluster takes the address that the router put into the request's metadata. Before the router is asked, the
address of a listener of the edge's own is put there; it balances over the workers without knowing anything of them.
"""

from typing import Any, Final

from services.common.allowed_models import UNROUTED_HEADER
from services.mesh.envoy_clusters import DESTINATION_KEY, DESTINATION_NAMESPACE, balanced
from services.mesh.envoy_types import any_of, socket_address

__all__ = ["FALLBACK_CLUSTER", "destination_filter", "fallback_cluster", "fallback_listener"]

FALLBACK_CLUSTER: Final = "any_worker"
_IDLE: Final = "900s"
_BUFFER_BYTES: Final = 32 << 10
_MAX_BODY_BYTES: Final = 4 << 20
_NOT_FOUND: Final = "5"


def destination_filter(listen: str) -> dict[str, Any]:
    """The HTTP filter that sends a request to the fallback listener unless the router says otherwise after it."""
    return any_of(
        "envoy.extensions.filters.http.set_metadata.v3.Config",
        metadata=[{"metadata_namespace": DESTINATION_NAMESPACE, "value": {DESTINATION_KEY: listen}}],
    )


def fallback_cluster(workers: tuple[str, ...]) -> dict[str, Any]:
    """Every worker that the configuration names."""
    return balanced(FALLBACK_CLUSTER, workers)


def fallback_listener(listen: str) -> dict[str, Any]:
    """The listener that only the edge itself talks to."""
    manager = any_of(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="fallback",
        codec_type="HTTP2",
        # It is the edge that speaks: what it said of the request stays as it is.
        generate_request_id=False,
        preserve_external_request_id=True,
        stream_idle_timeout=_IDLE,
        http2_protocol_options={"max_concurrent_streams": 100_000},
        route_config={"name": "fallback", "virtual_hosts": [{"name": "fallback", "domains": ["*"], "routes": _ROUTES}]},
        http_filters=[
            {
                "name": "envoy.filters.http.router",
                "typed_config": any_of("envoy.extensions.filters.http.router.v3.Router", suppress_envoy_headers=True),
            }
        ],
    )
    return {
        "name": "fallback",
        "address": socket_address(listen),
        "per_connection_buffer_limit_bytes": _BUFFER_BYTES,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


_ROUTES: Final[list[dict[str, Any]]] = [
    {
        "match": {"prefix": "/"},
        # Which models a key may use nobody has compared with the body yet: the worker does.
        "request_headers_to_add": [{"header": {"key": UNROUTED_HEADER, "value": "1"}}],
        "request_body_buffer_limit": _MAX_BODY_BYTES,
        "route": {
            "cluster": FALLBACK_CLUSTER,
            "timeout": "0s",
            "idle_timeout": _IDLE,
            "retry_policy": {
                # One that is gone or full, and one that has another model.
                "retry_on": "connect-failure,refused-stream,unavailable,resource-exhausted,retriable-headers",
                "retriable_headers": [{"name": "grpc-status", "string_match": {"exact": _NOT_FOUND}}],
                "num_retries": 4,
                "retry_back_off": {"base_interval": "0.01s", "max_interval": "0.1s"},
                "retry_host_predicate": [
                    {
                        "name": "envoy.retry_host_predicates.previous_hosts",
                        "typed_config": any_of("envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"),
                    }
                ],
                "host_selection_retry_max_attempts": 5,
            },
        },
    },
]
