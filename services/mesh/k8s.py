"""Kubernetes manifests: every process of a mesh, Envoy and Redis, from the same mesh.yaml."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from services.common.config import ConfigError
from services.common.settings import TelemetrySettings
from services.mesh.config import MeshConfig
from services.mesh.containers import METRICS_PORT, TLS_FILES, Container, containers, edge_of
from services.mesh.envoy import bootstrap
from services.mesh.k8s_pods import GRPC_PORT, HTTP_PORT, Wishes, claims, labels, labels_of, pod, resource_of, slug

__all__ = ["Growth", "manifests"]

_ENVOY_IMAGE: Final = "envoyproxy/envoy:v1.40.0"
_REDIS_IMAGE: Final = "redis:8-alpine"
_WORKERS: Final = "workers"
_AGENTS: Final = "telemetry-agents"
_PICKER_PORT: Final = 50052
_REDIS_PORT: Final = 6379
_TLS_FOLDER: Final = str(Path(TLS_FILES["certificate"]).parent)
_DRAIN_SECONDS: Final = 5
_GPU_NODES: Final = {"nvidia.com/gpu.present": "true"}
_SHARED: Final = "nvidia.com/gpu.shared"


class Growth(msgspec.Struct, kw_only=True, frozen=True):
    """How workers become more and fewer, by KEDA."""

    most: int
    """Replicas of each worker."""
    prometheus: str
    """The URL of the Prometheus that scrapes the routers."""
    waiting: int = 4
    """Requests that wait in the router, for each replica."""
    hours: tuple[int, int] | None = None
    """From which to which hour of working days all replicas run, whatever waits."""
    timezone: str = "UTC"


def manifests(
    mesh: MeshConfig, wishes: Wishes, *, namespace: str = "tokenloom", growth: Growth | None = None
) -> list[dict[str, Any]]:
    """The objects, in the order in which they are to be made.

    Raises:
        ConfigError: the mesh can't run in Kubernetes as it is described.
    """
    listed = _containers(mesh)
    _check(mesh, listed)
    workers = [container for container in listed if container.worker is not None]
    objects = [
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "settings"}, "stringData": _settings(listed)},
        *_slices(mesh, wishes),
        *(each for container in listed for each in _process(mesh, container, wishes)),
        _headless(_WORKERS, labels_of("worker")),
        *_telemetry_agents(mesh, wishes),
        *([] if mesh.redis_url is not None else _redis()),
        *_edge(mesh),
        *_disruption(mesh),
        _firewall(mesh),
        *([] if growth is None else [_scaler(container, growth) for container in workers]),
    ]
    for each in objects:
        each["metadata"] |= {"namespace": namespace}
    return [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}, *objects]


def _containers(mesh: MeshConfig) -> list[Container]:
    listed = containers(mesh)
    if not _uses_gpus(mesh):
        return listed
    # Cards are seen by an agent on each of their nodes; this one joins what those say.
    first = listed[0]
    assert isinstance(first.settings, TelemetrySettings)
    joined = msgspec.structs.replace(first.settings, own_gpus=False, agents=[f"{_AGENTS}:{GRPC_PORT}"])
    return [replace(first, settings=joined), *listed[1:]]


def _check(mesh: MeshConfig, listed: list[Container]) -> None:
    if mesh.gateways > 1 and mesh.database_url is None:
        raise ConfigError("gateways: several of them can't share a file in Kubernetes: set database_url (PostgreSQL)")
    names = Counter(slug(container.name) for container in listed)
    names.update(("edge", "redis", _WORKERS, _AGENTS))
    for name, count in names.items():
        if count > 1:
            raise ConfigError(f"workers of pools: Kubernetes takes two names, or one and one of our own, for {name!r}")


def _settings(listed: list[Container]) -> dict[str, str]:
    # A Secret, since there may be passwords in the URLs of databases.
    return {f"{container.name}.json": _json_of(container) for container in listed}


def _json_of(container: Container) -> str:
    return msgspec.json.format(msgspec.json.encode(container.settings)).decode()


def _watched(mine: dict[str, str], container: Container) -> dict[str, Any]:
    """Other settings make another template, so that Kubernetes starts the pods again."""
    return {
        "labels": mine,
        "annotations": {"tokenloom/settings": hashlib.sha256(_json_of(container).encode()).hexdigest()[:16]},
    }


def _process(mesh: MeshConfig, container: Container, wishes: Wishes) -> list[dict[str, Any]]:
    name = slug(container.name)
    component = "worker" if container.worker is not None else container.service
    mine = labels(name, component)
    stateful = container.worker is not None or container.service == "gateway"
    made = _workload("StatefulSet" if stateful else "Deployment", name, mine, pod(mesh, container, wishes))
    made["spec"]["template"]["metadata"] = _watched(mine, container)
    if stateful:
        made["spec"] |= {"serviceName": _WORKERS if component == "worker" else name, "podManagementPolicy": "Parallel"}
        if kept := claims(container):
            made["spec"]["volumeClaimTemplates"] = kept
    return [made] if component == "worker" else [made, _service(name, mine, **_ports(container))]


def _ports(container: Container) -> dict[str, int]:
    more = {"gateway": {"http": HTTP_PORT}, "router": {"picker": _PICKER_PORT}}
    return {"grpc": GRPC_PORT, "metrics": METRICS_PORT, **more.get(container.service, {})}


def _service(name: str, selector: dict[str, str], **ports: int) -> dict[str, Any]:
    listed = [{"name": port_name, "port": port, "targetPort": port} for port_name, port in ports.items()]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": selector},
        "spec": {"selector": selector, "ports": listed},
    }


def _headless(name: str, selector: dict[str, str]) -> dict[str, Any]:
    made = _service(name, selector, grpc=GRPC_PORT, metrics=METRICS_PORT)
    made["spec"]["clusterIP"] = "None"
    return made


def _telemetry_agents(mesh: MeshConfig, wishes: Wishes) -> list[dict[str, Any]]:
    """One on each node with cards. It takes none of them: it sees them all through the NVIDIA runtime."""
    if not _uses_gpus(mesh):
        return []
    mine = labels(_AGENTS, "telemetry-agent")
    settings = containers(mesh)[0]
    spec = pod(mesh, settings, wishes)
    (container,) = spec["containers"]
    container["env"] += [
        {"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"},
        {"name": "NVIDIA_DRIVER_CAPABILITIES", "value": "utility"},
    ]
    container["command"][container["command"].index("--config") + 1] = f"/etc/tokenloom/{_AGENTS}.json"
    # With the host's processes it can tell whose memory is on a card.
    spec |= {"runtimeClassName": "nvidia", "hostPID": True, "nodeSelector": _GPU_NODES}
    spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists"}, *wishes.tolerations]
    spec["volumes"] = [{"name": "settings", "secret": {"secretName": _AGENTS}}]
    own = {f"{_AGENTS}.json": _json_of(settings)}
    return [
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": _AGENTS}, "stringData": own},
        {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": {"name": _AGENTS, "labels": mine},
            "spec": {
                "selector": {"matchLabels": mine},
                "template": {"metadata": _watched(mine, settings), "spec": spec},
            },
        },
        _headless(_AGENTS, mine),
    ]


def _slices(mesh: MeshConfig, wishes: Wishes) -> list[dict[str, Any]]:
    """How the NVIDIA device plugin is to slice cards that several workers share."""
    workers = [worker for pool in mesh.pools for worker in pool.workers]
    sharing = [worker for worker in workers if (resource_of(mesh, worker, wishes) or ("", 0))[0] == _SHARED]
    if not sharing:
        return []
    by_card = Counter(card for worker in sharing for card in str(worker.gpu).split(","))
    most = max(by_card.values())
    resources = [{"name": "nvidia.com/gpu", "replicas": most}]
    slicing = {"version": "v1", "sharing": {"timeSlicing": {"renameByDefault": True, "resources": resources}}}
    data = {"shared": yaml.safe_dump(slicing, sort_keys=False)}
    name = "nvidia-device-plugin-time-slicing"
    return [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}]


def _redis() -> list[dict[str, Any]]:
    mine = labels("redis", "redis")
    probe = {"exec": {"command": ["redis-cli", "ping"]}, "periodSeconds": 5}
    container = {
        "name": "redis",
        "image": _REDIS_IMAGE,
        "ports": [{"name": "redis", "containerPort": _REDIS_PORT}],
        "readinessProbe": probe,
        "livenessProbe": probe,
        "securityContext": {"allowPrivilegeEscalation": False},
    }
    spec = {"automountServiceAccountToken": False, "containers": [container]}
    return [_workload("Deployment", "redis", mine, spec), _service("redis", mine, redis=_REDIS_PORT)]


def _edge(mesh: MeshConfig) -> list[dict[str, Any]]:
    mine, port = labels("edge", "edge"), mesh.edge.port
    # Workers are whoever is behind their service, not those of the file: there may be more.
    edge = replace(edge_of(mesh), workers=(f"{_WORKERS}:{GRPC_PORT}",))
    container = {
        "name": "envoy",
        "image": _ENVOY_IMAGE,
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
    config = {"envoy.yaml": json.dumps(bootstrap(edge), indent=1)}
    service = _service("edge", mine, http=port)
    service["spec"]["type"] = "ClusterIP" if _is_private(mesh) else "LoadBalancer"
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "edge"}, "data": config},
        _workload("Deployment", "edge", mine, spec),
        service,
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


def _workload(kind: str, name: str, mine: dict[str, str], spec: dict[str, Any]) -> dict[str, Any]:
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


def _disruption(mesh: MeshConfig) -> list[dict[str, Any]]:
    """Nodes are emptied one pod of a kind at a time; a kind that has one pod only may be moved."""
    several = [
        ("worker", mesh.worker_count > 1),
        ("router", mesh.routers > 1),
        ("gateway", mesh.gateways > 1),
    ]
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": f"{component}s"},
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": labels_of(component)}},
        }
        for component, has_several in several
        if has_several
    ]


def _firewall(mesh: MeshConfig) -> dict[str, Any]:
    """Only the edge is reached from outside: the others take whoever is inside for one of the mesh."""
    inside: dict[str, Any] = {"from": [{"podSelector": {}}]}
    scrapers = {"from": [{"namespaceSelector": {}}], "ports": [{"protocol": "TCP", "port": METRICS_PORT}]}
    clients = {"ports": [{"protocol": "TCP", "port": mesh.edge.port}]}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "inside"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [inside, scrapers, clients]},
    }


def _scaler(container: Container, growth: Growth) -> dict[str, Any]:
    name = slug(container.name)
    queue = {
        "serverAddress": growth.prometheus,
        "query": "sum(tokenloom_router_waiting_requests)",
        "threshold": str(growth.waiting),
    }
    triggers: list[dict[str, Any]] = [{"type": "prometheus", "metadata": queue}]
    if growth.hours is not None:
        first, last = growth.hours
        times = {"timezone": growth.timezone, "start": f"0 {first} * * 1-5", "end": f"0 {last} * * 1-5"}
        triggers.append({"type": "cron", "metadata": {**times, "desiredReplicas": str(growth.most)}})
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": name},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": name},
            "minReplicaCount": 1,
            "maxReplicaCount": growth.most,
            "cooldownPeriod": 300,
            "triggers": triggers,
        },
    }


def _uses_gpus(mesh: MeshConfig) -> bool:
    return any(worker.gpu is not None for pool in mesh.pools for worker in pool.workers)


def _is_private(mesh: MeshConfig) -> bool:
    """Whether nobody outside is to reach the edge, as mesh.yaml says by a loopback address."""
    return mesh.edge.host == "localhost" or ip_address(mesh.edge.host).is_loopback
