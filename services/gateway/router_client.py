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
from tokenloom.router.v1 import router_pb2

from services.common.errors import MeshError, Reason
from services.common.http2_call import ClientCall
from services.common.http2_client import calling
from services.common.http2_outgoing import send_from
from services.common.outbox import Outbox
from services.common.rpc import channel, connected
from services.common.status import error_from_status
from services.gateway.lease import Lease, unwanted
from services.gateway.placement import Placement

__all__ = ["OnQueued", "RouterClient"]

OnQueued = Callable[[int, float | None], None]
"""Takes how many are before a request in the router's queue, and the seconds that it is expected to wait, if known."""
_log = logging.getLogger(__name__)
_PATH: Final = "/tokenloom.router.v1.RouterService/Session"
_MAX_WAITING_EDITS: Final = 100_000
_RETRY_SECONDS: Final = 0.1
_CONNECT_SECONDS: Final = 1.0
# A router answers each acquire at once, if only by saying that it waits; one that takes longer is away.
_ANSWER_SECONDS: Final = 0.15
_SWEEP_SECONDS: Final = 0.05
# A router that has just started does not know every worker yet, and has requests wait for those that we know.
_TRUST_SECONDS: Final = 1.0
_SILENCE_SECONDS: Final = 1.0
# The first router is used again after it has answered so often, so many seconds apart.
_SURE: Final = 2
_RETURN_SECONDS: Final = 1.0
_AWAY_REASON: Final = "the router is away: the less busy one of two workers that were ready last"


@dataclass(slots=True)
class _Pending:
    acquire: router_pb2.Acquire
    granted: asyncio.Future[Lease]
    asked_at: float
    queued: bool = False
    on_queued: OnQueued | None = None
    local: bool = False
    """Whether the lease is known to nobody but us."""


class RouterClient:
    """Keeps a session with the first router that answers, and acquires leases over it.

    While no router answers, requests are placed among the workers that were ready last, as `placement` knows them. What
    finds no room there waits, for `patience_seconds` at most, and is asked for again once a router is back.
    """

    def __init__(
        self,
        targets: Sequence[str],
        *,
        sessions: Sequence[str] = (),
        placement: Placement | None = None,
        patience_seconds: float = 10.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`sessions`: where each of the targets takes sessions; empty: all do at `targets`."""
        self._targets = targets
        self._sessions = sessions or targets
        self._placement = placement or Placement()
        self._patience = patience_seconds
        self._clock = clock
        self._pending: dict[int, _Pending] = {}
        self._asked = asyncio.Event()
        self._handles = itertools.count(1)
        self._outbox: Outbox[router_pb2.SessionRequest] | None = None
        self._talking: asyncio.Timeout | None = None
        self._away_since = clock()
        self._connected_at = clock()
        self._silent_since: float | None = None
        self._place_of_router = 0
        self._away_before = clock()

    @property
    def connected(self) -> bool:
        """Whether a router answers."""
        return self._outbox is not None

    @property
    def can_place(self) -> bool:
        """Whether requests find a worker, with a router or without."""
        return self.connected or self._placement.is_fresh

    async def run(self) -> None:
        """Keeps the session until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._sweep_often())
            tasks.create_task(self._return_to_first())
            while True:
                await self._try(self._sessions[self._place_of_router])
                await asyncio.sleep(_RETRY_SECONDS)

    async def _try(self, target: str) -> None:
        """One session with one router; afterwards it is the next one's turn, or the first one's if it had answered."""
        following = (self._place_of_router + 1) % len(self._targets)
        try:
            async with calling(target, _PATH, self._take, connect_seconds=_CONNECT_SECONDS) as call:
                await self._talk(call)
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            _log.debug("router session lost", extra={"router": target, "cause": repr(error)})
        hung = self._silent_since is not None
        answered = self._connected_at > self._away_before and not hung
        self._away_before = self._clock()
        self._place_of_router = 0 if answered else following

    async def _return_to_first(self) -> None:
        """Has everybody use the same router again once it is back: one that sees every request decides best."""
        found = 0
        while len(self._targets) > 1:
            await asyncio.sleep(_RETURN_SECONDS)
            found = found + 1 if self._place_of_router and await _answers(self._targets[0]) else 0
            if found >= _SURE and self._talking is not None:
                found = 0
                self._talking.reschedule(asyncio.get_running_loop().time())

    async def _talk(self, call: ClientCall) -> None:
        outbox = Outbox(router_pb2.SessionRequest, max_edits=_MAX_WAITING_EDITS)
        send_from(outbox, call, lambda message: (message.SerializeToString(),))
        self._outbox = outbox
        self._connected_at, self._silent_since = self._clock(), None
        _log.info("router session begins")
        try:
            async with asyncio.timeout(None) as self._talking:
                for pending in self._pending.values():
                    pending.asked_at = self._connected_at
                    outbox.edit().acquires.append(pending.acquire)
                await call.ended()
        finally:
            self._outbox = self._talking = None
            self._away_since = self._clock()
            for pending in self._pending.values():
                pending.queued = False
            _log.warning("router session lost", extra={"unanswered": len(self._pending)})

    def _take(self, encoded: bytes) -> None:
        message = router_pb2.SessionResponse.FromString(encoded)
        self._silent_since = None
        for grant in message.grants:
            self._grant(grant)
        for queued in message.queued:
            waiting = self._pending.get(queued.handle)
            if waiting is not None:
                waiting.queued = True
                if waiting.on_queued is not None:
                    known = queued.HasField("expected_wait_duration")
                    expected = queued.expected_wait_duration.ToNanoseconds() / 1e9 if known else None
                    waiting.on_queued(queued.position, expected)
        for rejection in message.rejections:
            pending = self._pending.pop(rejection.handle, None)
            if pending is not None and not pending.granted.done():
                pending.granted.set_exception(error_from_status(rejection.status))

    def _grant(self, grant: router_pb2.Grant) -> None:
        pending = self._pending.pop(grant.handle, None)
        if pending is None or pending.granted.done():
            self._release(unwanted(grant.handle))
            return
        lease = Lease(
            grant.worker_id,
            grant.endpoint,
            grant.reason,
            grant.queue_duration.ToNanoseconds() / 1e9,
            model=grant.model or pending.acquire.model,
            degraded=grant.degraded,
            output_token_limit=grant.output_token_limit,
        )
        pending.granted.set_result(lease)

    async def _sweep_often(self) -> None:
        while True:
            if not self._pending:
                self._asked.clear()
                await self._asked.wait()
            await asyncio.sleep(_SWEEP_SECONDS)
            self._sweep()

    def _sweep(self) -> None:
        """Looks after those that no router has answered."""
        now = self._clock()
        for pending in list(self._pending.values()):
            if pending.granted.done() or not self._is_left_alone(pending, now):
                continue
            if self._place(pending):
                if self._outbox is not None and self._silent_since is None:
                    self._silent_since = now
            elif self._outbox is None and now - max(self._away_since, pending.asked_at) >= self._patience:
                pending.granted.set_exception(_no_router())
        if self._silent_since is not None and now - self._silent_since > _SILENCE_SECONDS:
            self._try_another(now)

    def _is_left_alone(self, pending: _Pending, now: float) -> bool:
        if self._outbox is None:
            return True
        if now - pending.asked_at < _ANSWER_SECONDS:
            return False
        return not pending.queued or now - self._connected_at < _TRUST_SECONDS

    def _place(self, pending: _Pending) -> bool:
        acquire = pending.acquire
        place = self._placement.place(acquire.model, acquire.excluded_worker_ids)
        if place is None:
            return False
        if self._pending.pop(acquire.handle, None) is not None:
            self._release(unwanted(acquire.handle))
        pending.local = True
        pending.granted.set_result(Lease(place.worker_id, place.endpoint, _AWAY_REASON, model=place.model))
        return True

    def _try_another(self, now: float) -> None:
        # It is connected and says nothing: it hangs.
        self._silent_since = now
        if self._talking is not None and len(self._targets) > 1:
            self._talking.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def lease(self, acquire: router_pb2.Acquire, on_queued: OnQueued | None = None) -> AsyncIterator[Lease]:
        """Acquires a lease, and gives it back at the end of the block. Raises as `acquire` does."""
        lease = await self.acquire(acquire, on_queued)
        try:
            yield lease
        finally:
            self.give_back(lease)

    async def acquire(self, acquire: router_pb2.Acquire, on_queued: OnQueued | None = None) -> Lease:
        """Acquires a lease, waiting for it in the router's queue; it has to be given back.

        `on_queued` hears of the place in the queue.

        Raises:
            MeshError: the router refused, or no router answers and no worker is known that has room.
        """
        acquire.handle = next(self._handles)
        pending = _Pending(acquire, asyncio.get_running_loop().create_future(), self._clock(), on_queued=on_queued)
        self._ask(pending)
        try:
            lease = await pending.granted
        except BaseException:
            if not pending.local and not _was_rejected(pending.granted):
                self._release(unwanted(acquire.handle))
            raise
        finally:
            self._pending.pop(acquire.handle, None)
        if not pending.local:
            lease.handle = acquire.handle
        self._placement.took(lease.worker_id)
        return lease

    def give_back(self, lease: Lease) -> None:
        """Ends a lease. Say in it how it went before that; one that is just given back counts as cancelled."""
        self._placement.gave_back(lease.worker_id)
        if lease.handle:
            self._release(lease.release())

    def _ask(self, pending: _Pending) -> None:
        if self._outbox is None:
            if self._place(pending):
                return
            if not self._placement.is_fresh and self._clock() - self._away_since >= self._patience:
                raise _no_router()
        self._pending[pending.acquire.handle] = pending
        self._asked.set()
        if self._outbox is not None:
            self._outbox.edit().acquires.append(pending.acquire)
            if self._silent_since is not None:
                # It has left others without an answer. It is asked all the same: its answer tells that it is back.
                self._place(pending)

    def _release(self, release: router_pb2.Release) -> None:
        if self._outbox is not None:
            self._outbox.edit().releases.append(release)


async def _answers(target: str) -> bool:
    async with channel(target) as connection:
        try:
            await connected(connection, within=_RETURN_SECONDS)
        except TimeoutError:
            return False
        return True


def _was_rejected(granted: asyncio.Future[Lease]) -> bool:
    return granted.done() and not granted.cancelled() and granted.exception() is not None


def _no_router() -> MeshError:
    return MeshError(Reason.NO_READY_WORKER, "no router answers", retry_after_seconds=1.0)
