"""What becomes of requests that find no room, as their clients prefer: over a real gateway, router and worker."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from services.common.settings_worker import SimSettings
from services.inference.sim_text import expected_text, tokenize
from tests.support.openai_lane import Lane, openai_lane

pytestmark = pytest.mark.asyncio(loop_scope="module")
SIM = SimSettings(prefill_tokens_per_second=1e6, decode_step_ms=5, max_num_seqs=1)
NOW_OR_LATER = {"prefer": "respond-async, wait=0"}
BODY: dict[str, Any] = {"model": "sim", "prompt": "later", "max_tokens": 8, "ignore_eos": True, "temperature": 0}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lane(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lane]:
    async with openai_lane(tmp_path_factory.mktemp("put-off"), SIM) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(lane: Lane) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=lane.base_url, headers=lane.headers, timeout=20) as opened:
        yield opened


async def occupy(client: httpx.AsyncClient, *, until: asyncio.Event, begun: asyncio.Semaphore) -> None:
    body = {"model": "sim", "prompt": "busy", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        # Held on to: an iterator that is dropped closes the answer.
        chunks = answer.aiter_bytes()
        await anext(chunks)
        begun.release()
        await until.wait()


@asynccontextmanager
async def no_room(client: httpx.AsyncClient) -> AsyncIterator[None]:
    """The worker's one slot is taken, and whatever place there is in its engine's own line."""
    over, begun = asyncio.Event(), asyncio.Semaphore(0)
    async with asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(occupy(client, until=over, begun=begun)) for _ in range(4)]
        await begun.acquire()
        try:
            yield
        finally:
            over.set()
            for task in waiting:
                task.cancel()


async def ended(lane: Lane, batch_id: str) -> dict[str, Any]:
    """What the only line of a batch was answered, by the official SDK."""
    async with openai.AsyncOpenAI(base_url=f"{lane.base_url}/v1", api_key=lane.key, max_retries=0) as sdk:
        async with asyncio.timeout(20):
            while (batch := await sdk.batches.retrieve(batch_id)).status != "completed":
                await asyncio.sleep(0.1)
        assert batch.output_file_id is not None
        (line,) = (await sdk.files.content(batch.output_file_id)).text.splitlines()
    parsed: dict[str, Any] = json.loads(line)
    return parsed


async def test_who_waits_no_time_is_refused_at_once_where_there_is_no_room_and_served_where_there_is(
    client: httpx.AsyncClient,
) -> None:
    async with no_room(client):
        began = time.monotonic()
        refused = await client.post("/v1/completions", json=BODY, headers={"prefer": "wait=0"})
        assert time.monotonic() - began < 1
        assert refused.json()["error"]["code"] == "no_capacity"
        assert int(refused.headers["retry-after"]) >= 1
        began = time.monotonic()
        refused = await client.post("/v1/completions", json=BODY, headers={"prefer": "wait=1"})
        assert time.monotonic() - began < 3
        assert refused.json()["error"]["code"] == "no_capacity"
    async with asyncio.timeout(10):
        # There is room a moment after those who took it have left.
        while (served := await client.post("/v1/completions", json=BODY, headers=NOW_OR_LATER)).status_code == 202:
            await asyncio.sleep(0.05)
    assert (served.status_code, served.json()["choices"][0]["text"]) == (200, expected_text(tokenize("later"), 8))


@pytest.mark.parametrize(
    ("path", "stream"), [("/v1/completions", True), ("/v1/chat/completions", False), ("/v1/responses", True)]
)
async def test_a_request_that_may_be_answered_later_becomes_a_batch_of_one(
    lane: Lane, client: httpx.AsyncClient, path: str, stream: bool
) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": BODY,
        "/v1/chat/completions": {"model": "sim", "messages": [{"role": "user", "content": "later"}], "max_tokens": 8},
        "/v1/responses": {"model": "sim", "input": "later", "max_output_tokens": 16},
    }
    async with no_room(client):
        answer = await client.post(path, json={**bodies[path], "stream": stream}, headers=NOW_OR_LATER)
    assert answer.status_code == 202
    batch = answer.json()
    assert (batch["object"], batch["endpoint"], batch["status"]) == ("batch", path, "validating")
    assert answer.headers["location"] == f"/v1/batches/{batch['id']}"
    assert answer.headers["preference-applied"] == "respond-async"
    line = await ended(lane, batch["id"])
    assert line["custom_id"] == answer.headers["x-request-id"]
    assert line["response"]["status_code"] == 200
    if path == "/v1/completions":
        assert line["response"]["body"]["choices"][0]["text"] == expected_text(tokenize("later"), 8)


async def test_a_key_that_may_make_no_batches_is_refused_instead(lane: Lane, client: httpx.AsyncClient) -> None:
    key = await lane.make_key("no batches", endpoints=["completions"])
    headers = {**NOW_OR_LATER, "authorization": f"Bearer {key}"}
    async with no_room(client):
        refused = await client.post("/v1/completions", json=BODY, headers=headers)
    assert refused.json()["error"]["code"] == "no_capacity"


async def test_what_is_wrong_with_a_request_is_told_at_once_whatever_is_preferred(client: httpx.AsyncClient) -> None:
    async with no_room(client):
        wrong = await client.post("/v1/completions", json={**BODY, "temperature": 7}, headers=NOW_OR_LATER)
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "temperature")
        odd = await client.post("/v1/completions", json=BODY, headers={"prefer": "wait=soon"})
        assert (odd.status_code, odd.json()["error"]["param"]) == (400, "prefer")
