"""tokenloom.router.v1.RouterAdminService: the fleet and the decisions, for operators. Rights are the edge's matter."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

from tokenloom.inference.v1 import worker_pb2
from tokenloom.router.v1 import admin_pb2, admin_pb2_grpc

from services.common.config import ConfigError
from services.common.errors import MeshError, Reason
from services.common.policy import policy_json
from services.common.rpc import metadata_of
from services.router import rolling, wire
from services.router.admission import Admission
from services.router.decisions import Decisions
from services.router.fleet import Clock, Fleet
from services.router.operations import Operation, Operations
from services.router.policy import Policies
from services.router.policy_file import PolicyFile
from services.router.slowness import slow_reasons

__all__ = ["AdminServicer"]

_BETWEEN_UPDATES_SECONDS: Final = 0.1
_MOST_TENANTS: Final = 64
_log = logging.getLogger(__name__)


class AdminServicer(admin_pb2_grpc.RouterAdminServiceServicer):
    """What operators ask of the router."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        admission: Admission,
        decisions: Decisions,
        policies: Policies,
        policy_file: PolicyFile,
        operations: Operations,
        clock: Clock,
    ) -> None:
        self._fleet = fleet
        self._admission = admission
        self._decisions = decisions
        self._policies = policies
        self._policy_file = policy_file
        self._clock = clock
        self._operations = operations
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
        del context
        interval = max(_BETWEEN_UPDATES_SECONDS, request.interval_duration.ToNanoseconds() / 1e9)
        changed = asyncio.Event()
        self._watches.add(changed)
        unsubscribe = (self._fleet.subscribe(lambda _: changed.set()), self._policies.subscribe(changed.set))
        try:
            while not self._closing.is_set():
                changed.clear()
                yield self._seen()
                await asyncio.sleep(interval)
                await changed.wait()
        finally:
            for each in unsubscribe:
                each()
            self._watches.discard(changed)

    async def DrainWorker(self, request: admin_pb2.DrainWorkerRequest, context: Any) -> admin_pb2.DrainWorkerResponse:
        """Takes a worker out of service, also when its process comes back."""
        self._found(request.worker_id, "worker.drain", context, self._fleet.drain(request.worker_id, True))
        return admin_pb2.DrainWorkerResponse()

    async def UndrainWorker(
        self, request: admin_pb2.UndrainWorkerRequest, context: Any
    ) -> admin_pb2.UndrainWorkerResponse:
        """Puts a worker back into service, drained or cordoned."""
        found = self._fleet.drain(request.worker_id, False) and self._fleet.cordon(request.worker_id, False)
        self._found(request.worker_id, "worker.undrain", context, found)
        return admin_pb2.UndrainWorkerResponse()

    async def CordonWorker(
        self, request: admin_pb2.CordonWorkerRequest, context: Any
    ) -> admin_pb2.CordonWorkerResponse:
        """Takes a worker out of service without telling it, also when its process comes back."""
        self._found(request.worker_id, "worker.cordon", context, self._fleet.cordon(request.worker_id, True))
        return admin_pb2.CordonWorkerResponse()

    async def SleepWorker(self, request: admin_pb2.SleepWorkerRequest, context: Any) -> admin_pb2.SleepWorkerResponse:
        """Has a worker give its GPU's memory back."""
        await self._operate(request.worker_id, worker_pb2.SleepRequest(level=request.level), context)
        return admin_pb2.SleepWorkerResponse()

    async def WakeWorker(self, request: admin_pb2.WakeWorkerRequest, context: Any) -> admin_pb2.WakeWorkerResponse:
        """Has a worker take its GPU's memory again."""
        await self._operate(request.worker_id, worker_pb2.WakeRequest(), context)
        return admin_pb2.WakeWorkerResponse()

    async def ReloadWeights(
        self, request: admin_pb2.ReloadWeightsRequest, context: Any
    ) -> admin_pb2.ReloadWeightsResponse:
        """Has a worker replace its weights."""
        await self._operate(request.worker_id, worker_pb2.ReloadWeightsRequest(path=request.path), context)
        return admin_pb2.ReloadWeightsResponse()

    async def LoadAdapter(self, request: admin_pb2.LoadAdapterRequest, context: Any) -> admin_pb2.LoadAdapterResponse:
        """Has a worker serve an adapter."""
        operation = worker_pb2.LoadAdapterRequest(name=request.name, path=request.path)
        loaded = await self._operate(request.worker_id, operation, context)
        return admin_pb2.LoadAdapterResponse(model=loaded.model)

    async def UnloadAdapter(
        self, request: admin_pb2.UnloadAdapterRequest, context: Any
    ) -> admin_pb2.UnloadAdapterResponse:
        """Has a worker serve an adapter no more."""
        await self._operate(request.worker_id, worker_pb2.UnloadAdapterRequest(name=request.name), context)
        return admin_pb2.UnloadAdapterResponse()

    async def RollWorkers(
        self, request: admin_pb2.RollWorkersRequest, context: Any
    ) -> AsyncIterator[admin_pb2.RollWorkersResponse]:
        """Has several workers do the same in turn."""
        field, meant = rolling.meant(request)
        operation = rolling.operation(request)
        async with aclosing(self._operations.roll(meant, operation, field=field, by=_caller(context))) as rolled:
            async for done in rolled:
                yield rolling.told(done)

    async def GetPolicy(self, request: admin_pb2.GetPolicyRequest, context: Any) -> admin_pb2.GetPolicyResponse:
        """The policy in force."""
        del request, context
        return admin_pb2.GetPolicyResponse(
            policy_json=policy_json(self._policies.current), version=self._policies.version
        )

    async def SetPolicy(self, request: admin_pb2.SetPolicyRequest, context: Any) -> admin_pb2.SetPolicyResponse:
        """Puts a policy in force, and keeps it where the router has a file for it."""
        policy = wire.policy(request.policy_json)
        try:
            version = self._policy_file.set(policy, by=_caller(context))
        except ConfigError as error:
            raise MeshError(Reason.INVALID_REQUEST, str(error), field="policy_json") from error
        return admin_pb2.SetPolicyResponse(version=version)

    async def Explain(self, request: admin_pb2.ExplainRequest, context: Any) -> admin_pb2.ExplainResponse:
        """The decisions of a request, oldest first."""
        del context
        records = self._decisions.of(request.request_id)
        if not records:
            raise MeshError(Reason.NOT_FOUND, "no decision of this request is known", field="request_id")
        return admin_pb2.ExplainResponse(decisions=[wire.decision(record, self._clock) for record in records])

    def _workers(self) -> list[admin_pb2.Worker]:
        workers = self._fleet.workers
        slow = slow_reasons(workers)
        return [wire.worker(worker, self._clock, slow.get(worker.worker_id, ())) for worker in workers]

    def _tenants(self) -> list[admin_pb2.TenantLoad]:
        running = Counter(lease.request.tenant for worker in self._fleet.workers for lease in worker.leases)
        return wire.tenants(running, self._admission.waiting_tenants, most=_MOST_TENANTS)

    def _seen(self) -> admin_pb2.WatchFleetResponse:
        degradation = self._policies.degradation
        return admin_pb2.WatchFleetResponse(
            workers=self._workers(),
            waiting_count=self._admission.waiting_count,
            models=wire.served(self._policies.aliases, self._fleet.workers, self._clock),
            degradation_level=wire.degradation(degradation.level),
            degradation_reason=degradation.reason,
            tenants=self._tenants(),
        )

    def _found(self, worker_id: str, what: str, context: Any, found: bool) -> None:
        if not found:
            raise MeshError(Reason.NOT_FOUND, "no worker of this name is registered", field="worker_id")
        _log.info("operated", extra={"audit": what, "by": _caller(context), "worker": worker_id})

    async def _operate(self, worker_id: str, operation: Operation, context: Any) -> Any:
        return await self._operations.run(worker_id, operation, by=_caller(context))


def _caller(context: Any) -> str:
    """Whose key it is; the edge has found that out, and lets nobody else say it."""
    return str(metadata_of(context).get("x-tokenloom-key", "inside the mesh"))
