"""A worker before its engine is up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import grpc.aio
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2_grpc

from services.common import rpc
from services.common.errors import Reason
from services.common.settings_worker import WorkerSettings
from services.common.status import error_from_call
from services.inference.engine import Engine
from services.inference.worker import Worker
from tests.support.workers import worker_config


class LoadingWorker(Worker):
    """A worker whose engine takes its time, or fails."""

    loaded: asyncio.Event
    error: Exception | None = None

    def _make_engine(self) -> AbstractAsyncContextManager[Engine]:
        return self._load_engine(super()._make_engine())

    @asynccontextmanager
    async def _load_engine(self, engine: AbstractAsyncContextManager[Engine]) -> AsyncIterator[Engine]:
        await self.loaded.wait()
        if self.error is not None:
            raise self.error
        async with engine as started:
            yield started


@asynccontextmanager
async def loading_worker() -> AsyncIterator[tuple[LoadingWorker, grpc.aio.Channel, asyncio.Event, asyncio.Task[int]]]:
    settings = msgspec.convert(worker_config(), WorkerSettings)
    worker, stop = LoadingWorker(settings), asyncio.Event()
    worker.loaded = asyncio.Event()
    running = asyncio.create_task(worker.run(stop))
    async with rpc.channel(settings.listen) as channel:
        await asyncio.wait_for(channel.channel_ready(), 5)
        yield worker, channel, stop, running
    stop.set()
    await asyncio.wait([running], timeout=5)


async def watch(channel: grpc.aio.Channel, wanted: str) -> None:
    async with asyncio.timeout(5):
        async for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
            if health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) == wanted:
                return


async def generate(channel: grpc.aio.Channel) -> str:
    request = pb.GenerateRequest(model="sim", text="x", sampling=pb.SamplingParameters(max_tokens=4))
    events = [event async for event in inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)]
    return "".join(event.delta.text for event in events)


async def test_a_worker_answers_probes_and_refuses_work_until_its_engine_is_up() -> None:
    async with loading_worker() as (worker, channel, _stop, _running):
        await watch(channel, "NOT_SERVING")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await generate(channel)
        assert error_from_call(raised.value).reason == Reason.NO_READY_WORKER
        worker.loaded.set()
        await watch(channel, "SERVING")
        assert await generate(channel)


async def test_a_worker_that_is_stopped_while_it_loads_ends_at_once() -> None:
    async with loading_worker() as (_worker, _channel, stop, running):
        stop.set()
        assert await asyncio.wait_for(running, 3) == 0


async def test_a_worker_whose_engine_can_not_start_ends_with_its_error() -> None:
    async with loading_worker() as (worker, _channel, _stop, running):
        worker.error = RuntimeError("no such model")
        worker.loaded.set()
        with pytest.raises(ExceptionGroup, match="unhandled errors") as raised:
            await asyncio.wait_for(running, 3)
        assert "no such model" in repr(raised.value.exceptions)
