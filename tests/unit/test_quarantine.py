"""Which request engines die of, found out among its neighbours."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from tokenloom.inference.v1 import generation_pb2 as pb

from services.common.errors import MeshError, Reason
from services.gateway.quarantine import Losses
from services.gateway.quarantine import Quarantine as GatewayQuarantine
from services.inference.output import EngineLostError
from services.inference.quarantine import FatalRequestError, Quarantine, fingerprint
from services.inference.request import ChatMessage, Generation, Sampling
from tests.support.waiting import eventually


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def generation(name: str, *, prompt: Any = None, lost_engines: int = 0, **others: Any) -> Generation:
    return Generation(
        id=name,
        model="m",
        prompt=prompt or f"the prompt of {name}",
        kind="text",
        sampling=others.pop("sampling", Sampling()),
        lost_engines=lost_engines,
        **others,
    )


def reasons(errors: list[MeshError]) -> list[Reason]:
    return [error.reason for error in errors]


async def test_without_a_lost_engine_everything_runs_freely() -> None:
    quarantine = Quarantine()
    assert [await quarantine.enter(generation(str(i))) for i in range(100)] == [False] * 100


async def test_the_culprit_is_found_on_its_second_engine_and_nobody_else_is_refused() -> None:
    clock = Clock()
    quarantine = Quarantine(clock)
    crowd = [generation(str(i)) for i in range(64)]
    for entry in crowd:
        await quarantine.enter(entry)
    first = [quarantine.lost(entry) for entry in crowd]
    assert all(isinstance(error, EngineLostError) for error in first)
    for entry in crowd:
        quarantine.leave(entry, completed=False)
    clock.now += 1
    culprit = crowd[40]
    for entry in crowd[:40]:
        assert await quarantine.enter(entry)
        quarantine.prove(entry.id)
    assert await quarantine.enter(culprit)
    clock.now += 1
    second = {entry.id: quarantine.lost(entry) for entry in crowd[:41]}
    assert isinstance(second.pop("40"), FatalRequestError)
    # The others are moved as often as it takes.
    assert set(reasons(list(second.values()))) == {Reason.NO_READY_WORKER}
    for entry in crowd[:41]:
        quarantine.leave(entry, completed=False)
    clock.now += 1
    for entry in crowd:
        if entry is culprit:
            with pytest.raises(FatalRequestError):
                await quarantine.enter(entry)
        else:
            await quarantine.enter(entry)
            quarantine.leave(entry, completed=True)
    assert not await quarantine.enter(crowd[0]), "who completed is no suspect any more"
    clock.now += 601
    with pytest.raises(FatalRequestError):
        await quarantine.enter(replace(culprit, id="again", emitted_token_ids=[1, 2]))
    clock.now += 300
    assert not await quarantine.enter(culprit)


async def test_a_suspect_from_elsewhere_enters_alone_and_who_comes_meanwhile_waits_for_its_proof() -> None:
    quarantine = Quarantine()
    assert await quarantine.enter(generation("suspect", lost_engines=1))
    waiting = [
        asyncio.create_task(quarantine.enter(generation(name, lost_engines=lost)))
        for name, lost in (("new", 0), ("second", 1), ("later", 0))
    ]
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in waiting)
    quarantine.prove("suspect")
    await eventually(lambda: [task.done() for task in waiting] == [True, True, False], within=1)
    quarantine.leave(generation("second", lost_engines=1), completed=False)
    assert await asyncio.gather(*waiting) == [False, True, False]


async def test_a_suspect_that_is_cancelled_while_it_waits_lets_the_next_one_in() -> None:
    quarantine = Quarantine()
    await quarantine.enter(generation("first", lost_engines=1))
    gone = asyncio.create_task(quarantine.enter(generation("gone", lost_engines=1)))
    next_ = asyncio.create_task(quarantine.enter(generation("next", lost_engines=1)))
    await asyncio.sleep(0)
    gone.cancel()
    quarantine.prove("first")
    assert await asyncio.wait_for(next_, 1)


async def test_a_suspect_that_brings_nothing_holds_the_others_up_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.inference.quarantine._TURN_SECONDS", 0.05)
    quarantine = Quarantine()
    slow, other = generation("slow", lost_engines=1), generation("other", lost_engines=1)
    await quarantine.enter(slow)
    assert await asyncio.wait_for(quarantine.enter(other), 1)
    # With two unproven ones in the engine, neither is convicted.
    assert [type(quarantine.lost(entry)) for entry in (slow, other)] == [EngineLostError, EngineLostError]


def test_a_fingerprint_is_of_what_the_engine_gets_and_not_of_who_asks() -> None:
    base = generation("a", prompt="x")
    same = replace(base, id="b", emitted_token_ids=[1], priority=3, traceparent="t", lost_engines=1, cache_salt="s")
    assert fingerprint(same) == fingerprint(base)
    others = [
        replace(base, prompt="y"),
        replace(base, prompt=(120,), kind="tokens"),
        replace(base, prompt=[ChatMessage(role="user", content="x")], kind="chat"),
        replace(base, sampling=Sampling(top_k=3)),
        replace(base, choices=2),
    ]
    assert len({fingerprint(entry) for entry in (base, *others)}) == 6
    assert fingerprint(replace(base, prompt="\ud800"))


def test_a_gateway_refuses_what_took_engines_down_for_more_than_ten_minutes() -> None:
    clock = Clock()
    quarantine = GatewayQuarantine(clock)
    poison, other = pb.GenerateRequest(model="m", text="poison"), pb.GenerateRequest(model="m", text="other")
    assert quarantine.check(poison) == Losses()
    quarantine.note(poison, Losses(engines=1), fatal=True)
    quarantine.note(poison, Losses(engines=1), fatal=False)
    clock.now += 601
    assert quarantine.check(other) == Losses()
    with pytest.raises(MeshError) as caught:
        quarantine.check(pb.GenerateRequest(model="m", text="poison"))
    assert (caught.value.row.http, caught.value.code) == (500, "engine_error")
    clock.now += 300
    assert quarantine.check(poison) == Losses()


def test_a_gateway_tells_how_many_were_lost_with_a_request_until_it_completes() -> None:
    quarantine = GatewayQuarantine()
    request = pb.GenerateRequest(model="m", text="x")
    quarantine.note(request, Losses(engines=1), fatal=False)
    quarantine.note(request, Losses(engines=1), fatal=False)
    assert quarantine.check(request).suspicion == 2
    quarantine.clear(request)
    assert quarantine.check(request) == Losses()


@pytest.mark.parametrize(
    ("losses", "suspicion"),
    [
        ([], 0),
        ([Losses(workers=1)], 0),
        ([Losses(workers=1)] * 2, 1),
        ([Losses(engines=1)], 1),
        ([Losses(workers=1), Losses(engines=1)], 1),
        ([Losses(engines=1), Losses(workers=1), Losses(workers=1)], 2),
    ],
    ids=["none", "a worker", "two workers", "an engine", "one of each", "three"],
)
def test_one_worker_that_vanished_makes_nobody_suspect(losses: list[Losses], suspicion: int) -> None:
    quarantine, request = GatewayQuarantine(), pb.GenerateRequest(model="m", text="any")
    for loss in losses:
        quarantine.note(request, loss, fatal=False)
    assert quarantine.check(request).suspicion == suspicion
