"""Whom the edge talks to."""

from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any, Final

from services.mesh.envoy_accounting import accounting_cluster_name, gateway_cluster_name
from services.mesh.envoy_types import any_of, socket_address

__all__ = [
    "DESTINATION_KEY",
    "DESTINATION_NAMESPACE",
    "GATEWAY_GRPC",
    "accounting_clusters",
    "balanced",
    "clusters",
    "otlp_cluster",
]

GATEWAY_GRPC: Final = "gateway-grpc"
"""The cluster of the gateways' gRPC sides."""
# Where the router says which worker gets a request: dynamic metadata, which no client can set.
DESTINATION_NAMESPACE: Final = "envoy.lb"
DESTINATION_KEY: Final = "x-gateway-destination-endpoint"

# A router is asked all the time whether it is there, so that nobody has to wait to find out that it hangs: it answers
# that between other messages, however many there are. Twice is no accident of a busy machine.
_IS_THERE: Final = {
    "timeout": "0.2s",
    "interval": "0.1s",
    "no_traffic_interval": "0.1s",
    "unhealthy_interval": "0.1s",
    "unhealthy_threshold": 2,
    "healthy_threshold": 2,
    "grpc_health_check": {},
}
_BUFFER_BYTES: Final = 32 << 10
_MANY: Final = 100_000


def clusters(
    *,
    gateways: Sequence[str],
    grpc_gateways: Sequence[str],
    routers: Sequence[str],
    pickers: Sequence[str],
    telemetry: str,
    has_fallback: bool,
) -> list[dict[str, Any]]:
    """Every cluster but the tracing collector; addresses are `host:port`.

    Requests are shared among gateways; of several routers the first one that is there is used. With a fallback a picker
    that is away is not even asked; without one, asking the only one there is remains the best that can be done.
    """
    return [
        _gateways(gateways),
        _alike(GATEWAY_GRPC, grpc_gateways, _HTTP2),
        _first_of("router", routers),
        _first_of("picker", pickers, is_checked=has_fallback),
        _fixed("telemetry", telemetry, _HTTP2),
        _workers(),
    ]


def otlp_cluster(address: str) -> dict[str, Any]:
    """The tracing collector."""
    return _fixed("otlp", address, _HTTP2)


def accounting_clusters(gateway: str, address: str) -> list[dict[str, Any]]:
    """A gateway's gRPC side, by the gateway's name: past a listener inside the edge, which waits for it."""
    name = accounting_cluster_name(gateway)
    itself = _fixed(gateway_cluster_name(gateway), address, _HTTP2)
    del itself["typed_extension_protocol_options"]
    inside = {"address": {"envoy_internal_address": {"server_listener_name": name, "endpoint_id": name}}}
    waiting = {
        **_cluster(name, _HTTP2),
        "type": "STATIC",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": inside}]}]},
    }
    return [waiting, itself]


def balanced(name: str, addresses: Sequence[str]) -> dict[str, Any]:
    """A cluster of gRPC servers of which each is as good as the others; addresses are `ip:port`."""
    endpoints = [{"endpoint": {"address": socket_address(address)}} for address in addresses]
    return {
        **_cluster(name, _HTTP2),
        "connect_timeout": "0.25s",
        "type": "STATIC",
        "lb_policy": "LEAST_REQUEST",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
    }


def _cluster(name: str, protocol: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "connect_timeout": "1s",
        "per_connection_buffer_limit_bytes": _BUFFER_BYTES,
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protocol},
        # The mesh bounds its work in the router and in the gateway, which can say why and for how long.
        "circuit_breakers": {
            "thresholds": [
                {"max_connections": _MANY, "max_pending_requests": _MANY, "max_requests": _MANY, "max_retries": 100}
            ]
        },
    }


def _fixed(name: str, address: str, protocol: dict[str, Any]) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": socket_address(address)}}
    return {
        **_cluster(name, protocol),
        "type": "STATIC" if _is_ip(address) else "STRICT_DNS",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def _gateways(addresses: Sequence[str]) -> dict[str, Any]:
    if len(addresses) == 1:
        return _fixed("gateway", addresses[0], _HTTP1)
    return {
        **_alike("gateway", addresses, _HTTP1),
        # One that is gone is left out within a second or so, one that is only busy stays; checks of keys, too, go
        # to one that is there.
        "health_checks": [
            {
                "timeout": "3s",
                "interval": "0.5s",
                "no_traffic_interval": "0.5s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                "http_health_check": {"path": "/readyz"},
            }
        ],
    }


def _alike(name: str, addresses: Sequence[str], protocol: dict[str, Any]) -> dict[str, Any]:
    endpoints = [{"endpoint": {"address": socket_address(address)}} for address in addresses]
    return {
        **_cluster(name, protocol),
        "type": "STATIC" if all(map(_is_ip, addresses)) else "STRICT_DNS",
        "lb_policy": "LEAST_REQUEST",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
    }


def _first_of(name: str, addresses: Sequence[str], *, is_checked: bool = False) -> dict[str, Any]:
    """Replicas of which the first that is there gets everything: one that sees every request decides best."""
    cluster = _fixed(name, addresses[0], _HTTP2)
    if len(addresses) == 1 and not is_checked:
        return cluster
    levels = [
        {"priority": level, "lb_endpoints": [{"endpoint": {"address": socket_address(address)}}]}
        for level, address in enumerate(addresses)
    ]
    return {
        **cluster,
        "connect_timeout": "0.25s",
        "load_assignment": {"cluster_name": name, "endpoints": levels},
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "health_checks": [_IS_THERE],
    }


def _workers() -> dict[str, Any]:
    return {
        **_cluster("workers", _HTTP2),
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": {"metadata_key": {"key": DESTINATION_NAMESPACE, "path": [{"key": DESTINATION_KEY}]}},
        "cleanup_interval": "60s",
    }


def _is_ip(address: str) -> bool:
    try:
        ip_address(address.rpartition(":")[0])
    except ValueError:
        return False
    return True


_HTTP1: Final = any_of(
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
    explicit_http_config={"http_protocol_options": {}},
    # Shorter than the gateway's own keep-alive: a request never meets a connection that the other side is closing.
    common_http_protocol_options={"idle_timeout": "4s"},
)
_HTTP2: Final = any_of(
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
    explicit_http_config={
        "http2_protocol_options": {
            "initial_stream_window_size": 64 << 10,
            "initial_connection_window_size": 1 << 20,
            # A peer that vanished without a FIN is noticed within 20 s.
            "connection_keepalive": {"interval": "15s", "timeout": "5s"},
        }
    },
)
