"""Which processes a mesh is made of on this machine, and how each is started."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from services.common.settings import ProcessSettings, RouterSettings, TelemetrySettings
from services.common.settings_gateway import GatewaySettings
from services.common.settings_worker import ModelSettings, WorkerSettings
from services.mesh import settings_from
from services.mesh.config import MeshConfig, PoolConfig, WorkerConfig, demo_model
from services.mesh.envoy import Edge, bootstrap
from services.mesh.envoy_binary import find_envoy
from services.mesh.envoy_tls import EdgeTls
from services.mesh.ports import PortPicker
from services.mesh.probe import Probe, grpc_health, http_ok
from services.mesh.state import State

__all__ = ["ProcessPlan", "database_of", "plan_processes"]

_HOST: Final = "127.0.0.1"
_START_SECONDS: Final = 60.0
# Weights may come over a network, and kernels are compiled at the first start.
_MODEL_START_SECONDS: Final = 1800.0
_MOST_EDGE_THREADS: Final = 4
_MODEL_CACHE: Final = str(Path("~/.cache/tokenloom/models").expanduser())


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPlan:
    """One process: what it is, how it is started, and how it is asked whether it is ready."""

    name: str
    service: str
    """The package of `services` that it is, or "envoy"."""
    label: str
    """What people are told it is."""
    command: tuple[str, ...]
    config: str
    """Its configuration, JSON."""
    ports: dict[str, int]
    ready: Probe = field(compare=False)
    start_seconds: float = _START_SECONDS
    """Longest that a start may take."""


def plan_processes(mesh: MeshConfig, state: State) -> list[ProcessPlan]:
    """Every process of a mesh, with its ports. Free ports are looked for at each call."""
    return list(_Planner(mesh, state).plans())


def database_of(mesh: MeshConfig, state: State) -> str:
    """Where keys, usage and audit of a mesh on this machine are."""
    return mesh.database_url or str(state.keys.resolve())


class _Planner:
    def __init__(self, mesh: MeshConfig, state: State) -> None:
        self._mesh = mesh
        self._state = state
        self._ports = PortPicker(_HOST)

    def plans(self) -> Iterator[ProcessPlan]:
        """In the order in which a request needs them last to first."""
        telemetry = self._python(
            "telemetry",
            "telemetry",
            TelemetrySettings,
            redis_url=self._mesh.redis_url,
            **settings_from.telemetry(self._mesh),
        )
        yield telemetry
        routers = [self._router(name, _grpc(telemetry)) for name in self._mesh.router_names]
        yield from routers
        addresses = [_grpc(router) for router in routers]
        workers = [self._worker(pool, worker, addresses) for pool in self._mesh.pools for worker in pool.workers]
        yield from workers
        gateways = [self._gateway(name, routers) for name in self._mesh.gateway_names]
        yield from gateways
        yield self._envoy(telemetry=telemetry, routers=routers, gateways=gateways, workers=workers)

    def _router(self, name: str, telemetry: str) -> ProcessPlan:
        port = self._ports.pick()
        return self._python(
            name,
            "router",
            RouterSettings,
            more_ports={"picker": port},
            picker=f"{_HOST}:{port}",
            telemetry=[telemetry],
            policy_path=str(self._state.policy.resolve()),
            **settings_from.router(self._mesh),
        )

    def _worker(self, pool: PoolConfig, worker: WorkerConfig, routers: list[str]) -> ProcessPlan:
        port = self._ports.pick()
        return self._python(
            worker.name,
            "inference",
            WorkerSettings,
            grpc_port=port,
            label=worker.engine,
            start_seconds=_START_SECONDS if worker.engine == "sim" else _MODEL_START_SECONDS,
            advertise=f"{_HOST}:{port}",
            routers=routers,
            model=self._model(pool, worker),
            gpu=worker.gpu,
            model_cache=self._mesh.model_cache or _MODEL_CACHE,
            **settings_from.worker(self._mesh, pool, worker),
        )

    def _model(self, pool: PoolConfig, worker: WorkerConfig) -> ModelSettings:
        model = self._mesh.model(pool.model_of(worker))
        if worker.engine == "vllm" and model.path is None:
            return demo_model(model, str(self._state.demo_model.resolve()))
        return model

    def _gateway(self, name: str, routers: list[ProcessPlan]) -> ProcessPlan:
        port = self._ports.pick()
        return self._python(
            name,
            "gateway",
            GatewaySettings,
            more_ports={"http": port},
            ready=http_ok(f"http://{_HOST}:{port}/readyz"),
            http=f"{_HOST}:{port}",
            routers=[_grpc(router) for router in routers],
            router_sessions=[_picker(router) for router in routers],
            database=database_of(self._mesh, self._state),
            journal=str(self._state.folder.resolve() / f"journal-{name}"),
            redis_url=self._mesh.redis_url,
            **settings_from.gateway(self._mesh),
        )

    def _python(
        self,
        name: str,
        service: str,
        shape: type[ProcessSettings],
        *,
        grpc_port: int | None = None,
        more_ports: dict[str, int] | None = None,
        ready: Probe | None = None,
        label: str | None = None,
        start_seconds: float = _START_SECONDS,
        **settings: Any,
    ) -> ProcessPlan:
        """One of our own services; `settings` are those that not every one has."""
        ports = {
            "grpc": grpc_port if grpc_port is not None else self._ports.pick(),
            **(more_ports or {}),
            "metrics": self._ports.pick(),
        }
        listen = f"{_HOST}:{ports['grpc']}"
        written = shape(
            name=name,
            listen=listen,
            metrics=f"{_HOST}:{ports['metrics']}",
            **settings_from.every_process(self._mesh),
            **settings,
        )
        return ProcessPlan(
            name=name,
            service=service,
            label=label or service,
            command=(sys.executable, "-m", f"services.{service}", "--config", str(self._state.config(name))),
            config=msgspec.json.format(msgspec.json.encode(written)).decode(),
            ports=ports,
            ready=ready or grpc_health(listen),
            start_seconds=start_seconds,
        )

    def _envoy(
        self,
        *,
        telemetry: ProcessPlan,
        routers: list[ProcessPlan],
        gateways: list[ProcessPlan],
        workers: list[ProcessPlan],
    ) -> ProcessPlan:
        ports = {
            "http": self._mesh.edge.port,
            "admin": self._mesh.edge.admin_port or self._ports.pick(),
            "fallback": self._ports.pick(),
        }
        tls = self._mesh.edge.tls
        if tls is not None:
            # Whoever runs commands here need not know whom the certificate is for, nor show one.
            ports["operators"] = self._ports.pick()
        edge = Edge(
            listen=f"{self._mesh.edge.host}:{ports['http']}",
            admin=f"{_HOST}:{ports['admin']}",
            gateways=tuple(f"{_HOST}:{gateway.ports['http']}" for gateway in gateways),
            accounting=tuple((gateway.name, _grpc(gateway)) for gateway in gateways),
            router=_grpc(routers[0]),
            picker=_picker(routers[0]),
            standby_routers=tuple(_grpc(router) for router in routers[1:]),
            standby_pickers=tuple(_picker(router) for router in routers[1:]),
            telemetry=_grpc(telemetry),
            workers=tuple(_grpc(worker) for worker in workers),
            fallback=f"{_HOST}:{ports['fallback']}",
            otlp=self._mesh.otlp_endpoint,
            sample_ratio=self._mesh.tracing.sample_ratio,
            client_timeout=self._mesh.edge.client_timeout_seconds,
            tls=None if tls is None else EdgeTls(**msgspec.structs.asdict(tls)),
            operators=None if tls is None else f"{_HOST}:{ports['operators']}",
        )
        # What it says at level info before it has read the bootstrap would not be JSON.
        options = ("--disable-hot-restart", "--file-flush-interval-msec", "200", "--log-level", "warning")
        threads = str(min(_MOST_EDGE_THREADS, os.cpu_count() or 1))
        return ProcessPlan(
            name="envoy",
            service="envoy",
            label="edge",
            command=(str(find_envoy()), "-c", str(self._state.config("envoy")), "--concurrency", threads, *options),
            config=json.dumps(bootstrap(edge), indent=2),
            ports=ports,
            ready=http_ok(f"http://{_HOST}:{ports['admin']}/ready"),
        )


def _picker(plan: ProcessPlan) -> str:
    return f"{_HOST}:{plan.ports['picker']}"


def _grpc(plan: ProcessPlan) -> str:
    return f"{_HOST}:{plan.ports['grpc']}"
