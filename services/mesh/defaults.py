"""The mesh that `tokenloom up` starts when it is given options and no mesh.yaml."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from services.common.config import ConfigError
from services.common.object_store import check_url, is_in_store
from services.common.settings_worker import ModelSettings, SimSettings
from services.mesh.config import DEMO_MODEL, MeshConfig, PoolConfig, WorkerConfig
from services.mesh.config_rules import check_mesh

__all__ = ["count_gpus", "default_mesh", "otlp_endpoint_of"]

_NVIDIA: Final = Path("/proc/driver/nvidia/gpus")
_MEMORY_SHARE: Final = 0.8
_OTLP_VARIABLE: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
_OTLP_PORT: Final = 4317


def default_mesh(
    *,
    engine: Literal["vllm", "sim"],
    workers: int,
    model: str | None,
    sim: SimSettings | None,
    gpus: int,
    engine_args: Mapping[str, Any] = MappingProxyType({}),
) -> MeshConfig:
    """One pool of equal workers. `gpus`: how many this machine has; workers take turns on them.

    Raises:
        ConfigError: the options don't fit each other.
    """
    if workers < 1:
        raise ConfigError(f"--workers: expected at least 1, got the value {workers}")
    if engine == "sim":
        if engine_args:
            raise ConfigError("--engine-args: for --engine vllm alone")
        return _simulated(workers, model, sim)
    if sim is not None:
        raise ConfigError("--sim: for --engine sim alone")
    known = _model(model)
    share = _MEMORY_SHARE / max(1, -(-workers // gpus)) if gpus else _MEMORY_SHARE
    listed = [
        WorkerConfig(
            name=f"worker-{index}",
            gpu=index % gpus if gpus else None,
            gpu_memory_utilization=share,
            engine_args=dict(engine_args),
        )
        for index in range(workers)
    ]
    return _one_pool(known, listed)


def count_gpus() -> int:
    """GPUs with NVIDIA's driver in this machine."""
    return len(list(_NVIDIA.iterdir())) if _NVIDIA.is_dir() else 0


def otlp_endpoint_of(environment: Mapping[str, str]) -> str | None:
    """Where spans go by OpenTelemetry's own variable, as `host:port`; None when it isn't set.

    Raises:
        ConfigError: it isn't the URL of a host, or asks for TLS, which the exporters here don't speak.
    """
    url = environment.get(_OTLP_VARIABLE, "")
    if not url:
        return None
    wrong = ConfigError(f"{_OTLP_VARIABLE}: expected http://HOST:PORT, got the value {url!r}")
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        port = parts.port or _OTLP_PORT
    except ValueError as error:
        raise wrong from error
    if parts.scheme not in ("", "http") or not parts.hostname:
        raise wrong
    return f"{parts.hostname}:{port}"


def _simulated(workers: int, model: str | None, sim: SimSettings | None) -> MeshConfig:
    if model is not None:
        raise ConfigError(f"--model: the simulated engine takes none, got the value {model!r}")
    listed = [WorkerConfig(name=f"worker-{index}", engine="sim", sim=sim) for index in range(workers)]
    return _one_pool(ModelSettings(name="sim"), listed)


def _one_pool(model: ModelSettings, workers: list[WorkerConfig]) -> MeshConfig:
    pool = PoolConfig(name="default", serves=[model.name], workers=workers)
    return check_mesh(MeshConfig(models=[model], pools=[pool]), "the command line")


def _model(path: str | None) -> ModelSettings:
    if path is None:
        return ModelSettings(name=DEMO_MODEL)
    if is_in_store(path):
        check_url(path, "--model")
        return ModelSettings(name=path.rstrip("/").rpartition("/")[2], path=path)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return ModelSettings(name=folder.resolve().name, path=str(folder.resolve()))
    if path.startswith((".", "/", "~")):
        raise ConfigError(f"--model: there is no folder {path!r}")
    return ModelSettings(name=path, path=path)
