"""What a mesh.yaml says: the fleet, described once for the launcher and for containers."""

from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from services.common.policy import Policy
from services.common.settings import (
    Address,
    Count,
    Fallbacks,
    LogLevel,
    MetricsPushSettings,
    Name,
    SampleSeconds,
    TracingSettings,
    Waiting,
)
from services.common.settings_gateway import BatchSettings, JwtSettings, LedgerSettings
from services.common.settings_guardrails import GuardrailSettings
from services.common.settings_worker import ModelSettings, SimSettings, UpstreamSettings, WatchdogSettings

__all__ = [
    "DEMO_MODEL",
    "MOST_MEMORY",
    "EdgeConfig",
    "MeshConfig",
    "PoolConfig",
    "TlsConfig",
    "WorkerConfig",
    "demo_model",
]

DEMO_MODEL: Final = "demo"
"""The model that the launcher makes itself when it has no path."""

MOST_MEMORY: Final = 0.98
"""Share of a card's memory that its workers may take together."""

_DEMO_PARSER: Final = "hermes"

DnsLabel = Annotated[str, Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Port = Annotated[int, Meta(ge=1, le=65535)]


class _Struct(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    pass


class WorkerConfig(_Struct, kw_only=True, frozen=True):
    """One engine."""

    name: Name
    """What it is called in metrics, logs and commands."""
    engine: Literal["vllm", "sim", "openai"] = "vllm"
    """vLLM here, a simulation, or a server with OpenAI's API anywhere."""
    model: str | None = None
    """Which of the pool's models it runs; may be left out where the pool serves one."""
    gpu: int | str | None = None
    """CUDA device by index or UUID (`GPU-…`, `MIG-…`), several with commas between; null on a CPU."""
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=MOST_MEMORY)] = 0.8
    """Share of the card's memory that vLLM may take; never all of it, since the driver and others need some."""
    engine_args: dict[str, Any] = {}
    """Further arguments of vLLM's AsyncEngineArgs, by their Python names."""
    sim: SimSettings | None = None
    """How fast and how large a simulated engine is; for `engine: sim` alone."""
    upstream: UpstreamSettings | None = None
    """The server that does the work; for `engine: openai` alone."""
    watchdog: WatchdogSettings = WatchdogSettings()
    """When an engine that makes no progress is given up."""
    max_queued: Annotated[int, Meta(ge=0, le=65_536)] = 64
    """Requests that may wait inside the engine beyond those that run; the next one goes elsewhere, or waits in the
    router."""


class PoolConfig(_Struct, kw_only=True, frozen=True):
    """Workers that serve the same models."""

    name: Name
    serves: Annotated[list[str], Meta(min_length=1)]
    """Names of `models`."""
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


class EdgeConfig(_Struct, kw_only=True, frozen=True):
    """Where clients come in."""

    host: str = "127.0.0.1"
    """The address that it listens at: this one for this machine alone, 0.0.0.0 for others, too."""
    port: Port = 8080
    """For HTTP and gRPC."""
    admin_port: Port | None = None
    """Envoy's own admin interface, on the loopback address; null takes a free port."""
    tls: TlsConfig | None = None
    """How clients are spoken to over TLS; null: in plain text."""
    client_timeout_seconds: Annotated[float, Meta(ge=1, le=3600)] = 30.0
    """How long a client may stand still: send nothing more of what it began, take nothing of its answer, or be gone
    without a word. Then it is given up, and what it asked for is stopped."""
    replicas: Annotated[int, Meta(ge=1, le=64)] = 1
    """Edges behind one service in Kubernetes; the launcher and compose run one."""

    @property
    def address(self) -> IPv4Address | IPv6Address | None:
        """The host as an address; None where it is a name, by which clients know the machine."""
        if self.host == "localhost":
            return ip_address("127.0.0.1")
        try:
            return ip_address(self.host)
        except ValueError:
            return None


class InferenceGatewayConfig(_Struct, kw_only=True, frozen=True):
    """A gateway of the Gateway API, with its inference extension, in front of workers in Kubernetes."""

    name: DnsLabel
    """Of the Gateway."""
    namespace: DnsLabel | None = None
    """Where it and its pods are, which may reach routers and workers then; null: with the mesh."""


class MeshConfig(_Struct, kw_only=True, frozen=True):
    """The whole mesh."""

    models: Annotated[list[ModelSettings], Meta(min_length=1)]
    """What is served; a worker runs one of them."""
    pools: Annotated[list[PoolConfig], Meta(min_length=1)]
    """The workers, by what they serve; routing chooses among pools."""
    routing: Policy = Policy()
    """Which model, which pools and how well, by what a request is; may be changed while the mesh runs."""
    routers: Annotated[int, Meta(ge=1, le=8)] = 1
    """Replicas of the router. The first one decides; the others know the fleet, too, and step in at once."""
    edge: EdgeConfig = EdgeConfig()
    """Where clients come in."""
    inference_gateway: InferenceGatewayConfig | None = None
    """A gateway of others that asks the router which worker gets a call of the typed API; null: our edge alone does."""
    otlp_endpoint: Address | None = None
    """Where spans go, over OTLP gRPC; null exports none."""
    tracing: TracingSettings = TracingSettings()
    """Which ones."""
    metrics_push: MetricsPushSettings | None = None
    """Where our processes' metrics go, over OTLP gRPC, beside being served for scrapes; null: nowhere."""
    redis_url: str | None = None
    """Where GPU readings are published besides gRPC and Prometheus, and replicas of the gateway share limits and
    conversations."""
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
    model_cache: Annotated[str, Meta(min_length=1)] | None = None
    """The folder of this machine that models in S3 are fetched into; null: `~/.cache/tokenloom/models`. Containers have
    a volume for it."""
    max_waiting: Waiting = 1024
    """Requests that may wait in the router for a worker; the next one is refused with 429, `no_capacity`."""
    max_wait_seconds: Annotated[float, Meta(gt=0, le=3600)] = 60.0
    """Longest that a request waits there, whatever its class allows."""
    request_timeout_seconds: Annotated[float, Meta(gt=0, le=86_400)] = 600.0
    """Longest that a request over the OpenAI API may take, its wait included."""
    fleet_memory_seconds: Annotated[float, Meta(ge=0, le=3600)] = 60.0
    """How long gateways place requests among the workers that were ready last while no router answers."""
    new_forms_per_minute: Count = 120
    """Forms of outputs, such as JSON schemas, that a tenant may bring to a worker that were not compiled before."""
    picker_fallbacks: Fallbacks = 0
    """Further endpoints that other gateways than our own edge are named after the one picked."""
    sample_seconds: SampleSeconds = 1.0
    """Between two readings of the GPUs."""
    log_level: LogLevel = "info"
    """Of every process but Envoy."""
    drain_seconds: Annotated[float, Meta(ge=0, le=3600)] = 10.0
    """How long running streams may go on when the mesh is stopped."""

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


def demo_model(model: ModelSettings, path: str) -> ModelSettings:
    """What is said of a model that has no path: it is the one made here, in the folder `path`, and calls functions."""
    return msgspec.structs.replace(model, path=path, tool_call_parser=model.tool_call_parser or _DEMO_PARSER)
