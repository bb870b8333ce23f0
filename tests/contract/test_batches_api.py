"""Files and batches over a real gateway, router and simulated worker, as the official SDK uses them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
import pytest_asyncio
from openai.types import Batch

from services.common.settings_worker import SimSettings
from services.inference.sim_text import expected_text, tokenize
from tests.support.openai_lane import Lane, openai_lane

pytestmark = pytest.mark.asyncio(loop_scope="module")
FAST = SimSettings(prefill_tokens_per_second=1e6, decode_step_ms=1)
SLOW = SimSettings(prefill_tokens_per_second=1e6, decode_step_ms=10)
URL: Literal["/v1/completions"] = "/v1/completions"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lane(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lane]:
    async with openai_lane(tmp_path_factory.mktemp("batches"), FAST) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(lane: Lane) -> AsyncIterator[openai.AsyncOpenAI]:
    async with sdk(lane) as opened:
        yield opened


def sdk(lane: Lane) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{lane.base_url}/v1", api_key=lane.key, max_retries=0)


def line(name: str, *, url: str = URL, **body: Any) -> str:
    asked = {"model": "sim", "prompt": name, "max_tokens": 8, "ignore_eos": True, "temperature": 0} | body
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": asked})


async def submitted(client: openai.AsyncOpenAI, lines: Iterable[str]) -> Batch:
    file = await client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")


async def ended(client: openai.AsyncOpenAI, batch: Batch) -> Batch:
    return await polled(client, batch, lambda now: now.status in ("completed", "failed", "cancelled", "expired"))


async def polled(client: openai.AsyncOpenAI, batch: Batch, check: Callable[[Batch], bool]) -> Batch:
    async with asyncio.timeout(40):
        while not check(found := await client.batches.retrieve(batch.id)):
            await asyncio.sleep(0.1)
    return found


def some_done(batch: Batch) -> bool:
    return batch.request_counts is not None and batch.request_counts.completed > 0


async def results(client: openai.AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    if file_id is None:
        return {}
    text = (await client.files.content(file_id)).text
    parsed = [json.loads(entry) for entry in text.splitlines()]
    assert len({entry["custom_id"] for entry in parsed}) == len(parsed)
    return {entry["custom_id"]: entry for entry in parsed}


async def test_a_batch_answers_every_line_as_a_request_of_its_own(client: openai.AsyncOpenAI) -> None:
    lines = [line(f"prompt {number}") for number in range(40)] + [line("bad", temperature=7), line("lost", model="no")]
    batch = await ended(client, await submitted(client, lines))
    assert batch.status == "completed"
    assert batch.request_counts
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (42, 40, 2)
    good = await results(client, batch.output_file_id)
    for number in range(40):
        body = good[f"prompt {number}"]["response"]["body"]
        assert body["choices"][0]["text"] == expected_text(tokenize(f"prompt {number}"), 8)
    bad = await results(client, batch.error_file_id)
    assert bad["bad"]["response"]["body"]["error"]["param"] == "temperature"
    assert bad["lost"]["response"]["status_code"] == 404
    assert (await client.batches.list(limit=1)).data[0].id == batch.id


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["{"], "invalid_json"),
        (["[]"], "invalid_type"),
        ([line("a"), line("a")], "duplicate_custom_id"),
        ([line("a", url="/v1/embeddings")], "mismatched_endpoint"),
        ([line("a", stream=True)], "invalid_value"),
        ([""], "empty_file"),
    ],
)
async def test_a_file_with_a_bad_line_fails_before_anything_is_asked(
    client: openai.AsyncOpenAI, lines: list[str], code: str
) -> None:
    batch = await ended(client, await submitted(client, lines))
    assert batch.status == "failed"
    assert batch.errors
    assert batch.errors.data
    assert batch.errors.data[0].code == code
    assert batch.request_counts
    assert batch.request_counts.completed == 0


async def test_a_batch_goes_on_where_a_lost_gateway_stopped(tmp_path: Path) -> None:
    lines = [line(f"prompt {number}", max_tokens=20) for number in range(60)]
    async with openai_lane(tmp_path, SLOW) as lane, sdk(lane) as client:
        batch = await submitted(client, lines)
        await polled(client, batch, some_done)
    # With another key of the same tenant: the batch is the tenant's.
    async with openai_lane(tmp_path, FAST) as lane, sdk(lane) as client:
        done = await ended(client, batch)
        assert done.status == "completed"
        good = await results(client, done.output_file_id)
    assert len(good) == 60
    assert good["prompt 7"]["response"]["body"]["choices"][0]["text"] == expected_text(tokenize("prompt 7"), 20)


async def test_a_cancelled_batch_keeps_what_is_done(tmp_path: Path) -> None:
    async with openai_lane(tmp_path, SLOW) as lane, sdk(lane) as client:
        batch = await submitted(client, [line(f"{number}", max_tokens=50) for number in range(200)])
        await polled(client, batch, some_done)
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        done = await ended(client, batch)
        assert done.status == "cancelled"
        assert 0 < len(await results(client, done.output_file_id)) < 200


async def test_a_file_comes_back_as_it_was_sent(client: openai.AsyncOpenAI) -> None:
    content = bytes(range(256)) * 10_000
    file = await client.files.create(file=("data.jsonl", content), purpose="batch")
    assert (file.bytes, file.filename, file.purpose) == (len(content), "data.jsonl", "batch")
    assert (await client.files.content(file.id)).content == content
    assert file.id in [found.id async for found in client.files.list(purpose="batch")]
    assert (await client.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(file.id)


async def test_nobody_sees_another_tenants_files(lane: Lane, client: openai.AsyncOpenAI) -> None:
    file = await client.files.create(file=("mine.jsonl", b"x"), purpose="batch")
    async with openai.AsyncOpenAI(base_url=f"{lane.base_url}/v1", api_key=lane.new_key("stranger")) as stranger:
        await asyncio.sleep(0.6)
        with pytest.raises(openai.NotFoundError):
            await stranger.files.content(file.id)
        with pytest.raises(openai.BadRequestError, match="input_file_id"):
            await stranger.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")


@pytest.mark.parametrize(
    ("files", "data", "status", "param"),
    [
        ({}, {"purpose": "batch"}, 415, None),
        ({"other": b"x"}, {"purpose": "batch"}, 400, "file"),
        ({"file": b"x"}, {}, 400, "purpose"),
        ({"file": b"x"}, {"purpose": "fine-tune"}, 400, "purpose"),
        ({"file": b"x"}, {"purpose": "batch", "more": "1"}, 400, "more"),
        ({"file": b"x"}, {"purpose": "b" * 5000}, 400, "purpose"),
        ({"file": b"x"}, {"purpose": "batch", "expires_after[seconds]": "5"}, 400, "expires_after.seconds"),
        ({"file": b"x"}, {"purpose": "batch", "expires_after[anchor]": "now"}, 400, "expires_after.anchor"),
        ({"file": b"x"}, {"purpose": "batch", "expires_after[anchor]": "created_at"}, 400, "expires_after.seconds"),
    ],
)
async def test_a_bad_upload_is_refused_by_name(
    lane: Lane, files: dict[str, bytes], data: dict[str, str], status: int, param: str | None
) -> None:
    async with httpx.AsyncClient(base_url=lane.base_url, headers=lane.headers) as http:
        answer = await http.post("/v1/files", files=files, data=data)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


async def test_a_page_that_makes_no_sense_is_refused(lane: Lane) -> None:
    async with httpx.AsyncClient(base_url=lane.base_url, headers=lane.headers) as http:
        for query in ("limit=0", "limit=101", "limit=x", "order=up"):
            answer = await http.get(f"/v1/files?{query}")
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, query.partition("=")[0])
