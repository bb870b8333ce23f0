"""mesh.yaml: the fleet, described once for the launcher and for containers."""

import os
import ssl
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from services.common import config
from services.common.config import ConfigError
from services.common.engine_args import check_engine_args, parallel_size
from services.common.policy import Policy, policy_from
from services.common.settings import Address, MetricsPushSettings, Name, TracingSettings
from services.common.settings_gateway import BatchSettings, JwtSettings, LedgerSettings
from services.common.settings_guardrails import GuardrailSettings
from services.common.settings_worker import ModelSettings, SimSettings, UpstreamSettings, WatchdogSettings

__all__ = [
    "DEMO_MODEL",
    "EdgeConfig",
    "MeshConfig",
    "PoolConfig",
    "TlsConfig",
    "WorkerConfig",
    "demo_model",
    "load_mesh",
    "parse_sim",
]

DEMO_MODEL: Final = "demo"
"""The model that the launcher makes itself when it has no path."""

_DEMO_PARSER: Final = "hermes"
_MOST_MEMORY: Final = 0.98
# Shares such as a third are written with few digits.
_ROUNDING: Final = 0.001

Port = Annotated[int, Meta(ge=1, le=65535)]


class _Struct(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    pass


class WorkerConfig(_Struct, kw_only=True, frozen=True):
    """One engine."""

    name: Name
    engine: Literal["vllm", "sim", "openai"] = "vllm"
    """vLLM here, a simulation, or a server with OpenAI's API anywhere."""
    model: str | None = None
    """Which of the pool's models it runs; may be left out where the pool serves one."""
    gpu: int | str | None = None
    """CUDA device by index or UUID (`GPU-…`, `MIG-…`), several with commas between; null on a CPU."""
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=_MOST_MEMORY)] = 0.8
    """Share of the card's memory that vLLM may take; never all of it, since the driver and others need some."""
    engine_args: dict[str, Any] = {}
    """Further arguments of vLLM's AsyncEngineArgs, by their Python names."""
    sim: SimSettings | None = None
    """How fast and how large a simulated engine is; for `engine: sim` alone."""
    upstream: UpstreamSettings | None = None
    """The server that does the work; for `engine: openai` alone."""
    watchdog: WatchdogSettings = WatchdogSettings()
    """When an engine that makes no progress is given up."""


class PoolConfig(_Struct, kw_only=True, frozen=True):
    """Workers that serve the same models."""

    name: Name
    serves: Annotated[list[str], Meta(min_length=1)]
    workers: Annotated[list[WorkerConfig], Meta(min_length=1)]

    def model_of(self, worker: WorkerConfig) -> str:
        """The model that one of its workers runs."""
        return worker.model if worker.model is not None else self.serves[0]


class TlsConfig(_Struct, kw_only=True, frozen=True):
    """What the edge shows of itself, and wants to see of clients. Files are in PEM form."""

    certificate: Annotated[str, Meta(min_length=1)]
    """The edge's certificate, and behind it those between it and its root."""
    key: Annotated[str, Meta(min_length=1)]
    """Its private key, without a password."""
    client_ca: Annotated[str, Meta(min_length=1)] | None = None
    """The roots of clients' certificates, one of which every client has to show, beside its key; null: none has to."""
    minimum: Literal["1.2", "1.3"] = "1.2"
    """The least version of TLS that is spoken."""

    @property
    def files(self) -> dict[str, str]:
        """Those that are named, by their keys."""
        named = {"certificate": self.certificate, "key": self.key, "client_ca": self.client_ca}
        return {name: path for name, path in named.items() if path is not None}

    def check(self, where: str) -> None:
        """Checks that the files are there, and belong together.

        Raises:
            ConfigError: one can't be used; it is named.
        """
        for name, path in self.files.items():
            if not os.access(path, os.R_OK):
                raise ConfigError(f"{where}.{name}: there is no file that can be read, got the value {path!r}")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # It would ask on the terminal for the password of a key that has one.
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except (OSError, ValueError) as error:
            said = f"no certificate in PEM form and its key: {_ssl_words(error)}"
            message = f"{where}: certificate {self.certificate!r} and key {self.key!r} are {said}"
            raise ConfigError(message) from None
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (OSError, ValueError) as error:
                said = f"has no certificate in PEM form: {_ssl_words(error)}"
                raise ConfigError(f"{where}.client_ca: {self.client_ca!r} {said}") from None


class EdgeConfig(_Struct, kw_only=True, frozen=True):
    """Where clients come in."""

    host: str = "127.0.0.1"
    port: Port = 8080
    admin_port: Port | None = None
    """Envoy's own admin interface, on the loopback address; null takes a free port."""
    tls: TlsConfig | None = None
    """How clients are spoken to over TLS; null: in plain text."""
    client_timeout_seconds: Annotated[float, Meta(ge=1, le=3600)] = 30.0
    """How long a client may stand still: send nothing more of what it began, take nothing of its answer, or be gone
    without a word. Then it is given up, and what it asked for is stopped."""


class MeshConfig(_Struct, kw_only=True, frozen=True):
    """The whole mesh."""

    models: Annotated[list[ModelSettings], Meta(min_length=1)]
    pools: Annotated[list[PoolConfig], Meta(min_length=1)]
    routing: Policy = Policy()
    """Which model, which pools and how well, by what a request is; may be changed while the mesh runs."""
    routers: Annotated[int, Meta(ge=1, le=8)] = 1
    """Replicas of the router. The first one decides; the others know the fleet, too, and step in at once."""
    edge: EdgeConfig = EdgeConfig()
    otlp_endpoint: Address | None = None
    """Where spans go, over OTLP gRPC; null exports none."""
    tracing: TracingSettings = TracingSettings()
    """Which ones."""
    metrics_push: MetricsPushSettings | None = None
    """Where our processes' metrics go, over OTLP gRPC, beside being served for scrapes; null: nowhere."""
    redis_url: str | None = None
    """Where GPU readings are published besides gRPC and Prometheus, and replicas of the gateway share limits."""
    database_url: str | None = None
    """Where keys, usage and audit are, `postgresql://…`; null: a SQLite file in the state folder."""
    jwt: JwtSettings | None = None
    """Tokens of an identity provider that are taken beside keys; null: none."""
    ledger: LedgerSettings = LedgerSettings()
    """What a request costs, and how long that is known."""
    isolate_tenants: bool = True
    """Whether what one tenant's prompts leave in engines' caches serves that tenant alone. Where it serves all, the
    time to first token tells one tenant what another one has asked."""
    guardrails: GuardrailSettings = GuardrailSettings()
    """What prompts and answers must not have, by tenant."""
    batches: BatchSettings = BatchSettings()
    """Files, and the batches of requests that are made of them."""
    gateways: Annotated[int, Meta(ge=1, le=64)] = 1
    """Gateway processes behind the one edge. Without Redis each gives away its part of a key's limits."""
    drain_seconds: Annotated[float, Meta(ge=0, le=3600)] = 10.0
    """How long running streams may go on when the mesh is stopped."""

    def check(self, where: str) -> "MeshConfig":
        """Checks what one key says about another one, and returns itself.

        Raises:
            ConfigError: they don't fit.
        """
        adapters = [adapter.name for model in self.models for adapter in model.adapters]
        _check_unique(where, "models", [*(model.name for model in self.models), *adapters])
        _check_unique(where, "pools", [pool.name for pool in self.pools])
        workers = [worker.name for pool in self.pools for worker in pool.workers]
        _check_unique(where, "workers of pools", workers)
        _check_not_taken(where, workers, [*self.router_names, *self.gateway_names])
        for index, pool in enumerate(self.pools):
            self._check_pool(f"{where}: pools[{index}]", pool)
        _check_shares(where, self.pools)
        self.routing.check(f"{where}: routing", pools=self.pool_names, models=self.model_names)
        return self

    @property
    def gateway_names(self) -> list[str]:
        """One name a gateway process."""
        return ["gateway"] if self.gateways == 1 else [f"gateway-{index}" for index in range(self.gateways)]

    @property
    def pool_names(self) -> list[str]:
        """The pools, in order."""
        return [pool.name for pool in self.pools]

    @property
    def model_names(self) -> list[str]:
        """The models and their adapters, in order."""
        return [name for model in self.models for name in (model.name, *(adapter.name for adapter in model.adapters))]

    @property
    def router_names(self) -> list[str]:
        """The replicas of the router, the one that is used first."""
        return ["router", *(f"router-{number}" for number in range(1, self.routers))]

    @property
    def worker_count(self) -> int:
        """How many workers it has when all is well."""
        return sum(len(pool.workers) for pool in self.pools)

    def model(self, name: str) -> ModelSettings:
        """The model of a name that is checked."""
        return next(model for model in self.models if model.name == name)

    def check_folders(self, where: str) -> "MeshConfig":
        """Checks that the folders of models and the files of TLS are there, and returns itself.

        A Hugging Face id is no folder.

        Raises:
            ConfigError: one is missing.
        """
        if self.edge.tls is not None:
            self.edge.tls.check(f"{where}: edge.tls")
        for index, model in enumerate(self.models):
            if model.path is not None and model.path.startswith("/") and not Path(model.path).is_dir():
                raise ConfigError(f"{where}: models[{index}].path: there is no folder, got the value {model.path!r}")
            if model.adapters_dir is not None and not Path(model.adapters_dir).is_dir():
                raise ConfigError(
                    f"{where}: models[{index}].adapters_dir: there is no folder, got the value {model.adapters_dir!r}"
                )
        return self

    def _check_pool(self, where: str, pool: PoolConfig) -> None:
        _check_unique(where, "serves", pool.serves)
        known = [model.name for model in self.models]
        for name in pool.serves:
            if name not in known:
                raise ConfigError(f"{where}.serves: there is no model {name!r} among models, which has {_list(known)}")
        for index, worker in enumerate(pool.workers):
            self._check_worker(f"{where}.workers[{index}]", pool, worker)
        idle = set(pool.serves) - {pool.model_of(worker) for worker in pool.workers}
        if idle:
            raise ConfigError(f"{where}.serves: no worker of the pool runs {_list(sorted(idle))}")

    def _check_engine(self, where: str, worker: WorkerConfig, model: str) -> None:
        kind = {"sim": "the simulated engine", "openai": "a server with OpenAI's API"}.get(worker.engine)
        if kind is not None and worker.engine_args:
            raise ConfigError(f"{where}.engine_args: {kind} takes none, got the value {worker.engine_args!r}")
        if kind is not None and self.model(model).adapters_dir is not None:
            raise ConfigError(f"{where}: {kind} takes no adapters, but the model {model!r} has adapters_dir")
        if worker.engine != "sim" and worker.sim is not None:
            raise ConfigError(f"{where}.sim: for engine 'sim' alone, this worker's engine is {worker.engine!r}")
        if worker.engine != "openai" and worker.upstream is not None:
            raise ConfigError(f"{where}.upstream: for engine 'openai' alone, this worker's engine is {worker.engine!r}")
        if worker.engine == "openai" and worker.upstream is None:
            raise ConfigError(
                f"{where}.upstream: missing: engine 'openai' needs the url of the server that does the work"
            )

    def _check_worker(self, where: str, pool: PoolConfig, worker: WorkerConfig) -> None:
        if worker.model is None and len(pool.serves) > 1:
            raise ConfigError(
                f"{where}.model: missing: the pool serves {_list(pool.serves)}, say which this worker runs"
            )
        name = pool.model_of(worker)
        if name not in pool.serves:
            raise ConfigError(f"{where}.model: got the value {name!r}, expected one of the pool's {_list(pool.serves)}")
        self._check_engine(where, worker, name)
        if worker.engine == "vllm" and self.model(name).path is None and name != DEMO_MODEL:
            raise ConfigError(f"{where}: engine 'vllm' needs the path of its model, and models has none for {name!r}")
        if worker.engine == "vllm":
            check_engine_args(worker.engine_args, f"{where}.engine_args")
            _check_gpus(where, worker)


def demo_model(model: ModelSettings, path: str) -> ModelSettings:
    """What is said of a model that has no path: it is the one made here, in the folder `path`, and calls functions."""
    return msgspec.structs.replace(model, path=path, tool_call_parser=model.tool_call_parser or _DEMO_PARSER)


def load_mesh(path: Path) -> MeshConfig:
    """Reads a mesh.yaml. A path of a model that begins with `.` or `~` is made absolute; `.` is the file's folder.

    Raises:
        ConfigError: it can't be used.
    """
    raw = config.read(path)
    if isinstance(raw, dict) and "routing" in raw:
        # It names the key at fault more exactly.
        policy_from(raw["routing"], where=f"{path}: routing")
    mesh = config.convert(raw, MeshConfig, where=str(path)).check(str(path))
    return msgspec.structs.replace(
        mesh,
        models=[_with_paths(model, path.parent) for model in mesh.models],
        edge=_with_tls_paths(mesh.edge, path.parent),
    )


def parse_sim(text: str) -> SimSettings:
    """The settings that `--sim key=value,…` asks for.

    Raises:
        ConfigError: a key is unknown or a value doesn't fit.
    """
    raw: dict[str, float | str] = {}
    for part in filter(None, text.split(",")):
        key, separator, value = part.partition("=")
        if not separator:
            raise ConfigError(f"--sim: expected key=value, got the value {part!r}")
        if key not in SimSettings.__struct_fields__:
            known = ", ".join(SimSettings.__struct_fields__)
            raise ConfigError(f"--sim: there is no key {key!r}, got the value {value!r}; the keys are {known}")
        raw[key] = _number(value)
    return config.convert(raw, SimSettings, where="--sim")


def _number(text: str) -> float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _with_paths(model: ModelSettings, folder: Path) -> ModelSettings:
    adapters_dir = (
        None if model.adapters_dir is None else str((folder / Path(model.adapters_dir).expanduser()).resolve())
    )
    return msgspec.structs.replace(model, path=_resolved(model.path, folder), adapters_dir=adapters_dir)


def _with_tls_paths(edge: EdgeConfig, folder: Path) -> EdgeConfig:
    """Files of TLS are looked for beside the mesh.yaml, unless they are said to be elsewhere."""
    if edge.tls is None:
        return edge
    found = {name: str((folder / Path(path).expanduser()).resolve()) for name, path in edge.tls.files.items()}
    return msgspec.structs.replace(edge, tls=msgspec.structs.replace(edge.tls, **found))


def _ssl_words(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error).lower().replace("_", " ")


def _resolved(path: str | None, folder: Path) -> str | None:
    if path is None or not path.startswith((".", "~")):
        return path
    return str((folder / Path(path).expanduser()).resolve())


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
        if total > _MOST_MEMORY + _ROUNDING:
            names = _list([worker.name for worker in workers])
            raise ConfigError(
                f"{where}: gpu_memory_utilization: the workers {names} share gpu {gpu} and want {total:.2f} of its "
                f"memory together, expected at most {_MOST_MEMORY:g}"
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
