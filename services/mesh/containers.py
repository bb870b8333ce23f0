"""The same mesh in containers: one network, a fixed address for each container, the same ports in all of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Any, Final, Literal

import msgspec

from services.common.object_store import is_in_store
from services.common.policy import Policy
from services.common.settings import ProcessSettings, RouterSettings, TelemetrySettings
from services.common.settings_gateway import GatewaySettings
from services.common.settings_worker import WorkerSettings
from services.mesh import settings_from
from services.mesh.config import MeshConfig, PoolConfig, WorkerConfig, demo_model
from services.mesh.envoy import Edge
from services.mesh.envoy_tls import EdgeTls

__all__ = [
    "DEMO_FOLDER",
    "ENVOY_IMAGE",
    "FETCHED_FOLDER",
    "JWKS_FILE",
    "METRICS_PORT",
    "NETWORK",
    "POLICY_FILE",
    "REDIS_IMAGE",
    "STATE_FOLDER",
    "TLS_FILES",
    "Container",
    "containers",
    "edge_of",
    "jwks_of",
]

NETWORK: Final = IPv4Network("172.28.0.0/24")
ENVOY_IMAGE: Final = "envoyproxy/envoy:v1.40.0"
REDIS_IMAGE: Final = "redis:8-alpine"
STATE_FOLDER: Final = "/var/lib/tokenloom"
DEMO_FOLDER: Final = "/models/demo"
FETCHED_FOLDER: Final = "/models/fetched"
"""Where a worker's container has the volume with models that were in S3."""
TLS_FILES: Final = {
    "certificate": "/run/secrets/edge/tls.crt",
    "key": "/run/secrets/edge/tls.key",
    "client_ca": "/run/secrets/edge/ca.crt",
}
"""Where the edge's container has what mesh.yaml names under edge.tls."""
POLICY_FILE: Final = "/run/policy/policy.json"
"""Where routers have the policy, which they follow: its folder is mounted, so that the file can be replaced."""
JWKS_FILE: Final = "/run/jwks/jwks.json"
"""Where gateways have the file that mesh.yaml names under jwt.jwks."""
_GRPC: Final = 50051
_PICKER: Final = 50052
_HTTP: Final = 8000
METRICS_PORT: Final = 9100
_ADMIN: Final = 9901
_FALLBACK: Final = 9902
_ANY: Final = "0.0.0.0"  # noqa: S104  # inside a container, whose network is the mesh's alone
_REDIS_URL: Final = "redis://redis:6379/0"
# The first addresses of the network are Docker's own.
_FIRST_HOST: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """One of our own services in a container."""

    name: str
    service: str
    address: str
    """Its IP address: the edge takes workers by address, never by name."""
    settings: ProcessSettings
    worker: WorkerConfig | None = None
    model_path: str | None = None
    """The folder, Hugging Face id or URL that a worker loads."""
    adapters_dir: str | None = None
    """The folder that it may take adapters from."""

    @property
    def fetches(self) -> Literal["hub", "store"] | None:
        """Where its model comes from, when it is no folder."""
        if self.model_path is None or self.model_path.startswith("/"):
            return None
        return "store" if is_in_store(self.model_path) else "hub"


def jwks_of(mesh: MeshConfig) -> str | None:
    """The file with the keys of the identity provider; None where there is none, or its keys are at a URL."""
    jwks = None if mesh.jwt is None else mesh.jwt.jwks
    return None if jwks is None or jwks.startswith(("http://", "https://")) else jwks


def containers(mesh: MeshConfig) -> list[Container]:
    """The containers of a mesh, Envoy and Redis aside."""
    return list(_containers(mesh))


def edge_of(mesh: MeshConfig) -> Edge:
    """How the edge finds the others from its own container."""
    tls = mesh.edge.tls
    return Edge(
        listen=f"{_ANY}:{mesh.edge.port}",
        admin=f"127.0.0.1:{mesh.edge.admin_port or _ADMIN}",
        gateways=tuple(f"{name}:{_HTTP}" for name in mesh.gateway_names),
        accounting=tuple((name, f"{name}:{_GRPC}") for name in mesh.gateway_names),
        router=f"router:{_GRPC}",
        picker=f"router:{_PICKER}",
        standby_routers=tuple(f"{name}:{_GRPC}" for name in mesh.router_names[1:]),
        standby_pickers=tuple(f"{name}:{_PICKER}" for name in mesh.router_names[1:]),
        telemetry=f"telemetry:{_GRPC}",
        workers=tuple(f"{one.address}:{_GRPC}" for one in _containers(mesh) if one.worker is not None),
        fallback=f"127.0.0.1:{_FALLBACK}",
        otlp=mesh.otlp_endpoint,
        sample_ratio=mesh.tracing.sample_ratio,
        client_timeout=mesh.edge.client_timeout_seconds,
        tls=None if tls is None else EdgeTls(minimum=tls.minimum, **{name: TLS_FILES[name] for name in tls.files}),
    )


def _containers(mesh: MeshConfig) -> Iterator[Container]:
    hosts = (str(NETWORK[index]) for index in range(_FIRST_HOST, NETWORK.num_addresses - 1))
    telemetry = TelemetrySettings(
        **_everywhere(mesh, "telemetry"),
        redis_url=mesh.redis_url or _REDIS_URL,
        **settings_from.telemetry(mesh),
    )
    yield Container(name="telemetry", service="telemetry", address=next(hosts), settings=telemetry)
    for name in mesh.router_names:
        router = RouterSettings(
            **_everywhere(mesh, name),
            picker=f"{_ANY}:{_PICKER}",
            telemetry=[f"telemetry:{_GRPC}"],
            # The policy is not in the settings, for which a process would have to start again.
            **{**settings_from.router(mesh), "routing": Policy()},
            policy_path=POLICY_FILE,
        )
        yield Container(name=name, service="router", address=next(hosts), settings=router)
    for name in mesh.gateway_names:
        yield _gateway(mesh, name, next(hosts))
    for pool in mesh.pools:
        for worker in pool.workers:
            yield _worker(mesh, pool, worker, next(hosts))


def _everywhere(mesh: MeshConfig, name: str) -> dict[str, Any]:
    """What the settings of each process have."""
    return {
        "name": name,
        "listen": f"{_ANY}:{_GRPC}",
        "metrics": f"{_ANY}:{METRICS_PORT}",
        **settings_from.every_process(mesh),
    }


def _gateway(mesh: MeshConfig, name: str, address: str) -> Container:
    said = settings_from.gateway(mesh)
    if mesh.jwt is not None and jwks_of(mesh) is not None:
        said["jwt"] = msgspec.structs.replace(mesh.jwt, jwks=JWKS_FILE)
    settings = GatewaySettings(
        **_everywhere(mesh, name),
        http=f"{_ANY}:{_HTTP}",
        routers=[f"{name}:{_GRPC}" for name in mesh.router_names],
        router_sessions=[f"{name}:{_PICKER}" for name in mesh.router_names],
        database=mesh.database_url or f"{STATE_FOLDER}/keys.db",
        journal=f"{STATE_FOLDER}/journal-{name}",
        redis_url=mesh.redis_url or _REDIS_URL,
        **said,
    )
    return Container(name=name, service="gateway", address=address, settings=settings)


def _worker(mesh: MeshConfig, pool: PoolConfig, worker: WorkerConfig, address: str) -> Container:
    model = mesh.model(pool.model_of(worker))
    if worker.engine == "vllm" and model.path is None:
        model = demo_model(model, DEMO_FOLDER)
    settings = WorkerSettings(
        **_everywhere(mesh, worker.name),
        advertise=f"{address}:{_GRPC}",
        routers=[f"{name}:{_GRPC}" for name in mesh.router_names],
        model=model,
        gpu=_gpu_inside(worker.gpu),
        model_cache=FETCHED_FOLDER,
        **settings_from.worker(mesh, pool, worker),
    )
    return Container(
        name=worker.name,
        service="inference",
        address=address,
        settings=settings,
        worker=worker,
        model_path=model.path if worker.engine == "vllm" else None,
        adapters_dir=model.adapters_dir,
    )


def _gpu_inside(gpu: int | str | None) -> int | str | None:
    """A container sees the cards that it is given, and counts them from 0."""
    count = 0 if gpu is None else len(str(gpu).split(","))
    if count > 1:
        return ",".join(map(str, range(count)))
    return None if gpu is None else 0
