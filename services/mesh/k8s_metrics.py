"""How Prometheus finds the processes of a mesh in Kubernetes, with the labels that rules and dashboards go by."""

from typing import Any, Final

from services.mesh.containers import METRICS_PORT

__all__ = ["SCRAPED", "pod_monitor"]

SCRAPED: Final = {"prometheus.io/scrape": "true", "prometheus.io/port": str(METRICS_PORT)}
"""Annotations of a pod that has metrics, for a Prometheus that goes by them."""
_META: Final = "__meta_kubernetes_pod"
_COMPONENT: Final = f"{_META}_label_app_kubernetes_io_component"
_RELABELINGS: Final[list[dict[str, Any]]] = [
    {"targetLabel": "job", "replacement": "tokenloom"},
    {"sourceLabels": [f"{_META}_label_app_kubernetes_io_instance"], "targetLabel": "process"},
    # Of these there are several of one kind; a worker is known by its pod's name anyway.
    {
        "sourceLabels": [_COMPONENT, f"{_META}_name"],
        "regex": "(?:worker|telemetry-agent);(.+)",
        "targetLabel": "process",
        "replacement": "$1",
    },
    {"sourceLabels": [_COMPONENT], "targetLabel": "service"},
    {"sourceLabels": [_COMPONENT], "regex": "worker", "targetLabel": "service", "replacement": "inference"},
    {"sourceLabels": [_COMPONENT], "regex": "telemetry-agent", "targetLabel": "service", "replacement": "telemetry"},
]


def pod_monitor() -> dict[str, Any]:
    """What has the Prometheus Operator scrape every process of the mesh."""
    endpoint = {
        "port": "metrics",
        "interval": "15s",
        # A metric's own label `endpoint` is a path of the API, not the port that it came from.
        "honorLabels": True,
        "relabelings": _RELABELINGS,
    }
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "tokenloom"},
        "spec": {
            "selector": {"matchLabels": {"app.kubernetes.io/name": "tokenloom"}},
            "podMetricsEndpoints": [endpoint],
        },
    }
