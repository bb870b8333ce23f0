"""What a gateway of the Gateway API has to know to send calls of the typed API to the workers that the router picks."""

from typing import Any, Final

from services.mesh.config import InferenceGatewayConfig
from services.mesh.k8s_objects import WORKERS
from services.mesh.k8s_pods import GRPC_PORT, labels_of
from services.mesh.rest import INFERENCE

__all__ = ["inference_gateway"]

_GROUP: Final = "inference.networking.k8s.io"


def inference_gateway(gateway: InferenceGatewayConfig) -> list[dict[str, Any]]:
    """The pool of all workers, the route to it, and the way in for a gateway in another namespace."""
    return [_pool(), _route(gateway), *([] if gateway.namespace is None else [_way_in(gateway.namespace)])]


def _pool() -> dict[str, Any]:
    picker = {
        "group": "",
        "kind": "Service",
        "name": "router",
        "port": {"number": GRPC_PORT},
        # A worker that nobody has picked might not have the model.
        "failureMode": "FailClose",
    }
    return {
        "apiVersion": f"{_GROUP}/v1",
        "kind": "InferencePool",
        "metadata": {"name": WORKERS},
        "spec": {
            "selector": {"matchLabels": labels_of("worker")},
            "targetPorts": [{"number": GRPC_PORT}],
            "appProtocol": "kubernetes.io/h2c",
            "endpointPickerRef": picker,
        },
    }


def _route(gateway: InferenceGatewayConfig) -> dict[str, Any]:
    elsewhere = {} if gateway.namespace is None else {"namespace": gateway.namespace}
    match = {"path": {"type": "PathPrefix", "value": f"/{INFERENCE.full_name}"}}
    backend = {"group": _GROUP, "kind": "InferencePool", "name": WORKERS}
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": WORKERS},
        "spec": {
            "parentRefs": [{"name": gateway.name, **elsewhere}],
            # Streams last as long as they last.
            "rules": [{"matches": [match], "backendRefs": [backend], "timeouts": {"request": "0s"}}],
        },
    }


def _way_in(namespace: str) -> dict[str, Any]:
    theirs = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
    components = {"key": "app.kubernetes.io/component", "operator": "In", "values": ["router", "worker"]}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "inference-gateway"},
        "spec": {
            "podSelector": {"matchExpressions": [components]},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [theirs], "ports": [{"protocol": "TCP", "port": GRPC_PORT}]}],
        },
    }
