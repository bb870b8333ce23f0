"""The configuration of the edge: one Envoy bootstrap, for the launcher and for containers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from services.mesh.envoy_accounting import accounting_listener, usage_log
from services.mesh.envoy_clusters import accounting_clusters, clusters, otlp_cluster
from services.mesh.envoy_fallback import fallback_cluster, fallback_listener
from services.mesh.envoy_filters import http_filters
from services.mesh.envoy_replies import local_replies
from services.mesh.envoy_routes import route_config
from services.mesh.envoy_tls import EdgeTls, transport
from services.mesh.envoy_types import any_of, socket_address

__all__ = ["Edge", "bootstrap"]

_MAX_CONNECTIONS: Final = 10_000
_MAX_HEAP_BYTES: Final = 2 << 30
_BUFFER_BYTES: Final = 32 << 10
# Longest until a connection's first byte, and from the first byte of a request until its headers are complete.
_FIRST_SECONDS: Final = 10.0
# Dropped before anything reads them: who a client is, and where its request goes, is ours to say.
_FORGEABLE_PREFIXES: Final = ("x-tokenloom-", "x-gateway-destination-endpoint", "x-envoy-")
_FORGEABLE: Final = ("x-request-id",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """Where the edge listens, and where it finds the others; every address is `host:port`."""

    listen: str
    admin: str
    gateways: tuple[str, ...]
    """The gateways' HTTP sides."""
    accounting: tuple[tuple[str, str], ...] = ()
    """The gateways by name, and their gRPC sides: each hears how the calls went that it has let in."""
    router: str
    picker: str
    """The router's endpoint picker for the edge."""
    telemetry: str
    standby_routers: tuple[str, ...] = ()
    """Replicas of the router, which are used while those before them are away."""
    standby_pickers: tuple[str, ...] = ()
    """Their endpoint pickers."""
    workers: tuple[str, ...] = ()
    """Workers that are known before any has registered; they are used while the router is away. Each is `ip:port`."""
    fallback: str | None = None
    """Where the edge listens for itself, to send what the router could not be asked about to any worker; None: such
    requests are refused."""
    otlp: str | None = None
    """Where spans go, over OTLP gRPC; None: no tracing."""
    sample_ratio: float = 1.0
    """Share of the requests that are traced, of those whose client hasn't decided that already."""
    access_log: str = "/dev/stdout"
    client_timeout: float = 30.0
    """How many seconds a client may stand still."""
    tls: EdgeTls | None = None
    """How clients are spoken to over TLS; None: in plain text."""
    operators: str | None = None
    """Where the edge also listens in plain text, for operators on this machine; None: nowhere."""


def bootstrap(edge: Edge) -> dict[str, Any]:
    """The Envoy bootstrap, as plain data for JSON or YAML."""
    collector = [] if edge.otlp is None else [otlp_cluster(edge.otlp)]
    return {
        "node": {"id": "edge", "cluster": "tokenloom-edge"},
        "admin": {"address": socket_address(edge.admin), "ignore_global_conn_limit": True},
        "application_log_config": {"log_format": {"json_format": _LOG_LINE}},
        "bootstrap_extensions": [
            {
                "name": "envoy.bootstrap.internal_listener",
                "typed_config": any_of("envoy.extensions.bootstrap.internal_listener.v3.InternalListener"),
            }
        ],
        "overload_manager": _overload_manager(),
        "layered_runtime": {
            "layers": [{"name": "ours", "static_layer": _RUNTIME}, {"name": "admin", "admin_layer": {}}]
        },
        "static_resources": {
            "listeners": [
                _listener("edge", edge.listen, edge, edge.tls),
                *([] if edge.operators is None else [_listener("operators", edge.operators, edge)]),
                *([] if edge.fallback is None else [fallback_listener(edge.fallback)]),
                *(accounting_listener(name) for name, _ in edge.accounting),
            ],
            "clusters": [
                *clusters(
                    gateways=edge.gateways,
                    grpc_gateways=[address for _, address in edge.accounting],
                    routers=(edge.router, *edge.standby_routers),
                    pickers=(edge.picker, *edge.standby_pickers),
                    telemetry=edge.telemetry,
                    has_fallback=edge.fallback is not None,
                ),
                *(each for name, address in edge.accounting for each in accounting_clusters(name, address)),
                *([] if edge.fallback is None else [fallback_cluster(edge.workers)]),
                *collector,
            ],
        },
    }


_RUNTIME: Final = {
    # Envoy would keep a span for 5 s: whoever looks into a slow request should not have to wait for its edge.
    "tracing.opentelemetry.flush_interval_ms": 1000,
    # One connection's requests take turns with those of the others.
    "http.max_requests_per_io_cycle": 8,
}
_LOG_LINE: Final = {
    "time": "%Y-%m-%dT%H:%M:%S.%eZ",
    "level": "%l",
    "service": "envoy",
    "logger": "%n",
    "message": "%j",
}
_ACCESS_LINE: Final = {
    "time": "%START_TIME(%Y-%m-%dT%H:%M:%S.%3fZ)%",
    "level": "info",
    "service": "envoy",
    "message": "request",
    "request": "%REQ(X-REQUEST-ID)%",
    "trace_id": "%TRACE_ID%",
    "method": "%REQ(X-ENVOY-ORIGINAL-METHOD?:METHOD)%",
    "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH):256%",
    "protocol": "%PROTOCOL%",
    "status": "%RESPONSE_CODE%",
    "grpc_status": "%GRPC_STATUS(SNAKE_STRING)%",
    "flags": "%RESPONSE_FLAGS%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "key": "%REQ(X-TOKENLOOM-KEY)%",
    "cluster": "%UPSTREAM_CLUSTER%",
    "upstream": "%UPSTREAM_HOST%",
    "client": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
    "bytes_in": "%BYTES_RECEIVED%",
    "bytes_out": "%BYTES_SENT%",
    "duration_ms": "%DURATION%",
    "first_byte_ms": "%RESPONSE_DURATION%",
}


def _overload_manager() -> dict[str, Any]:
    heap = "envoy.resource_monitors.fixed_heap"
    return {
        "refresh_interval": "0.25s",
        "resource_monitors": [
            {
                "name": heap,
                "typed_config": any_of(
                    "envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig",
                    max_heap_size_bytes=_MAX_HEAP_BYTES,
                ),
            },
            {
                "name": "envoy.resource_monitors.global_downstream_max_connections",
                "typed_config": any_of(
                    "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                    max_active_downstream_connections=_MAX_CONNECTIONS,
                ),
            },
        ],
        "actions": [
            {
                "name": "envoy.overload_actions.reset_high_memory_stream",
                "triggers": [{"name": heap, "scaled": {"scaling_threshold": 0.85, "saturation_threshold": 0.95}}],
            },
            *(
                {"name": f"envoy.overload_actions.{name}", "triggers": [{"name": heap, "threshold": {"value": value}}]}
                for name, value in (("shrink_heap", 0.95), ("stop_accepting_requests", 0.98))
            ),
        ],
        # Streams that hold less than 2**15 bytes are never among those that are reset.
        "buffer_factory_config": {"minimum_account_to_track_power_of_two": 15},
    }


def _listener(name: str, address: str, edge: Edge, tls: EdgeTls | None = None) -> dict[str, Any]:
    first = f"{min(_FIRST_SECONDS, edge.client_timeout):g}s"
    manager = {"name": "envoy.filters.network.http_connection_manager", "typed_config": _connection_manager(edge)}
    handshake = {} if tls is None else {"transport_socket": transport(tls), "transport_socket_connect_timeout": first}
    return {
        "name": name,
        "address": socket_address(address),
        "per_connection_buffer_limit_bytes": _BUFFER_BYTES,
        "socket_options": list(_socket_options(edge.client_timeout)),
        # It waits for a first byte: who connects and says nothing is not kept.
        "listener_filters": [
            {
                "name": "envoy.filters.listener.tls_inspector",
                "typed_config": any_of("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"),
            }
        ],
        "listener_filters_timeout": first,
        "filter_chains": [{"filters": [manager], **handshake}],
    }


def _connection_manager(edge: Edge) -> dict[str, Any]:
    return any_of(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="edge",
        codec_type="AUTO",
        server_name="tokenloom",
        **_identity_of_clients(),
        **_hygiene(),
        **_limits(edge.client_timeout),
        **({} if edge.otlp is None else {"tracing": _tracing(edge.sample_ratio)}),
        access_log=[_access_log(edge.access_log), *(usage_log(name) for name, _ in edge.accounting)],
        local_reply_config=local_replies(),
        route_config=route_config(),
        http_filters=http_filters(edge.fallback, [name for name, _ in edge.accounting]),
    )


def _identity_of_clients() -> dict[str, Any]:
    return {
        "use_remote_address": True,
        # No address is trusted more than another one: an internal client's x-envoy-* would be obeyed.
        "internal_address_config": {"cidr_ranges": [{"address_prefix": "255.255.255.255", "prefix_len": 32}]},
        "generate_request_id": True,
        "always_set_request_id_in_response": True,
        "early_header_mutation_extensions": [
            {
                "name": "envoy.http.early_header_mutation.header_mutation",
                "typed_config": any_of(
                    "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
                    mutations=[
                        *({"remove_on_match": {"key_matcher": {"prefix": prefix}}} for prefix in _FORGEABLE_PREFIXES),
                        *({"remove": name} for name in _FORGEABLE),
                    ],
                ),
            }
        ],
    }


def _hygiene() -> dict[str, Any]:
    return {
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "common_http_protocol_options": {
            "headers_with_underscores_action": "REJECT_REQUEST",
            "max_headers_count": 100,
            # Of a connection without a request: the edge has places for so many of them only.
            "idle_timeout": "120s",
        },
        "max_request_headers_kb": 60,
        "strip_any_host_port": False,
    }


def _limits(client_timeout: float) -> dict[str, Any]:
    return {
        "request_headers_timeout": f"{min(_FIRST_SECONDS, client_timeout):g}s",
        # A body may be a large file, and only the gateway knows of which size: it is stricter where it can be.
        "request_timeout": "900s",
        # A stream on which nothing at all moves; routes to engines have a longer one of their own.
        "stream_idle_timeout": "300s",
        # What is left of an answer that is complete.
        "stream_flush_timeout": f"{client_timeout:g}s",
        "delayed_close_timeout": "1s",
        "drain_timeout": "5s",
        "http2_protocol_options": {
            "max_concurrent_streams": 100,
            "initial_stream_window_size": 64 << 10,
            "initial_connection_window_size": 1 << 20,
            # Together less than the client's time, with 15% more that Envoy adds to the interval now and then.
            "connection_keepalive": {"interval": f"{client_timeout / 2:g}s", "timeout": f"{client_timeout / 3:g}s"},
        },
    }


def _socket_options(client_timeout: float) -> Iterator[dict[str, Any]]:
    """Has the kernel find out about clients that are gone without a word, by the numbers that Linux has for that."""
    solsocket, tcp = 1, 6
    idle = max(1, round(client_timeout / 2))
    options = (
        ("SO_KEEPALIVE", solsocket, 9, 1),
        ("TCP_KEEPIDLE", tcp, 4, idle),
        ("TCP_KEEPINTVL", tcp, 5, max(1, idle // 3)),
        ("TCP_KEEPCNT", tcp, 6, 3),
        # Also for one that is there and takes nothing of what was sent.
        ("TCP_USER_TIMEOUT", tcp, 18, round(client_timeout * 1000)),
    )
    for description, level, name, value in options:
        yield {"description": description, "level": level, "name": name, "int_value": value, "state": "STATE_LISTENING"}


def _tracing(sample_ratio: float) -> dict[str, Any]:
    return {
        "random_sampling": {"value": 100 * sample_ratio},
        "provider": {
            "name": "envoy.tracers.opentelemetry",
            "typed_config": any_of(
                "envoy.config.trace.v3.OpenTelemetryConfig",
                grpc_service={"envoy_grpc": {"cluster_name": "otlp"}, "timeout": "2s"},
                service_name="tokenloom-edge",
            ),
        },
    }


def _access_log(path: str) -> dict[str, Any]:
    return {
        "name": "envoy.access_loggers.file",
        "typed_config": any_of(
            "envoy.extensions.access_loggers.file.v3.FileAccessLog", path=path, log_format={"json_format": _ACCESS_LINE}
        ),
    }
