"""Puts a worker together: its engine, its services, its registration; starts them and stops them in order."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Final

import grpc.aio
from prometheus_client import CollectorRegistry

from services.common import rpc, tracing
from services.common.errors import MeshError, Reason
from services.common.metrics import serve_metrics
from services.common.settings_worker import WorkerSettings
from services.inference.engine import Engine, Load
from services.inference.gate import Gate, State
from services.inference.generations import Generations
from services.inference.gpus import gpu_uuids
from services.inference.lifecycle import Lifecycle
from services.inference.metrics import LoadCollector, VllmCollector, WorkerMetrics
from services.inference.model_fetch import with_local_model
from services.inference.openai_engine import OpenAIEngine
from services.inference.registration import Registration, registration_to_proto
from services.inference.servicer import InferenceServicer, WorkerServicer, register
from services.inference.sim_engine import SimEngine
from services.inference.sim_pooling import SimPooler
from services.inference.spans import Spans

__all__ = ["Worker"]

_log = logging.getLogger(__name__)
_HEALTH_SECONDS: Final = 0.2
_GRACE_SECONDS: Final = 2.0
_RETRY_SECONDS: Final = 1.0


class Worker:
    """One worker process."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._gate = Gate()
        self._registry = CollectorRegistry()
        self._registry.register(LoadCollector(self._load))
        if settings.engine == "vllm":
            self._registry.register(VllmCollector())
        tracer = tracing.tracer() if settings.otlp_endpoint else None
        self._generations = Generations(
            Spans(tracer, worker=settings.name),
            WorkerMetrics(self._registry),
            isolates_tenants=settings.isolate_tenants,
        )
        self._inference = InferenceServicer(
            self._gate, self._generations, worker=settings.name, client_seconds=settings.client_timeout_seconds
        )
        lifecycle = Lifecycle(self._gate, self._generations, drain_seconds=settings.drain_seconds)
        self._sessions = WorkerServicer(self._gate, self._generations, lifecycle)

    async def run(self, stop: asyncio.Event) -> int:
        """Serves until `stop` is set, then drains; returns the exit code."""
        settings = self._settings
        with serve_metrics("inference", settings, self._registry) as metrics_port:
            # Probes get an answer while the engine starts, which may take minutes.
            async with rpc.serve(
                settings.listen,
                self._register,
                grace_seconds=_GRACE_SECONDS,
                # A submission of a session is a request of any size that is taken, and a little more.
                max_message_bytes=2 * rpc.MAX_MESSAGE_BYTES,
            ) as server:
                _log.info("listening", extra={"grpc_port": server.port, "metrics_port": metrics_port})
                async with asyncio.TaskGroup() as tasks:
                    serving = tasks.create_task(self._serve(server, stop))
                    impatient = tasks.create_task(self._give_start_up(serving, stop))
                    await asyncio.wait({serving})
                    impatient.cancel()
        _log.info("stopped")
        return 0

    async def _give_start_up(self, serving: "asyncio.Task[None]", stop: asyncio.Event) -> None:
        await stop.wait()
        if self._gate.state is State.STARTING:
            serving.cancel()

    async def _serve(self, server: rpc.Server, stop: asyncio.Event) -> None:
        self._settings = await with_local_model(self._settings)
        async with self._make_engine() as engine:
            self._gate.open(engine)
            async with asyncio.TaskGroup() as tasks:
                health = tasks.create_task(self._report_health(server))
                registration = tasks.create_task(self._registration(engine, server.port).keep(self._settings.routers))
                await stop.wait()
                await self._drain()
                health.cancel()
                registration.cancel()
        self._gate.close()

    def _make_engine(self) -> AbstractAsyncContextManager[Engine]:
        settings = self._settings
        if settings.engine == "sim":
            return self._make_sim()
        if settings.engine == "openai":
            return OpenAIEngine(settings)
        from services.inference.vllm_engine import VllmEngine  # noqa: PLC0415  # vLLM takes seconds to import

        return VllmEngine(settings)

    @asynccontextmanager
    async def _make_sim(self) -> AsyncIterator[Engine]:
        settings = self._settings
        if settings.sim.runner == "pooling":
            async with SimPooler(settings.sim, settings.model.name, settings.max_queued) as pooler:
                yield pooler
            return
        simulated = SimEngine(settings.sim, settings.model.name, settings.max_queued, watchdog=settings.watchdog)
        async with simulated as engine:
            with engine.life.obeying_signals():
                yield engine

    def _registration(self, engine: Engine, port: int) -> Registration:
        settings = self._settings
        host, _, advertised = settings.advertise.rpartition(":")
        who = registration_to_proto(
            engine.card,
            worker_id=settings.name,
            endpoint=settings.advertise if int(advertised) else f"{host}:{port}",
            pool=settings.pool,
            gpus=gpu_uuids(settings.gpu, os.environ),
        )
        return Registration(
            who, self._gate, report_seconds=settings.report_seconds, abandoned=self._inference.abandoned.recent
        )

    async def _report_health(self, server: rpc.Server) -> None:
        told = None
        while True:
            ready = self._gate.state is State.READY
            if self._gate.state is State.UNAVAILABLE:
                # Generations are failed by their engine.
                self._inference.pooling.fail_all(MeshError(Reason.ENGINE_FAILED, "the engine failed"))
            if ready != told:
                told = ready
                _log.info("serving" if ready else "not serving", extra={"state": self._gate.state.value})
                await server.set_serving(ready)
            await asyncio.sleep(_HEALTH_SECONDS)

    async def _drain(self) -> None:
        self._gate.stop()
        stopping = MeshError(Reason.NO_READY_WORKER, "this worker is stopping", retry_after_seconds=_RETRY_SECONDS)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._generations.finish(self._settings.drain_seconds, stopping))
            tasks.create_task(self._finish_pooling(stopping))
        self._sessions.close()

    async def _finish_pooling(self, stopping: MeshError) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._inference.pooling.wait_idle()
        self._inference.pooling.fail_all(stopping)

    def _register(self, server: grpc.aio.Server) -> list[str]:
        return register(server, self._inference, self._sessions)

    def _load(self) -> Load | None:
        return None if self._gate.state is State.STARTING else self._gate.engine.load
