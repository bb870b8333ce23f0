"""What the gateway knows of the fleet: what can be asked for, and which workers to have a session with."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

import grpc.aio
from google.protobuf import duration_pb2
from tokenloom.inference.v1 import inference_pb2
from tokenloom.router.v1 import admin_pb2, admin_pb2_grpc, router_pb2

from services.common.rpc import channel
from services.gateway.placement import KnownWorker, Placement

__all__ = ["FleetWatch", "Model"]

# Load changes all the time; what a gateway needs to know of the fleet doesn't.
_WATCH: Final = admin_pb2.WatchFleetRequest(interval_duration=duration_pb2.Duration(nanos=250_000_000))
_log = logging.getLogger(__name__)
_RETRY_SECONDS: Final = 0.2
# Within so long, workers have registered with a router that has just started; until then it knows less than we do.
_SETTLE_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A name that requests may use: a model that some worker serves, or an alias.

    Attributes:
        name: the name.
        max_context_tokens: the longest sequence, prompt and output together.
        card: what it is and can do; an alias has the card of the model behind it that takes the longest sequences.
        targets: the models behind an alias; none for a model's own name.
    """

    name: str
    max_context_tokens: int
    card: inference_pb2.ModelCard
    targets: tuple[str, ...] = ()


class FleetWatch:
    """The router's view of the fleet, kept up to date; the last one known while no router answers."""

    def __init__(
        self,
        targets: Sequence[str],
        *,
        on_endpoints: Callable[[set[str]], None],
        placement: Placement | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`on_endpoints` gets the addresses of all workers whenever they change, `placement` all that is seen."""
        self._targets = targets
        self._on_endpoints = on_endpoints
        self._placement = placement
        self._clock = clock
        self._models: dict[str, Model] = {}
        self._workers: dict[str, admin_pb2.Worker] = {}
        self._settled_at = clock()

    @property
    def models(self) -> list[Model]:
        """What can be asked for, by name."""
        return [self._models[name] for name in sorted(self._models)]

    def model(self, name: str) -> Model | None:
        """One model; None when no worker serves it."""
        return self._models.get(name)

    async def run(self) -> None:
        """Watches until cancelled."""
        for target in itertools.cycle(self._targets):
            try:
                async with channel(target) as connection:
                    await self._follow(admin_pb2_grpc.RouterAdminServiceStub(connection))
            except grpc.aio.AioRpcError as error:
                _log.debug("fleet watch lost", extra={"router": target, "cause": error.code().name})
            await asyncio.sleep(_RETRY_SECONDS)

    async def _follow(self, stub: Any) -> None:
        latest: admin_pb2.WatchFleetResponse | None = None
        settling: asyncio.TimerHandle | None = None

        def settle() -> None:
            if latest is not None:
                self._apply(latest, settled=True)

        try:
            async for latest in stub.WatchFleet(_WATCH):
                if settling is None:
                    self._settled_at = self._clock() + _SETTLE_SECONDS
                    settling = asyncio.get_running_loop().call_later(_SETTLE_SECONDS, settle)
                self._apply(latest, settled=self._clock() >= self._settled_at)
        finally:
            if settling is not None:
                settling.cancel()

    def _apply(self, fleet: admin_pb2.WatchFleetResponse, *, settled: bool) -> None:
        workers = {worker.registration.worker_id: worker for worker in fleet.workers}
        models = {
            served.name: Model(
                name=served.name,
                max_context_tokens=served.card.max_context_token_count,
                card=_named(served.card, served.name),
                targets=tuple(served.target_models),
            )
            for served in fleet.models
        }
        self._workers = workers if settled else {**self._workers, **workers}
        self._models = models if settled else {**self._models, **models}
        if self._placement is not None:
            targets = {model.name: model.targets for model in self._models.values() if model.targets}
            self._placement.see(map(_known, filter(_is_ready, self._workers.values())), targets)
        self._on_endpoints({worker.registration.endpoint for worker in self._workers.values()})


def _named(card: inference_pb2.ModelCard, name: str) -> inference_pb2.ModelCard:
    named = inference_pb2.ModelCard()
    named.CopyFrom(card)
    named.name = name
    return named


def _is_ready(worker: admin_pb2.Worker) -> bool:
    out = worker.drained or worker.cordoned
    return not out and worker.load.state == router_pb2.WORKER_STATE_READY


def _known(worker: admin_pb2.Worker) -> KnownWorker:
    said = worker.registration
    return KnownWorker(
        worker_id=said.worker_id,
        endpoint=said.endpoint,
        models=frozenset(card.name for card in worker.load.models or said.models),
        max_running=said.max_running_count,
        leases=worker.lease_count,
    )
