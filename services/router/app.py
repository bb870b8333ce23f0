"""The router as a whole: who gets what through its constructor, one gRPC server for all, and one for the edge."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc.aio
from envoy.service.ext_proc.v3 import external_processor_pb2, external_processor_pb2_grpc
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry
from tokenloom.router.v1 import admin_pb2, admin_pb2_grpc, router_pb2, router_pb2_grpc

from services.common.errors import MeshError, Reason
from services.common.metrics import serve_metrics
from services.common.rpc import serve
from services.common.settings import RouterSettings
from services.common.tracing import tracer as process_tracer
from services.router.admin import AdminServicer
from services.router.admission import Admission, Observer
from services.router.decisions import Decisions
from services.router.edge_picker import EdgePicker
from services.router.exchange import MAX_SHOWN_BYTES
from services.router.fleet import Clock, Fleet
from services.router.gpus import GpuWatch
from services.router.http2 import Open
from services.router.memory import AnswerLengths
from services.router.metrics import FleetCollector, RouterMetrics
from services.router.operations import Operations
from services.router.picker import Picker
from services.router.policy import Policies
from services.router.policy_file import PolicyFile
from services.router.prefixes import Prefixes
from services.router.scheduler import Scheduler
from services.router.servicer import SESSION_PATH, RouterServicer
from services.router.worker import Worker

__all__ = ["RunningRouter", "running"]

# Streams are ended from this side first, so that only unary calls are waited for.
_GRACE_SECONDS: Final = 1.0
# As the endpoint picker protocol has them, beside the name of the service.
_HEALTH_NAMES: Final = ("liveness", "readiness")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRouter:
    """A router that serves. Its parts are there for whoever runs it in process.

    Attributes:
        port: where it serves gRPC.
        picker_port: where it serves the endpoint picker for our own edge; 0: nowhere.
        metrics_port: where it serves Prometheus metrics.
    """

    port: int
    picker_port: int
    metrics_port: int
    fleet: Fleet
    admission: Admission
    policies: Policies


@asynccontextmanager
async def running(settings: RouterSettings, *, tracer: Tracer | None = None) -> AsyncIterator[RunningRouter]:
    """Runs a router until the block is left. Then requests that wait are refused, and every stream is ended cleanly.

    Raises:
        OSError: an address is in use or not ours.
        ConfigError: the routing policy of the settings does not fit them.
    """
    registry = CollectorRegistry()
    core = _Core(settings, RouterMetrics(registry))
    registry.register(FleetCollector(core.fleet, core.admission, core.policies, core.clock))
    doors = _Doors(core, tracer or process_tracer(), fallbacks=settings.picker_fallbacks)
    with serve_metrics("router", settings, registry) as metrics_port:
        core.policy_file.load()
        async with (
            serve(
                settings.listen,
                doors.register,
                grace_seconds=_GRACE_SECONDS,
                max_message_bytes=MAX_SHOWN_BYTES,
                health_names=_HEALTH_NAMES,
            ) as server,
            doors.edge(settings.picker) as picker_port,
            _background(core, settings.telemetry),
            core.operations.calling(),
        ):
            await server.set_serving(True)
            try:
                yield RunningRouter(
                    port=server.port,
                    picker_port=picker_port,
                    metrics_port=metrics_port,
                    fleet=core.fleet,
                    admission=core.admission,
                    policies=core.policies,
                )
            finally:
                await server.set_serving(False)
                doors.close()


@asynccontextmanager
async def _background(core: "_Core", telemetry: Sequence[str]) -> AsyncIterator[None]:
    watches = [GpuWatch(address, core.fleet, clock=core.clock) for address in telemetry]
    works = (core.admission.keep_deadlines(), core.policies.follow(), core.policy_file.watch())
    async with asyncio.TaskGroup() as tasks:
        running_tasks = [tasks.create_task(work) for work in (*works, *map(GpuWatch.run, watches))]
        try:
            yield
        finally:
            for task in running_tasks:
                task.cancel()


class _Core:
    """The router without its network."""

    def __init__(self, settings: RouterSettings, observer: Observer) -> None:
        self.clock: Clock = time.monotonic
        self.fleet = Fleet(self.clock)
        self.decisions = Decisions()
        self.operations = Operations(self.fleet, self.clock)
        self.policies = Policies(
            self.fleet,
            settings.routing,
            clock=self.clock,
            pools=settings.pools,
            models=settings.models,
            expected_workers=settings.expected_workers,
        )
        path = settings.policy_path
        self.policy_file = PolicyFile(None if path is None else Path(path), self.policies)
        lengths, prefixes = AnswerLengths(), Prefixes(isolates_tenants=settings.isolate_tenants)
        self.prefixes = prefixes
        # Who wins a tie is no secret.
        rng = random.Random()  # noqa: S311
        self.admission = Admission(
            fleet=self.fleet,
            scheduler=Scheduler(self.fleet, prefixes, lengths, clock=self.clock, rng=rng),
            policies=self.policies,
            prefixes=prefixes,
            lengths=lengths,
            decisions=self.decisions,
            observer=observer,
            clock=self.clock,
            max_waiting=settings.max_waiting,
            max_wait_seconds=settings.max_wait_seconds,
            ready_grace_seconds=settings.ready_grace_seconds,
        )


class _Doors:
    """The servicers of the gRPC server, and the edge's picker on a server of its own."""

    def __init__(self, core: _Core, tracer: Tracer, *, fallbacks: int) -> None:
        self._admission = core.admission
        self._picker = Picker(core.admission, tracer, fallbacks=fallbacks)
        self._edge_picker = EdgePicker(core.admission, tracer)
        self._inside = RouterServicer(core.fleet, core.admission, core.prefixes, tracer, abandon=self._abandon)
        self._admin = AdminServicer(
            fleet=core.fleet,
            admission=core.admission,
            decisions=core.decisions,
            policies=core.policies,
            policy_file=core.policy_file,
            operations=core.operations,
            clock=core.clock,
        )

    def _abandon(self, worker: Worker, request_ids: Collection[str]) -> None:
        self._edge_picker.abandon(worker, request_ids)
        self._picker.abandon(worker, request_ids)

    @asynccontextmanager
    async def edge(self, address: str | None) -> AsyncIterator[int]:
        """Serves the edge's picker and gateways' sessions leanly, where it is wanted; yields the port or 0."""
        if address is None:
            yield 0
            return
        beside: dict[str, Open] = {SESSION_PATH: self._inside.open}
        async with self._edge_picker.serve(address, grace_seconds=_GRACE_SECONDS, beside=beside) as port:
            yield port

    def register(self, server: grpc.aio.Server) -> list[str]:
        """Adds them, and names their services."""
        router_pb2_grpc.add_RouterServiceServicer_to_server(self._inside, server)
        admin_pb2_grpc.add_RouterAdminServiceServicer_to_server(self._admin, server)
        external_processor_pb2_grpc.add_ExternalProcessorServicer_to_server(self._picker, server)
        files = (router_pb2, admin_pb2, external_processor_pb2)
        return [name.full_name for file in files for name in file.DESCRIPTOR.services_by_name.values()]

    def close(self) -> None:
        """Answers those who wait, and ends every stream."""
        self._admission.refuse_all(MeshError(Reason.NO_READY_WORKER, "the router stops", retry_after_seconds=1.0))
        self._inside.close()
        self._admin.close()
        self._picker.close()
        self._edge_picker.close()
