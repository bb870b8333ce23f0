"""Engines that hang or die while streams run on them, and the request that they die of."""

import asyncio
import os
import signal
from collections.abc import Sequence
from typing import Any

import httpx
import openai
import pytest

from tests.support.failover import POISON
from tests.support.mesh import Mesh
from tests.support.waiting import eventually, wait_until

pytestmark = pytest.mark.timeout(120)
WORKERS = [f"worker-{index}" for index in range(4)]


@pytest.fixture(scope="module")
def mesh(large_mesh: Mesh) -> Mesh:
    """Four simulated workers."""
    return large_mesh


async def texts(mesh: Mesh, prompts: Sequence[str], *, model: str, flowing: set[str], tokens: int = 120) -> list[Any]:
    """What streams of these prompts say, or the error that they end with."""

    async def text(client: openai.AsyncOpenAI, prompt: str) -> Any:
        try:
            stream = await client.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=tokens,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            parts = []
            async for chunk in stream:
                flowing.add(prompt)
                parts += [choice.text for choice in chunk.choices]
        except openai.APIError as error:
            return error
        return "".join(parts)

    async with mesh.async_sdk() as client:
        return await asyncio.gather(*(text(client, prompt) for prompt in prompts))


def worker(mesh: Mesh, name: str) -> dict[str, Any]:
    listed = httpx.get(f"{mesh.edge}/api/v1/workers", headers=mesh.headers, timeout=10).json()["workers"]
    found: dict[str, Any] = next(entry["load"] for entry in listed if entry["registration"]["worker_id"] == name)
    return found


def starts(mesh: Mesh) -> int:
    return round(sum(mesh.metric(name, "tokenloom_inference_engine_starts_total") for name in WORKERS))


def engine_error(error: Any) -> tuple[int | None, str | None]:
    assert isinstance(error, openai.APIError), error
    return getattr(error, "status_code", None), error.code


async def test_one_poisonous_request_among_64_costs_two_engines_and_nobody_elses_output(mesh: Mesh) -> None:
    prompts = [f"prompt {index}" for index in range(63)]
    undisturbed = await texts(mesh, prompts, model="sim", flowing=set())
    before = starts(mesh)
    flowing: set[str] = set()
    running = asyncio.create_task(texts(mesh, prompts, model="sim", flowing=flowing))
    await eventually(lambda: len(flowing) == 63, within=10)
    (poisonous,) = await texts(mesh, [POISON], model="sim", flowing=set())
    assert engine_error(poisonous) == (500, "engine_error")
    disturbed = await running
    assert [text for text in disturbed if isinstance(text, Exception)] == []
    assert disturbed == undisturbed
    await asyncio.to_thread(wait_until, lambda: starts(mesh) == before + 2, within=5)
    for _ in range(3):
        (again,) = await texts(mesh, [POISON], model="sim", flowing=set())
        assert engine_error(again) == (500, "engine_error")
    assert starts(mesh) == before + 2


async def test_an_engine_that_hangs_is_given_up_within_3_s_and_its_streams_go_on_elsewhere(mesh: Mesh) -> None:
    prompts = [f"question {index}" for index in range(64)]
    undisturbed = await texts(mesh, prompts, model="sim", flowing=set(), tokens=200)
    flowing: set[str] = set()
    running = asyncio.create_task(texts(mesh, prompts, model="sim", flowing=flowing, tokens=200))
    await eventually(lambda: len(flowing) == 64, within=10)
    pid = mesh.process("worker-2")["pid"]
    os.kill(pid, signal.SIGUSR1)
    await asyncio.to_thread(
        wait_until, lambda: worker(mesh, "worker-2").get("state") == "WORKER_STATE_UNAVAILABLE", within=3
    )
    assert worker(mesh, "worker-2")["state_reason"] == "the engine makes no progress"
    assert await running == undisturbed
    os.kill(pid, signal.SIGUSR2)
    await asyncio.to_thread(wait_until, lambda: worker(mesh, "worker-2").get("state") == "WORKER_STATE_READY", within=2)
    assert worker(mesh, "worker-2").get("running_count", 0) == 0
    assert mesh.process("worker-2")["pid"] == pid
