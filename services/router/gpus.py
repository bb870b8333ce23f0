"""Follows the telemetry agents, and tells the fleet how its GPUs are."""

import asyncio
import logging
from typing import Any, Final

import grpc.aio
from tokenloom.telemetry.v1 import telemetry_pb2, telemetry_pb2_grpc

from services.common.rpc import channel
from services.router.fleet import Clock, Fleet
from services.router.reading import Condition, GpuReading, condition_of

__all__ = ["GpuWatch"]

# What an agent said counts for so long after it fell silent; after that its GPUs are as good as any.
_STALE_SECONDS: Final = 5.0
_FIRST_BACKOFF_SECONDS: Final = 0.05
_LONGEST_BACKOFF_SECONDS: Final = 0.5
_log = logging.getLogger(__name__)


class GpuWatch:
    """One telemetry agent, followed until cancelled. An agent that is away costs nothing."""

    def __init__(self, address: str, fleet: Fleet, *, clock: Clock, stale_seconds: float = _STALE_SECONDS) -> None:
        self._address = address
        self._fleet = fleet
        self._clock = clock
        self._stale_seconds = stale_seconds
        self._conditions: dict[str, Condition] = {}
        self._connected = False
        self._heard_at = clock()
        self._backoff = _FIRST_BACKOFF_SECONDS

    async def run(self) -> None:
        """Follows the agent, and comes back to it whenever the stream ends. Never returns."""
        async with channel(self._address) as to_agent, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._forget_when_stale())
            stub = telemetry_pb2_grpc.TelemetryServiceStub(to_agent)
            while True:
                await self._follow(stub)
                await asyncio.sleep(self._backoff)
                self._backoff = min(2 * self._backoff, _LONGEST_BACKOFF_SECONDS)

    async def _follow(self, stub: Any) -> None:
        call = stub.WatchGpus(telemetry_pb2.WatchGpusRequest())
        try:
            async for message in call:
                self._take(message, everything=not self._connected)
        except grpc.aio.AioRpcError as error:
            if self._connected or self._backoff == _FIRST_BACKOFF_SECONDS:
                _log.info("telemetry is away", extra={"address": self._address, "code": error.code().name})
        finally:
            self._connected = False
            call.cancel()

    def _take(self, message: telemetry_pb2.WatchGpusResponse, *, everything: bool) -> None:
        self._connected = True
        self._heard_at = self._clock()
        self._backoff = _FIRST_BACKOFF_SECONDS
        conditions = {gpu.uuid: _condition(gpu) for gpu in message.gpus if gpu.uuid}
        gone = set(message.removed_uuids)
        if everything:
            gone |= set(self._conditions) - set(conditions)
        self._conditions.update(conditions)
        self._fleet.set_gpus(conditions)
        self._forget(gone)

    def _forget(self, uuids: set[str]) -> None:
        for uuid in uuids:
            self._conditions.pop(uuid, None)
        self._fleet.forget_gpus(uuids)

    async def _forget_when_stale(self) -> None:
        while True:
            await asyncio.sleep(self._stale_seconds / 4)
            if self._conditions and self._clock() - self._heard_at > self._stale_seconds:
                self._let_go()

    def _let_go(self) -> None:
        # An agent that is there and says nothing new has nothing new to say of a GPU that does not answer; heat passes.
        if self._connected:
            self._conditions = {uuid: Condition(lost=now.lost) for uuid, now in self._conditions.items()}
            self._fleet.set_gpus(self._conditions)
        else:
            self._forget(set(self._conditions))


def _condition(gpu: telemetry_pb2.Gpu) -> Condition:
    share = None
    if gpu.HasField("memory_used_bytes") and gpu.memory_total_bytes > 0:
        share = gpu.memory_used_bytes / gpu.memory_total_bytes
    return condition_of(
        GpuReading(
            lost=gpu.health == telemetry_pb2.GPU_HEALTH_LOST,
            degraded=gpu.health == telemetry_pb2.GPU_HEALTH_DEGRADED,
            temperature_celsius=gpu.temperature_celsius if gpu.HasField("temperature_celsius") else None,
            memory_used_share=share,
            throttle_reasons=tuple(gpu.throttle_reasons),
        )
    )
