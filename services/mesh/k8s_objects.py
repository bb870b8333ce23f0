"""Objects of Kubernetes that most processes of the mesh have."""

import hashlib
from pathlib import Path
from typing import Any, Final

from services.mesh.containers import METRICS_PORT
from services.mesh.k8s_pods import GRPC_PORT

__all__ = ["WORKERS", "config_map", "digest", "headless", "service", "workload"]

WORKERS: Final = "workers"
"""The service that all workers are behind."""


def service(name: str, selector: dict[str, str], **ports: int) -> dict[str, Any]:
    """One address before pods; `ports` by their names."""
    listed = [{"name": port_name, "port": port, "targetPort": port} for port_name, port in ports.items()]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": selector},
        "spec": {"selector": selector, "ports": listed},
    }


def config_map(name: str, path: str, text: str) -> dict[str, Any]:
    """What pods have as the file `path`, where its folder is mounted."""
    data = {Path(path).name: text}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def digest(text: str) -> str:
    """A few characters that are other ones when the text is another one."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def headless(name: str, selector: dict[str, str]) -> dict[str, Any]:
    """A name that every one of the pods is found by."""
    made = service(name, selector, grpc=GRPC_PORT, metrics=METRICS_PORT)
    made["spec"]["clusterIP"] = "None"
    return made


def workload(kind: str, name: str, mine: dict[str, str], spec: dict[str, Any]) -> dict[str, Any]:
    """What makes one pod, which has the labels `mine`."""
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name, "labels": mine},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": mine},
            "template": {"metadata": {"labels": mine}, "spec": spec},
        },
    }
