"""What the keys of a mesh.yaml have to do with each other, and with what is on this machine."""

import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from services.common.config import ConfigError
from services.common.engine_args import check_engine_args, parallel_size
from services.common.settings_worker import ModelSettings
from services.mesh.config import DEMO_MODEL, MOST_MEMORY, MeshConfig, PoolConfig, TlsConfig, WorkerConfig

__all__ = ["advice_on", "check_folders", "check_mesh"]

# Shares such as a third are written with few digits.
_ROUNDING: Final = 0.001


def check_mesh(mesh: MeshConfig, where: str) -> MeshConfig:
    """Checks what one key says about another one, and returns the mesh.

    Raises:
        ConfigError: they don't fit.
    """
    adapters = [adapter.name for model in mesh.models for adapter in model.adapters]
    _check_unique(where, "models", [*(model.name for model in mesh.models), *adapters])
    _check_unique(where, "pools", [pool.name for pool in mesh.pools])
    workers = [worker.name for pool in mesh.pools for worker in pool.workers]
    _check_unique(where, "workers of pools", workers)
    _check_not_taken(where, workers, [*mesh.router_names, *mesh.gateway_names])
    for index, pool in enumerate(mesh.pools):
        _check_pool(f"{where}: pools[{index}]", mesh, pool)
    _check_shares(where, mesh.pools)
    mesh.routing.check(f"{where}: routing", pools=mesh.pool_names, models=mesh.model_names)
    return mesh


def advice_on(mesh: MeshConfig) -> Iterator[str]:
    """What is no mistake, and yet seldom meant."""
    if mesh.gateways > 1 and mesh.redis_url is None:
        yield (
            f"gateways: {mesh.gateways} of them without redis_url: each remembers conversations of its own, so that "
            "previous_response_id gets 404 from the others, and gives away its part of each key's limits"
        )


def check_folders(mesh: MeshConfig, where: str) -> MeshConfig:
    """Checks that the folders of models and the files of TLS are there, and returns the mesh.

    A Hugging Face id is no folder.

    Raises:
        ConfigError: one is missing.
    """
    if mesh.edge.tls is not None:
        _check_tls(mesh.edge.tls, f"{where}: edge.tls")
    for index, model in enumerate(mesh.models):
        if model.path is not None and model.path.startswith("/") and not Path(model.path).is_dir():
            raise ConfigError(f"{where}: models[{index}].path: there is no folder, got the value {model.path!r}")
        if model.adapters_dir is not None and not Path(model.adapters_dir).is_dir():
            raise ConfigError(
                f"{where}: models[{index}].adapters_dir: there is no folder, got the value {model.adapters_dir!r}"
            )
    return mesh


def _check_pool(where: str, mesh: MeshConfig, pool: PoolConfig) -> None:
    _check_unique(where, "serves", pool.serves)
    known = [model.name for model in mesh.models]
    for name in pool.serves:
        if name not in known:
            raise ConfigError(f"{where}.serves: there is no model {name!r} among models, which has {_list(known)}")
    for index, worker in enumerate(pool.workers):
        _check_worker(f"{where}.workers[{index}]", mesh, pool, worker)
    idle = set(pool.serves) - {pool.model_of(worker) for worker in pool.workers}
    if idle:
        raise ConfigError(f"{where}.serves: no worker of the pool runs {_list(sorted(idle))}")


def _check_engine(where: str, worker: WorkerConfig, model: ModelSettings) -> None:
    kind = {"sim": "the simulated engine", "openai": "a server with OpenAI's API"}.get(worker.engine)
    if kind is not None and worker.engine_args:
        raise ConfigError(f"{where}.engine_args: {kind} takes none, got the value {worker.engine_args!r}")
    if kind is not None and model.adapters_dir is not None:
        raise ConfigError(f"{where}: {kind} takes no adapters, but the model {model.name!r} has adapters_dir")
    if worker.engine != "sim" and worker.sim is not None:
        raise ConfigError(f"{where}.sim: for engine 'sim' alone, this worker's engine is {worker.engine!r}")
    if worker.engine != "openai" and worker.upstream is not None:
        raise ConfigError(f"{where}.upstream: for engine 'openai' alone, this worker's engine is {worker.engine!r}")
    if worker.engine == "openai" and worker.upstream is None:
        raise ConfigError(f"{where}.upstream: missing: engine 'openai' needs the url of the server that does the work")


def _check_worker(where: str, mesh: MeshConfig, pool: PoolConfig, worker: WorkerConfig) -> None:
    if worker.model is None and len(pool.serves) > 1:
        raise ConfigError(f"{where}.model: missing: the pool serves {_list(pool.serves)}, say which this worker runs")
    name = pool.model_of(worker)
    if name not in pool.serves:
        raise ConfigError(f"{where}.model: got the value {name!r}, expected one of the pool's {_list(pool.serves)}")
    _check_engine(where, worker, mesh.model(name))
    if worker.engine == "vllm" and mesh.model(name).path is None and name != DEMO_MODEL:
        raise ConfigError(f"{where}: engine 'vllm' needs the path of its model, and models has none for {name!r}")
    if worker.engine == "vllm":
        check_engine_args(worker.engine_args, f"{where}.engine_args")
        _check_gpus(where, worker)


def _check_gpus(where: str, worker: WorkerConfig) -> None:
    if worker.gpu is None or worker.engine_args.get("distributed_executor_backend") == "ray":
        return
    named, needed = len(str(worker.gpu).split(",")), parallel_size(worker.engine_args)
    if named != needed:
        raise ConfigError(
            f"{where}.gpu: tensor_parallel_size times pipeline_parallel_size of engine_args is {needed}, so expected "
            f"{needed} of them with commas between, got the value {worker.gpu!r}"
        )


def _check_shares(where: str, pools: list[PoolConfig]) -> None:
    shares: dict[str, list[WorkerConfig]] = {}
    for pool in pools:
        for worker in pool.workers:
            if worker.engine == "vllm" and worker.gpu is not None:
                for name in str(worker.gpu).split(","):
                    shares.setdefault(name.strip(), []).append(worker)
    for gpu, workers in shares.items():
        total = sum(worker.gpu_memory_utilization for worker in workers)
        if total > MOST_MEMORY + _ROUNDING:
            names = _list([worker.name for worker in workers])
            raise ConfigError(
                f"{where}: gpu_memory_utilization: the workers {names} share gpu {gpu} and want {total:.2f} of its "
                f"memory together, expected at most {MOST_MEMORY:g}"
            )


def _check_unique(where: str, key: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{where}: {key}: the name {twice[0]!r} is there twice")


def _check_not_taken(where: str, workers: list[str], others: list[str]) -> None:
    taken = sorted({"telemetry", *others, "envoy"}.intersection(workers))
    if taken:
        raise ConfigError(f"{where}: workers of pools: the name {taken[0]!r} belongs to another process of the mesh")


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _check_tls(tls: TlsConfig, where: str) -> None:
    for name, path in tls.files.items():
        if not os.access(path, os.R_OK):
            raise ConfigError(f"{where}.{name}: there is no file that can be read, got the value {path!r}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # It would ask on the terminal for the password of a key that has one.
        context.load_cert_chain(tls.certificate, tls.key, password=lambda: "")
    except (OSError, ValueError) as error:
        said = f"no certificate in PEM form and its key: {_ssl_words(error)}"
        message = f"{where}: certificate {tls.certificate!r} and key {tls.key!r} are {said}"
        raise ConfigError(message) from None
    if tls.client_ca is not None:
        try:
            context.load_verify_locations(tls.client_ca)
        except (OSError, ValueError) as error:
            said = f"has no certificate in PEM form: {_ssl_words(error)}"
            raise ConfigError(f"{where}.client_ca: {tls.client_ca!r} {said}") from None


def _ssl_words(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error).lower().replace("_", " ")
