"""Follows the fleet and its GPUs through the edge: what both watches said last, for as long as somebody looks."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final

import grpc
import grpc.aio
from tokenloom.router.v1 import admin_pb2, admin_pb2_grpc
from tokenloom.telemetry.v1 import telemetry_pb2, telemetry_pb2_grpc

from services.common.errors import MeshError, Reason
from services.common.status import error_from_call
from services.mesh.edge_client import Door
from services.mesh.fleet_view import FleetView, view_of

__all__ = ["FleetWatch", "watch_fleet"]

_AGAIN_SECONDS: Final = 0.5
_FIRST_SECONDS: Final = 10.0
# What no second try changes.
_FINAL: Final = (Reason.INVALID_API_KEY, Reason.PERMISSION_DENIED)


class FleetWatch:
    """What was said last. `changed` is set whenever that is new."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._fleet: admin_pb2.WatchFleetResponse | None = None
        self._heard_at: datetime | None = None
        self._gpus: dict[str, telemetry_pb2.Gpu] = {}
        self._driver: telemetry_pb2.Driver | None = None
        self._nodes: list[telemetry_pb2.Node] = []
        self._knows_gpus = asyncio.Event()
        self.changed = asyncio.Event()
        self.error: MeshError | None = None
        """Why there is nothing new at present; None: there is."""

    @property
    def view(self) -> FleetView | None:
        """The fleet as it was said last; None while nothing was."""
        if self._fleet is None:
            return None
        return view_of(
            self._door.url, self._fleet, self._gpus, self._driver, nodes=self._nodes, heard_at=self._heard_at
        )

    async def first(self) -> FleetView:
        """The first whole view.

        Raises:
            MeshError: the mesh does not tell.
        """
        try:
            async with asyncio.timeout(_FIRST_SECONDS):
                while self._fleet is None and self.error is None:
                    await self.changed.wait()
                    self.changed.clear()
                if self.error is None:
                    await self._knows_gpus.wait()
        except TimeoutError:
            self.error = MeshError(Reason.DEADLINE_EXCEEDED, f"{self._door.url} says nothing")
        view = self.view
        if view is None:
            assert self.error is not None
            raise self.error
        return view

    async def follow_fleet(self, channel: grpc.aio.Channel, interval_seconds: float) -> None:
        """Follows the router."""
        request = admin_pb2.WatchFleetRequest()
        request.interval_duration.FromNanoseconds(int(interval_seconds * 1e9))
        stub = admin_pb2_grpc.RouterAdminServiceStub(channel)
        async for message in stub.WatchFleet(request, metadata=self._door.metadata):
            self._fleet, self._heard_at, self.error = message, datetime.now(UTC), None
            self.changed.set()

    async def follow_gpus(self, channel: grpc.aio.Channel) -> None:
        """Follows telemetry."""
        stub = telemetry_pb2_grpc.TelemetryServiceStub(channel)
        everything = True
        async for message in stub.WatchGpus(telemetry_pb2.WatchGpusRequest(), metadata=self._door.metadata):
            if everything:
                self._gpus.clear()
                everything = False
            self._driver, self._nodes = message.driver, list(message.nodes)
            self._gpus.update((gpu.uuid, gpu) for gpu in message.gpus)
            for uuid in message.removed_uuids:
                self._gpus.pop(uuid, None)
            self._knows_gpus.set()
            self.changed.set()

    async def again_and_again(self, follow: Callable[[], Awaitable[None]], *, matters: bool) -> None:
        """Follows until cancelled; what ends is begun again. `matters`: without it there is nothing to show."""
        while True:
            try:
                await follow()
                error = MeshError(Reason.NO_READY_WORKER, "the mesh ended the watch")
            except grpc.aio.AioRpcError as failed:
                error = error_from_call(failed)
            if matters:
                self.error = error
            # Without telemetry there are no GPUs to wait for.
            self._knows_gpus.set()
            self.changed.set()
            if error.reason in _FINAL:
                return
            await asyncio.sleep(_AGAIN_SECONDS)


@asynccontextmanager
async def watch_fleet(door: Door, *, interval_seconds: float) -> AsyncIterator[FleetWatch]:
    """Follows a mesh until the block is left; it is told of changes once in `interval_seconds` at most."""
    watch = FleetWatch(door)
    async with door.async_channel() as channel:

        def follow_fleet() -> Awaitable[None]:
            return watch.follow_fleet(channel, interval_seconds)

        def follow_gpus() -> Awaitable[None]:
            return watch.follow_gpus(channel)

        try:
            async with asyncio.TaskGroup() as tasks:
                following = [
                    tasks.create_task(watch.again_and_again(follow_fleet, matters=True)),
                    tasks.create_task(watch.again_and_again(follow_gpus, matters=False)),
                ]
                try:
                    yield watch
                finally:
                    for task in following:
                        task.cancel()
        except* (MeshError, BrokenPipeError) as errors:
            raise errors.exceptions[0] from None
