"""tokenloom.router.v1.RouterAdminService: the fleet and the decisions, for operators. Rights are the edge's matter."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from tokenloom.router.v1 import admin_pb2, admin_pb2_grpc

from services.common.errors import MeshError, Reason
from services.router import wire
from services.router.admission import Admission
from services.router.decisions import Decisions
from services.router.fleet import Clock, Fleet

__all__ = ["AdminServicer"]

_BETWEEN_UPDATES_SECONDS: Final = 0.1


class AdminServicer(admin_pb2_grpc.RouterAdminServiceServicer):
    """What operators ask of the router."""

    def __init__(self, fleet: Fleet, admission: Admission, decisions: Decisions, clock: Clock) -> None:
        self._fleet = fleet
        self._admission = admission
        self._decisions = decisions
        self._clock = clock
        self._closing = asyncio.Event()
        self._watches: set[asyncio.Event] = set()

    def close(self) -> None:
        """Ends every watch."""
        self._closing.set()
        for changed in self._watches:
            changed.set()

    async def ListWorkers(self, request: admin_pb2.ListWorkersRequest, context: Any) -> admin_pb2.ListWorkersResponse:
        """The workers, by name."""
        del request, context
        return admin_pb2.ListWorkersResponse(workers=self._workers())

    async def WatchFleet(
        self, request: admin_pb2.WatchFleetRequest, context: Any
    ) -> AsyncIterator[admin_pb2.WatchFleetResponse]:
        """The fleet now, and again on change. What changes while the watcher is slow comes as one update."""
        del request, context
        changed = asyncio.Event()
        self._watches.add(changed)
        unsubscribe = self._fleet.subscribe(lambda _: changed.set())
        try:
            while not self._closing.is_set():
                changed.clear()
                yield admin_pb2.WatchFleetResponse(workers=self._workers(), waiting_count=self._admission.waiting_count)
                await asyncio.sleep(_BETWEEN_UPDATES_SECONDS)
                await changed.wait()
        finally:
            unsubscribe()
            self._watches.discard(changed)

    async def DrainWorker(self, request: admin_pb2.DrainWorkerRequest, context: Any) -> admin_pb2.DrainWorkerResponse:
        """Takes a worker out of service, also when its process comes back."""
        del context
        self._drain(request.worker_id, drained=True)
        return admin_pb2.DrainWorkerResponse()

    async def UndrainWorker(
        self, request: admin_pb2.UndrainWorkerRequest, context: Any
    ) -> admin_pb2.UndrainWorkerResponse:
        """Puts a worker back into service."""
        del context
        self._drain(request.worker_id, drained=False)
        return admin_pb2.UndrainWorkerResponse()

    async def CordonWorker(
        self, request: admin_pb2.CordonWorkerRequest, context: Any
    ) -> admin_pb2.CordonWorkerResponse:
        """Refuses: not there yet."""
        del request, context
        raise MeshError(Reason.UNIMPLEMENTED, "workers can't be cordoned yet")

    async def GetPolicy(self, request: admin_pb2.GetPolicyRequest, context: Any) -> admin_pb2.GetPolicyResponse:
        """Refuses: not there yet."""
        del request, context
        raise MeshError(Reason.UNIMPLEMENTED, "there is no routing policy yet")

    async def SetPolicy(self, request: admin_pb2.SetPolicyRequest, context: Any) -> admin_pb2.SetPolicyResponse:
        """Refuses: not there yet."""
        del request, context
        raise MeshError(Reason.UNIMPLEMENTED, "there is no routing policy yet")

    async def Explain(self, request: admin_pb2.ExplainRequest, context: Any) -> admin_pb2.ExplainResponse:
        """The decisions of a request, oldest first."""
        del context
        records = self._decisions.of(request.request_id)
        if not records:
            raise MeshError(Reason.NOT_FOUND, "no decision of this request is known", field="request_id")
        return admin_pb2.ExplainResponse(decisions=[wire.decision(record, self._clock) for record in records])

    def _workers(self) -> list[admin_pb2.Worker]:
        return [wire.worker(worker, self._clock) for worker in self._fleet.workers]

    def _drain(self, worker_id: str, *, drained: bool) -> None:
        if not self._fleet.drain(worker_id, drained):
            raise MeshError(Reason.NOT_FOUND, "no worker of this name is registered", field="worker_id")
