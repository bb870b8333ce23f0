"""RouterService.Session on the router's lean server, as grpc.aio speaks it: the same promises, and bad peers."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from services.common.errors import Reason
from services.common.rpc import channel
from services.common.status import error_from_call, error_from_status
from services.common.tracing import tracer
from services.router.app import RunningRouter
from services.router.http2 import Open, serve_streams
from services.router.servicer import SESSION_PATH, RouterServicer
from tests.support.measured import measured
from tests.support.router import GatewaySession, assert_stuck_alone, gateway_session, running_router, worker_link
from tests.support.scheduling import Bench
from tests.support.waiting import eventually
from tests.support.wire import wire


@asynccontextmanager
async def lean_session(port: int) -> AsyncIterator[GatewaySession]:
    async with channel(f"127.0.0.1:{port}") as to_router, gateway_session(to_router) as gateway:
        yield gateway


@asynccontextmanager
async def lean_router(**worker: Any) -> AsyncIterator[tuple[RunningRouter, GatewaySession]]:
    async with (
        running_router(picker="127.0.0.1:0") as (router, to_router),
        worker_link(router, to_router, **worker),
        lean_session(router.picker_port) as gateway,
    ):
        yield router, gateway


async def test_leases_are_granted_released_and_waited_for() -> None:
    # With so many slots one of them is soon free, and one request may wait for it in the engine.
    async with lean_router(max_running=16) as (router, gateway):
        first = await gateway.granted()
        assert first.worker_id == "worker-0"
        *_, waiting = await gateway.acquire(count=17)
        await eventually(lambda: waiting in gateway.queued, within=5)
        await gateway.release(first.handle)
        await eventually(lambda: waiting in gateway.grants, within=5)
        assert len(router.fleet.workers[0].leases) == 17


@measured
async def test_a_lost_session_frees_its_leases_and_takes_its_requests_out_of_the_line() -> None:
    async with lean_router(max_running=1) as (router, gateway):
        await gateway.acquire(count=5)
        await eventually(lambda: len(gateway.grants) == 2 and len(gateway.queued) == 3, within=5)
        gateway.lose()
        lost = time.monotonic()
        await eventually(lambda: not router.fleet.workers[0].leases and not router.admission.waiting_count, within=5)
        assert time.monotonic() - lost < 0.05


async def test_a_handle_that_is_in_use_ends_the_session_with_the_reason() -> None:
    async with lean_router() as (router, gateway):
        grant = await gateway.granted()
        await gateway.acquire(handle=grant.handle)
        assert await gateway.code() is grpc.StatusCode.INVALID_ARGUMENT
        await eventually(lambda: not router.fleet.workers[0].leases, within=5)


async def test_a_message_that_is_none_ends_the_session_with_the_reason() -> None:
    async with (
        running_router(picker="127.0.0.1:0") as (router, _),
        channel(f"127.0.0.1:{router.picker_port}") as to_router,
    ):
        call: Any = to_router.stream_stream(SESSION_PATH)()
        await call.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    told = error_from_call(caught.value)
    assert told.reason is Reason.INVALID_REQUEST
    assert "can't be decoded" in told.message


async def test_a_router_that_stops_refuses_those_who_wait_and_ends_its_sessions_cleanly() -> None:
    async with AsyncExitStack() as after, AsyncExitStack() as router_lives:
        router, _ = await router_lives.enter_async_context(running_router(picker="127.0.0.1:0"))
        gateway = await after.enter_async_context(lean_session(router.picker_port))
        (handle,) = await gateway.acquire()
        await eventually(lambda: handle in gateway.queued, within=5)
        started = time.monotonic()
        await router_lives.aclose()
        assert time.monotonic() - started < 0.5
        assert await gateway.code() is grpc.StatusCode.OK
        assert error_from_status(gateway.rejections[handle].status).reason is Reason.NO_READY_WORKER


async def test_a_gateway_that_does_not_read_loses_its_session_and_nobody_elses() -> None:
    bench = Bench()
    bench.worker("w0", max_running=64)
    servicer = RouterServicer(bench.fleet, bench.admission, bench.prefixes, tracer(), most_answers=20)
    async with (
        serve_streams(
            "127.0.0.1:0", {SESSION_PATH: servicer.open}, max_message_bytes=1 << 20, grace_seconds=0.1
        ) as port,
        lean_session(port) as patient,
        lean_session(port) as stuck,
    ):
        await assert_stuck_alone(bench.fleet, patient, stuck)


async def test_a_gateway_that_hangs_loses_its_leases() -> None:
    bench = Bench()
    bench.worker("w0", max_running=64)
    servicer = RouterServicer(bench.fleet, bench.admission, bench.prefixes, tracer())
    methods: dict[str, Open] = {SESSION_PATH: servicer.open}
    async with (
        serve_streams(
            "127.0.0.1:0", methods, max_message_bytes=1 << 20, grace_seconds=0.1, silent_seconds=0.1, answer_seconds=0.2
        ) as port,
        wire(f"127.0.0.1:{port}") as between,
        channel(between.address) as to_router,
        gateway_session(to_router) as gateway,
    ):
        await gateway.granted()
        await asyncio.sleep(0.3)
        assert len(bench.fleet.workers[0].leases) == 1, "its pings were answered"
        between.freeze()
        await eventually(lambda: not bench.fleet.workers[0].leases, within=5)
        gateway.lose()


async def test_a_router_that_has_begun_to_stop_takes_no_session() -> None:
    bench = Bench()
    servicer = RouterServicer(bench.fleet, bench.admission, bench.prefixes, tracer())
    servicer.close()
    methods: dict[str, Open] = {SESSION_PATH: servicer.open}
    async with (
        serve_streams("127.0.0.1:0", methods, max_message_bytes=1 << 20, grace_seconds=0.1) as port,
        lean_session(port) as gateway,
    ):
        assert await gateway.code() is grpc.StatusCode.UNAVAILABLE
