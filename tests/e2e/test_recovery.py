"""Whatever is killed comes back, streams go on elsewhere, and nothing is left behind."""

import asyncio
import os
import secrets
import signal
import statistics
import time
from collections.abc import Callable
from typing import Any

import grpc.aio
import httpx
import psutil
import pytest
from tokenloom.inference.v1 import generation_pb2, inference_pb2_grpc

from tests.support.commands import tokenloom
from tests.support.failover import Strike, said
from tests.support.mesh import Mesh
from tests.support.otlp import Receiver
from tests.support.uneven_mesh import ended
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(120)
MODEL = "sim"


@pytest.fixture(scope="module")
def mesh(large_mesh: Mesh) -> Mesh:
    """Four simulated workers."""
    return large_mesh


def kill(mesh: Mesh, name: str) -> int:
    pid = int(mesh.process(name)["pid"])
    os.kill(pid, signal.SIGKILL)
    return pid


def answers(mesh: Mesh) -> bool:
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 2}
    try:
        answer = httpx.post(f"{mesh.edge}/v1/completions", json=body, headers=mesh.headers, timeout=10)
    except httpx.TransportError:
        return False
    return answer.status_code == 200


@pytest.mark.parametrize("name", ["worker-0", "router", "gateway", "telemetry", "envoy"])
def test_a_killed_process_comes_back_and_the_next_request_works(mesh: Mesh, name: str) -> None:
    assert answers(mesh)
    children = psutil.Process(mesh.process(name)["pid"]).children(recursive=True)
    pid = kill(mesh, name)
    wait_until(lambda: mesh.process(name)["pid"] != pid, within=20)
    wait_until(lambda: answers(mesh), within=10)
    assert answers(mesh)
    assert not [child for child in children if child.is_running()]


async def test_64_streams_survive_the_loss_of_workers_without_a_token_lost_or_twice(mesh: Mesh) -> None:
    prompts = [f"prompt {index}" for index in range(64)]
    undisturbed = await said(mesh, MODEL, prompts, tokens=150)
    assert {tokens for _, tokens in undisturbed.values()} == {150}
    first, both = Strike(mesh, 1), Strike(mesh, 2)
    assert await said(mesh, MODEL, prompts, tokens=150, strike=first) == undisturbed
    await asyncio.to_thread(check_that_moves_are_told, mesh, away_from=next(iter(first.pids)))
    first.wait_until_replaced()
    # The second one goes while what was on the first is being moved, to it among others.
    assert await said(mesh, MODEL, prompts, tokens=150, strike=both) == undisturbed
    both.wait_until_replaced()


async def test_streams_go_on_elsewhere_when_their_worker_stands_still(mesh: Mesh) -> None:
    wait_until(lambda: mesh.metric("router", "tokenloom_router_workers") == 4, within=20)
    prompts, strike = [f"prompt {index}" for index in range(32)], Strike(mesh, 1, by=signal.SIGSTOP)
    undisturbed = await said(mesh, MODEL, prompts, tokens=150)
    began = time.monotonic()
    try:
        assert await said(mesh, MODEL, prompts, tokens=150, strike=strike) == undisturbed
        # It is given up after three seconds; the rest is what the streams take.
        assert time.monotonic() - began < 10
        meanwhile = await said(mesh, MODEL, prompts[:4], tokens=5)
        assert [tokens for _, tokens in meanwhile.values()] == [5] * 4
    finally:
        for pid in strike.pids.values():
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: mesh.metric("router", "tokenloom_router_workers") == 4, within=20)
    assert await said(mesh, MODEL, prompts, tokens=150) == undisturbed


def check_that_moves_are_told(mesh: Mesh, *, away_from: str) -> None:
    def moved() -> list[dict[str, Any]]:
        return [row for row in ended(mesh, limit=64) if row["moves"]]

    wait_until(lambda: bool(moved()), within=15)
    row = moved()[0]
    (move,) = row["moves"]
    assert (move["worker"], move["emitted_tokens"] > 0, row["worker"] != away_from) == (away_from, True, True)
    assert 0 < move["at_seconds"] < row["duration_seconds"]
    told = tokenloom(mesh, "explain", row["request_id"])
    assert f"It was moved away from {away_from} " in told.stdout
    assert told.stdout.count("chosen: ") == 2


def stream_until_lost(mesh: Mesh, traceparent: str) -> str:
    """Streams an answer whose worker is killed after the first event; returns which worker it was."""
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 60, "temperature": 0, "stream": True, "ignore_eos": True}
    headers = {**mesh.headers, "traceparent": traceparent}
    with (
        httpx.Client(base_url=mesh.edge, headers=headers, timeout=20) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        worker = answer.headers["x-tokenloom-worker"]
        lines = answer.iter_lines()
        next(lines)
        kill(mesh, worker)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    return str(worker)


def test_one_trace_tells_of_a_request_that_moved_whether_it_was_sampled_or_not(mesh: Mesh, spans: Receiver) -> None:
    pids = {process["name"]: process["pid"] for process in mesh.state["processes"]}
    sampled, not_sampled = secrets.token_hex(16), secrets.token_hex(16)
    lost = stream_until_lost(mesh, f"00-{sampled}-{secrets.token_hex(8)}-01")
    request = "tokenloom-gateway: text_completion sim"
    edges = {
        (request, "tokenloom-gateway: router.acquire"),
        ("tokenloom-gateway: router.acquire", "tokenloom-router: schedule"),
        (request, "tokenloom-gateway: worker.generate"),
        ("tokenloom-gateway: worker.generate", "tokenloom-inference: generate"),
        ("tokenloom-inference: generate", "tokenloom-inference: decode"),
    }
    wait_until(lambda: edges <= spans.edges(sampled), within=10)
    trace = spans.trace(sampled)
    picks = {span.attributes["tokenloom.attempt"]: span for span in trace if span.name == "schedule"}
    assert picks.keys() == {1, 2}
    assert picks[1].attributes["tokenloom.worker"] == lost
    (second,) = [span for span in trace if span.name == "generate"]
    assert second.attributes["tokenloom.worker"] == picks[2].attributes["tokenloom.worker"] != lost
    assert second.attributes["tokenloom.emitted_tokens"] > 0
    (whole,) = [span for span in trace if span.name == "text_completion sim"]
    assert whole.events == ("first token", "failover")

    # Only now: the worker that is killed here may be the one that had spans of the first to send.
    other = stream_until_lost(mesh, f"00-{not_sampled}-{secrets.token_hex(8)}-00")
    wait_until(lambda: any(span.events for span in spans.trace(not_sampled)), within=10)
    assert {span.service for span in spans.trace(not_sampled)} == {"tokenloom-gateway"}
    wait_until(lambda: all(mesh.process(name)["pid"] != pids[name] for name in {lost, other}), within=20)


async def requests_over(mesh: Mesh, count: int, disturb: Callable[[], None]) -> list[float]:
    """Seconds that each of so many requests took, started evenly over four seconds; after one of these, `disturb`."""
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 20, "ignore_eos": True}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=mesh.edge, headers=mesh.headers, timeout=20, limits=limits) as client:

        async def one() -> float:
            began = time.monotonic()
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return time.monotonic() - began

        async with asyncio.TaskGroup() as tasks:
            running = []
            for number in range(count):
                if number == count // 4:
                    disturb()
                running.append(tasks.create_task(one()))
                await asyncio.sleep(4 / count)
    return [task.result() for task in running]


async def test_no_request_fails_or_waits_when_the_router_is_killed_and_its_successor_knows_the_fleet(
    mesh: Mesh,
) -> None:
    wait_until(lambda: answers(mesh), within=10)
    pid = mesh.process("router")["pid"]
    quiet = statistics.median(await requests_over(mesh, 50, lambda: None))
    took = await requests_over(mesh, 200, lambda: os.kill(pid, signal.SIGKILL))
    assert len(took) == 200
    # Those that came while it was away, by their middle: a busy machine adds to the longest.
    assert statistics.median(took[50:100]) - quiet < 0.25
    wait_until(lambda: mesh.process("router")["pid"] != pid, within=20)
    wait_until(lambda: mesh.metric("router", "tokenloom_router_workers") == 4, within=1)


async def test_no_request_fails_or_waits_while_the_router_hangs(mesh: Mesh) -> None:
    wait_until(lambda: mesh.metric("router", "tokenloom_router_workers") == 4, within=10)
    pid = mesh.process("router")["pid"]
    try:
        took = await requests_over(mesh, 100, lambda: os.kill(pid, signal.SIGSTOP))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert len(took) == 100
    assert statistics.median(took) < 2
    wait_until(lambda: answers(mesh), within=10)
    wait_until(lambda: mesh.metric("router", "tokenloom_router_leases") == 0, within=5)


def test_a_stream_that_cannot_go_on_ends_with_an_error_and_without_done(mesh: Mesh) -> None:
    wait_until(lambda: answers(mesh), within=10)
    body = {"model": MODEL, "prompt": "x", "max_tokens": 2000, "stream": True, "n": 2, "ignore_eos": True}
    with httpx.stream("POST", f"{mesh.edge}/v1/completions", json=body, headers=mesh.headers, timeout=20) as response:
        worker = response.headers["x-tokenloom-worker"]
        lines = response.iter_lines()
        next(lines)
        kill(mesh, worker)
        rest = [line for line in lines if line]
    assert '"error"' in rest[-1]
    assert "[DONE]" not in "".join(rest)


def test_a_worker_that_is_asked_to_stop_finishes_its_streams_and_comes_back(mesh: Mesh) -> None:
    wait_until(lambda: answers(mesh), within=10)
    body = {"model": MODEL, "prompt": "x", "max_tokens": 200, "stream": True, "n": 2, "ignore_eos": True}
    with httpx.stream("POST", f"{mesh.edge}/v1/completions", json=body, headers=mesh.headers, timeout=20) as response:
        worker = response.headers["x-tokenloom-worker"]
        pid = int(mesh.process(worker)["pid"])
        os.kill(pid, signal.SIGTERM)
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert sum('"finish_reason":"length"' in line for line in lines) == 2
    wait_until(lambda: mesh.process(worker)["pid"] != pid, within=20)


async def typed_lane(mesh: Mesh, slowest: list[float], until: asyncio.Event) -> int:
    """Generates over the typed lane, one request after the other; notes how long each took to begin."""
    sampling = generation_pb2.SamplingParameters(max_tokens=5, ignore_eos=True)
    request = generation_pb2.GenerateRequest(model=MODEL, text="hi", sampling=sampling)
    done = 0
    async with grpc.aio.insecure_channel(mesh.edge_target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        while not until.is_set():
            began = time.monotonic()
            call: Any = stub.Generate(request, metadata=mesh.metadata, timeout=20)
            kinds: list[str | None] = []
            async for event in call:
                if not kinds:
                    slowest.append(time.monotonic() - began)
                kinds.append(event.WhichOneof("event"))
            assert kinds[-1] == "completed"
            done += 1
    return done


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "paused"])
async def test_the_typed_lane_does_without_the_router(mesh: Mesh, signal_number: signal.Signals) -> None:
    wait_until(lambda: answers(mesh), within=10)
    pid, began, over = int(mesh.process("router")["pid"]), list[float](), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        lanes = [tasks.create_task(typed_lane(mesh, began, over)) for _ in range(8)]
        await asyncio.sleep(0.5)
        os.kill(pid, signal_number)
        before = len(began)
        await asyncio.sleep(2.5)
        assert len(began) >= before + 8
        if signal_number == signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(1)
        over.set()
    assert sum(lane.result() for lane in lanes) == len(began)
    # Half of them at least never noticed; the others took a second at most until the edge gave the router up, and what
    # else they take on a busy machine.
    assert statistics.median(began) < 1.0
    assert max(began) < 6.0
    wait_until(lambda: answers(mesh), within=20)
