"""python -m services.telemetry --config FILE: the agent of one node, or the hub that joins several."""

import asyncio
import logging
import socket
import sys
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from tokenloom.telemetry.v1 import telemetry_pb2, telemetry_pb2_grpc

from services.common.entry import start
from services.common.metrics import serve_metrics
from services.common.rpc import Server, serve
from services.common.settings import TelemetrySettings
from services.telemetry.board import Board
from services.telemetry.hub import Hub
from services.telemetry.metrics import TelemetryCollector
from services.telemetry.nvml import Nvml
from services.telemetry.processes import WorkerNames
from services.telemetry.publish import Publisher, connect
from services.telemetry.roster import Roster
from services.telemetry.sampler import Sampler, deadline_for
from services.telemetry.servicer import TelemetryServicer

_SERVICE = telemetry_pb2.DESCRIPTOR.services_by_name["TelemetryService"].full_name
_log = logging.getLogger(__name__)


async def run(settings: TelemetrySettings, stop: asyncio.Event) -> int:
    """Samples, serves and publishes until `stop` is set; returns the exit code."""
    try:
        redis = connect(settings.redis_url) if settings.redis_url is not None else None
    except ValueError as error:
        # Not the value: it may hold a password.
        sys.stderr.write(f"redis_url: {error}\n")
        return 2
    sampler = _sampler(settings)
    hub = Hub(settings.agents, local=sampler if settings.own_gpus else None) if _is_hub(settings) else None
    async with AsyncExitStack() as resources:
        publisher = None if redis is None else await _publisher(resources, redis, settings)
        registry = CollectorRegistry()
        registry.register(
            TelemetryCollector(
                sampler,
                publish_failures=lambda: 0 if publisher is None else publisher.failures,
                agents=lambda: {} if hub is None else hub.agents,
            )
        )
        metrics_port = resources.enter_context(serve_metrics("telemetry", settings, registry))
        board = sampler if hub is None else hub
        server = await resources.enter_async_context(serve(settings.listen, lambda it: _register(it, board)))
        _log.info("listening", extra={"grpc_port": server.port, "metrics_port": metrics_port})
        work: list[Coroutine[Any, Any, None]] = [_announce(board, server)]
        if settings.own_gpus:
            work.append(sampler.run())
        if hub is not None:
            work.append(hub.run())
        if publisher is not None and settings.own_gpus:
            work.append(publisher.run(sampler))
        await _work(work, stop)
    return 0


def _is_hub(settings: TelemetrySettings) -> bool:
    return bool(settings.agents) or not settings.own_gpus


def _sampler(settings: TelemetrySettings) -> Sampler:
    return Sampler(
        Nvml().read,
        Roster(settings.node or socket.gethostname(), worker_of=WorkerNames().of),
        period_seconds=settings.sample_seconds,
        deadline_seconds=deadline_for(settings.sample_seconds),
    )


async def _publisher(resources: AsyncExitStack, redis: Redis, settings: TelemetrySettings) -> Publisher:
    await resources.enter_async_context(redis)
    return Publisher(redis, period_seconds=settings.sample_seconds)


def _register(server: grpc.aio.Server, board: Board) -> Sequence[str]:
    telemetry_pb2_grpc.add_TelemetryServiceServicer_to_server(TelemetryServicer(board), server)
    return [_SERVICE]


async def _work(work: Sequence[Coroutine[Any, Any, None]], stop: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as tasks:
        owned = [tasks.create_task(each) for each in work]
        await stop.wait()
        # Watches end with what they watch, so that the server need not wait for them.
        for task in owned:
            task.cancel()


async def _announce(board: Board, server: Server) -> None:
    await board.first()
    await server.set_serving(True)


if __name__ == "__main__":
    sys.exit(start("telemetry", TelemetrySettings, run))
