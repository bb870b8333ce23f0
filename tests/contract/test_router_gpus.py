"""GPU readings reach the scheduler: a real stream from a telemetry agent whose readings the test makes up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from tokenloom.telemetry.v1 import telemetry_pb2, telemetry_pb2_grpc

from services.common.rpc import serve
from services.router.fleet import Fleet
from services.router.gpus import GpuWatch
from tests.support.ports import free_port
from tests.support.router import gateway_session, running_router, worker_link
from tests.support.scheduling import Bench
from tests.support.waiting import eventually


class Agent(telemetry_pb2_grpc.TelemetryServiceServicer):
    """Streams what the test tells it to."""

    def __init__(self, *gpus: telemetry_pb2.Gpu) -> None:
        self._gpus = gpus
        self.watchers: list[asyncio.Queue[telemetry_pb2.WatchGpusResponse]] = []

    def say(self, *gpus: telemetry_pb2.Gpu, removed: tuple[str, ...] = ()) -> None:
        """These have changed, and those are gone."""
        for watcher in self.watchers:
            watcher.put_nowait(telemetry_pb2.WatchGpusResponse(gpus=gpus, removed_uuids=removed))

    async def ListGpus(self, request: telemetry_pb2.ListGpusRequest, context: Any) -> telemetry_pb2.ListGpusResponse:
        """All."""
        del request, context
        return telemetry_pb2.ListGpusResponse(gpus=self._gpus)

    async def WatchGpus(
        self, request: telemetry_pb2.WatchGpusRequest, context: Any
    ) -> AsyncIterator[telemetry_pb2.WatchGpusResponse]:
        """All first, then what is said."""
        del request, context
        watcher: asyncio.Queue[telemetry_pb2.WatchGpusResponse] = asyncio.Queue()
        self.watchers.append(watcher)
        yield telemetry_pb2.WatchGpusResponse(gpus=self._gpus)
        while True:
            yield await watcher.get()


@asynccontextmanager
async def serving(agent: Agent, port: int) -> AsyncIterator[None]:
    """The agent at a port of its own, until the block is left."""

    def register(server: grpc.aio.Server) -> list[str]:
        telemetry_pb2_grpc.add_TelemetryServiceServicer_to_server(agent, server)
        return []

    async with serve(f"127.0.0.1:{port}", register, grace_seconds=0):
        yield


def gpu(uuid: str, **reading: Any) -> telemetry_pb2.Gpu:
    """A healthy GPU, unless said otherwise."""
    return telemetry_pb2.Gpu(**{"uuid": uuid, "health": telemetry_pb2.GPU_HEALTH_HEALTHY, **reading})


async def test_a_lost_gpu_takes_its_worker_out_until_it_is_back() -> None:
    agent, port = Agent(gpu("GPU-0"), gpu("GPU-1")), free_port()
    async with (
        serving(agent, port),
        running_router(telemetry=[f"127.0.0.1:{port}"]) as (router, to_router),
        worker_link(router, to_router, "worker-0", gpu_uuids=("GPU-0",)),
        worker_link(router, to_router, "worker-1", gpu_uuids=("GPU-1",), endpoint="127.0.0.1:5002"),
        gateway_session(to_router) as gateway,
    ):
        await eventually(lambda: bool(agent.watchers), within=5)
        agent.say(gpu("GPU-0", health=telemetry_pb2.GPU_HEALTH_LOST))
        await eventually(lambda: router.fleet.workers[0].blocked == "gpu lost", within=5)
        assert {(await gateway.granted()).worker_id for _ in range(4)} == {"worker-1"}
        agent.say(gpu("GPU-0"))
        await eventually(lambda: not router.fleet.workers[0].blocked, within=5)


async def test_a_throttled_gpu_makes_its_worker_expensive() -> None:
    hot = gpu("GPU-0", temperature_celsius=91, throttle_reasons=["hw_thermal_slowdown"])
    agent, port = Agent(hot, gpu("GPU-1")), free_port()
    async with (
        serving(agent, port),
        running_router(telemetry=[f"127.0.0.1:{port}"]) as (router, to_router),
        worker_link(router, to_router, "worker-0", gpu_uuids=("GPU-0",)),
        worker_link(router, to_router, "worker-1", gpu_uuids=("GPU-1",), endpoint="127.0.0.1:5002"),
        gateway_session(to_router) as gateway,
    ):
        await eventually(lambda: router.fleet.workers[0].condition.slowdown > 1, within=5)
        assert (await gateway.granted(max_output_token_count=500)).worker_id == "worker-1"


async def test_an_agent_that_is_away_costs_nothing_and_is_found_when_it_comes() -> None:
    port = free_port()
    async with (
        running_router(telemetry=[f"127.0.0.1:{port}"]) as (router, to_router),
        worker_link(router, to_router, gpu_uuids=("GPU-0",)),
        gateway_session(to_router) as gateway,
    ):
        assert (await gateway.granted()).worker_id == "worker-0"
        async with serving(Agent(gpu("GPU-0", health=telemetry_pb2.GPU_HEALTH_LOST)), port):
            await eventually(lambda: router.fleet.workers[0].blocked == "gpu lost", within=3)


async def test_what_an_agent_said_is_forgotten_some_time_after_it_is_gone() -> None:
    bench, port = Bench(), free_port()
    worker = bench.worker(gpu_uuids=("GPU-0", "GPU-1"))
    hot = gpu("GPU-1", throttle_reasons=["hw_slowdown"])
    async with watching(port, bench.fleet):
        async with serving(Agent(gpu("GPU-0", health=telemetry_pb2.GPU_HEALTH_LOST), hot), port):
            await eventually(lambda: worker.condition.lost, within=3)
            # A lost GPU stays lost while its agent is there, heat that is not confirmed passes.
            await eventually(lambda: worker.condition.slowdown == 1.0, within=3)
            assert worker.condition.lost
        await eventually(lambda: not worker.condition.lost, within=3)


async def test_a_gpu_that_is_removed_is_forgotten() -> None:
    bench, port = Bench(), free_port()
    worker = bench.worker(gpu_uuids=("GPU-0",))
    agent = Agent(gpu("GPU-0", health=telemetry_pb2.GPU_HEALTH_LOST))
    async with serving(agent, port), watching(port, bench.fleet):
        await eventually(lambda: worker.condition.lost, within=3)
        agent.say(removed=("GPU-0",))
        await eventually(lambda: not worker.condition.lost, within=5)


@asynccontextmanager
async def watching(port: int, fleet: Fleet) -> AsyncIterator[None]:
    """Follows the agent at a port, and thinks of it as gone after 200 ms."""
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(GpuWatch(f"127.0.0.1:{port}", fleet, clock=loop.time, stale_seconds=0.2).run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
