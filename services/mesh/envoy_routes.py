"""Which path goes where. Anything that isn't here is 404."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from google.protobuf.descriptor import ServiceDescriptor

from services.common.typed_calls import TOLD, TOLD_NAMESPACE
from services.mesh.envoy_clusters import GATEWAY_GRPC
from services.mesh.envoy_filters import MAX_BODY_BYTES, SHOWN_TO_PICKER, Right, for_grpc, for_rest
from services.mesh.rest import INFERENCE, ROUTER_ADMIN, TELEMETRY, RestMethod, rest_methods

__all__ = ["MAX_BODY_BYTES", "OPENAI_PATHS", "route_config"]

OPENAI_PATHS: Final = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/models",
    "/v1/responses",
    "/v1/files",
    "/v1/batches",
    "/v1/tokenize",
    "/v1/detokenize",
    "/v1/rerank",
    "/v1/score",
    "/v1/admin",
    "/openapi.json",
)
# Longer than a request may wait for a worker and for its first token.
_IDLE: Final = "900s"
_LIST_MODELS: Final = "ListModels"
# The router says these where the client may know them; what it doesn't say is not added.
_TOLD_HEADERS: Final = [
    {
        "header": {"key": f"x-tokenloom-{name}", "value": f"%DYNAMIC_METADATA({TOLD_NAMESPACE}:{name})%"},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
    }
    for name in TOLD
]


def route_config() -> dict[str, Any]:
    """The route table."""
    return {
        "name": "edge",
        "virtual_hosts": [{"name": "edge", "domains": ["*"], "routes": list(_routes())}],
    }


def _routes() -> Iterator[dict[str, Any]]:
    yield {
        "name": "malformed",
        # Envoy makes one of several Host headers.
        "match": {"prefix": "/", "headers": [{"name": ":authority", "string_match": {"contains": ","}}]},
        "direct_response": {"status": 400, "body": {"inline_string": "more than one host"}},
    }
    yield {"name": "healthz", "match": {"path": "/healthz"}, "direct_response": _json(200, '{"status": "ok"}')}
    yield {"name": "readyz", "match": {"path": "/readyz"}, "route": _to("gateway", timeout="5s")}
    for match in ({"path": "/"}, {"prefix": "/console/"}):
        yield {"name": "console", "match": match, "route": _to("gateway", timeout="10s")}
    for path in OPENAI_PATHS:
        yield {
            "name": "openai",
            "match": {"path_separated_prefix": path},
            "route": _to("gateway"),
        }
    for header in SHOWN_TO_PICKER:
        yield {
            "name": "malformed",
            "match": {"prefix": "/", "headers": [_no_text(header)]},
            "direct_response": _BAD_HEADER,
        }
    yield from _models()
    yield from _service(INFERENCE, "workers", Right.INFERENCE, picked=True)
    yield from _service(TELEMETRY, "telemetry", Right.TELEMETRY)
    yield from _service(ROUTER_ADMIN, "router", Right.ADMIN)


def _models() -> Iterator[dict[str, Any]]:
    """What there is to ask for: a gateway knows that of the whole fleet, a worker of itself."""
    path = {"path": f"/{INFERENCE.full_name}/{_LIST_MODELS}"}
    yield _grpc_route("models", path, GATEWAY_GRPC, Right.MODELS)
    listing = [method for method in rest_methods(INFERENCE) if method.name == _LIST_MODELS]
    yield from _rest_routes("models", listing, GATEWAY_GRPC, Right.MODELS)


def _service(
    service: ServiceDescriptor, cluster: str, right: Right, *, picked: bool = False
) -> Iterator[dict[str, Any]]:
    """A service in its two forms; `picked`: the router says which of the cluster's hosts."""
    prefix = f"/{service.full_name}/"
    yield _grpc_route(service.name, {"prefix": prefix}, cluster, right, picked=picked)
    yield {"name": "not-grpc", "match": {"prefix": prefix}, "direct_response": {"status": 415}}
    methods = [method for method in rest_methods(service) if method.name != _LIST_MODELS]
    yield from _rest_routes(service.name, methods, cluster, right, picked=picked)


def _grpc_route(
    name: str, match: dict[str, Any], cluster: str, right: Right, *, picked: bool = False
) -> dict[str, Any]:
    return {
        "name": name,
        "match": {**match, "headers": [_IS_GRPC]},
        "metadata": right.metadata("grpc"),
        "typed_per_filter_config": for_grpc(picked=picked),
        **_call(cluster, picked=picked),
    }


def _rest_routes(
    name: str, methods: Sequence[RestMethod], cluster: str, right: Right, *, picked: bool = False
) -> Iterator[dict[str, Any]]:
    for method in methods:
        yield {
            "name": name,
            "match": {**_path(method), "headers": [{"name": ":method", "string_match": {"exact": method.verb}}]},
            "metadata": right.metadata("rest"),
            "typed_per_filter_config": for_rest(picked=picked),
            **_call(cluster, picked=picked),
        }
    for method in methods:
        yield {
            "name": "wrong-method",
            "match": _path(method),
            "direct_response": {"status": 405},
            "response_headers_to_add": [{"header": {"key": "allow", "value": method.verb}}],
        }


def _call(cluster: str, *, picked: bool) -> dict[str, Any]:
    return {
        "route": _to(cluster),
        "request_body_buffer_limit": MAX_BODY_BYTES,
        **({"response_headers_to_add": _TOLD_HEADERS} if picked else {}),
    }


def _path(method: RestMethod) -> dict[str, Any]:
    return {"safe_regex": {"regex": method.pattern}} if method.has_variables else {"path": method.template}


def _to(cluster: str, *, timeout: str = "0s") -> dict[str, Any]:
    return {
        "cluster": cluster,
        # A stream lasts as long as it lasts. A client's grpc-timeout is kept by the router and by the worker, which can
        # say DEADLINE_EXCEEDED; Envoy could only reset a stream that has begun, and would race the client's own timer.
        "timeout": timeout,
        "idle_timeout": _IDLE,
        "retry_policy": _RETRY_UNSENT,
    }


def _json(status: int, body: str) -> dict[str, Any]:
    return {"status": status, "body": {"inline_string": body}}


def _no_text(header: str) -> dict[str, Any]:
    return {"name": header, "string_match": {"safe_regex": {"regex": _UTF8}}, "invert_match": True}


# Envoy's regular expressions see bytes.
_UTF8: Final = (
    r"([\x00-\x7f]|[\xc2-\xdf][\x80-\xbf]"
    r"|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}|\xed[\x80-\x9f][\x80-\xbf]"
    r"|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2})*"
)
# Attributes are protobuf strings: with a value that is not UTF-8 the router could not read a request at all.
_BAD_HEADER: Final = {"status": 400, "body": {"inline_string": "a header is not UTF-8"}}
_IS_GRPC: Final = {"name": "content-type", "string_match": {"prefix": "application/grpc"}}
# Only what never left the edge is tried again: a process that starts again is back within a second.
_RETRY_UNSENT: Final = {
    "retry_on": "connect-failure",
    "num_retries": 3,
    "retry_back_off": {"base_interval": "0.1s", "max_interval": "0.5s"},
    # Another of several, where there are several; the same one again where there is one.
    "retry_host_predicate": [
        {
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
            },
        }
    ],
    "host_selection_retry_max_attempts": 3,
}
