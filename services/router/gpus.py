"""Follows the telemetry agents, and tells the fleet how its GPUs are."""

import asyncio
import logging
from collections.abc import Iterator
from typing import Final

import grpc
from tokenloom.telemetry.v1 import telemetry_pb2

from services.common.gpu_watch import follow_gpus
from services.router.fleet import Clock, Fleet
from services.router.reading import Condition, GpuReading, condition_of

__all__ = ["GpuWatch"]

# What an agent said counts for so long after it fell silent; after that its GPUs are as good as any.
_STALE_SECONDS: Final = 5.0
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
        self._instances: dict[str, set[str]] = {}
        self._connected = False
        self._heard_at = clock()

    async def run(self) -> None:
        """Follows the agent, and comes back to it whenever the stream ends. Never returns."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._forget_when_stale())
            await follow_gpus(self._address, self, longest_backoff_seconds=_LONGEST_BACKOFF_SECONDS)

    def away(self, code: grpc.StatusCode) -> None:
        """The agent does not answer any more."""
        _log.info("telemetry is away", extra={"address": self._address, "code": code.name})

    def left(self) -> None:
        """The stream is over."""
        self._connected = False

    def heard(self, message: telemetry_pb2.WatchGpusResponse, *, first: bool) -> None:
        """The agent told something; everything, with the first message of a stream."""
        self._connected = True
        self._heard_at = self._clock()
        conditions = {uuid: now for gpu in message.gpus if gpu.uuid for uuid, now in _conditions(gpu)}
        for gpu in message.gpus:
            if gpu.health == telemetry_pb2.GPU_HEALTH_LOST:
                # A card that does not answer does not name its instances.
                conditions |= dict.fromkeys(self._instances.get(gpu.uuid, ()), Condition(lost=True))
        gone = self._gone(message)
        if first:
            gone |= set(self._conditions) - set(conditions)
        self._conditions.update(conditions)
        self._fleet.set_gpus(conditions)
        self._forget(gone)

    def _gone(self, message: telemetry_pb2.WatchGpusResponse) -> set[str]:
        # With a card go its instances; a card that was split in another way has others now.
        gone = set(message.removed_uuids)
        for uuid in message.removed_uuids:
            gone |= self._instances.pop(uuid, set())
        for gpu in message.gpus:
            if gpu.health != telemetry_pb2.GPU_HEALTH_LOST:
                now = {instance.uuid for instance in gpu.mig_instances}
                gone |= self._instances.get(gpu.uuid, set()) - now
                self._instances[gpu.uuid] = now
        return gone

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


def _conditions(gpu: telemetry_pb2.Gpu) -> Iterator[tuple[str, Condition]]:
    """What a card means for workers on it, and on each instance of it: they have memory of their own, and its heat."""
    yield gpu.uuid, _condition(gpu, _memory_share(gpu))
    for instance in gpu.mig_instances:
        yield instance.uuid, _condition(gpu, _memory_share(instance))


def _memory_share(part: telemetry_pb2.Gpu | telemetry_pb2.MigInstance) -> float | None:
    if not part.HasField("memory_used_bytes") or part.memory_total_bytes == 0:
        return None
    return part.memory_used_bytes / part.memory_total_bytes


def _condition(gpu: telemetry_pb2.Gpu, share: float | None) -> Condition:
    return condition_of(
        GpuReading(
            lost=gpu.health == telemetry_pb2.GPU_HEALTH_LOST,
            failed=gpu.health == telemetry_pb2.GPU_HEALTH_FAILED,
            degraded=gpu.health == telemetry_pb2.GPU_HEALTH_DEGRADED,
            temperature_celsius=gpu.temperature_celsius if gpu.HasField("temperature_celsius") else None,
            memory_used_share=share,
            throttle_reasons=tuple(gpu.throttle_reasons),
        )
    )
