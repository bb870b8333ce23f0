"""What operators have workers do through the router: real router, real workers over simulated engines, real gRPC."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import worker_pb2
from tokenloom.router.v1 import admin_pb2, admin_pb2_grpc

from services.common import rpc
from services.common.errors import MeshError, Reason
from services.common.settings_worker import SimSettings
from services.common.status import error_from_call, error_from_status
from services.inference.engine import EngineCard
from services.inference.sim_engine import SimEngine
from services.router.app import RunningRouter
from tests.support.router import running_router, worker_link
from tests.support.waiting import eventually
from tests.support.workers import SimWorker, registered, sim_worker

SLOW = SimSettings(decode_step_ms=5)
LONG = pb.GenerateRequest(model="sim", text="x", sampling=pb.SamplingParameters(max_tokens=40, ignore_eos=True))


@asynccontextmanager
async def fleet_of(
    *names: str, make_engine: Callable[[SimSettings, str, int], SimEngine] = SimEngine
) -> AsyncIterator[tuple[RunningRouter, Any, list[SimWorker]]]:
    """A router with workers of these names that are ready, and its stub for operators."""
    async with running_router() as (router, to_router), asyncio.TaskGroup() as tasks:
        stop, workers = asyncio.Event(), dict[str, SimWorker]()

        async def keep(name: str) -> None:
            async with (
                sim_worker(SLOW, make_engine=make_engine) as worker,
                registered(worker, f"127.0.0.1:{router.port}", worker_id=name),
            ):
                workers[name] = worker
                await stop.wait()

        for name in names:
            tasks.create_task(keep(name))
        try:
            await eventually(lambda: [ready(router, name) for name in names] == [True] * len(names), within=10)
            yield router, admin_pb2_grpc.RouterAdminServiceStub(to_router), [workers[name] for name in names]
        finally:
            stop.set()


def ready(router: RunningRouter, name: str) -> bool:
    worker = router.fleet.get(name)
    return worker is not None and not worker.blocked


async def refusal(call: Any) -> MeshError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_call(caught.value)


async def read_all(call: Any) -> list[pb.GenerateResponse]:
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


async def rolled(admin: Any, **request: Any) -> list[admin_pb2.RollWorkersResponse]:
    return [answer async for answer in admin.RollWorkers(admin_pb2.RollWorkersRequest(**request))]


async def test_a_worker_is_put_to_sleep_once_it_is_idle_shown_asleep_and_woken() -> None:
    async with fleet_of("w0") as (router, admin, (worker,)):
        running = worker.inference.Generate(LONG)
        await running.read()
        sleep = admin_pb2.SleepWorkerRequest(worker_id="w0", level=2)
        assert (await refusal(admin.SleepWorker(sleep))).reason is Reason.FAILED_PRECONDITION
        running.cancel()
        await eventually(lambda: worker.is_idle, within=5)
        await admin.SleepWorker(sleep)
        await eventually(lambda: not ready(router, "w0"), within=5)
        (shown,) = (await admin.ListWorkers(admin_pb2.ListWorkersRequest())).workers
        assert shown.excluded_reason == "asleep"
        # An operator has done it: nobody misses the worker.
        assert router.fleet.health(1) == (0, 0)
        assert (await refusal(admin.ReloadWeights(admin_pb2.ReloadWeightsRequest(worker_id="w0")))).reason is (
            Reason.FAILED_PRECONDITION
        )
        await admin.WakeWorker(admin_pb2.WakeWorkerRequest(worker_id="w0"))
        await eventually(lambda: ready(router, "w0"), within=5)
        wrong = await refusal(admin.SleepWorker(admin_pb2.SleepWorkerRequest(worker_id="w0", level=3)))
        assert (wrong.reason, wrong.field) == (Reason.INVALID_REQUEST, "level")


async def test_workers_reload_in_turn_so_that_one_serves_at_any_time() -> None:
    async with fleet_of("w0", "w1", "w2") as (router, admin, workers):
        names = ["w0", "w1", "w2"]
        out = set[str]()
        most_out = 0

        def look(_: object) -> None:
            nonlocal most_out
            missing = {name for name in names if not ready(router, name)}
            out.update(missing)
            most_out = max(most_out, len(missing))

        unsubscribe = router.fleet.subscribe(look)
        running = [worker.inference.Generate(LONG) for worker in workers]
        await asyncio.gather(*(call.read() for call in running))
        answers = await rolled(admin, model="sim", reload_weights=worker_pb2.ReloadWeightsRequest())
        unsubscribe()
        assert [(answer.worker_id, list(answer.left_worker_ids)) for answer in answers] == [
            ("w0", ["w1", "w2"]),
            ("w1", ["w2"]),
            ("w2", []),
        ]
        assert not any(answer.HasField("error") for answer in answers)
        assert answers[0].duration.ToMilliseconds() > 0
        # The first was seen to be out: it finished what ran there.
        assert "w0" in out
        assert most_out == 1
        assert all(ready(router, name) for name in names)
        for call in running:
            events = await asyncio.wait_for(read_all(call), 10)
            assert events[-1].HasField("completed")


async def test_a_roll_ends_at_the_first_that_fails_and_says_who_is_left() -> None:
    async with fleet_of("w0", "w1") as (_, admin, workers):
        (failed,) = await rolled(admin, all=True, reload_weights=worker_pb2.ReloadWeightsRequest(path="/else"))
        assert (failed.worker_id, list(failed.left_worker_ids)) == ("w0", ["w1"])
        error = error_from_status(failed.error)
        assert (error.reason, error.field) == (Reason.FAILED_PRECONDITION, "path")
        assert all(worker.gate.reason == "" for worker in workers)
        none = await refusal(admin.LoadAdapter(admin_pb2.LoadAdapterRequest(worker_id="w1", name="a", path="a")))
        assert none.reason is Reason.FAILED_PRECONDITION
        assert "adapters" in none.message


@pytest.mark.parametrize(
    ("request_fields", "reason", "field"),
    [
        ({"wake": {}}, Reason.INVALID_REQUEST, "workers"),
        ({"all": False, "wake": {}}, Reason.INVALID_REQUEST, "workers"),
        ({"all": True}, Reason.INVALID_REQUEST, "operation"),
        ({"worker_id": "nobody", "wake": {}}, Reason.NOT_FOUND, "worker_id"),
        ({"pool": "nowhere", "wake": {}}, Reason.NOT_FOUND, "pool"),
        ({"model": "nothing", "wake": {}}, Reason.NOT_FOUND, "model"),
        ({"all": True, "wake": {}}, Reason.NOT_FOUND, "all"),
    ],
)
async def test_a_roll_of_nobody_or_nothing_is_refused_by_name(
    request_fields: dict[str, Any], reason: Reason, field: str
) -> None:
    async with running_router() as (_, to_router):
        call: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router).RollWorkers(
            admin_pb2.RollWorkersRequest(**request_fields)
        )
        error = await refusal(call.read())
        assert (error.reason, error.field) == (reason, field)


async def test_a_worker_that_is_unknown_or_does_not_answer_is_told_without_its_address() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router, endpoint="127.0.0.1:1"):
        admin: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router)
        unknown = await refusal(admin.WakeWorker(admin_pb2.WakeWorkerRequest(worker_id="nobody")))
        assert (unknown.reason, unknown.field) == (Reason.NOT_FOUND, "worker_id")
        away = await refusal(admin.WakeWorker(admin_pb2.WakeWorkerRequest(worker_id="worker-0")))
        assert (away.reason, away.message) == (Reason.NO_READY_WORKER, "the worker can't be reached")


class ReloadsSlowly(SimEngine):
    """It has other weights once it is told so."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked, self.may_end, self.ended = asyncio.Event(), asyncio.Event(), False

    async def reload_weights(self, path: str) -> None:
        self.asked.set()
        await self.may_end.wait()
        await super().reload_weights(path)
        self.ended = True


async def test_what_a_worker_has_begun_goes_to_its_end_when_the_operator_leaves_and_no_other_begins() -> None:
    async with fleet_of("w0", "w1", make_engine=ReloadsSlowly) as (router, admin, workers):
        first, second = (cast("ReloadsSlowly", worker.engine) for worker in workers)
        request = admin_pb2.RollWorkersRequest(all=True, reload_weights=worker_pb2.ReloadWeightsRequest())
        call = admin.RollWorkers(request)
        reading = asyncio.create_task(call.read())
        await asyncio.wait_for(first.asked.wait(), 5)
        call.cancel()
        await asyncio.wait([reading])
        await asyncio.sleep(0.1)
        assert workers[0].gate.reason == "the weights are being replaced"
        first.may_end.set()
        await eventually(lambda: first.ended and workers[0].gate.reason == "", within=5)
        await eventually(lambda: ready(router, "w0"), within=5)
        assert not second.asked.is_set()


async def test_an_operator_who_waits_for_a_worker_when_the_router_stops_is_told_so() -> None:
    async with sim_worker(SLOW, make_engine=ReloadsSlowly) as worker, AsyncExitStack() as later:
        async with running_router() as (router, _), registered(worker, f"127.0.0.1:{router.port}", worker_id="w0"):
            await eventually(lambda: ready(router, "w0"), within=10)
            connection = await later.enter_async_context(rpc.channel(f"127.0.0.1:{router.port}"))
            admin: Any = admin_pb2_grpc.RouterAdminServiceStub(connection)
            call = admin.ReloadWeights(admin_pb2.ReloadWeightsRequest(worker_id="w0"))
            await asyncio.wait_for(cast("ReloadsSlowly", worker.engine).asked.wait(), 5)
        error = await refusal(call)
    assert error.reason is Reason.NO_READY_WORKER
    assert error.message.startswith("the router stops")


class FallsAsleepSlowly(SimEngine):
    """It never says that it sleeps."""

    async def sleep(self, level: int) -> None:  # noqa: ARG002  # the engine's
        await asyncio.Event().wait()


async def test_a_worker_whose_router_left_while_it_fell_asleep_can_be_woken() -> None:
    async with fleet_of("w0", make_engine=FallsAsleepSlowly) as (router, admin, (worker,)):
        call = cast("Any", worker.worker).Sleep(worker_pb2.SleepRequest())
        await eventually(lambda: worker.gate.reason == "the worker falls asleep", within=5)
        call.cancel()
        await eventually(lambda: worker.gate.reason == "the worker is asleep", within=5)
        await admin.WakeWorker(admin_pb2.WakeWorkerRequest(worker_id="w0"))
        await eventually(lambda: ready(router, "w0"), within=5)


class Shelf:
    """The adapters of an engine that takes any."""

    def __init__(self, card: EngineCard) -> None:
        self._card = card
        self.paths: dict[str, str] = {}

    @property
    def cards(self) -> Sequence[EngineCard]:
        return [replace(self._card, model=name, base_model=self._card.model) for name in self.paths]

    async def load(self, name: str, path: str) -> EngineCard:
        if name in self.paths:
            raise MeshError(Reason.ALREADY_EXISTS, f"name: {name} is there", field="name")
        self.paths[name] = path
        return self.cards[-1]

    async def unload(self, name: str) -> None:
        if self.paths.pop(name, None) is None:
            raise MeshError(Reason.NOT_FOUND, f"name: there is no {name}", field="name")


class TakesAdapters(SimEngine):
    """The simulated engine takes none of its own."""

    @cached_property
    def adapters(self) -> Shelf:  # type: ignore[override]  # what it overrides is None
        return Shelf(self.card)


async def test_adapters_are_loaded_in_turn_and_one_that_is_there_already_or_gone_stops_nothing() -> None:
    async with fleet_of("w0", "w1", make_engine=TakesAdapters) as (router, admin, workers):
        shelves = [cast("TakesAdapters", worker.engine).adapters for worker in workers]
        load = admin_pb2.LoadAdapterRequest(worker_id="w0", name="poet", path="poet-1")
        assert (await admin.LoadAdapter(load)).model.base_model == "sim"
        again = await refusal(admin.LoadAdapter(load))
        assert (again.reason, again.field) == (Reason.ALREADY_EXISTS, "name")
        answers = await rolled(admin, pool="p", load_adapter={"name": "poet", "path": "poet-2"})
        assert [answer.unchanged_reason for answer in answers] == ["name: poet is there", ""]
        assert [answer.HasField("error") for answer in answers] == [False, False]
        assert [shelf.paths for shelf in shelves] == [{"poet": "poet-1"}, {"poet": "poet-2"}]
        await eventually(lambda: len(router.fleet.serving("poet")) == 2, within=5)
        await admin.UnloadAdapter(admin_pb2.UnloadAdapterRequest(worker_id="w0", name="poet"))
        answers = await rolled(admin, model="sim", unload_adapter={"name": "poet"})
        assert [answer.unchanged_reason for answer in answers] == ["name: there is no poet", ""]
        assert [shelf.paths for shelf in shelves] == [{}, {}]
        gone = await refusal(admin.UnloadAdapter(admin_pb2.UnloadAdapterRequest(worker_id="w1", name="poet")))
        assert gone.reason is Reason.NOT_FOUND
