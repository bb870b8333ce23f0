"""A worker's registration with its routers, over real gRPC."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from tokenloom.router.v1 import router_pb2, router_pb2_grpc

from services.common import rpc
from services.common.errors import Reason
from services.common.prefix import salt_of, token_block_hashes
from services.common.settings_worker import SimSettings
from services.common.status import error_from_call
from services.inference.engine import Load
from services.inference.gpus import gpu_uuids
from services.inference.sim_engine import SimEngine
from tests.support.measured import measured
from tests.support.ports import free_port
from tests.support.waiting import eventually
from tests.support.workers import registered, sim_worker, worker_config, worker_process

READY, DRAINING, UNAVAILABLE = (
    router_pb2.WORKER_STATE_READY,
    router_pb2.WORKER_STATE_DRAINING,
    router_pb2.WORKER_STATE_UNAVAILABLE,
)


class RecordingRouter(router_pb2_grpc.RouterServiceServicer):
    """The far end: keeps what workers say, and says what a test wants said."""

    def __init__(self) -> None:
        self.registrations: list[router_pb2.Registration] = []
        self.loads: list[router_pb2.LoadReport] = []
        self.events: list[router_pb2.KvCacheEvents] = []
        self.times: list[float] = []
        self.streams = 0
        self.commands: asyncio.Queue[router_pb2.RegisterResponse | None] = asyncio.Queue()

    def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[router_pb2.SessionResponse]:
        raise NotImplementedError

    async def Register(
        self, request_iterator: AsyncIterator[router_pb2.RegisterRequest], context: Any
    ) -> AsyncIterator[router_pb2.RegisterResponse]:
        del context
        self.streams += 1
        reader = asyncio.ensure_future(self._read(request_iterator))
        try:
            yield router_pb2.RegisterResponse(registered=router_pb2.Registered())
            while (command := await self.commands.get()) is not None:
                yield command
        finally:
            self.streams -= 1
            reader.cancel()

    @property
    def state(self) -> router_pb2.WorkerState.ValueType | None:
        return self.loads[-1].state if self.loads else None

    async def _read(self, requests: AsyncIterator[router_pb2.RegisterRequest]) -> None:
        async for request in requests:
            if request.HasField("registration"):
                self.registrations.append(request.registration)
            elif request.HasField("kv_cache_events"):
                self.events.append(request.kv_cache_events)
            else:
                self.loads.append(request.load)
                self.times.append(asyncio.get_running_loop().time())


@asynccontextmanager
async def router_at(address: str = "127.0.0.1:0") -> AsyncIterator[tuple[RecordingRouter, str]]:
    recorder = RecordingRouter()

    def register(server: Any) -> list[str]:
        router_pb2_grpc.add_RouterServiceServicer_to_server(recorder, server)
        return ["tokenloom.router.v1.RouterService"]

    async with rpc.serve(address, register, grace_seconds=0) as server:
        yield recorder, f"127.0.0.1:{server.port}"


async def test_a_worker_says_who_it_is_and_then_how_it_is() -> None:
    async with sim_worker() as worker, router_at() as (router, address), registered(worker, address):
        await eventually(lambda: len(router.loads) >= 3, within=5)
    assert router.registrations == [
        router_pb2.Registration(
            worker_id="sim-0",
            endpoint=worker.address,
            models=[
                inference_pb2.ModelCard(
                    name="sim",
                    max_context_token_count=worker.engine.card.max_context_tokens,
                    capabilities=[
                        inference_pb2.CAPABILITY_GENERATE,
                        inference_pb2.CAPABILITY_CHAT,
                        inference_pb2.CAPABILITY_LOGPROBS,
                    ],
                    vocabulary_size=worker.engine.card.vocabulary_size,
                )
            ],
            engine="sim",
            pool="p",
            gpu_uuids=["GPU-1"],
            max_running_count=64,
            kv_cache_token_count=65536,
            kv_block_token_count=16,
        )
    ]
    assert router.loads[0] == router_pb2.LoadReport(state=READY)


@measured
async def test_reports_keep_coming_while_nothing_happens() -> None:
    async with sim_worker() as worker, router_at() as (router, address), registered(worker, address):
        await eventually(lambda: len(router.loads) >= 6, within=5)
    gaps = [after - before for before, after in zip(router.times, router.times[1:], strict=False)]
    assert max(gaps) < 0.25


@measured
async def test_a_worker_that_has_nothing_to_do_says_so_no_more_often_than_it_must() -> None:
    async with sim_worker() as worker, router_at() as (router, address), registered(worker, address):
        await eventually(lambda: len(router.loads) >= 6, within=5)
    assert router.times[5] - router.times[0] > 5 * 0.15


@measured
async def test_a_change_is_reported_soon_and_a_measurement_with_it() -> None:
    sim = SimSettings(decode_step_ms=5)
    async with sim_worker(sim) as worker, router_at() as (router, address), registered(worker, address):
        await eventually(lambda: bool(router.loads), within=5)
        call = worker.inference.Generate(pb.GenerateRequest(model="sim", text="hello there " * 100))
        await eventually(lambda: router.loads[-1].running_count == 1, within=0.15)
        await call.read()
        await eventually(lambda: router.loads[-1].HasField("decode_step_duration"), within=5)
        assert router.loads[-1].kv_usage_ratio > 0
        call.cancel()
        await eventually(lambda: router.loads[-1].running_count == 0, within=0.15)


async def test_what_the_prefix_cache_holds_is_told_to_every_router_in_the_names_of_the_mesh() -> None:
    prompt = list(range(40))
    request = pb.GenerateRequest(
        model="sim", token_ids=pb.TokenIds(ids=prompt), sampling=pb.SamplingParameters(max_tokens=1)
    )
    expected = token_block_hashes(prompt, 16, salt=salt_of("sim"))
    async with sim_worker() as worker, router_at() as (first, one), registered(worker, one):
        await eventually(lambda: [event.cleared for event in first.events] == [True], within=5)
        assert [event async for event in worker.inference.Generate(request)]
        await eventually(lambda: len(first.events) == 2, within=5)
        assert list(first.events[1].stored_hashes) == expected
        assert [event.sequence_number for event in first.events] == [1, 2]
        async with router_at() as (second, two), registered(worker, two):
            await eventually(lambda: bool(second.events), within=5)
            assert second.events[0] == router_pb2.KvCacheEvents(sequence_number=1, cleared=True, stored_hashes=expected)
        await worker.worker.ReloadWeights(worker_pb2.ReloadWeightsRequest())
        await eventually(lambda: len(first.events) == 3, within=5)
        assert first.events[2] == router_pb2.KvCacheEvents(sequence_number=3, cleared=True)


async def test_a_worker_that_sleeps_says_so_and_takes_work_again_when_it_is_woken() -> None:
    request = pb.GenerateRequest(model="sim", text="x", sampling=pb.SamplingParameters(max_tokens=500))
    async with (
        sim_worker(SimSettings(decode_step_ms=5)) as worker,
        router_at() as (router, address),
        registered(worker, address),
    ):
        running = worker.inference.Generate(request)
        await running.read()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await worker.worker.Sleep(worker_pb2.SleepRequest())
        assert error_from_call(raised.value).reason is Reason.FAILED_PRECONDITION
        running.cancel()
        await eventually(lambda: worker.is_idle, within=5)
        await worker.worker.Sleep(worker_pb2.SleepRequest())
        await eventually(lambda: router.state == router_pb2.WORKER_STATE_ASLEEP, within=5)
        assert router.loads[-1].state_reason == "the worker is asleep"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await worker.inference.Generate(request).read()
        assert error_from_call(raised.value).reason is Reason.NO_READY_WORKER
        await worker.worker.Wake(worker_pb2.WakeRequest())
        await eventually(lambda: router.state == READY, within=5)


async def test_every_router_is_told_and_a_hanging_one_holds_up_nobody() -> None:
    async with sim_worker() as worker, router_at() as (first, one), router_at() as (second, two):
        # The kernel takes the connection, and nobody ever says a word on it.
        with socket.create_server(("127.0.0.1", 0)) as silent:
            hanging, absent = f"127.0.0.1:{silent.getsockname()[1]}", f"127.0.0.1:{free_port()}"
            async with registered(worker, one, hanging, absent, two):
                await eventually(lambda: len(first.loads) >= 3 and len(second.loads) >= 3, within=5)


async def test_a_router_that_comes_back_is_registered_with_again() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with sim_worker() as worker, registered(worker, address):
        async with router_at(address) as (before, _):
            await eventually(lambda: bool(before.loads), within=5)
        async with router_at(address) as (after, _):
            await eventually(lambda: bool(after.loads), within=5)


async def test_a_router_that_ends_the_stream_gets_a_new_one() -> None:
    async with sim_worker() as worker, router_at() as (router, address), registered(worker, address):
        await eventually(lambda: bool(router.loads), within=5)
        await router.commands.put(None)
        await eventually(lambda: len(router.registrations) == 2, within=5)


async def test_a_router_may_drain_a_worker_and_take_it_back() -> None:
    async with sim_worker() as worker, router_at() as (router, address), registered(worker, address):
        await router.commands.put(router_pb2.RegisterResponse(drain=router_pb2.DrainCommand()))
        await eventually(lambda: router.state == DRAINING, within=5)
        await router.commands.put(router_pb2.RegisterResponse(undrain=router_pb2.UndrainCommand()))
        await eventually(lambda: router.state == READY, within=5)
        worker.gate.stop()
        await router.commands.put(router_pb2.RegisterResponse(undrain=router_pb2.UndrainCommand()))
        await eventually(lambda: router.state == DRAINING, within=5)


async def test_a_dead_engine_is_reported() -> None:
    alive = True

    class Mortal(SimEngine):
        @property
        def load(self) -> Load:
            return replace(super().load, trouble="" if alive else "it died")

    async with sim_worker(make_engine=Mortal) as worker, router_at() as (router, address), registered(worker, address):
        await eventually(lambda: router.state == READY, within=5)
        alive = False
        await eventually(lambda: router.state == UNAVAILABLE, within=5)
        assert router.loads[-1].state_reason == "it died"
        alive = True
        await eventually(lambda: router.state == READY, within=5)


async def test_a_worker_process_registers_drains_and_leaves(tmp_path: Path) -> None:
    async with router_at() as (router, address):
        config = worker_config(sim=SimSettings(decode_step_ms=5), routers=[address], gpu="GPU-of-a-test", pool="large")
        async with worker_process(config, tmp_path) as process, rpc.channel(process.address) as channel:
            await eventually(lambda: router.state == READY, within=5)
            registration = router.registrations[0]
            assert (registration.worker_id, registration.endpoint) == ("sim-0", process.address)
            assert (registration.pool, list(registration.gpu_uuids)) == ("large", ["GPU-of-a-test"])
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
                pb.GenerateRequest(model="sim", text="x", sampling=pb.SamplingParameters(max_tokens=100))
            )
            await call.read()
            process.terminate()
            await eventually(lambda: router.state == DRAINING, within=5)
            assert await process.exit_code(within=5) == 0
            await eventually(lambda: router.streams == 0, within=5)


async def test_a_killed_worker_is_gone_at_once(tmp_path: Path) -> None:
    async with (
        router_at() as (router, address),
        worker_process(worker_config(routers=[address]), tmp_path) as process,
    ):
        await eventually(lambda: router.state == READY, within=5)
        os.kill(process.process.pid, signal.SIGKILL)
        await eventually(lambda: router.streams == 0, within=5)


@pytest.mark.parametrize(
    ("gpu", "environment", "expected"),
    [
        (None, {}, []),
        (None, {"CUDA_VISIBLE_DEVICES": ""}, []),
        (None, {"CUDA_VISIBLE_DEVICES": "-1"}, []),
        (None, {"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"}, ["GPU-a", "GPU-b"]),
        ("GPU-c", {"CUDA_VISIBLE_DEVICES": "GPU-a"}, ["GPU-c"]),
    ],
)
def test_the_gpus_of_a_worker_are_named(
    gpu: int | str | None, environment: dict[str, str], expected: list[str]
) -> None:
    assert gpu_uuids(gpu, environment) == expected


def test_an_index_without_nvml_names_no_gpu() -> None:
    if not Path("/proc/driver/nvidia").exists():
        assert gpu_uuids(0, {}) == []
