"""The edge in Kubernetes: Envoy, and who reaches it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from services.mesh.config import MeshConfig
from services.mesh.containers import ENVOY_IMAGE, TLS_FILES, edge_of
from services.mesh.envoy import bootstrap
from services.mesh.k8s_objects import WORKERS, digest, service, workload
from services.mesh.k8s_pods import GRPC_PORT, labels

__all__ = ["edge"]

_TLS_FOLDER: Final = str(Path(TLS_FILES["certificate"]).parent)
_DRAIN_SECONDS: Final = 5


def edge(mesh: MeshConfig) -> list[dict[str, Any]]:
    """Its configuration, its deployment and its service."""
    mine, port = labels("edge", "edge"), mesh.edge.port
    # Workers are whoever is behind their service, not those of the file: there may be more.
    reached = replace(edge_of(mesh), workers=(f"{WORKERS}:{GRPC_PORT}",))
    container = {
        "name": "envoy",
        "image": ENVOY_IMAGE,
        "args": ["-c", "/etc/envoy/envoy.yaml"],
        "ports": [{"name": "http", "containerPort": port}],
        "readinessProbe": {**_edge_probe(mesh), "periodSeconds": 2, "failureThreshold": 2},
        "livenessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 10},
        # It is taken out of the service before it stops.
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_DRAIN_SECONDS)]}}},
        "volumeMounts": [
            {"name": "config", "mountPath": "/etc/envoy", "readOnly": True},
            *({"name": name, "mountPath": _TLS_FOLDER, "readOnly": True} for name in _tls_volumes(mesh)),
        ],
        "securityContext": {"allowPrivilegeEscalation": False},
    }
    spec = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": int(mesh.drain_seconds) + 2 * _DRAIN_SECONDS,
        "containers": [container],
        "volumes": [
            {"name": "config", "configMap": {"name": "edge"}},
            *({"name": name, "secret": {"secretName": name}} for name in _tls_volumes(mesh)),
        ],
    }
    config = {"envoy.yaml": json.dumps(bootstrap(reached), indent=1)}
    edges = workload("Deployment", "edge", mine, spec)
    edges["spec"]["replicas"] = mesh.edge.replicas
    # Envoy reads it once: another one makes another template, so that Kubernetes starts the pods again.
    edges["spec"]["template"]["metadata"]["annotations"] = {"tokenloom/settings": digest(config["envoy.yaml"])}
    door = service("edge", mine, http=port)
    door["spec"]["type"] = "ClusterIP" if _is_private(mesh) else "LoadBalancer"
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "edge"}, "data": config},
        edges,
        door,
    ]


def _tls_volumes(mesh: MeshConfig) -> list[str]:
    """The Secret of type kubernetes.io/tls, made by cert-manager or by hand, with ca.crt where clients need one."""
    return [] if mesh.edge.tls is None else ["edge-tls"]


def _edge_probe(mesh: MeshConfig) -> dict[str, Any]:
    port, tls = mesh.edge.port, mesh.edge.tls
    if tls is not None and tls.client_ca is not None:
        # The kubelet has no certificate to show.
        return {"tcpSocket": {"port": port}}
    scheme = {} if tls is None else {"scheme": "HTTPS"}
    return {"httpGet": {"path": "/readyz", "port": port, **scheme}}


def _is_private(mesh: MeshConfig) -> bool:
    """Whether nobody outside is to reach the edge, as mesh.yaml says by a loopback address."""
    return mesh.edge.address is not None and mesh.edge.address.is_loopback
