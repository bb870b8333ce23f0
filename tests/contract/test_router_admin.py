"""RouterAdminService over real gRPC."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from tokenloom.router.v1 import admin_pb2, admin_pb2_grpc

from services.common.errors import Reason
from services.common.status import error_from_call
from tests.support.measured import measured
from tests.support.router import duration, gateway_session, running_router, worker_link
from tests.support.waiting import eventually


async def test_workers_are_listed_as_they_said_they_are() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router, "worker-1", endpoint="127.0.0.1:5002"),
        worker_link(router, to_router, "worker-0", max_running=4) as link,
        gateway_session(to_router) as gateway,
    ):
        await gateway.granted(excluded_worker_ids=["worker-1"])
        await link.report(running_count=1)
        await eventually(lambda: router.fleet.workers[0].load.running == 1, within=5)
        admin: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router)
        listed = (await admin.ListWorkers(admin_pb2.ListWorkersRequest())).workers
        assert [worker.registration.worker_id for worker in listed] == ["worker-0", "worker-1"]
        first = listed[0]
        assert (first.registration.max_running_count, first.load.running_count, first.lease_count) == (4, 1, 1)
        assert abs(first.last_report_time.ToNanoseconds() / 1e9 - time.time()) < 2


async def test_a_watch_shows_the_fleet_and_then_each_change() -> None:
    async with running_router() as (router, to_router):
        call: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router).WatchFleet(admin_pb2.WatchFleetRequest())
        assert not (await call.read()).workers
        async with worker_link(router, to_router):
            update = await call.read()
            assert [worker.registration.worker_id for worker in update.workers] == ["worker-0"]
            while not update.workers[0].HasField("load"):
                update = await call.read()
        while update.workers:
            update = await call.read()
        call.cancel()


async def test_a_watch_says_whose_requests_run_and_wait_and_which_worker_is_slow() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router, "worker-0", max_running=1) as quick,
        worker_link(router, to_router, "worker-1", endpoint="127.0.0.1:5002", max_running=1) as slow,
        gateway_session(to_router) as gateway,
    ):
        await quick.report(decode_step_duration=duration(0.01))
        await slow.report(decode_step_duration=duration(0.08))
        await eventually(lambda: all(worker.load.decode_step_seconds for worker in router.fleet.workers), within=5)
        # Each worker takes one that runs and one that waits in its engine.
        await gateway.acquire(4, tenant_id="acme")
        await gateway.acquire(2, tenant_id="corp")
        await eventually(lambda: router.admission.waiting_count == 2, within=5)
        call: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router).WatchFleet(admin_pb2.WatchFleetRequest())
        seen = await call.read()
        call.cancel()
    assert [(one.tenant_id, one.running_count, one.waiting_count) for one in seen.tenants] == [
        ("acme", 4, 0),
        ("corp", 0, 2),
    ]
    assert [list(worker.slow_reasons) for worker in seen.workers] == [
        [],
        ["a decode step takes 80.0 ms, 8.0 times as long as on the others (10.0 ms)"],
    ]
    assert [worker.admitted_ratio for worker in seen.workers] == [1, 1]


@measured
async def test_a_watch_is_told_at_most_ten_times_a_second() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router) as link:
        call: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router).WatchFleet(admin_pb2.WatchFleetRequest())
        updates = 0

        async def count() -> None:
            nonlocal updates
            async for _ in call:
                updates += 1

        counting = asyncio.create_task(count())
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            await link.report()
        call.cancel()
        await asyncio.wait([counting])
        assert 3 <= updates <= 7


async def test_a_drained_worker_gets_no_work_and_is_told_and_so_when_it_is_back() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router) as link,
        gateway_session(to_router) as gateway,
    ):
        admin: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router)
        await admin.DrainWorker(admin_pb2.DrainWorkerRequest(worker_id="worker-0"))
        await eventually(lambda: link.commands == ["registered", "drain"], within=5)
        (worker,) = (await admin.ListWorkers(admin_pb2.ListWorkersRequest())).workers
        assert worker.drained
        (handle,) = await gateway.acquire()
        await eventually(lambda: handle in gateway.queued, within=5)
        await admin.UndrainWorker(admin_pb2.UndrainWorkerRequest(worker_id="worker-0"))
        await eventually(lambda: handle in gateway.grants, within=5)
        await eventually(lambda: link.commands == ["registered", "drain", "undrain"], within=5)


async def test_a_worker_that_comes_back_drained_is_told_again() -> None:
    async with running_router() as (router, to_router):
        async with worker_link(router, to_router):
            admin: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router)
            await admin.DrainWorker(admin_pb2.DrainWorkerRequest(worker_id="worker-0"))
        async with worker_link(router, to_router) as link:
            await eventually(lambda: link.commands == ["registered", "drain"], within=5)


async def test_draining_a_worker_that_is_not_there_is_not_found() -> None:
    async with running_router() as (_, to_router):
        admin: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router)
        for call in (
            admin.DrainWorker(admin_pb2.DrainWorkerRequest(worker_id="nobody")),
            admin.UndrainWorker(admin_pb2.UndrainWorkerRequest(worker_id="nobody")),
            admin.CordonWorker(admin_pb2.CordonWorkerRequest(worker_id="nobody")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert error_from_call(caught.value).reason is Reason.NOT_FOUND


async def test_a_cordoned_worker_gets_no_work_and_is_not_told() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router) as link,
        gateway_session(to_router) as gateway,
    ):
        admin: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router)
        await admin.CordonWorker(admin_pb2.CordonWorkerRequest(worker_id="worker-0"))
        (worker,) = (await admin.ListWorkers(admin_pb2.ListWorkersRequest())).workers
        assert (worker.cordoned, worker.drained, worker.excluded_reason) == (True, False, "cordoned")
        (handle,) = await gateway.acquire()
        await eventually(lambda: handle in gateway.queued, within=5)
        await admin.UndrainWorker(admin_pb2.UndrainWorkerRequest(worker_id="worker-0"))
        await eventually(lambda: handle in gateway.grants, within=5)
        assert link.commands == ["registered"]


async def test_a_silent_worker_is_shown_with_the_age_of_its_report_and_why_it_gets_no_work() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        worker = router.fleet.workers[0]
        worker.reported_at -= 60
        admin: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router)
        (shown,) = (await admin.ListWorkers(admin_pb2.ListWorkersRequest())).workers
        assert shown.report_age_duration.seconds >= 60
        assert shown.excluded_reason.startswith("silent for 60")


POLICY = {"aliases": {"chat": "demo"}, "rules": [{"name": "all", "pools": ["default"]}]}


async def test_a_policy_that_is_set_is_in_force_at_once_and_shown() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router),
        gateway_session(to_router) as gateway,
    ):
        admin: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router)
        assert (await admin.GetPolicy(admin_pb2.GetPolicyRequest())).version == 1
        answer = await admin.SetPolicy(admin_pb2.SetPolicyRequest(policy_json=json.dumps(POLICY)))
        assert answer.version == 2
        shown = await admin.GetPolicy(admin_pb2.GetPolicyRequest())
        assert (json.loads(shown.policy_json), shown.version) == (POLICY, 2)
        grant = await gateway.granted(model="chat", request_id="r")
        assert (grant.model, grant.worker_id, grant.degraded) == ("demo", "worker-0", False)
        (decision,) = (await admin.Explain(admin_pb2.ExplainRequest(request_id="r"))).decisions
        assert (decision.rule, decision.model) == ("all", "chat")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("{", "routing: not JSON"),
        ('{"rules": [{"name": "r", "pools": ["nope"]}]}', "routing.rules[0].pools[0]: there is no pool 'nope'"),
        ('{"aliases": {"chat": "nope"}}', "routing.aliases.chat: there is no model 'nope'"),
        ('{"surprise": 1}', "unknown field `surprise`"),
    ],
)
async def test_a_policy_that_is_wrong_is_refused_by_its_key_and_the_old_one_stays(policy: str, message: str) -> None:
    async with running_router(pools=["default"], models=["demo"]) as (router, to_router):
        admin: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin.SetPolicy(admin_pb2.SetPolicyRequest(policy_json=policy))
        error = error_from_call(caught.value)
        assert (error.reason, error.field) == (Reason.INVALID_REQUEST, "policy_json")
        assert message in error.message
        assert router.policies.version == 1


async def test_a_policy_is_kept_in_its_file_and_the_file_is_obeyed(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    async with running_router(policy_path=str(path)) as (router, to_router):
        admin: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router)
        await admin.SetPolicy(admin_pb2.SetPolicyRequest(policy_json=json.dumps(POLICY)))
        assert json.loads(path.read_text()) == POLICY
        path.write_text('{"aliases": {"fast": "demo"}}')
        await eventually(lambda: "fast" in router.policies.aliases, within=5)
        path.write_text('{"aliases": 5}')
        await asyncio.sleep(0.6)
        assert (list(router.policies.aliases), router.policies.version) == (["fast"], 3)
    path.write_text(json.dumps(POLICY))
    async with running_router(policy_path=str(path)) as (router, _):
        assert list(router.policies.aliases) == ["chat"]


async def test_a_policy_that_cannot_be_kept_is_not_put_in_force(tmp_path: Path) -> None:
    async with running_router(policy_path=str(tmp_path / "nowhere" / "policy.json")) as (router, to_router):
        admin: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin.SetPolicy(admin_pb2.SetPolicyRequest(policy_json=json.dumps(POLICY)))
        assert error_from_call(caught.value).reason is Reason.FAILED_PRECONDITION
        assert router.policies.version == 1


async def test_a_watch_tells_what_can_be_asked_for_and_how_far_the_mesh_is_degraded() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router),
        worker_link(router, to_router, "worker-1", endpoint="127.0.0.1:5002", models=("other",)) as other,
    ):
        admin: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router)
        call = admin.WatchFleet(admin_pb2.WatchFleetRequest())
        seen = await call.read()
        assert [model.name for model in seen.models] == ["demo", "other"]
        assert seen.degradation_level == admin_pb2.DEGRADATION_LEVEL_NONE
        bounds = {"short_outputs_below": 0.9, "worsen_after_seconds": 0}
        policy = {"aliases": {"chat": "demo"}, "degradation": bounds}
        await admin.SetPolicy(admin_pb2.SetPolicyRequest(policy_json=json.dumps(policy)))
        while len(seen.models) < 3:
            seen = await call.read()
        chat = seen.models[0]
        assert (chat.name, list(chat.target_models), chat.ready_worker_count) == ("chat", ["demo"], 1)
        assert chat.card.max_context_token_count == 4096
        other.lose()
        while seen.degradation_level != admin_pb2.DEGRADATION_LEVEL_SHORT_OUTPUTS:
            seen = await asyncio.wait_for(call.read(), 2)
        assert seen.degradation_reason == "1 of 2 workers are healthy"
        call.cancel()


async def test_a_decision_is_explained_with_every_candidate() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router, "worker-0"),
        worker_link(router, to_router, "worker-1", endpoint="127.0.0.1:5002"),
        gateway_session(to_router) as gateway,
    ):
        await gateway.granted(request_id="r1", excluded_worker_ids=["worker-0"], prompt_token_count=100)
        admin: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router)
        (decision,) = (await admin.Explain(admin_pb2.ExplainRequest(request_id="r1"))).decisions
        assert (decision.model, decision.worker_id) == ("demo", "worker-1")
        candidates = {candidate.worker_id: candidate for candidate in decision.candidates}
        assert candidates["worker-0"].excluded_reason == "excluded"
        assert not candidates["worker-1"].excluded_reason
        chosen = candidates["worker-1"]
        ttft = chosen.predicted_time_to_first_token_duration.ToNanoseconds()
        assert 0 < ttft < chosen.cost_duration.ToNanoseconds()
        assert chosen.predicted_time_per_output_token_duration.ToNanoseconds() > 0
        assert not chosen.HasField("predicted_delay_duration")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin.Explain(admin_pb2.ExplainRequest(request_id="forgotten"))
        assert error_from_call(caught.value).reason is Reason.NOT_FOUND
