"""Pods of a mesh in Kubernetes: what runs in them, on which nodes, with which cards, and how it is known to be well."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from services.common.config import ConfigError
from services.common.settings_gateway import GatewaySettings
from services.mesh.books import SETTINGS_VARIABLE
from services.mesh.config import MeshConfig, WorkerConfig
from services.mesh.container_environment import variables
from services.mesh.containers import (
    DEMO_FOLDER,
    FETCHED_FOLDER,
    JWKS_FILE,
    METRICS_PORT,
    POLICY_FILE,
    STATE_FOLDER,
    Container,
)

__all__ = ["GRPC_PORT", "HTTP_PORT", "Wishes", "claims", "labels", "labels_of", "pod", "resource_of", "slug"]

GRPC_PORT: Final = 50051
HTTP_PORT: Final = 8000
_CONFIG_FOLDER: Final = "/etc/tokenloom"
_CACHE_FOLDER: Final = "/root/.cache/huggingface"
_STOP_MARGIN_SECONDS: Final = 10
# The first start of a large model reads it over the network.
_START_TRIES: Final = 360
_CACHE_SIZE: Final = "100Gi"
_STATE_SIZE: Final = "10Gi"
_WHERE_IT_IS: Final = [
    {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
    for name, path in (("POD_NAME", "metadata.name"), ("POD_IP", "status.podIP"), ("NODE_NAME", "spec.nodeName"))
]
_ENVIRONMENT: Final = "environment"
"""The Secret, made by hand, that has the variables which mesh.yaml names."""
_POLICY_FOLDER: Final = str(Path(POLICY_FILE).parent)
_JWKS_FOLDER: Final = str(Path(JWKS_FILE).parent)


class Wishes:
    """What a mesh.yaml doesn't say and Kubernetes wants to know."""

    def __init__(
        self, *, image: str = "tokenloom", resources: Mapping[str, str] | None = None, tolerate: Sequence[str] = ()
    ) -> None:
        """`resources`: the cards' resource by worker, such as nvidia.com/mig-3g.20gb. `tolerate`: taints of nodes that
        workers may run on, KEY or KEY=VALUE, such as those of spot nodes.
        """
        self.image = image
        self.resources = resources or {}
        self.tolerations = [_toleration(taint) for taint in tolerate]


def slug(name: str) -> str:
    """A name of the mesh as Kubernetes takes it."""
    return re.sub(r"[^a-z0-9-]", "-", name.lower()).strip("-")


def labels_of(component: str) -> dict[str, str]:
    """What all pods of a kind are selected by."""
    return {"app.kubernetes.io/name": "tokenloom", "app.kubernetes.io/component": component}


def labels(name: str, component: str) -> dict[str, str]:
    """What an object's pods are selected by."""
    return {**labels_of(component), "app.kubernetes.io/instance": name}


def pod(mesh: MeshConfig, container: Container, wishes: Wishes) -> dict[str, Any]:
    """The spec of a pod with one of our services."""
    model = container.model_path
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": math.ceil(mesh.drain_seconds) + _STOP_MARGIN_SECONDS,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [_container(mesh, container, wishes)],
        "volumes": _volumes(container),
    }
    if model == DEMO_FOLDER:
        command = ["python", "-m", "services.inference.demo_model", DEMO_FOLDER]
        mounts = [{"name": "model", "mountPath": "/models"}]
        maker = {"name": "demo-model", "image": wishes.image, "command": command, "volumeMounts": mounts}
        spec["initContainers"] = [maker]
    if container.worker is not None and wishes.tolerations:
        spec["tolerations"] = wishes.tolerations
    return spec


def claims(container: Container) -> list[dict[str, Any]]:
    """The volumes that a pod keeps when it moves to another node."""
    if container.service == "gateway":
        return [_claim("state", _STATE_SIZE)]
    if container.fetches is not None:
        return [_claim("model", _CACHE_SIZE)]
    return []


def resource_of(mesh: MeshConfig, worker: WorkerConfig, wishes: Wishes) -> tuple[str, int] | None:
    """The resource that stands for a worker's cards, and how many of it; None for a worker without.

    Cards that several workers share are `nvidia.com/gpu.shared`, as the device plugin calls what it slices in time.

    Raises:
        ConfigError: a part of a card, which Kubernetes knows by its kind and not by its UUID.
    """
    if worker.gpu is None:
        return None
    cards = str(worker.gpu).split(",")
    if (named := wishes.resources.get(worker.name)) is not None:
        return named, len(cards)
    if any(card.startswith("MIG-") for card in cards):
        message = "Kubernetes gives parts of cards by kind: say --gpu-resource"
        raise ConfigError(f"worker {worker.name!r}: gpu: {message} {worker.name}=nvidia.com/mig-…")
    others = [other for pool in mesh.pools for other in pool.workers if other is not worker and other.gpu is not None]
    shared = any(set(cards) & set(str(other.gpu).split(",")) for other in others)
    return "nvidia.com/gpu.shared" if shared else "nvidia.com/gpu", len(cards)


def _container(mesh: MeshConfig, container: Container, wishes: Wishes) -> dict[str, Any]:
    file = f"{_CONFIG_FOLDER}/{container.name}.json"
    made: dict[str, Any] = {
        "name": container.service,
        "image": wishes.image,
        "command": ["python", "-m", f"services.{container.service}", "--config", file, *_set(container)],
        "env": [
            *_WHERE_IT_IS,
            # Commands that are run beside a gateway find its database there.
            *([{"name": SETTINGS_VARIABLE, "value": file}] if container.service == "gateway" else []),
            *map(_secret_variable, variables(container.settings)),
        ],
        "ports": [
            {"name": "grpc", "containerPort": GRPC_PORT},
            {"name": "metrics", "containerPort": METRICS_PORT},
            *([{"name": "http", "containerPort": HTTP_PORT}] if container.service == "gateway" else []),
        ],
        "volumeMounts": _mounts(container),
        **_probes(),
        "securityContext": {"allowPrivilegeEscalation": False},
    }
    if container.worker is not None and (cards := resource_of(mesh, container.worker, wishes)) is not None:
        made["resources"] = {"limits": {cards[0]: cards[1]}}
    return made


def _secret_variable(name: str) -> dict[str, Any]:
    # Whoever needs one that is not there says so itself.
    chosen = {"name": _ENVIRONMENT, "key": name, "optional": True}
    return {"name": name, "valueFrom": {"secretKeyRef": chosen}}


def _set(container: Container) -> list[str]:
    if container.worker is not None:
        # Each replica is a worker of its own, and the edge takes workers by address.
        return ["--set", "name=$(POD_NAME)", "--set", f"advertise=$(POD_IP):{GRPC_PORT}"]
    return ["--set", "node=$(NODE_NAME)"] if container.service == "telemetry" else []


def _probes() -> dict[str, Any]:
    health = {"grpc": {"port": GRPC_PORT}, "timeoutSeconds": 3}
    return {
        "startupProbe": {**health, "periodSeconds": 5, "failureThreshold": _START_TRIES},
        "readinessProbe": {**health, "periodSeconds": 2, "failureThreshold": 2},
        # Alive is who listens: an engine that hangs is noticed, and started again, by its own worker.
        "livenessProbe": {"tcpSocket": {"port": GRPC_PORT}, "periodSeconds": 10, "failureThreshold": 3},
    }


def _volumes(container: Container) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [{"name": "settings", "secret": {"secretName": "settings"}}]
    if container.worker is not None:
        # Processes of one engine speak through it.
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    if container.model_path == DEMO_FOLDER:
        volumes.append({"name": "model", "emptyDir": {}})
    volumes += [{"name": name, "configMap": {"name": name}} for name, _ in _files(container)]
    for name, path in _folders(container):
        volumes.append({"name": name, "hostPath": {"path": path, "type": "Directory"}})
    return volumes


def _mounts(container: Container) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [{"name": "settings", "mountPath": _CONFIG_FOLDER, "readOnly": True}]
    if container.service == "gateway":
        mounts.append({"name": "state", "mountPath": STATE_FOLDER})
    if container.worker is not None:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108  # where it is
    if container.model_path == DEMO_FOLDER:
        mounts.append({"name": "model", "mountPath": "/models", "readOnly": True})
    if container.fetches is not None:
        folder = FETCHED_FOLDER if container.fetches == "store" else _CACHE_FOLDER
        mounts.append({"name": "model", "mountPath": folder})
    read_only = (*_files(container), *_folders(container))
    mounts += [{"name": name, "mountPath": path, "readOnly": True} for name, path in read_only]
    return mounts


def _files(container: Container) -> list[tuple[str, str]]:
    """ConfigMaps, and where a process follows what is in them: as folders, since a single file would never change."""
    if container.service == "router":
        return [("policy", _POLICY_FOLDER)]
    settings = container.settings
    has_jwks = isinstance(settings, GatewaySettings) and settings.jwt is not None and settings.jwt.jwks == JWKS_FILE
    return [("jwks", _JWKS_FOLDER)] if has_jwks else []


def _folders(container: Container) -> list[tuple[str, str]]:
    """Folders of the node, or of a share that is mounted there."""
    model = container.model_path
    local = model if model is not None and model.startswith("/") and model != DEMO_FOLDER else None
    return [(name, path) for name, path in (("model", local), ("adapters", container.adapters_dir)) if path is not None]


def _claim(name: str, size: str) -> dict[str, Any]:
    asked = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}}
    return {"metadata": {"name": name}, "spec": asked}


def _toleration(taint: str) -> dict[str, Any]:
    key, _, value = taint.partition("=")
    return {"key": key, "operator": "Equal", "value": value} if value else {"key": key, "operator": "Exists"}
