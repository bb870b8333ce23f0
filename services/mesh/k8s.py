"""Kubernetes manifests: every process of a mesh, Envoy and Redis, from the same mesh.yaml."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from services.common.config import ConfigError
from services.common.policy import policy_json
from services.common.settings import TelemetrySettings
from services.mesh.config import MeshConfig
from services.mesh.containers import (
    JWKS_FILE,
    METRICS_PORT,
    POLICY_FILE,
    REDIS_IMAGE,
    Container,
    containers,
    jwks_of,
)
from services.mesh.k8s_edge import edge
from services.mesh.k8s_gateway import inference_gateway
from services.mesh.k8s_growth import Growth, scaler
from services.mesh.k8s_metrics import SCRAPED, pod_monitor
from services.mesh.k8s_objects import WORKERS, config_map, digest, headless, service, workload
from services.mesh.k8s_pods import GRPC_PORT, HTTP_PORT, Wishes, claims, labels, labels_of, pod, resource_of, slug

__all__ = ["manifests"]

_AGENTS: Final = "telemetry-agents"
_PICKER_PORT: Final = 50052
_REDIS_PORT: Final = 6379
_GPU_NODES: Final = {"nvidia.com/gpu.present": "true"}
_SHARED: Final = "nvidia.com/gpu.shared"


def manifests(
    mesh: MeshConfig,
    wishes: Wishes,
    *,
    namespace: str = "tokenloom",
    growth: Growth | None = None,
    has_pod_monitor: bool = False,
) -> list[dict[str, Any]]:
    """The objects, in the order in which they are to be made; `has_pod_monitor`: one of the Prometheus Operator's, too.

    Raises:
        ConfigError: the mesh can't run in Kubernetes as it is described.
    """
    listed = _containers(mesh)
    _check(mesh, listed)
    workers = [container for container in listed if container.worker is not None]
    objects = [
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "settings"}, "stringData": _settings(listed)},
        config_map("policy", POLICY_FILE, policy_json(mesh.routing) + "\n"),
        *_jwks(mesh),
        *_slices(mesh, wishes),
        *(each for container in listed for each in _process(mesh, container, wishes)),
        headless(WORKERS, labels_of("worker")),
        *_telemetry_agents(mesh, wishes),
        *([] if mesh.redis_url is not None else _redis()),
        *edge(mesh),
        *_disruption(mesh),
        _firewall(mesh),
        *([] if mesh.inference_gateway is None else inference_gateway(mesh.inference_gateway)),
        *([pod_monitor()] if has_pod_monitor else []),
        *([] if growth is None else [scaler(container, growth) for container in workers]),
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
    names.update(("edge", "redis", WORKERS, _AGENTS))
    for name, count in names.items():
        if count > 1:
            raise ConfigError(f"workers of pools: Kubernetes takes two names, or one and one of our own, for {name!r}")


def _settings(listed: list[Container]) -> dict[str, str]:
    # A Secret, since there may be passwords in the URLs of databases.
    return {f"{container.name}.json": _json_of(container) for container in listed}


def _jwks(mesh: MeshConfig) -> list[dict[str, Any]]:
    if (path := jwks_of(mesh)) is None:
        return []
    try:
        keys = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"jwt.jwks: there is no file that can be read, got the value {path!r}") from error
    return [config_map("jwks", JWKS_FILE, keys)]


def _json_of(container: Container) -> str:
    return msgspec.json.format(msgspec.json.encode(container.settings)).decode()


def _watched(mine: dict[str, str], container: Container) -> dict[str, Any]:
    """Other settings make another template, so that Kubernetes starts the pods again."""
    return {
        "labels": mine,
        "annotations": {"tokenloom/settings": digest(_json_of(container)), **SCRAPED},
    }


def _process(mesh: MeshConfig, container: Container, wishes: Wishes) -> list[dict[str, Any]]:
    name = slug(container.name)
    component = "worker" if container.worker is not None else container.service
    mine = labels(name, component)
    stateful = container.worker is not None or container.service == "gateway"
    made = workload("StatefulSet" if stateful else "Deployment", name, mine, pod(mesh, container, wishes))
    made["spec"]["template"]["metadata"] = _watched(mine, container)
    if stateful:
        made["spec"] |= {"serviceName": WORKERS if component == "worker" else name, "podManagementPolicy": "Parallel"}
        if kept := claims(container):
            made["spec"]["volumeClaimTemplates"] = kept
    return [made] if component == "worker" else [made, service(name, mine, **_ports(container))]


def _ports(container: Container) -> dict[str, int]:
    more = {"gateway": {"http": HTTP_PORT}, "router": {"picker": _PICKER_PORT}}
    return {"grpc": GRPC_PORT, "metrics": METRICS_PORT, **more.get(container.service, {})}


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
        headless(_AGENTS, mine),
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
        "image": REDIS_IMAGE,
        "ports": [{"name": "redis", "containerPort": _REDIS_PORT}],
        "readinessProbe": probe,
        "livenessProbe": probe,
        "securityContext": {"allowPrivilegeEscalation": False},
    }
    spec = {"automountServiceAccountToken": False, "containers": [container]}
    return [workload("Deployment", "redis", mine, spec), service("redis", mine, redis=_REDIS_PORT)]


def _disruption(mesh: MeshConfig) -> list[dict[str, Any]]:
    """Nodes are emptied one pod of a kind at a time; a kind that has one pod only may be moved."""
    several = [
        ("worker", mesh.worker_count > 1),
        ("router", mesh.routers > 1),
        ("gateway", mesh.gateways > 1),
        ("edge", mesh.edge.replicas > 1),
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


def _uses_gpus(mesh: MeshConfig) -> bool:
    return any(worker.gpu is not None for pool in mesh.pools for worker in pool.workers)
