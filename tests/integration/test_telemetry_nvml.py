"""The real telemetry process over the real pynvml, with a stub of NVIDIA's library under it."""

import asyncio
import ctypes
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenloom.telemetry.v1 import telemetry_pb2 as pb
from tokenloom.telemetry.v1 import telemetry_pb2_grpc

from services.common.rpc import channel
from tests.support.nvml.agent import TelemetryAgent, telemetry_agent
from tests.support.nvml.stub import L40, NOT_LOADED, RTX_4090, Card, NvmlStub

SECOND_L40 = replace(L40, uuid="GPU-l40-2")
FLEET = (L40, SECOND_L40, RTX_4090)
LOST, RESET_REQUIRED, UNKNOWN = 15, 16, 999
SAMPLE_SECONDS = 0.1
LONG_SAMPLE_SECONDS = 0.4
ABSENT = pb.Driver(state=pb.DRIVER_STATE_ABSENT, message="no NVIDIA driver on this machine")


@pytest.fixture
def stub(tmp_path: Path) -> NvmlStub:
    stub = NvmlStub(tmp_path)
    stub.show(FLEET)
    return stub


@pytest.fixture
def agent(tmp_path: Path, stub: NvmlStub) -> Iterator[TelemetryAgent]:
    with telemetry_agent(tmp_path, environment=stub.environment) as agent:
        yield agent


class Watcher:
    """What somebody who watches knows of the fleet."""

    def __init__(self, stream: AsyncIterator[pb.WatchGpusResponse]) -> None:
        self._stream = stream
        self.driver = pb.Driver()
        self.gpus: dict[str, pb.Gpu] = {}

    async def sees(self, check: Callable[["Watcher"], bool], *, within: float = 5) -> float:
        """Follows until `check` holds; returns the seconds that it took."""
        started = time.monotonic()
        async with asyncio.timeout(within):
            while not check(self):
                self._take(await anext(self._stream))
        return time.monotonic() - started

    async def sees_health(self, uuid: str, health: "pb.GpuHealth.ValueType", *, within: float = 5) -> float:
        return await self.sees(lambda it: uuid in it.gpus and it.gpus[uuid].health == health, within=within)

    def _take(self, change: pb.WatchGpusResponse) -> None:
        self.driver = change.driver
        self.gpus.update({gpu.uuid: gpu for gpu in change.gpus})
        for uuid in change.removed_uuids:
            del self.gpus[uuid]


@asynccontextmanager
async def watching(agent: TelemetryAgent) -> AsyncIterator[Watcher]:
    async with channel(agent.target) as connection:
        stub = telemetry_pb2_grpc.TelemetryServiceStub(connection)
        yield Watcher(aiter(stub.WatchGpus(pb.WatchGpusRequest(), wait_for_ready=True)))


async def fleet_of(agent: TelemetryAgent) -> pb.ListGpusResponse:
    async with channel(agent.target) as connection:
        stub = telemetry_pb2_grpc.TelemetryServiceStub(connection)
        answer: pb.ListGpusResponse = await stub.ListGpus(pb.ListGpusRequest(), timeout=10, wait_for_ready=True)
        return answer


async def test_three_unequal_cards_are_seen_with_all_that_they_report(agent: TelemetryAgent) -> None:
    fleet = await fleet_of(agent)

    assert fleet.driver == pb.Driver(state=pb.DRIVER_STATE_READY, version="570.86.10")
    assert [(gpu.index, gpu.uuid, gpu.name, gpu.memory_total_bytes >> 30) for gpu in fleet.gpus] == [
        (0, "GPU-l40", "NVIDIA L40", 45),
        (1, "GPU-l40-2", "NVIDIA L40", 45),
        (2, "GPU-4090", "NVIDIA GeForce RTX 4090", 24),
    ]
    first = fleet.gpus[0]
    assert abs(first.sample_time.ToNanoseconds() / 1e9 - time.time()) < 5
    first.ClearField("sample_time")
    assert first == pb.Gpu(
        uuid="GPU-l40",
        name="NVIDIA L40",
        node="node-1",
        health=pb.GPU_HEALTH_HEALTHY,
        utilization_percent=10,
        memory_utilization_percent=5,
        memory_used_bytes=1 << 30,
        memory_total_bytes=45 << 30,
        temperature_celsius=40,
        power_watts=60.5,
        power_limit_watts=300.0,
        sm_clock_mhz=1500,
        memory_clock_mhz=9001,
        uncorrected_ecc_error_count=0,
    )


async def test_what_a_card_does_not_report_is_absent(agent: TelemetryAgent, stub: NvmlStub) -> None:
    silent = Card(
        uuid="GPU-silent",
        name="A card that reports nothing",
        **dict.fromkeys(("memory_total", "memory_used", "utilization", "memory_utilization", "temperature")),
        **dict.fromkeys(("power_mw", "power_limit_mw", "sm_clock", "memory_clock", "clock_reasons", "ecc_uncorrected")),
    )
    stub.show([silent, replace(L40, power_mw=f"!{UNKNOWN}")])
    async with watching(agent) as watcher:
        await watcher.sees(lambda it: it.gpus.keys() == {"GPU-silent", "GPU-l40"})

    present = {field.name for field, _ in watcher.gpus["GPU-silent"].ListFields()}
    assert present == {"uuid", "name", "node", "sample_time", "health"}
    assert not watcher.gpus["GPU-l40"].HasField("power_watts")
    assert watcher.gpus["GPU-l40"].health == pb.GPU_HEALTH_HEALTHY


async def test_processes_come_with_their_memory_where_the_driver_tells(agent: TelemetryAgent, stub: NvmlStub) -> None:
    stub.show([replace(L40, processes="4242:4096 17:-")])
    async with watching(agent) as watcher:
        await watcher.sees(lambda it: len(it.gpus) == 1 and len(it.gpus["GPU-l40"].processes) == 2)

    assert list(watcher.gpus["GPU-l40"].processes) == [
        pb.GpuProcess(pid=17),
        pb.GpuProcess(pid=4242, memory_used_bytes=4096),
    ]


async def test_throttling_is_named_and_degrades(agent: TelemetryAgent, stub: NvmlStub) -> None:
    async with watching(agent) as watcher:
        await watcher.sees_health("GPU-l40", pb.GPU_HEALTH_HEALTHY)
        stub.show([replace(L40, clock_reasons=0x44), SECOND_L40, RTX_4090])
        await watcher.sees_health("GPU-l40", pb.GPU_HEALTH_DEGRADED)
        hot = watcher.gpus["GPU-l40"]
        stub.show(FLEET)
        await watcher.sees_health("GPU-l40", pb.GPU_HEALTH_HEALTHY)

    assert list(hot.throttle_reasons) == ["sw_power_cap", "hw_thermal_slowdown"]
    assert hot.health_reason == "throttled by hw_thermal_slowdown"
    assert watcher.gpus["GPU-l40-2"].health == pb.GPU_HEALTH_HEALTHY


@pytest.mark.parametrize("error", [LOST, RESET_REQUIRED, UNKNOWN])
async def test_a_lost_card_is_told_within_two_samples(agent: TelemetryAgent, stub: NvmlStub, error: int) -> None:
    async with watching(agent) as watcher:
        await watcher.sees_health("GPU-l40-2", pb.GPU_HEALTH_HEALTHY)
        stub.show([L40, replace(SECOND_L40, error=error), RTX_4090])
        took = await watcher.sees_health("GPU-l40-2", pb.GPU_HEALTH_LOST)

    lost = watcher.gpus["GPU-l40-2"]
    assert took < 2 * SAMPLE_SECONDS + 1  # and what a busy machine takes
    assert (lost.name, lost.index) == ("NVIDIA L40", 1)
    assert not lost.HasField("memory_used_bytes")
    assert lost.health_reason.startswith("it does not answer: ")
    assert watcher.gpus["GPU-l40"].health == pb.GPU_HEALTH_HEALTHY


async def test_a_card_that_was_reset_is_found_again(agent: TelemetryAgent, stub: NvmlStub) -> None:
    async with watching(agent) as watcher:
        stub.show([L40, replace(SECOND_L40, error=LOST), RTX_4090])
        await watcher.sees_health("GPU-l40-2", pb.GPU_HEALTH_LOST)
        stub.show(FLEET)
        await watcher.sees_health("GPU-l40-2", pb.GPU_HEALTH_HEALTHY)


async def test_memory_pressure_degrades_until_it_is_well_below(agent: TelemetryAgent, stub: NvmlStub) -> None:
    total = 45 << 30
    async with watching(agent) as watcher:
        stub.show([replace(L40, memory_used=int(total * 0.99))])
        await watcher.sees_health("GPU-l40", pb.GPU_HEALTH_DEGRADED)
        full = watcher.gpus["GPU-l40"].health_reason
        stub.show([replace(L40, memory_used=int(total * 0.96))])
        await watcher.sees(lambda it: "96.0" in it.gpus["GPU-l40"].health_reason)
        between = watcher.gpus["GPU-l40"].health
        stub.show([replace(L40, memory_used=int(total * 0.94))])
        await watcher.sees_health("GPU-l40", pb.GPU_HEALTH_HEALTHY)

    assert full == "memory 99.0 % used"
    assert between == pb.GPU_HEALTH_DEGRADED


async def test_a_driver_that_is_unloaded_and_loaded_again_is_told_and_recovered_from(
    agent: TelemetryAgent, stub: NvmlStub
) -> None:
    async with watching(agent) as watcher:
        await watcher.sees_health("GPU-l40", pb.GPU_HEALTH_HEALTHY)
        stub.show(error=NOT_LOADED)
        await watcher.sees(lambda it: it.driver.state == pb.DRIVER_STATE_FAILED)
        unloaded = watcher.driver.message
        lost = {gpu.health for gpu in watcher.gpus.values()}
        stub.show(FLEET, version="575.1")
        await watcher.sees(lambda it: it.driver.state == pb.DRIVER_STATE_READY)

    assert unloaded == "the NVIDIA driver is not loaded"
    assert lost == {pb.GPU_HEALTH_LOST}
    assert watcher.driver.version == "575.1"
    assert {gpu.health for gpu in watcher.gpus.values()} == {pb.GPU_HEALTH_HEALTHY}


async def test_a_driver_upgrade_is_followed_into_its_new_library(agent: TelemetryAgent, stub: NvmlStub) -> None:
    async with watching(agent) as watcher:
        await watcher.sees_health("GPU-l40", pb.GPU_HEALTH_HEALTHY)
        stub.show(FLEET, kernel="2")
        await watcher.sees(lambda it: it.driver.state == pb.DRIVER_STATE_FAILED)
        mismatch = watcher.driver.message
        stub.build(build="2")
        await watcher.sees(lambda it: it.driver.state == pb.DRIVER_STATE_READY)

    assert mismatch == "the NVIDIA library and the loaded driver have different versions"


async def test_a_driver_that_hangs_is_told_while_everything_else_answers(agent: TelemetryAgent, stub: NvmlStub) -> None:
    async with watching(agent) as watcher:
        await watcher.sees_health("GPU-l40", pb.GPU_HEALTH_HEALTHY)
        stub.show(FLEET, hang=True)
        await watcher.sees(lambda it: it.driver.state == pb.DRIVER_STATE_FAILED)
        hanging = watcher.driver.message
        threads = psutil.Process(agent.process.pid).num_threads()
        await _samples_failed(agent, 2)
        assert psutil.Process(agent.process.pid).num_threads() <= threads + 1  # the one that serves metrics
        stub.show(FLEET)
        await watcher.sees(lambda it: it.driver.state == pb.DRIVER_STATE_READY)

    assert hanging == "the NVIDIA driver does not answer"


async def test_a_process_whose_driver_hangs_stops_when_it_is_told(tmp_path: Path, stub: NvmlStub) -> None:
    stub.show(FLEET, hang=True)
    with telemetry_agent(tmp_path, environment=stub.environment) as agent:
        fleet = await fleet_of(agent)

        assert fleet.driver.state == pb.DRIVER_STATE_FAILED
        await _is_serving(agent)


async def test_an_old_driver_without_the_newest_functions_reports_as_much(tmp_path: Path, stub: NvmlStub) -> None:
    stub.build(old=True)
    stub.show([replace(L40, processes="7:1", clock_reasons=0x8)])
    with telemetry_agent(tmp_path, environment=stub.environment) as agent:
        (gpu,) = (await fleet_of(agent)).gpus

    assert (gpu.temperature_celsius, list(gpu.throttle_reasons)) == (40, ["hw_slowdown"])
    assert list(gpu.processes) == [pb.GpuProcess(pid=7, memory_used_bytes=1)]


async def test_a_card_that_is_lost_from_the_start_is_listed_by_its_place(tmp_path: Path, stub: NvmlStub) -> None:
    stub.show([L40, replace(SECOND_L40, error=LOST)])
    with telemetry_agent(tmp_path, environment=stub.environment) as agent:
        lost = (await fleet_of(agent)).gpus[1]

    assert (lost.uuid, lost.index, lost.name) == ("unknown-node-1-1", 1, "")
    assert lost.health_reason == "it does not answer: GPU is lost"


async def test_a_library_that_can_not_be_loaded_is_a_failure(tmp_path: Path, stub: NvmlStub) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"no library at all")
    with telemetry_agent(tmp_path, environment=stub.environment) as agent:
        driver = (await fleet_of(agent)).driver

    assert driver.state == pb.DRIVER_STATE_FAILED
    assert driver.message.startswith("the NVIDIA library can't be loaded: ")


def _has_a_library() -> bool:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(_has_a_library(), reason="this machine has NVIDIA's library")
async def test_a_machine_without_a_driver_says_so_until_it_gets_one(tmp_path: Path, stub: NvmlStub) -> None:
    stub.remove()
    with telemetry_agent(tmp_path, environment=stub.environment) as agent:
        await _is_serving(agent)
        without = await fleet_of(agent)
        scraped = await _scraped(agent)
        async with watching(agent) as watcher:
            stub.build()
            await watcher.sees(lambda it: it.driver.state == pb.DRIVER_STATE_READY)

    assert without == pb.ListGpusResponse(driver=ABSENT, nodes=[pb.Node(name="node-1", driver=ABSENT)])
    assert scraped['tokenloom_telemetry_driver_up{version=""}'] == "0.0"
    assert not [series for series in scraped if series.startswith("tokenloom_telemetry_gpu_")]
    assert len(watcher.gpus) == 3


async def test_an_xid_is_told_within_two_samples_and_a_fatal_one_fails_the_card(
    agent: TelemetryAgent, stub: NvmlStub
) -> None:
    async with watching(agent) as watcher:
        await watcher.sees_health("GPU-l40", pb.GPU_HEALTH_HEALTHY)
        stub.show([replace(L40, events="1:8:31"), SECOND_L40, RTX_4090])
        took = await watcher.sees(lambda it: len(it.gpus["GPU-l40"].recent_events) == 1)
        mild = watcher.gpus["GPU-l40"].health
        stub.show([replace(L40, events="1:8:31 2:8:95"), SECOND_L40, RTX_4090])
        await watcher.sees_health("GPU-l40", pb.GPU_HEALTH_FAILED)
        failed = watcher.gpus["GPU-l40"]
        stub.show([replace(L40, events="1:8:31 2:8:95", recovery_action=0), SECOND_L40, RTX_4090])
        await watcher.sees_health("GPU-l40", pb.GPU_HEALTH_HEALTHY)
        scraped = await _scraped(agent)

    assert took < 2 * SAMPLE_SECONDS + 1  # and what a busy machine takes
    assert mild == pb.GPU_HEALTH_HEALTHY
    assert [(each.kind, each.xid) for each in failed.recent_events] == [
        (pb.GPU_EVENT_KIND_XID, 31),
        (pb.GPU_EVENT_KIND_XID, 95),
    ]
    assert failed.health_reason == "XID 95, uncontained memory error"
    counted = [series for series in scraped if "gpu_xid_errors_total{" in series and 'uuid="GPU-l40"' in series]
    assert len(counted) == 2
    assert watcher.gpus["GPU-4090"].health == pb.GPU_HEALTH_HEALTHY


async def test_a_card_that_falls_off_the_bus_says_so_and_returns(agent: TelemetryAgent, stub: NvmlStub) -> None:
    async with watching(agent) as watcher:
        await watcher.sees_health("GPU-l40", pb.GPU_HEALTH_HEALTHY)
        stub.show([replace(L40, events="1:8:79", error=LOST), SECOND_L40, RTX_4090])
        await watcher.sees_health("GPU-l40", pb.GPU_HEALTH_LOST)
        stub.show(FLEET)
        await watcher.sees_health("GPU-l40", pb.GPU_HEALTH_HEALTHY)

    kinds = [each.kind for each in watcher.gpus["GPU-l40"].recent_events]
    assert kinds == [pb.GPU_EVENT_KIND_XID, pb.GPU_EVENT_KIND_LOST, pb.GPU_EVENT_KIND_RETURNED]


async def test_a_split_card_comes_with_its_instances_and_their_processes(agent: TelemetryAgent, stub: NvmlStub) -> None:
    parts = [
        Card(uuid=f"MIG-{n}", name="NVIDIA A100 MIG 1g.10gb", memory_total=10 << 30, memory_used=n, mig_instance=n + 1)
        for n in range(2)
    ]
    split = replace(L40, mig="MIG-0 MIG-1", utilization=None)
    stub.show([split, replace(parts[0], processes="77:5"), parts[1]])
    async with watching(agent) as watcher:
        await watcher.sees(lambda it: len(it.gpus) == 1 and len(it.gpus["GPU-l40"].mig_instances) == 2)
        gpu = watcher.gpus["GPU-l40"]
        stub.show([replace(L40, mig="", events="1:256:0"), RTX_4090])
        await watcher.sees(lambda it: not it.gpus["GPU-l40"].mig_enabled)

    assert gpu.mig_enabled
    assert not gpu.HasField("utilization_percent")
    assert gpu.mig_instances[0] == pb.MigInstance(
        uuid="MIG-0",
        name="NVIDIA A100 MIG 1g.10gb",
        gpu_instance_id=1,
        compute_instance_id=0,
        memory_used_bytes=0,
        memory_total_bytes=10 << 30,
        processes=[pb.GpuProcess(pid=77, memory_used_bytes=5)],
    )
    assert [each.kind for each in watcher.gpus["GPU-l40"].recent_events] == [pb.GPU_EVENT_KIND_MIG_CHANGED]


async def test_datacentre_cards_report_more_and_rates_are_made_of_their_counters(
    agent: TelemetryAgent, stub: NvmlStub
) -> None:
    h200 = replace(
        L40,
        uuid="GPU-h200",
        memory_temperature=61,
        slowdown_temperature=87,
        performance_state=0,
        max_sm_clock=1980,
        energy_mj=1_500,
        pcie_generation=5,
        pcie_width=16,
        max_pcie_generation=5,
        max_pcie_width=16,
        pcie_replays=0,
        ecc_corrected=3,
        remapped_rows="1 2 1 0",
        recovery_action=0,
        pcie_tx_bytes=0,
        pcie_rx_bytes=0,
    )
    stub.show([h200, replace(RTX_4090, fan_speed=30, pcie_tx_kb=2, pcie_rx_kb=3)])
    async with watching(agent) as watcher:
        await watcher.sees(lambda it: len(it.gpus) == 2 and it.gpus["GPU-4090"].HasField("fan_speed_percent"))
        await watcher.sees(lambda it: it.gpus["GPU-h200"].HasField("pcie_transmit_bytes_per_second"))
        stub.show([replace(h200, pcie_tx_bytes=10**9), replace(RTX_4090, fan_speed=30, pcie_tx_kb=2, pcie_rx_kb=3)])
        await watcher.sees(lambda it: it.gpus["GPU-h200"].pcie_transmit_bytes_per_second > 0)
    card, small = watcher.gpus["GPU-h200"], watcher.gpus["GPU-4090"]

    assert card.pcie_receive_bytes_per_second == 0
    assert (card.memory_temperature_celsius, card.slowdown_temperature_celsius, card.max_sm_clock_mhz) == (61, 87, 1980)
    assert (card.pcie_link_generation, card.pcie_link_width, card.pcie_replay_count) == (5, 16, 0)
    assert card.HasField("performance_state")
    assert (card.energy_joules, card.corrected_ecc_error_count, card.recovery_action) == (1.5, 3, "none")
    assert (card.uncorrectable_remapped_row_count, card.row_remap_pending, card.row_remap_failed) == (2, True, False)
    assert card.health_reason == "a row of memory waits for a reset to be remapped"
    assert (small.pcie_transmit_bytes_per_second, small.pcie_receive_bytes_per_second) == (2_000, 3_000)
    assert not small.HasField("memory_temperature_celsius")
    assert not small.HasField("recovery_action")


@pytest.fixture(scope="module")
def slow_stub(tmp_path_factory: pytest.TempPathFactory) -> NvmlStub:
    return NvmlStub(tmp_path_factory.mktemp("slow"))


@pytest.fixture(scope="module")
def slow_agent(slow_stub: NvmlStub) -> Iterator[TelemetryAgent]:
    """An agent whose samples are so far apart that they can be counted by the clock."""
    slow_stub.show([L40])
    running = telemetry_agent(slow_stub.folder, environment=slow_stub.environment, sample_seconds=LONG_SAMPLE_SECONDS)
    with running as agent:
        yield agent


EIGHT = tuple(replace(L40, uuid=f"GPU-{n}") for n in range(8))
SPLIT = replace(L40, mig="MIG-0", utilization=None)
INSTANCE = Card(uuid="MIG-0", name="A part", memory_total=10 << 30, memory_used=1, mig_instance=1)


@pytest.mark.parametrize(
    ("before", "after", "check"),
    [
        ({"cards": [L40]}, {"cards": [replace(L40, error=LOST)]}, lambda gpu, *_: gpu.health == pb.GPU_HEALTH_LOST),
        (
            {"cards": [L40]},
            {"cards": [replace(L40, clock_reasons=0x40)]},
            lambda gpu, *_: list(gpu.throttle_reasons) == ["hw_thermal_slowdown"] and gpu.health_reason,
        ),
        (
            {"cards": [L40]},
            {"cards": [replace(L40, events="1:8:31")]},
            lambda gpu, *_: gpu.recent_events and gpu.recent_events[-1].xid == 31,
        ),
        (
            {"cards": [L40]},
            {"cards": [replace(L40, events="2:8:79")]},
            lambda gpu, *_: gpu.health == pb.GPU_HEALTH_FAILED,
        ),
        ({"cards": [L40]}, {"cards": [SPLIT, INSTANCE]}, lambda gpu, *_: len(gpu.mig_instances) == 1),
        (
            {"cards": [L40]},
            {"cards": [replace(L40, power_mw=None, temperature=None)]},
            lambda gpu, *_: not gpu.HasField("power_watts") and not gpu.HasField("temperature_celsius"),
        ),
        (
            {"cards": [L40]},
            {"cards": [replace(L40, temperature=f"!{UNKNOWN}")]},
            lambda gpu, *_: not gpu.HasField("temperature_celsius") and gpu.HasField("power_watts"),
        ),
        (
            {"cards": [L40]},
            {"error": NOT_LOADED},
            lambda gpu, driver, _: driver.state == pb.DRIVER_STATE_FAILED and gpu.health == pb.GPU_HEALTH_LOST,
        ),
        (
            {"error": NOT_LOADED},
            {"cards": [L40], "version": "575.1"},
            lambda gpu, driver, _: driver.version == "575.1" and gpu.health == pb.GPU_HEALTH_HEALTHY,
        ),
        (
            {"cards": EIGHT},
            {"cards": [replace(card, utilization=77, fan_speed=50) for card in EIGHT]},
            lambda _, __, gpus: [gpu.fan_speed_percent for gpu in gpus] == [50] * 8,
        ),
        ({"cards": EIGHT}, {"cards": EIGHT[:5]}, lambda _, __, gpus: len(gpus) == 5),
    ],
    ids=[
        "a card is lost", "a card throttles", "an XID", "a fatal XID", "a card is split", "a card stops reporting",
        "a reading fails", "the driver is unloaded", "the driver is loaded again", "eight cards change",
        "three of eight cards are taken away",
    ],
)  # fmt: skip  # a table
async def test_whatever_happens_is_seen_by_a_watcher_within_two_samples(
    slow_agent: TelemetryAgent,
    slow_stub: NvmlStub,
    request: pytest.FixtureRequest,
    before: dict[str, Any],
    after: dict[str, Any],
    check: Callable[[pb.Gpu, pb.Driver, list[pb.Gpu]], object],
) -> None:
    # Cards of this case alone: one that was lost or failed by an XID stays so.
    case = f"{request.node.callspec.id.replace(' ', '-')}-"

    def of_this(it: Watcher) -> list[pb.Gpu]:
        return [gpu for uuid, gpu in it.gpus.items() if uuid.startswith(case)]

    async with watching(slow_agent) as watcher:
        slow_stub.show(**of_case(before, case))
        if "cards" in before:
            await watcher.sees(lambda it: len(of_this(it)) == len(before["cards"]))
        else:
            await watcher.sees(lambda it: it.driver.state == pb.DRIVER_STATE_FAILED)
        slow_stub.show(**of_case(after, case))
        took = await watcher.sees(
            lambda it: bool(check(it.gpus.get(f"{case}{L40.uuid}", pb.Gpu()), it.driver, of_this(it)))
        )

    assert took < 2.5 * LONG_SAMPLE_SECONDS  # the half is what a busy machine takes


def of_case(shown: dict[str, Any], case: str) -> dict[str, Any]:
    """The same with cards of other names."""
    if "cards" not in shown:
        return shown
    cards = [card if card.mig_instance else replace(card, uuid=f"{case}{card.uuid}") for card in shown["cards"]]
    return {**shown, "cards": cards}


async def test_eight_cards_are_seen_and_cost_little(agent: TelemetryAgent, stub: NvmlStub) -> None:
    stub.show([replace(L40, uuid=f"GPU-{n}", processes="1:1 2:2") for n in range(8)])
    async with watching(agent) as watcher:
        await watcher.sees(lambda it: len(it.gpus) == 8 and "GPU-7" in it.gpus)
        before, started = _cpu_seconds(agent), time.monotonic()
        await asyncio.sleep(1.5)
        share = (_cpu_seconds(agent) - before) / (time.monotonic() - started)

    # Ten samples a second; at one a second it is a tenth of this.
    assert share < 0.1


async def test_a_process_on_a_card_has_the_name_of_its_worker(agent: TelemetryAgent, stub: NvmlStub) -> None:
    engine = subprocess.Popen(["sleep", "30"], env={**os.environ, "TOKENLOOM_PROCESS": "worker-7"})  # noqa: ASYNC220
    try:
        stub.show([replace(L40, processes=f"{engine.pid}:4096 {os.getpid()}:1", drawing=f"{engine.pid}:4096")])
        async with watching(agent) as watcher:
            await watcher.sees(lambda it: len(it.gpus["GPU-l40"].processes) == 2 if "GPU-l40" in it.gpus else False)
            scraped = await _scraped(agent)
    finally:
        engine.kill()
        engine.wait()

    workers = {each.pid: (each.worker, each.memory_used_bytes) for each in watcher.gpus["GPU-l40"].processes}
    assert workers == {engine.pid: ("worker-7", 4096), os.getpid(): ("", 1)}
    held = [value for series, value in scraped.items() if "worker_memory_bytes{" in series and "worker-7" in series]
    assert held == ["4096.0"]


async def test_a_hub_joins_the_agents_and_tells_when_one_is_away(
    tmp_path: Path, agent: TelemetryAgent, stub: NvmlStub
) -> None:
    second, third = tmp_path / "second", tmp_path / "third"
    second.mkdir()
    third.mkdir()
    other = NvmlStub(second)
    other.show([replace(L40, uuid="GPU-other")])
    with telemetry_agent(second, environment=other.environment, node="node-2") as neighbour:
        agents = [agent.target, neighbour.target]
        with telemetry_agent(third, own_gpus=False, agents=agents, node="hub") as hub:
            async with watching(hub) as watcher:
                await watcher.sees(lambda it: len(it.gpus) == 4, within=10)
                stub.show([replace(L40, clock_reasons=0x40), SECOND_L40, RTX_4090])
                await watcher.sees_health("GPU-l40", pb.GPU_HEALTH_DEGRADED)
                nodes = {node.name: node.away for node in (await fleet_of(hub)).nodes}
                neighbour.process.terminate()
                await watcher.sees(lambda it: "GPU-other" not in it.gpus, within=10)
            left = await fleet_of(hub)

    assert nodes == {"node-1": False, "node-2": False}
    assert {node.name: node.away for node in left.nodes} == {"node-1": False, "node-2": True}
    assert left.driver.message == "node-2: its telemetry agent does not answer"
    assert [gpu.node for gpu in left.gpus] == ["node-1"] * 3


async def test_prometheus_gets_what_the_cards_report(agent: TelemetryAgent, stub: NvmlStub) -> None:
    stub.show([replace(L40, clock_reasons=0x40), replace(SECOND_L40, error=LOST), RTX_4090])
    async with watching(agent) as watcher:
        await watcher.sees_health("GPU-l40-2", pb.GPU_HEALTH_LOST)
        scraped = await _scraped(agent)

    l40 = {'uuid="GPU-l40"', 'index="0"', 'name="NVIDIA L40"', 'node="node-1"'}
    values = {_name(series): float(value) for series, value in scraped.items() if _labels(series) == l40}
    assert values == {
        "utilization_ratio": pytest.approx(0.1),
        "memory_utilization_ratio": pytest.approx(0.05),
        "memory_used_bytes": 1 << 30,
        "memory_total_bytes": 45 << 30,
        "temperature_celsius": 40,
        "power_watts": 60.5,
        "power_limit_watts": 300,
        "sm_clock_hertz": 1.5e9,
        "memory_clock_hertz": 9.001e9,
        "healthy": 0,
        "lost": 0,
        "failed": 0,
        "uncorrected_ecc_errors_total": 0,
    }
    lost = {_name(series): float(value) for series, value in scraped.items() if 'uuid="GPU-l40-2"' in series}
    assert lost == {"healthy": 0, "lost": 1, "failed": 0}
    assert not [series for series in scraped if "ecc_errors" in series and 'uuid="GPU-4090"' in series]
    assert [series for series in scraped if "gpu_throttled{" in series and 'reason="hw_thermal_slowdown"' in series]
    assert scraped['tokenloom_telemetry_driver_up{version="570.86.10"}'] == "1.0"
    assert float(scraped['tokenloom_telemetry_samples_total{driver="ready"}']) >= 1
    assert scraped["tokenloom_telemetry_publish_failures_total"] == "0.0"


def _cpu_seconds(agent: TelemetryAgent) -> float:
    times = psutil.Process(agent.process.pid).cpu_times()
    return float(times.user + times.system)


def _name(series: str) -> str:
    return series.partition("{")[0].removeprefix("tokenloom_telemetry_gpu_")


def _labels(series: str) -> set[str]:
    return set(series.partition("{")[2].rstrip("}").split(","))


async def _is_serving(agent: TelemetryAgent) -> None:
    async with channel(agent.target) as connection:
        watch = health_pb2_grpc.HealthStub(connection).Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
        async with asyncio.timeout(5):
            async for answer in watch:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return


async def _samples_failed(agent: TelemetryAgent, count: int) -> None:
    async with asyncio.timeout(10):
        while True:
            failed = (await _scraped(agent))['tokenloom_telemetry_samples_total{driver="failed"}']
            if float(failed) >= count:
                return
            await asyncio.sleep(0.05)


async def _scraped(agent: TelemetryAgent) -> dict[str, str]:
    async with httpx.AsyncClient() as client:
        lines = (await client.get(agent.metrics_url)).text.splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
