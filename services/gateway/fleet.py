"""What the gateway knows of the fleet: which models there are, and which workers to have a session with."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc.aio
from tokenloom.router.v1 import admin_pb2, admin_pb2_grpc

from services.common.rpc import channel

__all__ = ["FleetWatch", "Model"]

_log = logging.getLogger(__name__)
_RETRY_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that some worker serves."""

    name: str
    max_context_tokens: int


class FleetWatch:
    """The router's view of the fleet, kept up to date; the last one known while no router answers."""

    def __init__(self, targets: Sequence[str], *, on_endpoints: Callable[[set[str]], None]) -> None:
        """`on_endpoints` gets the addresses of all workers whenever they change."""
        self._targets = targets
        self._on_endpoints = on_endpoints
        self._models: dict[str, Model] = {}

    @property
    def models(self) -> list[Model]:
        """The models that can be asked for, by name."""
        return [self._models[name] for name in sorted(self._models)]

    def model(self, name: str) -> Model | None:
        """One model; None when no worker serves it."""
        return self._models.get(name)

    async def run(self) -> None:
        """Watches until cancelled."""
        for target in itertools.cycle(self._targets):
            try:
                async with channel(target) as connection:
                    stub = admin_pb2_grpc.RouterAdminServiceStub(connection)
                    async for fleet in stub.WatchFleet(admin_pb2.WatchFleetRequest()):
                        self._apply(fleet)
            except grpc.aio.AioRpcError as error:
                _log.debug("fleet watch lost", extra={"router": target, "cause": error.code().name})
            await asyncio.sleep(_RETRY_SECONDS)

    def _apply(self, fleet: admin_pb2.WatchFleetResponse) -> None:
        registrations = [worker.registration for worker in fleet.workers]
        self._models = {
            card.name: Model(name=card.name, max_context_tokens=card.max_context_token_count)
            for registration in registrations
            for card in registration.models
        }
        self._on_endpoints({registration.endpoint for registration in registrations})
