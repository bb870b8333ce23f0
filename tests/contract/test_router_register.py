"""RouterService.Register over real gRPC: workers come, report, are told things, and go."""

import time
from typing import Any

import grpc
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tokenloom.inference.v1 import inference_pb2
from tokenloom.router.v1 import router_pb2, router_pb2_grpc

from services.common.errors import Reason
from services.common.policy import policy_from
from services.common.prefix import salt_of, token_block_hashes
from services.common.status import error_from_call, error_from_status
from tests.support.measured import measured
from tests.support.router import duration, gateway_session, running_router, worker_link
from tests.support.waiting import eventually


def error_of(rejection: router_pb2.Rejection) -> Reason:
    return error_from_status(rejection.status).reason


@measured
async def test_a_worker_is_known_as_long_as_its_stream_lives() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router) as link:
        assert [worker.worker_id for worker in router.fleet.workers] == ["worker-0"]
        await eventually(lambda: link.commands == ["registered"], within=5)
        link.lose()
        lost = time.monotonic()
        await eventually(lambda: not router.fleet.workers, within=5)
        assert time.monotonic() - lost < 0.05


async def test_a_worker_takes_no_work_before_its_first_report() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router, report=False) as link,
        gateway_session(to_router) as gateway,
    ):
        (handle,) = await gateway.acquire()
        await eventually(lambda: handle in gateway.queued, within=5)
        await link.report()
        await eventually(lambda: handle in gateway.grants, within=5)


async def test_a_second_registration_of_a_name_replaces_the_first_and_ends_its_stream() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router, max_running=1),
        gateway_session(to_router) as gateway,
    ):
        await gateway.granted()
        first = router.fleet.workers[0]
        async with worker_link(router, to_router, max_running=2):
            assert first.gone
            (worker,) = router.fleet.workers
            assert (worker.card.max_running, len(worker.leases)) == (2, 0)
            await gateway.granted()


async def test_a_name_that_is_heard_of_at_another_address_is_not_given_away() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router, endpoint="127.0.0.1:5001"):
        first = router.fleet.workers[0]
        call: Any = router_pb2_grpc.RouterServiceStub(to_router).Register()
        registration = router_pb2.Registration(
            worker_id="worker-0", endpoint="127.0.0.1:5002", models=[inference_pb2.ModelCard(name="demo")]
        )
        await call.write(router_pb2.RegisterRequest(registration=registration))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert error_from_call(caught.value).reason is Reason.ALREADY_EXISTS
        assert router.fleet.workers == [first]
        assert not first.gone


async def test_measured_speeds_and_load_reach_the_scheduler() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router) as link:
        await link.report(
            running_count=3,
            kv_usage_ratio=0.5,
            pending_prefill_token_count=1000,
            prefill_tokens_per_second=5000.0,
            decode_step_duration=duration(0.012),
            decode_step_per_sequence_duration=duration(0.0005),
        )
        worker = router.fleet.workers[0]
        await eventually(lambda: worker.load.running == 3, within=5)
        assert worker.load.decode_step_seconds == pytest.approx(0.012)
        assert worker.outlook.clear_at - worker.reported_at == pytest.approx(0.2)
        assert worker.outlook.token_seconds == pytest.approx(0.0135)


async def test_a_model_that_a_worker_gains_or_drops_while_it_is_registered_is_served_or_unknown() -> None:
    base = inference_pb2.ModelCard(name="demo", max_context_token_count=4096)
    adapter = inference_pb2.ModelCard(name="poet", max_context_token_count=4096, base_model="demo")
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router) as link,
        gateway_session(to_router) as gateway,
    ):
        assert error_of(await gateway.rejected(model="poet")) is Reason.MODEL_NOT_FOUND
        await link.report(models=[base, adapter])
        worker = router.fleet.workers[0]
        await eventually(lambda: "poet" in worker.card.models, within=5)
        assert (await gateway.granted(model="poet")).worker_id == "worker-0"
        await link.report(running_count=1)
        assert (await gateway.granted(model="poet")).worker_id == "worker-0"
        assert [card.name for card in worker.card.said.models] == ["demo", "poet"]
        await link.report(models=[base])
        await eventually(lambda: "poet" not in worker.card.models, within=5)
        assert error_of(await gateway.rejected(model="poet")) is Reason.MODEL_NOT_FOUND
        assert (await gateway.granted(model="demo")).worker_id == "worker-0"


async def test_a_worker_that_reports_a_model_without_a_name_is_told_so() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router) as link:
        await link.report(models=[inference_pb2.ModelCard()])
        assert await link.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_reported_nonsense_is_not_believed() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router) as link,
        gateway_session(to_router) as gateway,
    ):
        await link.report(
            running_count=2**32 - 1,
            kv_usage_ratio=float("nan"),
            pending_prefill_token_count=2**63,
            prefill_tokens_per_second=float("-inf"),
            decode_step_duration=duration(-1),
        )
        worker = router.fleet.workers[0]
        await eventually(lambda: worker.load.said.running_count > 0, within=5)
        assert worker.occupied == 0
        assert (await gateway.granted()).worker_id == "worker-0"


@pytest.mark.parametrize(
    "change",
    [
        {"worker_id": ""},
        {"endpoint": "localhost:5001"},
        {"endpoint": "127.0.0.1"},
        {"endpoint": "127.0.0.1:99999"},
        {"models": []},
        {"models": [inference_pb2.ModelCard()]},
    ],
)
async def test_a_registration_that_cannot_be_used_is_refused_with_the_field(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "worker_id": "w",
        "endpoint": "127.0.0.1:5001",
        "models": [inference_pb2.ModelCard(name="demo")],
    }
    async with running_router() as (_, to_router):
        call: Any = router_pb2_grpc.RouterServiceStub(to_router).Register()
        await call.write(router_pb2.RegisterRequest(registration=router_pb2.Registration(**{**good, **change})))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert error_from_call(caught.value).field == f"registration.{next(iter(change))}"


@pytest.mark.parametrize("second", [{"registration": router_pb2.Registration(worker_id="w")}, {}])
async def test_only_the_first_message_registers(second: dict[str, Any]) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router) as link:
        await link.send(router_pb2.RegisterRequest(**second))
        assert await link.code() is grpc.StatusCode.INVALID_ARGUMENT
        await eventually(lambda: not router.fleet.workers, within=5)


async def test_a_stream_that_begins_with_a_report_is_refused() -> None:
    async with running_router() as (_, to_router):
        call: Any = router_pb2_grpc.RouterServiceStub(to_router).Register()
        await call.write(router_pb2.RegisterRequest(load=router_pb2.LoadReport()))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_metrics_count_workers_leases_and_decisions() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router),
        gateway_session(to_router) as gateway,
    ):
        await gateway.granted()
        async with httpx.AsyncClient() as client:
            lines = (await client.get(f"http://127.0.0.1:{router.metrics_port}/metrics")).text.splitlines()
    assert 'tokenloom_router_workers{state="ready"} 1.0' in lines
    assert "tokenloom_router_leases 1.0" in lines
    assert "tokenloom_router_waiting_requests 0.0" in lines
    assert 'tokenloom_router_decisions_total{outcome="granted"} 1.0' in lines
    assert "tokenloom_router_decision_seconds_count 1.0" in lines
    assert "tokenloom_router_queue_seconds_count 1.0" in lines


async def test_metrics_tell_each_pools_waiting_requests_and_their_wait() -> None:
    policy = policy_from({"aliases": {"any": "other"}}, where="routing")
    async with (
        running_router(routing=policy) as (router, to_router),
        worker_link(router, to_router, max_running=1),
        worker_link(
            router, to_router, "worker-1", endpoint="127.0.0.1:5002", models=("other",), pool="small", max_running=1
        ),
        gateway_session(to_router) as gateway,
    ):
        for model in ("demo", "other"):
            await gateway.acquire(2, model=model, max_output_token_count=1)
        await gateway.acquire(6, model="any", max_output_token_count=1)
        await gateway.acquire(3, model="demo", max_output_token_count=1)
        await eventually(lambda: router.admission.waiting_count + len(gateway.grants) == 13, within=5)
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://127.0.0.1:{router.metrics_port}/metrics")).text
        shown = {
            (
                sample.name.removeprefix("tokenloom_router_pool_"),
                sample.labels["pool"],
                sample.labels["model"],
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("tokenloom_router_pool_")
        }
        first, second = (router.fleet.get(f"worker-{number}") for number in range(2))
        assert first is not None
        assert second is not None
        for name in ("wait_seconds", "waiting_requests"):
            assert {key[1:] for key in shown if key[0] == name} == {
                (first.card.pool, "demo"),
                (second.card.pool, "other"),
            }
        for worker, model, came in ((first, "demo", 5), (second, "other", 8)):
            waiting = shown["waiting_requests", worker.card.pool, model]
            assert waiting == came - len(worker.leases)
            assert shown["wait_seconds", worker.card.pool, model] > 0


async def test_a_prompt_of_tokens_goes_to_the_worker_that_tells_it_has_them_cached() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router, worker_id="worker-0", endpoint="127.0.0.1:5001", block_tokens=16),
        worker_link(router, to_router, worker_id="worker-1", endpoint="127.0.0.1:5002", block_tokens=16) as knowing,
        gateway_session(to_router) as gateway,
    ):
        tokens = list(range(2000))
        hashes = token_block_hashes(tokens, 16, salt=salt_of("demo"))
        events = router_pb2.KvCacheEvents(sequence_number=1, cleared=True, stored_hashes=hashes)
        await knowing.send(router_pb2.RegisterRequest(kv_cache_events=events))
        await knowing.report()
        before = router.fleet.get("worker-1")
        assert before is not None
        seen = before.reported_at
        await knowing.report(running_count=0)
        await eventually(lambda: before.reported_at > seen, within=5)
        for _ in range(5):
            grant = await gateway.granted(prompt_token_ids=tokens, prompt_token_count=len(tokens))
            assert grant.worker_id == "worker-1"
            assert "1999 tokens cached" in grant.reason
            await gateway.release(grant.handle)


async def test_a_conversation_goes_where_its_beginning_was_sent_before() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router, worker_id="worker-0", endpoint="127.0.0.1:5001"),
        worker_link(router, to_router, worker_id="worker-1", endpoint="127.0.0.1:5002"),
        gateway_session(to_router) as gateway,
    ):
        hashes = [7 * number for number in range(40)]
        home = await gateway.granted(prefix_hashes=hashes[:30], prompt_token_count=1920)
        await gateway.release(home.handle)
        for length in (31, 35, 40):
            grant = await gateway.granted(prefix_hashes=hashes[:length], prompt_token_count=64 * length)
            assert grant.worker_id == home.worker_id
            await gateway.release(grant.handle)
