"""The gateway's session with the router, against a real router."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from tokenloom.router.v1 import router_pb2, router_pb2_grpc

from services.common.errors import MeshError, Reason
from services.common.rpc import serve
from services.gateway.placement import KnownWorker, Placement
from services.gateway.router_client import RouterClient
from services.router.app import RunningRouter
from tests.support.measured import measured
from tests.support.ports import free_port
from tests.support.router import running_router, worker_link
from tests.support.waiting import eventually


@asynccontextmanager
async def connected(
    *targets: str, patience_seconds: float = 5.0, wait: bool = True, placement: Placement | None = None
) -> AsyncIterator[RouterClient]:
    client = RouterClient(targets, patience_seconds=patience_seconds, placement=placement)
    running = asyncio.create_task(client.run())
    try:
        if wait:
            await eventually(lambda: client.connected, within=5)
        yield client
    finally:
        running.cancel()
        await asyncio.wait([running])


def acquire(model: str = "demo") -> router_pb2.Acquire:
    return router_pb2.Acquire(model=model, request_id="r", tenant_id="t", prompt_token_count=10)


def leases(router: RunningRouter, worker_id: str = "worker-0") -> int:
    worker = router.fleet.get(worker_id)
    return len(worker.leases) if worker else 0


@pytest.fixture(params=["port", "picker_port"])
def door(request: pytest.FixtureRequest) -> Callable[[RunningRouter], str]:
    """Where a router takes sessions: at its gRPC server, and at its lean one."""
    return lambda router: f"127.0.0.1:{getattr(router, request.param)}"


async def test_a_lease_lasts_as_long_as_its_block(door: Callable[[RunningRouter], str]) -> None:
    async with (
        running_router(picker="127.0.0.1:0") as (router, to_router),
        worker_link(router, to_router),
        connected(door(router)) as client,
    ):
        async with client.lease(acquire()) as lease:
            assert (lease.worker_id, lease.endpoint) == ("worker-0", "127.0.0.1:5001")
            assert leases(router) == 1
        await eventually(lambda: leases(router) == 0, within=5)


async def test_a_refusal_is_raised_with_its_reason(door: Callable[[RunningRouter], str]) -> None:
    async with (
        running_router(picker="127.0.0.1:0") as (router, to_router),
        worker_link(router, to_router),
        connected(door(router)) as client,
    ):
        with pytest.raises(MeshError) as caught:
            async with client.lease(acquire("nonsense")):
                pass
    assert (caught.value.reason, caught.value.field) == (Reason.MODEL_NOT_FOUND, "model")


async def test_who_stops_waiting_leaves_the_line(door: Callable[[RunningRouter], str]) -> None:
    async with (
        running_router(picker="127.0.0.1:0") as (router, to_router),
        worker_link(router, to_router, max_running=1),
        connected(door(router)) as client,
        client.lease(acquire()),
        client.lease(acquire()),
    ):
        waiting = asyncio.create_task(_worker_of(client))
        await eventually(lambda: router.admission.waiting_count == 1, within=5)
        waiting.cancel()
        await asyncio.wait([waiting])
        await eventually(lambda: router.admission.waiting_count == 0, within=5)


async def test_a_client_that_is_killed_frees_its_leases(door: Callable[[RunningRouter], str]) -> None:
    async with running_router(picker="127.0.0.1:0") as (router, to_router), worker_link(router, to_router):
        client = RouterClient([door(router)])
        running = asyncio.create_task(client.run())
        await eventually(lambda: client.connected, within=5)
        async with client.lease(acquire()):
            assert leases(router) == 1
            running.cancel()
            await asyncio.wait([running])
            await eventually(lambda: leases(router) == 0, within=5)


async def test_without_a_router_the_error_comes_after_some_patience() -> None:
    async with connected(f"127.0.0.1:{free_port()}", patience_seconds=0.3, wait=False) as client:
        with pytest.raises(MeshError) as caught:
            async with asyncio.timeout(5), client.lease(acquire()):
                pass
    assert caught.value.reason is Reason.NO_READY_WORKER
    assert caught.value.retry_after_seconds == 1.0


async def test_who_asks_before_the_router_is_there_is_answered_once_it_is() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with connected(address, wait=False) as client:
        waiting = asyncio.create_task(_worker_of(client))
        async with running_router(listen=address) as (router, to_router), worker_link(router, to_router):
            assert await asyncio.wait_for(waiting, 5) == "worker-0"


async def test_a_router_that_stops_refuses_those_that_wait_and_its_successor_serves_the_next() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with connected(address, wait=False) as client:
        async with running_router(listen=address, ready_grace_seconds=30) as (first, _):
            waiting = asyncio.create_task(_worker_of(client))
            await eventually(lambda: first.admission.waiting_count == 1, within=5)
        with pytest.raises(MeshError, match="the router stops"):
            await asyncio.wait_for(waiting, 5)
        async with running_router(listen=address) as (second, to_second), worker_link(second, to_second):
            assert await asyncio.wait_for(_worker_of(client), 5) == "worker-0"


async def test_the_next_router_is_tried_when_the_first_does_not_answer() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router),
        connected(f"127.0.0.1:{free_port()}", f"127.0.0.1:{router.port}") as client,
    ):
        assert await asyncio.wait_for(_worker_of(client), 5) == "worker-0"


def known(*workers: str, max_running: int = 8) -> Placement:
    """What a gateway has seen of workers that serve "demo"."""
    placement = Placement()
    placement.see(
        [
            KnownWorker(worker_id=name, endpoint=f"{name}:1", models=frozenset(["demo"]), max_running=max_running)
            for name in workers
        ],
        {},
    )
    return placement


@measured
async def test_without_a_router_requests_go_at_once_to_workers_that_were_ready_last() -> None:
    address = f"127.0.0.1:{free_port()}"
    placement = known("worker-7")
    async with connected(address, wait=False, patience_seconds=0.3, placement=placement) as client:
        began = time.monotonic()
        async with client.lease(acquire()) as lease:
            assert time.monotonic() - began < 0.1
            assert (lease.worker_id, lease.model) == ("worker-7", "demo")
            assert "the router is away" in lease.reason
        with pytest.raises(MeshError):
            async with asyncio.timeout(5), client.lease(acquire("unknown")):
                pass


async def test_without_a_router_and_without_room_requests_wait_for_each_other() -> None:
    placement = known("worker-7", max_running=1)
    async with connected(f"127.0.0.1:{free_port()}", wait=False, placement=placement) as client:
        async with client.lease(acquire()):
            waiting = asyncio.create_task(_worker_of(client))
            await asyncio.sleep(0.2)
            assert not waiting.done()
        assert await asyncio.wait_for(waiting, 1) == "worker-7"


async def test_a_router_that_has_just_started_is_not_waited_for_and_then_trusted() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with connected(address, wait=False, placement=known("worker-0")) as client:
        async with running_router(listen=address, ready_grace_seconds=30) as (first, _):
            await eventually(lambda: client.connected, within=5)
            async with asyncio.timeout(5), client.lease(acquire()) as lease:
                assert "the router is away" in lease.reason
                await eventually(lambda: first.admission.waiting_count == 0, within=5)
        async with running_router(listen=address) as (second, to_second), worker_link(second, to_second):
            await eventually(lambda: client.connected, within=5)
            async with client.lease(acquire()) as lease:
                assert "the router is away" not in lease.reason
                assert leases(second) == 1
            await eventually(lambda: leases(second) == 0, within=5)


class Silent(router_pb2_grpc.RouterServiceServicer):
    """A router that takes everything in and says nothing."""

    is_over = False

    async def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[router_pb2.SessionResponse]:
        """Listens."""
        del context
        try:
            async for _ in request_iterator:
                pass
            yield router_pb2.SessionResponse()
        finally:
            self.is_over = True

    async def Register(self, request_iterator: Any, context: Any) -> AsyncIterator[router_pb2.RegisterResponse]:
        """Has no workers."""
        del request_iterator, context
        yield router_pb2.RegisterResponse()

    def register(self, server: grpc.aio.Server) -> list[str]:
        """Adds it."""
        router_pb2_grpc.add_RouterServiceServicer_to_server(self, server)
        return []


async def test_a_router_that_hangs_is_not_waited_for_and_then_left_for_another_one() -> None:
    silent = Silent()
    async with (
        serve("127.0.0.1:0", silent.register) as hung,
        running_router() as (router, to_router),
        worker_link(router, to_router),
        connected(f"127.0.0.1:{hung.port}", f"127.0.0.1:{router.port}", placement=known("worker-7")) as client,
    ):
        began = time.monotonic()
        assert await _worker_of(client) == "worker-7"
        assert time.monotonic() - began < 0.5
        while not silent.is_over:
            assert await _worker_of(client) == "worker-7"
            await asyncio.sleep(0.05)
        await eventually(lambda: client.connected, within=5)
        assert await _worker_of(client) == "worker-0"


async def _worker_of(client: RouterClient) -> str:
    async with client.lease(acquire()) as lease:
        return lease.worker_id
