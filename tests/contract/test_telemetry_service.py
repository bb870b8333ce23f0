"""TelemetryService over real gRPC, with a driver that says what the test wants."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from tokenloom.telemetry.v1 import telemetry_pb2 as pb
from tokenloom.telemetry.v1 import telemetry_pb2_grpc

from services.common.rpc import channel, serve
from services.telemetry.gpu import Card, Driver, DriverState, Process, Reading, Scan
from services.telemetry.roster import Roster
from services.telemetry.sampler import Sampler
from services.telemetry.servicer import TelemetryServicer
from tests.support.waiting import eventually

READY = Driver(state=DriverState.READY, version="570.86.10")
FULL = Reading(
    utilization_percent=91,
    memory_utilization_percent=40,
    memory_used_bytes=10 << 30,
    memory_total_bytes=45 << 30,
    temperature_celsius=71,
    power_watts=250.5,
    power_limit_watts=300.0,
    sm_clock_mhz=2490,
    memory_clock_mhz=9001,
    throttle_reasons=("sw_power_cap",),
    uncorrected_ecc_error_count=0,
    processes=(Process(pid=12, memory_used_bytes=1 << 30), Process(pid=13, memory_used_bytes=None)),
)


def card(index: int, reading: Reading = FULL) -> Card:
    return Card(index=index, uuid=f"GPU-{index}", name="NVIDIA L40", reading=reading)


class FarEnd:
    """The driver."""

    def __init__(self, *cards: Card) -> None:
        self.scan = Scan(driver=READY, cards=cards)
        self.answers = threading.Event()
        self.answers.set()

    def show(self, *cards: Card) -> None:
        self.scan = Scan(driver=READY, cards=cards)

    def read(self) -> Scan:
        self.answers.wait(10)
        return self.scan


class Agent:
    """A served sampler and a stub of it."""

    def __init__(self, sampler: Sampler, stub: "telemetry_pb2_grpc.TelemetryServiceAsyncStub") -> None:
        self.sampler = sampler
        self.stub = stub
        self.running: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        assert self.running is not None
        self.running.cancel()
        await asyncio.wait({self.running})


@asynccontextmanager
async def serving(far_end: FarEnd, *, samples: bool = True) -> AsyncIterator[Agent]:
    sampler = Sampler(
        far_end.read, Roster("node-1"), period_seconds=0.01, deadline_seconds=0.2, clock=lambda: 1_700_000_000.25
    )

    def register(server: grpc.aio.Server) -> Sequence[str]:
        telemetry_pb2_grpc.add_TelemetryServiceServicer_to_server(TelemetryServicer(sampler), server)
        return ["tokenloom.telemetry.v1.TelemetryService"]

    async with (
        serve("127.0.0.1:0", register, grace_seconds=0) as server,
        channel(f"127.0.0.1:{server.port}") as connection,
        asyncio.TaskGroup() as tasks,
    ):
        agent = Agent(sampler, telemetry_pb2_grpc.TelemetryServiceStub(connection))
        if samples:
            agent.running = tasks.create_task(sampler.run())
        yield agent
        if agent.running is not None:
            await agent.stop()
        far_end.answers.set()


async def next_of(stream: AsyncIterator[pb.WatchGpusResponse]) -> pb.WatchGpusResponse:
    return await asyncio.wait_for(anext(stream), 5)


async def test_a_list_carries_every_field() -> None:
    async with serving(FarEnd(card(0))) as agent:
        answer = await agent.stub.ListGpus(pb.ListGpusRequest(), timeout=5)

    (gpu,) = answer.gpus
    assert answer.driver == pb.Driver(state=pb.DRIVER_STATE_READY, version="570.86.10")
    assert gpu.sample_time.ToMilliseconds() == 1_700_000_000_250
    gpu.ClearField("sample_time")
    assert gpu == pb.Gpu(
        uuid="GPU-0",
        index=0,
        name="NVIDIA L40",
        node="node-1",
        health=pb.GPU_HEALTH_HEALTHY,
        utilization_percent=91,
        memory_utilization_percent=40,
        memory_used_bytes=10 << 30,
        memory_total_bytes=45 << 30,
        temperature_celsius=71,
        power_watts=250.5,
        power_limit_watts=300.0,
        sm_clock_mhz=2490,
        memory_clock_mhz=9001,
        throttle_reasons=["sw_power_cap"],
        uncorrected_ecc_error_count=0,
        processes=[pb.GpuProcess(pid=12, memory_used_bytes=1 << 30), pb.GpuProcess(pid=13)],
    )


async def test_a_zero_is_sent_and_an_unknown_is_absent() -> None:
    async with serving(FarEnd(card(0, Reading(utilization_percent=0)))) as agent:
        answer = await agent.stub.ListGpus(pb.ListGpusRequest(), timeout=5)

    (gpu,) = answer.gpus
    present = {field.name for field, _ in gpu.ListFields()}
    assert present == {"uuid", "name", "node", "sample_time", "health", "utilization_percent"}


async def test_a_watch_starts_with_everything_and_goes_on_with_what_changed() -> None:
    far_end = FarEnd(card(0), card(1))
    async with serving(far_end) as agent:
        watch = aiter(agent.stub.WatchGpus(pb.WatchGpusRequest()))
        first = await next_of(watch)
        far_end.show(card(0), card(1, replace(FULL, utilization_percent=3)))
        second = await next_of(watch)
        far_end.show(card(0))
        third = await next_of(watch)

    assert [gpu.uuid for gpu in first.gpus] == ["GPU-0", "GPU-1"]
    assert [(gpu.uuid, gpu.utilization_percent) for gpu in second.gpus] == [("GPU-1", 3)]
    assert (list(third.gpus), list(third.removed_uuids)) == ([], ["GPU-1"])


async def test_calls_before_the_first_sample_wait_for_it() -> None:
    far_end = FarEnd(card(0))
    far_end.answers.clear()
    async with serving(far_end) as agent:
        listing = asyncio.ensure_future(agent.stub.ListGpus(pb.ListGpusRequest(), timeout=5))
        watch = aiter(agent.stub.WatchGpus(pb.WatchGpusRequest()))
        far_end.answers.set()

        assert len((await listing).gpus) == 1
        assert len((await next_of(watch)).gpus) == 1


async def test_a_driver_that_hangs_is_failed_and_its_cards_are_lost() -> None:
    far_end = FarEnd(card(0))
    async with serving(far_end) as agent:
        watch = aiter(agent.stub.WatchGpus(pb.WatchGpusRequest()))
        await next_of(watch)
        far_end.answers.clear()
        hanging = await next_of(watch)
        far_end.answers.set()
        back = await next_of(watch)

    assert hanging.driver == pb.Driver(state=pb.DRIVER_STATE_FAILED, message="the NVIDIA driver does not answer")
    assert [gpu.health for gpu in hanging.gpus] == [pb.GPU_HEALTH_LOST]
    assert back.driver.state == pb.DRIVER_STATE_READY
    assert [gpu.health for gpu in back.gpus] == [pb.GPU_HEALTH_HEALTHY]


async def test_watches_end_well_when_sampling_stops() -> None:
    async with serving(FarEnd(card(0))) as agent:
        call = agent.stub.WatchGpus(pb.WatchGpusRequest())
        watch = aiter(call)
        await next_of(watch)
        await agent.stop()

        with pytest.raises(StopAsyncIteration):
            await next_of(watch)
        assert await call.code() is grpc.StatusCode.OK


async def test_a_list_that_never_gets_a_sample_is_refused() -> None:
    far_end = FarEnd()
    far_end.answers.clear()
    async with serving(far_end) as agent:
        listing = asyncio.ensure_future(agent.stub.ListGpus(pb.ListGpusRequest(), timeout=5))
        await asyncio.wait({listing}, timeout=0.05)
        await agent.stop()

        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await listing

    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_watcher_that_does_not_read_skips_to_the_latest() -> None:
    far_end = FarEnd(card(0, Reading(utilization_percent=0)))
    async with serving(far_end) as agent:
        changes = agent.sampler.changes()
        await anext(changes)
        for percent in range(1, 6):
            far_end.show(card(0, Reading(utilization_percent=percent)))
            await eventually(lambda percent=percent: _utilization(agent.sampler) == percent, within=5)  # type: ignore[misc]
        change = await anext(changes)
        await changes.aclose()

    assert [gpu.reading.utilization_percent for gpu in change.gpus] == [5]


async def test_two_hundred_watchers_that_leave_leave_nothing_behind() -> None:
    far_end = FarEnd(card(0))
    async with serving(far_end) as agent:
        before = len(asyncio.all_tasks())
        calls = [agent.stub.WatchGpus(pb.WatchGpusRequest()) for _ in range(200)]
        for call in calls:
            await next_of(aiter(call))
        for call in calls:
            call.cancel()

        await eventually(lambda: len(asyncio.all_tasks()) <= before + 2, within=10)


def _utilization(sampler: Sampler) -> int | None:
    assert sampler.latest is not None
    return sampler.latest.gpus[0].reading.utilization_percent
