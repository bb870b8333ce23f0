"""Following what a telemetry agent tells of its GPUs."""

import asyncio
from typing import Final, Protocol

import grpc
import grpc.aio
from tokenloom.telemetry.v1 import telemetry_pb2, telemetry_pb2_grpc

from services.common.rpc import channel

__all__ = ["GpuListener", "follow_gpus"]

_FIRST_BACKOFF_SECONDS: Final = 0.05


class GpuListener(Protocol):
    """Whoever follows an agent."""

    def heard(self, message: telemetry_pb2.WatchGpusResponse, *, first: bool) -> None:
        """The agent told something; the `first` message of a stream has everything."""

    def left(self) -> None:
        """A stream that something came over is over."""

    def away(self, code: grpc.StatusCode) -> None:
        """The agent does not answer any more; told once until it does again."""


async def follow_gpus(address: str, listener: GpuListener, *, longest_backoff_seconds: float) -> None:
    """Follows an agent, and comes back to it whenever the stream ends. Never returns."""
    backoff = _FIRST_BACKOFF_SECONDS
    async with channel(address) as to_agent:
        stub: telemetry_pb2_grpc.TelemetryServiceAsyncStub = telemetry_pb2_grpc.TelemetryServiceStub(to_agent)
        while True:
            call = stub.WatchGpus(telemetry_pb2.WatchGpusRequest())
            here = False
            try:
                async for message in call:
                    listener.heard(message, first=not here)
                    here, backoff = True, _FIRST_BACKOFF_SECONDS
            except grpc.aio.AioRpcError as error:
                if here or backoff == _FIRST_BACKOFF_SECONDS:
                    listener.away(error.code())
            finally:
                call.cancel()
                if here:
                    listener.left()
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, longest_backoff_seconds)
