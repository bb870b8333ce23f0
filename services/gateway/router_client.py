"""The gateway's session with the router: leases on workers, acquired and released over one stream."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Final

import grpc.aio
from tokenloom.router.v1 import router_pb2, router_pb2_grpc

from services.common.errors import MeshError, Reason
from services.common.outbox import Outbox
from services.common.rpc import channel
from services.common.status import error_from_status

__all__ = ["Lease", "RouterClient"]

_log = logging.getLogger(__name__)
_MAX_WAITING_EDITS: Final = 100_000
_RETRY_SECONDS: Final = 0.1
_CONNECT_SECONDS: Final = 1.0


@dataclass(slots=True)
class Lease:
    """The right to run one generation on one worker, and how that went."""

    worker_id: str
    endpoint: str
    reason: str
    queue_seconds: float
    outcome: router_pb2.Outcome.ValueType = router_pb2.OUTCOME_CANCELLED
    output_tokens: int = 0


@dataclass(slots=True)
class _Pending:
    acquire: router_pb2.Acquire
    granted: asyncio.Future[Lease]


class RouterClient:
    """Keeps a session with the first router that answers, and acquires leases over it.

    While no router answers, acquires wait, for `patience_seconds` at most; those that a lost session left unanswered
    are sent again on the next one.
    """

    def __init__(
        self, targets: Sequence[str], *, patience_seconds: float = 10.0, clock: Callable[[], float] = monotonic
    ) -> None:
        self._targets = targets
        self._patience = patience_seconds
        self._clock = clock
        self._pending: dict[int, _Pending] = {}
        self._handles = itertools.count(1)
        self._outbox: Outbox[router_pb2.SessionRequest] | None = None
        self._away_since = clock()

    @property
    def connected(self) -> bool:
        """Whether a router answers."""
        return self._outbox is not None

    async def run(self) -> None:
        """Keeps the session until cancelled."""
        for target in itertools.cycle(self._targets):
            try:
                async with channel(target) as connection:
                    async with asyncio.timeout(_CONNECT_SECONDS):
                        await connection.channel_ready()
                    await self._talk(connection)
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                _log.debug("router session lost", extra={"router": target, "cause": repr(error)})
            self._refuse_impatient()
            await asyncio.sleep(_RETRY_SECONDS)

    async def _talk(self, connection: grpc.aio.Channel) -> None:
        outbox = Outbox(router_pb2.SessionRequest, max_edits=_MAX_WAITING_EDITS)
        call = router_pb2_grpc.RouterServiceStub(connection).Session(outbox.messages())
        self._outbox = outbox
        try:
            for pending in self._pending.values():
                outbox.edit().acquires.append(pending.acquire)
            async for message in call:
                self._apply(message)
        finally:
            self._outbox = None
            self._away_since = self._clock()
            outbox.close()
            call.cancel()

    def _apply(self, message: router_pb2.SessionResponse) -> None:
        for grant in message.grants:
            self._grant(grant)
        for rejection in message.rejections:
            pending = self._pending.pop(rejection.handle, None)
            if pending is not None and not pending.granted.done():
                pending.granted.set_exception(error_from_status(rejection.status))

    def _grant(self, grant: router_pb2.Grant) -> None:
        pending = self._pending.pop(grant.handle, None)
        if pending is None or pending.granted.done():
            self._release(grant.handle, router_pb2.OUTCOME_CANCELLED, 0)
            return
        queued = grant.queue_duration.ToNanoseconds() / 1e9
        pending.granted.set_result(Lease(grant.worker_id, grant.endpoint, grant.reason, queued))

    def _refuse_impatient(self) -> None:
        if self._clock() - self._away_since < self._patience:
            return
        for pending in self._pending.values():
            if not pending.granted.done():
                pending.granted.set_exception(_no_router())
        self._pending.clear()

    @asynccontextmanager
    async def lease(self, acquire: router_pb2.Acquire) -> AsyncIterator[Lease]:
        """Acquires a lease, waiting for it in the router's queue, and releases it at the end of the block.

        Set the lease's `outcome` and `output_tokens` before that; a lease that is just left counts as cancelled.

        Raises:
            MeshError: the router refused, or no router answers.
        """
        if self._outbox is None and self._clock() - self._away_since >= self._patience:
            raise _no_router()
        handle = acquire.handle = next(self._handles)
        pending = self._pending[handle] = _Pending(acquire, asyncio.get_running_loop().create_future())
        if self._outbox is not None:
            self._outbox.edit().acquires.append(acquire)
        lease: Lease | None = None
        try:
            lease = await pending.granted
            yield lease
        finally:
            self._pending.pop(handle, None)
            if lease is not None:
                self._release(handle, lease.outcome, lease.output_tokens)
            elif not _was_rejected(pending.granted):
                self._release(handle, router_pb2.OUTCOME_CANCELLED, 0)

    def _release(self, handle: int, outcome: router_pb2.Outcome.ValueType, output_tokens: int) -> None:
        if self._outbox is not None:
            release = router_pb2.Release(handle=handle, outcome=outcome, output_token_count=output_tokens)
            self._outbox.edit().releases.append(release)


def _was_rejected(granted: asyncio.Future[Lease]) -> bool:
    return granted.done() and not granted.cancelled() and granted.exception() is not None


def _no_router() -> MeshError:
    return MeshError(Reason.NO_READY_WORKER, "no router answers", retry_after_seconds=1.0)
