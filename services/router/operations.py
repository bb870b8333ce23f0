"""What operators have workers do beside serving: calls of their WorkerService, on one, or on several in turn."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import grpc.aio
from google.protobuf.message import Message
from tokenloom.inference.v1 import worker_pb2, worker_pb2_grpc

from services.common.errors import MeshError, Reason
from services.common.rpc import channel, connected
from services.common.status import DETAILS_KEY, error_from_call
from services.router.fleet import Clock, Fleet
from services.router.worker import Worker

__all__ = ["Done", "Operation", "Operations"]

_log = logging.getLogger(__name__)
_CONNECT_SECONDS: Final = 3.0
# A worker that is woken, or has other weights, says so within a report or two.
_BACK_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class _Kind:
    method: str
    """The rpc of WorkerService."""
    word: str
    """As the log has it."""
    seconds: float
    """Longest that it may take; less than the edge lets a stream be silent."""
    serves_after: bool = False
    """Whether the worker takes work once it is done."""
    settled: Reason | None = None
    """The refusal that says that there is nothing left to do."""


_KINDS: Final[dict[type[Message], _Kind]] = {
    worker_pb2.SleepRequest: _Kind("Sleep", "sleep", 120.0),
    worker_pb2.WakeRequest: _Kind("Wake", "wake", 600.0, serves_after=True),
    worker_pb2.ReloadWeightsRequest: _Kind("ReloadWeights", "reload", 600.0, serves_after=True),
    worker_pb2.LoadAdapterRequest: _Kind("LoadAdapter", "load_adapter", 150.0, settled=Reason.ALREADY_EXISTS),
    worker_pb2.UnloadAdapterRequest: _Kind("UnloadAdapter", "unload_adapter", 150.0, settled=Reason.NOT_FOUND),
}
Operation = (
    worker_pb2.SleepRequest
    | worker_pb2.WakeRequest
    | worker_pb2.ReloadWeightsRequest
    | worker_pb2.LoadAdapterRequest
    | worker_pb2.UnloadAdapterRequest
)
"""What a worker is to do: a request of its WorkerService."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A worker that is done with.

    Attributes:
        worker_id: which.
        seconds: how long it took, until it took work again where that was waited for.
        error: why it failed; None: it did not.
        unchanged: why there was nothing to do; empty: there was.
        left: the workers whose turn comes, or would have come.
    """

    worker_id: str
    seconds: float
    error: MeshError | None
    unchanged: str
    left: Sequence[str]


class Operations:
    """Calls workers where they registered. What a worker has begun goes to its end, also when who asked for it leaves:
    weights that are replaced by half would cost the worker its engine."""

    def __init__(self, fleet: Fleet, clock: Clock) -> None:
        self._fleet = fleet
        self._clock = clock
        self._calls: asyncio.TaskGroup
        self._open: set[asyncio.Task[Any]] = set()
        self._closing = False

    @asynccontextmanager
    async def calling(self) -> AsyncIterator[None]:
        """Workers can be called while the block runs; what is not done at its end is given up."""
        async with asyncio.TaskGroup() as self._calls:
            try:
                yield
            finally:
                self._closing = True
                for call in self._open:
                    call.cancel()

    async def run(self, worker_id: str, operation: Operation, *, by: str) -> Any:
        """Has one worker do it, for whoever `by` names; returns its answer.

        Raises:
            MeshError: NOT_FOUND, no such worker is registered; NO_READY_WORKER, it can't be reached or is lost;
                DEADLINE_EXCEEDED; or what it says itself.
        """
        worker = self._fleet.get(worker_id)
        if worker is None:
            raise MeshError(Reason.NOT_FOUND, "no worker of this name is registered", field="worker_id")
        if self._closing:
            raise _stopping()
        call = self._calls.create_task(_outcome(worker, operation, by))
        self._open.add(call)
        call.add_done_callback(self._open.discard)
        try:
            answer, error = await asyncio.shield(call)
        except asyncio.CancelledError:
            if call.cancelled():
                raise _stopping() from None
            raise
        if error is not None:
            raise error
        return answer

    async def roll(
        self, meant: Callable[[Worker], bool], operation: Operation, *, field: str, by: str
    ) -> AsyncGenerator[Done]:
        """Has those workers that are `meant` do it, one after the other by name, until one fails or who asks leaves.

        `field` is named where none is meant; `by` as for run().

        Raises:
            MeshError: NOT_FOUND, no worker is meant.
        """
        left = [worker.worker_id for worker in self._fleet.workers if meant(worker)]
        if not left:
            raise MeshError(Reason.NOT_FOUND, "no worker that is registered is meant", field=field)
        while left:
            worker_id = left.pop(0)
            began, error, unchanged = time.monotonic(), None, ""
            try:
                await self._turn(worker_id, operation, by)
            except MeshError as failed:
                if failed.reason is _kind(operation).settled and self._fleet.get(worker_id) is not None:
                    unchanged = failed.message
                else:
                    error = failed
            seconds = time.monotonic() - began
            yield Done(worker_id=worker_id, seconds=seconds, error=error, unchanged=unchanged, left=tuple(left))
            if error is not None:
                return

    async def _turn(self, worker_id: str, operation: Operation, by: str) -> None:
        await self.run(worker_id, operation, by=by)
        if _kind(operation).serves_after:
            await self._back(worker_id)

    async def _back(self, worker_id: str) -> None:
        """Waits until the worker takes work again; one that an operator took out of service is not waited for."""
        changed = asyncio.Event()
        unsubscribe = self._fleet.subscribe(lambda _: changed.set())
        try:
            async with asyncio.timeout(_BACK_SECONDS):
                while (why := self._missing(worker_id)) is not None:
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            message = f"it is done, but the worker takes no work {_BACK_SECONDS:g} s later: {why}"
            raise MeshError(Reason.NO_READY_WORKER, message) from None
        finally:
            unsubscribe()

    def _missing(self, worker_id: str) -> str | None:
        worker = self._fleet.get(worker_id)
        if worker is None:
            return "it is gone"
        return None if worker.drained or worker.cordoned else worker.excluded_reason(self._clock()) or None


def _stopping() -> MeshError:
    return MeshError(Reason.NO_READY_WORKER, "the router stops, and nobody knows whether the worker has done it")


def _kind(operation: Operation) -> _Kind:
    return _KINDS[type(operation)]


async def _outcome(worker: Worker, operation: Operation, by: str) -> tuple[Any, Exception | None]:
    """What comes of a call. Errors are for who waits for it, if anybody does, and not for the others' calls."""
    said = {"audit": f"worker.{_kind(operation).word}", "by": by, "worker": worker.worker_id}
    try:
        answer = await _call(worker, operation)
    except Exception as error:  # noqa: BLE001  # it is raised where it is waited for
        _log.info("not operated", extra={**said, "cause": str(error)})
        return None, error
    _log.info("operated", extra=said)
    return answer, None


async def _call(worker: Worker, operation: Operation) -> Any:
    kind = _kind(operation)
    async with channel(worker.endpoint) as connection:
        try:
            await connected(connection, within=_CONNECT_SECONDS)
        except TimeoutError:
            raise MeshError(Reason.NO_READY_WORKER, "the worker can't be reached", retry_after_seconds=1.0) from None
        try:
            stub = cast("Any", worker_pb2_grpc.WorkerServiceStub(connection))
            return await getattr(stub, kind.method)(operation, timeout=kind.seconds)
        except grpc.aio.AioRpcError as error:
            raise _told(error, kind.seconds) from error


def _told(error: grpc.aio.AioRpcError, seconds: float) -> MeshError:
    """What the worker said; of one that said nothing, what became of the call, without its address."""
    if any(key == DETAILS_KEY for key, _ in error.trailing_metadata() or ()):
        return error_from_call(error)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return MeshError(Reason.DEADLINE_EXCEEDED, f"the worker has not done it within {seconds:g} s")
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        message = "the worker was lost meanwhile, and nobody knows whether it has done it"
        return MeshError(Reason.NO_READY_WORKER, message)
    return error_from_call(error)
