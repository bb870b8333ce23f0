"""The gateway's session with the router, against a real router."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tokenloom.router.v1 import router_pb2

from services.common.errors import MeshError, Reason
from services.gateway.router_client import RouterClient
from services.router.app import RunningRouter
from tests.support.ports import free_port
from tests.support.router import running_router, worker_link
from tests.support.waiting import eventually


@asynccontextmanager
async def connected(*targets: str, patience_seconds: float = 5.0, wait: bool = True) -> AsyncIterator[RouterClient]:
    client = RouterClient(targets, patience_seconds=patience_seconds)
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


async def test_a_lease_lasts_as_long_as_its_block() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router),
        connected(f"127.0.0.1:{router.port}") as client,
    ):
        async with client.lease(acquire()) as lease:
            assert (lease.worker_id, lease.endpoint) == ("worker-0", "127.0.0.1:5001")
            assert leases(router) == 1
        await eventually(lambda: leases(router) == 0, within=1)


async def test_a_refusal_is_raised_with_its_reason() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router),
        connected(f"127.0.0.1:{router.port}") as client,
    ):
        with pytest.raises(MeshError) as caught:
            async with client.lease(acquire("nonsense")):
                pass
    assert (caught.value.reason, caught.value.field) == (Reason.MODEL_NOT_FOUND, "model")


async def test_who_stops_waiting_leaves_the_line() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router, max_running=1),
        connected(f"127.0.0.1:{router.port}") as client,
        client.lease(acquire()),
        client.lease(acquire()),
    ):
        waiting = asyncio.create_task(_worker_of(client))
        await eventually(lambda: router.admission.waiting_count == 1, within=2)
        waiting.cancel()
        await asyncio.wait([waiting])
        await eventually(lambda: router.admission.waiting_count == 0, within=1)


async def test_a_client_that_is_killed_frees_its_leases() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        client = RouterClient([f"127.0.0.1:{router.port}"])
        running = asyncio.create_task(client.run())
        await eventually(lambda: client.connected, within=5)
        async with client.lease(acquire()):
            assert leases(router) == 1
            running.cancel()
            await asyncio.wait([running])
            await eventually(lambda: leases(router) == 0, within=1)


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


async def _worker_of(client: RouterClient) -> str:
    async with client.lease(acquire()) as lease:
        return lease.worker_id
