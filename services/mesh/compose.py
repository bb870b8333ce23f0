"""compose.yaml: every process of a mesh, Envoy and Redis, from the same mesh.yaml."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from services.mesh.books import SETTINGS_VARIABLE
from services.mesh.config import MeshConfig, TlsConfig
from services.mesh.container_environment import variables
from services.mesh.containers import (
    DEMO_FOLDER,
    ENVOY_IMAGE,
    FETCHED_FOLDER,
    JWKS_FILE,
    NETWORK,
    POLICY_FILE,
    REDIS_IMAGE,
    STATE_FOLDER,
    TLS_FILES,
    Container,
    containers,
    jwks_of,
)

__all__ = ["compose_file"]

_IMAGE: Final = "${TOKENLOOM_IMAGE:-tokenloom}"
_CONFIG_FOLDER: Final = "/etc/tokenloom"
_EDGE_FILE: Final = "/run/edge/envoy.yaml"
_POLICY_FOLDER: Final = str(Path(POLICY_FILE).parent)
_JWKS: Final = "jwks"
_STOP_MARGIN_SECONDS: Final = 10
_PROBE: Final = ("python", "-m", "services.mesh.probe")


def compose_file(mesh: MeshConfig) -> dict[str, Any]:
    """The compose file, as plain data for YAML."""
    listed = containers(mesh)
    services = {container.name: _service(mesh, container) for container in listed}
    if _needs_demo(listed):
        services["demo-model"] = _demo_model()
    if mesh.redis_url is None:
        services["redis"] = _redis()
    services["policy"] = _rendering("policy", POLICY_FILE, "policy")
    services["edge-config"] = _rendering("envoy", _EDGE_FILE, "edge")
    services["envoy"] = _envoy(mesh)
    return {
        "name": "tokenloom",
        "services": services,
        "configs": _configs(mesh, listed),
        **({} if mesh.edge.tls is None else {"secrets": _secrets(mesh.edge.tls)}),
        "volumes": {"state": {}, "models": {}, "edge": {}, "policy": {}},
        "networks": {"mesh": {"ipam": {"config": [{"subnet": str(NETWORK)}]}}},
    }


def _service(mesh: MeshConfig, container: Container) -> dict[str, Any]:
    file = f"{_CONFIG_FOLDER}/{container.name}.json"
    return {
        "image": _IMAGE,
        "command": ["python", "-m", f"services.{container.service}", "--config", file],
        "configs": [{"source": container.name, "target": file}, *_jwks(mesh, container)],
        **_environment(container),
        "networks": {"mesh": {"ipv4_address": container.address}},
        "restart": "unless-stopped",
        "init": True,
        "stop_grace_period": f"{math.ceil(mesh.drain_seconds) + _STOP_MARGIN_SECONDS}s",
        "healthcheck": _healthcheck(*_PROBE, "127.0.0.1:50051"),
        **_storage(container),
        **_devices(mesh, container),
        **_dependencies(container),
    }


def _environment(container: Container) -> dict[str, Any]:
    # What has no value is from the environment that compose itself runs in, or its .env.
    named = variables(container.settings)
    if container.service == "gateway":
        # Commands that are run beside a gateway find its database there.
        named.append(f"{SETTINGS_VARIABLE}={_CONFIG_FOLDER}/{container.name}.json")
    return {"environment": named} if named else {}


def _jwks(mesh: MeshConfig, container: Container) -> list[dict[str, str]]:
    needed = container.service == "gateway" and jwks_of(mesh) is not None
    return [{"source": _JWKS, "target": JWKS_FILE}] if needed else []


def _storage(container: Container) -> dict[str, Any]:
    volumes = list(_volumes(container))
    return {"volumes": volumes} if volumes else {}


def _volumes(container: Container) -> Iterator[str]:
    if container.service == "gateway":
        yield f"state:{STATE_FOLDER}"
    if container.service == "router":
        # All replicas of the router have it, and what one of them is told, all obey.
        yield f"policy:{_POLICY_FOLDER}"
    if container.model_path == DEMO_FOLDER:
        yield "models:/models:ro"
    elif container.model_path is not None and container.model_path.startswith("/"):
        yield f"{container.model_path}:{container.model_path}:ro"
    elif container.fetches is not None:
        # What is fetched once stays.
        yield f"models:{FETCHED_FOLDER if container.fetches == 'store' else '/root/.cache/huggingface'}"
    if container.adapters_dir is not None:
        yield f"{container.adapters_dir}:{container.adapters_dir}:ro"


def _devices(mesh: MeshConfig, container: Container) -> dict[str, Any]:
    uses_gpu = any(worker.gpu is not None for pool in mesh.pools for worker in pool.workers)
    if container.service == "telemetry" and uses_gpu:
        card: dict[str, Any] = {"count": "all"}
    elif container.worker is not None and container.worker.gpu is not None:
        card = {"device_ids": str(container.worker.gpu).split(",")}
    else:
        return {}
    reserved = {"driver": "nvidia", "capabilities": ["gpu"], **card}
    return {"deploy": {"resources": {"reservations": {"devices": [reserved]}}}, "ipc": "host"}


def _dependencies(container: Container) -> dict[str, Any]:
    if container.model_path == DEMO_FOLDER:
        return {"depends_on": {"demo-model": {"condition": "service_completed_successfully"}}}
    if container.service == "router":
        return {"depends_on": {"policy": {"condition": "service_completed_successfully"}}}
    return {}


def _demo_model() -> dict[str, Any]:
    return {
        "image": _IMAGE,
        "command": ["python", "-m", "services.inference.demo_model", DEMO_FOLDER],
        "volumes": ["models:/models"],
        "networks": ["mesh"],
    }


def _redis() -> dict[str, Any]:
    return {
        "image": REDIS_IMAGE,
        "networks": ["mesh"],
        "restart": "unless-stopped",
        "healthcheck": _healthcheck("redis-cli", "ping"),
    }


def _rendering(what: str, file: str, volume: str) -> dict[str, Any]:
    """Writes a file into a volume, from the mesh.yaml that everything else comes from, and is done."""
    mesh_file = f"{_CONFIG_FOLDER}/mesh.yaml"
    return {
        "image": _IMAGE,
        "command": ["tokenloom", "render", what, "--config", mesh_file, "--output", file],
        "configs": [{"source": "mesh", "target": mesh_file}],
        "volumes": [f"{volume}:{Path(file).parent}"],
        "networks": ["mesh"],
    }


def _envoy(mesh: MeshConfig) -> dict[str, Any]:
    address = mesh.edge.address
    return {
        "image": ENVOY_IMAGE,
        "command": ["-c", _EDGE_FILE],
        "volumes": ["edge:/run/edge:ro"],
        **({} if mesh.edge.tls is None else {"secrets": _secret_files(mesh.edge.tls)}),
        "ports": [f"{'' if address is None else f'{address}:'}{mesh.edge.port}:{mesh.edge.port}"],
        "networks": ["mesh"],
        "restart": "unless-stopped",
        "depends_on": {"edge-config": {"condition": "service_completed_successfully"}},
    }


def _secrets(tls: TlsConfig) -> dict[str, Any]:
    return {f"edge-{name}": {"file": path} for name, path in tls.files.items()}


def _secret_files(tls: TlsConfig) -> list[dict[str, str]]:
    return [{"source": f"edge-{name}", "target": TLS_FILES[name]} for name in tls.files]


def _configs(mesh: MeshConfig, listed: list[Container]) -> dict[str, Any]:
    jwks = jwks_of(mesh)
    texts = {container.name: msgspec.json.format(msgspec.json.encode(container.settings)) for container in listed}
    texts["mesh"] = msgspec.yaml.encode(mesh)
    # Compose would take a $ for a variable.
    contents = {name: {"content": text.decode().replace("$", "$$")} for name, text in texts.items()}
    return contents if jwks is None else {**contents, _JWKS: {"file": jwks}}


def _healthcheck(*command: str) -> dict[str, Any]:
    return {"test": ["CMD", *command], "interval": "5s", "timeout": "3s", "retries": 3, "start_period": "30m"}


def _needs_demo(listed: list[Container]) -> bool:
    return any(container.model_path == DEMO_FOLDER for container in listed)
