"""Tells every router who this worker is and how it is, for as long as the worker lives."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

import grpc.aio
from tokenloom.router.v1 import router_pb2, router_pb2_grpc

from services.common.rpc import channel
from services.inference import convert
from services.inference.cache_journal import CacheBatch, CacheReader
from services.inference.engine import EngineCard, Load, cards_of
from services.inference.gate import Gate, State

__all__ = ["Registration", "registration_to_proto"]

_log = logging.getLogger(__name__)
_FIRST_BACKOFF_SECONDS: Final = 0.05
_LAST_BACKOFF_SECONDS: Final = 0.5
_ANSWER_SECONDS: Final = 5.0
# While nothing runs there is nothing to tell but that the worker is still there; routers are promised to hear that each
# quarter of a second.
_REST_SECONDS: Final = 0.2
# A change is told this many times sooner than the next report is due: soon, and yet not with each request.
_CHECKS_A_REPORT: Final = 4
_STATES: Final = {
    State.STARTING: router_pb2.WORKER_STATE_UNAVAILABLE,
    State.READY: router_pb2.WORKER_STATE_READY,
    State.DRAINING: router_pb2.WORKER_STATE_DRAINING,
    State.UNAVAILABLE: router_pb2.WORKER_STATE_UNAVAILABLE,
    State.ASLEEP: router_pb2.WORKER_STATE_ASLEEP,
}


class Registration:
    """A worker's streams to its routers, each of which is opened again whenever it ends."""

    def __init__(
        self,
        registration: router_pb2.Registration,
        gate: Gate,
        *,
        report_seconds: float,
        abandoned: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """`report_seconds` is the longest between two reports while anything runs.

        `abandoned` gives the ids of requests that were given up lately.
        """
        self._abandoned = abandoned
        self._registration = registration
        self._gate = gate
        self._report_seconds = report_seconds

    async def keep(self, routers: Sequence[str]) -> None:
        """Keeps the worker registered with every router; runs until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for router in routers:
                tasks.create_task(self._keep(router), name=f"registration with {router}")

    async def _keep(self, router: str) -> None:
        backoff = 0.0
        while True:
            connection = _Connection(router, self._gate)
            cause = await self._connect(connection)
            if connection.registered or not backoff:
                backoff = _FIRST_BACKOFF_SECONDS
                _log.warning("not registered", extra={"router": router, "cause": cause})
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, _LAST_BACKOFF_SECONDS)

    async def _connect(self, connection: "_Connection") -> str:
        try:
            await connection.run(self._messages())
        except TimeoutError:
            return "the router does not answer"
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        except asyncio.CancelledError:
            # gRPC also says so when it could not get at our own messages; then nobody has cancelled this task.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return "a report could not be made"
        return "the router ended the stream"

    async def _messages(self) -> AsyncIterator[router_pb2.RegisterRequest]:
        told = self._cards(())
        yield router_pb2.RegisterRequest(registration=_with_models(self._registration, told))
        cache: CacheReader | None = None
        while True:
            state, load = self._now()
            report = convert.load_to_proto(load, _STATES[state], self._gate.reason)
            report.abandoned_request_ids.extend(self._abandoned())
            cards = self._cards(told)
            if cards != told:
                told = cards
                report.models.extend(map(convert.model_card_to_proto, cards))
            yield router_pb2.RegisterRequest(load=report)
            if cache is None and state is not State.STARTING and self._registration.kv_block_token_count:
                cache = self._gate.engine.cache_journal.reader()
            for batch in cache.batches() if cache is not None else ():
                yield router_pb2.RegisterRequest(kv_cache_events=_batch_to_proto(batch))
            await self._wait(_gist(state, load), told)

    async def _wait(self, gist: tuple[State, int, int], cards: Sequence[EngineCard]) -> None:
        clock, look_seconds = asyncio.get_running_loop().time, self._report_seconds / _CHECKS_A_REPORT
        state, running, waiting = gist
        rests = not running and not waiting and state is not State.STARTING
        until = clock() + (_REST_SECONDS if rests else self._report_seconds) - look_seconds / 2
        if rests and not await self._gate.stirred(_REST_SECONDS):
            return
        # Load has no event to wait for: it is read, not pushed.
        while clock() < until:
            await asyncio.sleep(look_seconds)
            if _gist(*self._now()) != gist or self._cards(cards) != cards:
                return

    def _cards(self, known: Sequence[EngineCard]) -> Sequence[EngineCard]:
        return known if self._gate.state is State.STARTING else tuple(cards_of(self._gate.engine))

    def _now(self) -> tuple[State, Load]:
        state = self._gate.state
        return state, Load(trouble=self._gate.reason) if state is State.STARTING else self._gate.engine.load


class _Connection:
    """One stream to one router, from its beginning to its end."""

    def __init__(self, router: str, gate: Gate) -> None:
        self._router = router
        self._gate = gate
        self.registered = False

    async def run(self, messages: AsyncIterator[router_pb2.RegisterRequest]) -> None:
        """Registers, reports and obeys until the stream ends."""
        async with channel(self._router) as connection:
            call = router_pb2_grpc.RouterServiceStub(connection).Register(messages)
            async with asyncio.timeout(_ANSWER_SECONDS):
                response = await call.read()
            while isinstance(response, router_pb2.RegisterResponse):
                self._obey(response)
                response = await call.read()

    def _obey(self, response: router_pb2.RegisterResponse) -> None:
        match response.WhichOneof("message"):
            case "registered":
                self.registered = True
                _log.info("registered", extra={"router": self._router})
            case "drain":
                self._gate.drain()
            case "undrain":
                self._gate.undrain()


def registration_to_proto(
    card: EngineCard, *, worker_id: str, endpoint: str, pool: str, gpus: Sequence[str]
) -> router_pb2.Registration:
    """Who a worker is."""
    return router_pb2.Registration(
        worker_id=worker_id,
        endpoint=endpoint,
        models=[convert.model_card_to_proto(card)],
        engine=card.kind,
        pool=pool,
        gpu_uuids=gpus,
        max_running_count=card.max_running,
        kv_cache_token_count=card.kv_cache_tokens,
        kv_block_token_count=card.kv_block_tokens,
    )


def _with_models(registration: router_pb2.Registration, cards: Sequence[EngineCard]) -> router_pb2.Registration:
    """What the worker serves by now: adapters come and go, and routers are lost and found."""
    if not cards:
        return registration
    current = router_pb2.Registration()
    current.CopyFrom(registration)
    del current.models[:]
    current.models.extend(map(convert.model_card_to_proto, cards))
    return current


def _batch_to_proto(batch: CacheBatch) -> router_pb2.KvCacheEvents:
    return router_pb2.KvCacheEvents(
        sequence_number=batch.number,
        cleared=batch.cleared,
        stored_hashes=batch.stored,
        removed_hashes=batch.removed,
    )


def _gist(state: State, load: Load) -> tuple[State, int, int]:
    return state, load.running, load.waiting
