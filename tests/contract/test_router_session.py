"""RouterService.Session over real gRPC: what a gateway asks, holds and loses."""

import time
from contextlib import AsyncExitStack

import grpc
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tokenloom.router.v1 import router_pb2, router_pb2_grpc

from services.common.errors import Reason
from services.common.rpc import channel, serve
from services.common.status import error_from_status
from services.common.tracing import tracer
from services.router.servicer import RouterServicer
from tests.support.measured import measured
from tests.support.router import assert_stuck_alone, duration, gateway_session, running_router, tracer_to, worker_link
from tests.support.scheduling import Bench
from tests.support.waiting import eventually


async def test_an_acquire_is_answered_by_a_grant_that_names_the_worker() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router, endpoint="127.0.0.1:5001"),
        gateway_session(to_router) as gateway,
    ):
        grant = await gateway.granted(request_id="r1")
        assert (grant.worker_id, grant.endpoint) == ("worker-0", "127.0.0.1:5001")
        assert grant.reason.startswith("least predicted time of 1: first token in ")
        assert router.fleet.workers[0].occupied == 1


async def test_a_release_frees_the_lease() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router),
        gateway_session(to_router) as gateway,
    ):
        grant = await gateway.granted()
        await gateway.release(grant.handle)
        await eventually(lambda: not router.fleet.workers[0].leases, within=5)


@measured
async def test_a_lost_session_frees_its_leases_and_takes_its_requests_out_of_the_line() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router, max_running=1),
        gateway_session(to_router) as gateway,
    ):
        await gateway.acquire(count=5)
        await eventually(lambda: len(gateway.grants) == 2 and len(gateway.queued) == 3, within=5)
        gateway.lose()
        lost = time.monotonic()
        await eventually(lambda: not router.fleet.workers[0].leases and not router.admission.waiting_count, within=5)
        assert time.monotonic() - lost < 0.05


async def test_a_request_that_finds_no_room_is_queued_and_granted_on_the_next_release() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router, max_running=16),
        gateway_session(to_router) as gateway,
    ):
        # With so many slots one of them is soon free, and one request may wait for it in the engine.
        *granted, third, fourth = await gateway.acquire(count=19)
        await eventually(lambda: fourth in gateway.queued, within=5)
        assert set(granted) == set(gateway.grants)
        assert [gateway.queued[handle].position for handle in (third, fourth)] == [0, 1]
        await gateway.release(granted[0])
        await eventually(lambda: third in gateway.grants, within=5)
        assert gateway.grants[third].queue_duration.ToNanoseconds() > 0
        assert fourth not in gateway.grants


async def test_a_request_that_is_given_up_leaves_the_line_without_an_answer() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router, max_running=1),
        gateway_session(to_router) as gateway,
    ):
        _, _, third = await gateway.acquire(count=3)
        await eventually(lambda: third in gateway.queued, within=5)
        await gateway.release(third, outcome=router_pb2.OUTCOME_CANCELLED)
        await eventually(lambda: router.admission.waiting_count == 0, within=5)
        assert third not in gateway.grants
        assert third not in gateway.rejections


async def test_a_full_line_refuses_with_no_capacity_and_when_to_come_back() -> None:
    async with (
        running_router(max_waiting=1) as (router, to_router),
        worker_link(router, to_router, max_running=1),
        gateway_session(to_router) as gateway,
    ):
        await gateway.acquire(count=3)
        error = error_from_status((await gateway.rejected()).status)
        assert error.reason is Reason.NO_CAPACITY
        assert error.retry_after_seconds is not None
        assert error.retry_after_seconds >= 1


@measured
async def test_a_deadline_that_can_not_be_met_is_told_at_once() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router, max_running=1),
        gateway_session(to_router) as gateway,
    ):
        await gateway.acquire(count=2)
        started = time.monotonic()
        error = error_from_status((await gateway.rejected(timeout=duration(0.1))).status)
        assert error.reason is Reason.DEADLINE_EXCEEDED
        assert time.monotonic() - started < 0.1


async def test_without_any_worker_a_request_waits_for_one_to_register() -> None:
    async with running_router() as (router, to_router), gateway_session(to_router) as gateway:
        (handle,) = await gateway.acquire()
        await eventually(lambda: handle in gateway.queued, within=5)
        async with worker_link(router, to_router):
            await eventually(lambda: handle in gateway.grants, within=5)


async def test_without_any_worker_a_request_is_refused_after_the_grace() -> None:
    async with running_router(ready_grace_seconds=0.2) as (_, to_router), gateway_session(to_router) as gateway:
        started = time.monotonic()
        error = error_from_status((await gateway.rejected()).status)
        assert error.reason is Reason.NO_READY_WORKER
        assert error.retry_after_seconds is not None
        assert 0.19 < time.monotonic() - started < 1


async def test_a_worker_that_just_failed_the_request_is_not_picked_for_it() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router, "worker-0"),
        worker_link(router, to_router, "worker-1", endpoint="127.0.0.1:5002"),
        gateway_session(to_router) as gateway,
    ):
        for _ in range(5):
            assert (await gateway.granted(excluded_worker_ids=["worker-0"])).worker_id == "worker-1"


async def test_an_excluded_worker_that_comes_back_as_a_new_process_serves_the_request() -> None:
    async with running_router() as (router, to_router), gateway_session(to_router) as gateway:
        async with worker_link(router, to_router):
            (handle,) = await gateway.acquire(excluded_worker_ids=["worker-0"])
            await eventually(lambda: handle in gateway.queued, within=5)
        async with worker_link(router, to_router):
            await eventually(lambda: handle in gateway.grants, within=5)


async def test_a_handle_that_is_in_use_ends_the_session() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router),
        gateway_session(to_router) as gateway,
    ):
        grant = await gateway.granted()
        await gateway.acquire(handle=grant.handle)
        assert await gateway.code() is grpc.StatusCode.INVALID_ARGUMENT
        await eventually(lambda: not router.fleet.workers[0].leases, within=5)


@pytest.mark.parametrize("model", ["", "x" * 300])
async def test_an_impossible_model_name_is_refused_at_once(model: str) -> None:
    async with running_router() as (_, to_router), gateway_session(to_router) as gateway:
        error = error_from_status((await gateway.rejected(model=model)).status)
        assert (error.reason, error.field) == (Reason.INVALID_REQUEST, "model")


async def test_a_router_that_stops_refuses_those_who_wait_and_ends_its_sessions_cleanly() -> None:
    async with AsyncExitStack() as after, AsyncExitStack() as router_lives:
        router, _ = await router_lives.enter_async_context(running_router())
        to_router = await after.enter_async_context(channel(f"127.0.0.1:{router.port}"))
        gateway = await after.enter_async_context(gateway_session(to_router))
        (handle,) = await gateway.acquire()
        await eventually(lambda: handle in gateway.queued, within=5)
        started = time.monotonic()
        await router_lives.aclose()
        assert time.monotonic() - started < 0.5
        assert await gateway.code() is grpc.StatusCode.OK
        assert error_from_status(gateway.rejections[handle].status).reason is Reason.NO_READY_WORKER


async def test_the_schedule_span_tells_what_was_compared_and_why_the_chosen_worker_is_slow() -> None:
    spans = InMemorySpanExporter()
    async with (
        running_router(tracer=tracer_to(spans)) as (router, to_router),
        worker_link(router, to_router) as quick,
        worker_link(router, to_router, worker_id="worker-1", endpoint="127.0.0.1:5002") as slow,
        gateway_session(to_router) as gateway,
    ):
        await quick.report(decode_step_duration=duration(0.010))
        await slow.report(decode_step_duration=duration(0.080))
        await eventually(lambda: len(router.admission.why_slow(router.fleet.workers[1])) == 1, within=3)
        await gateway.granted(excluded_worker_ids=["worker-0"])
        await gateway.granted()
        of_slow, of_quick = (dict(span.attributes or {}) for span in spans.get_finished_spans())
    assert of_slow["tokenloom.worker"] == "worker-1"
    told = "a decode step takes 80.0 ms, 8.0 times as long as on the others (10.0 ms)"
    assert of_slow["tokenloom.worker_slow"] == (told,)
    assert of_slow["tokenloom.excluded"] == ("worker-0: excluded",)
    assert "tokenloom.worker_slow" not in of_quick
    compared = of_quick["tokenloom.compared"]
    assert isinstance(compared, tuple)
    assert [str(each).partition(":")[0] for each in compared] == ["worker-0", "worker-1"]


async def test_the_schedule_span_is_a_child_of_the_acquires() -> None:
    spans = InMemorySpanExporter()
    async with (
        running_router(tracer=tracer_to(spans)) as (router, to_router),
        worker_link(router, to_router),
        gateway_session(to_router) as gateway,
    ):
        grant = await gateway.granted(request_id="r1", traceparent=f"00-{'a' * 32}-{'b' * 16}-01")
        (span,) = spans.get_finished_spans()
    assert span.name == "schedule"
    assert span.parent is not None
    assert (span.context.trace_id, span.parent.span_id) == (int("a" * 32, 16), int("b" * 16, 16))
    attributes = dict(span.attributes or {})
    assert attributes["tokenloom.worker"] == "worker-0"
    assert attributes["tokenloom.candidates"] == 1
    assert attributes["tokenloom.reason"] == grant.reason
    assert {"tokenloom.queue_seconds", "tokenloom.predicted_ttft_seconds"} <= set(attributes)


async def test_a_gateway_that_does_not_read_loses_its_session_and_nobody_elses() -> None:
    bench = Bench()
    bench.worker("w0", max_running=64)
    servicer = RouterServicer(bench.fleet, bench.admission, bench.prefixes, tracer(), most_answers=20)

    def register(server: grpc.aio.Server) -> list[str]:
        router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, server)
        return []

    async with (
        serve("127.0.0.1:0", register) as server,
        channel(f"127.0.0.1:{server.port}") as to_router,
        gateway_session(to_router) as patient,
        gateway_session(to_router) as stuck,
    ):
        await assert_stuck_alone(bench.fleet, patient, stuck)


async def test_the_span_of_a_request_that_is_given_up_ends_all_the_same() -> None:
    spans = InMemorySpanExporter()
    async with (
        running_router(tracer=tracer_to(spans)) as (_, to_router),
        gateway_session(to_router) as gateway,
    ):
        given_up, left = await gateway.acquire(count=2)
        await eventually(lambda: left in gateway.queued, within=5)
        await gateway.release(given_up, outcome=router_pb2.OUTCOME_CANCELLED)
        await eventually(lambda: len(spans.get_finished_spans()) == 1, within=5)
        gateway.lose()
        await eventually(lambda: len(spans.get_finished_spans()) == 2, within=5)
