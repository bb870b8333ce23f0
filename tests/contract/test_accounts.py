"""Limits and the ledger on the OpenAI lane: a gateway with a real router and real simulated workers."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from services.common import ledger
from services.common.database import Database
from services.common.quota import KeyLimits
from services.common.settings_gateway import LedgerSettings
from services.common.settings_worker import SimSettings
from services.common.tables import USAGE
from tests.support.openai_lane import Lane, openai_lane
from tests.support.waiting import eventually

PRICE = 3600.0
"""An hour of a GPU; a second of one costs 1."""
BODY = {"model": "sim", "prompt": "x" * 40, "max_tokens": 10, "ignore_eos": True}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lane(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lane]:
    sim = SimSettings(decode_step_ms=5, decode_step_ms_per_sequence=0)
    prices = LedgerSettings(default_gpu_hour_price=PRICE)
    async with openai_lane(tmp_path_factory.mktemp("lane"), sim, ledger=prices) as running:
        yield running


pytestmark = pytest.mark.asyncio(loop_scope="module")


def usage(lane: Lane, tenant: str) -> list[dict[str, Any]]:
    with Database(lane.keys) as database, database.reading() as connection:
        query = USAGE.select().where(USAGE.c.tenant == tenant).order_by(USAGE.c.time)
        return [dict(row) for row in connection.execute(query).mappings()]


async def rows_of(lane: Lane, tenant: str, count: int = 1) -> list[dict[str, Any]]:
    await eventually(lambda: len(usage(lane, tenant)) >= count, within=5)
    return usage(lane, tenant)


async def ask(lane: Lane, key: str, **changes: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=lane.base_url, headers={"authorization": f"Bearer {key}"}) as client:
        return await client.post("/v1/completions", json={**BODY, **changes})


async def test_a_request_has_a_row_that_says_what_it_took(lane: Lane) -> None:
    key = await lane.make_key("rows")
    answer = await ask(lane, key)
    (row,) = await rows_of(lane, "rows")
    told = answer.json()["usage"]
    assert row["request_id"] == answer.headers["x-request-id"]
    assert (row["lane"], row["endpoint"], row["model"], row["worker"]) == ("openai", "completions", "sim", "worker-0")
    assert (row["prompt_tokens"], row["output_tokens"]) == (told["prompt_tokens"], told["completion_tokens"])
    assert row["outcome"] == "ok"
    assert 0.04 < row["duration_seconds"] < 5
    assert 0 < row["ttft_seconds"] < row["duration_seconds"]
    assert 0.003 < row["tpot_seconds"] < 0.1
    # Alone on its worker, it had all of its time.
    assert row["gpu_seconds"] == pytest.approx(row["duration_seconds"], abs=0.2)
    assert row["cost"] == pytest.approx(row["gpu_seconds"])


async def test_requests_at_the_same_time_share_the_cost_of_their_worker(lane: Lane) -> None:
    key = await lane.make_key("together")
    await asyncio.gather(*(ask(lane, key, max_tokens=40) for _ in range(4)))
    rows = await rows_of(lane, "together", 4)
    whole = max(row["duration_seconds"] for row in rows)
    assert sum(row["gpu_seconds"] for row in rows) < 1.6 * whole


async def test_a_client_that_leaves_pays_for_what_it_got(lane: Lane) -> None:
    key = await lane.make_key("left", limits=KeyLimits(tpm=100_000))
    client = openai.AsyncOpenAI(base_url=f"{lane.base_url}/v1", api_key=key)
    async with client:
        stream = await client.completions.create(
            model="sim", prompt="x" * 40, max_tokens=5000, stream=True, extra_body={"ignore_eos": True}
        )
        got = 0
        async for _ in stream:
            got += 1
            if got == 10:
                break
        await stream.close()
    (row,) = await rows_of(lane, "left")
    assert row["outcome"] == "client_left"
    assert 9 <= row["output_tokens"] < 200
    assert row["prompt_tokens"] > 0
    assert row["cost"] > 0
    # What it had reserved beyond that is back.
    answer = await ask(lane, key)
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) > 100_000 - 300


async def test_a_request_that_fails_has_a_row_with_the_reason(lane: Lane) -> None:
    key = await lane.make_key("fails")
    assert (await ask(lane, key, model="nope")).status_code == 404
    (row,) = await rows_of(lane, "fails")
    assert (row["outcome"], row["output_tokens"], row["cost"]) == ("model_not_found", 0, 0.0)


async def test_a_request_that_is_malformed_is_let_in_by_nobody(lane: Lane) -> None:
    key = await lane.make_key("malformed", limits=KeyLimits(rpm=1))
    for _ in range(3):
        assert (await ask(lane, key, temperature="hot")).status_code == 400
    assert (await ask(lane, key)).status_code == 200
    assert [row["outcome"] for row in await rows_of(lane, "malformed")] == ["ok"]


async def test_over_the_requests_of_a_minute_is_429_and_waiting_as_told_helps(lane: Lane) -> None:
    key = await lane.make_key("rpm", limits=KeyLimits(rpm=40))
    answers = await asyncio.gather(*(ask(lane, key, max_tokens=1) for _ in range(60)))
    passed = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert 40 <= len(passed) <= 44
    assert len(passed) + len(refused) == 60
    last = refused[-1]
    assert last.json()["error"] == {
        "message": "this key may make 40 requests a minute",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert last.headers["x-ratelimit-limit-requests"] == "40"
    assert last.headers["x-ratelimit-remaining-requests"] == "0"
    assert last.headers["x-ratelimit-reset-requests"].endswith("s")
    assert 1 <= int(last.headers["retry-after"]) <= 3
    await asyncio.sleep(int(last.headers["retry-after"]))
    assert (await ask(lane, key, max_tokens=1)).status_code == 200


async def test_tokens_are_reserved_on_arrival_and_settled_at_the_end(lane: Lane) -> None:
    key = await lane.make_key("tpm", limits=KeyLimits(tpm=1000))
    slow = asyncio.create_task(ask(lane, key, max_tokens=100))
    await asyncio.sleep(0.1)
    refused = await ask(lane, key, max_tokens=950)
    assert refused.status_code == 429
    assert refused.headers["x-ratelimit-limit-tokens"] == "1000"
    answer = await slow
    used = answer.json()["usage"]["total_tokens"]
    after = await ask(lane, key, max_tokens=1)
    left = int(after.headers["x-ratelimit-remaining-tokens"])
    # A request of one token and its prompt; a second fills up 17.
    assert left == pytest.approx(1000 - used - 12, abs=40)


async def test_more_requests_at_a_time_than_allowed_are_429(lane: Lane) -> None:
    key = await lane.make_key("narrow", limits=KeyLimits(concurrency=2))
    answers = await asyncio.gather(*(ask(lane, key, max_tokens=40) for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429]
    assert (await ask(lane, key, max_tokens=1)).status_code == 200


async def test_a_budget_that_is_used_up_ends_until_the_next_month(lane: Lane) -> None:
    key = await lane.make_key("budget", limits=KeyLimits(budget=0.02))
    assert (await ask(lane, key, max_tokens=20)).status_code == 200
    refused = await ask(lane, key)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "insufficient_quota"
    assert 0 < int(refused.headers["retry-after"]) <= 31 * 86_400


async def test_a_priority_may_be_lowered_and_never_raised(lane: Lane) -> None:
    async with httpx.AsyncClient(base_url=lane.base_url, headers=lane.headers) as client:
        for value, status in (("5", 200), ("-5", 200), ("high", 400), ("1001", 400)):
            answer = await client.post("/v1/completions", json=BODY, headers={"x-priority": value})
            assert answer.status_code == status


async def test_the_keys_of_a_tenant_make_no_more_metrics_than_one_of_them(lane: Lane) -> None:
    first, *keys = [await lane.make_key(f"many-{number}", tenant="many") for number in range(3)]
    await ask(lane, first, max_tokens=1)
    async with httpx.AsyncClient() as client:
        before = len((await client.get(f"{lane.metrics_url}/metrics")).text.splitlines())
        for key in keys:
            await ask(lane, key, max_tokens=1)
        after = len((await client.get(f"{lane.metrics_url}/metrics")).text.splitlines())
    assert after == before


async def test_the_report_adds_up(lane: Lane, tmp_path: Path) -> None:  # noqa: ARG001  # its own folder is not needed
    key = await lane.make_key("report")
    for _ in range(3):
        await ask(lane, key)
    rows = await rows_of(lane, "report", 3)
    with Database(lane.keys) as database:
        (line,) = ledger.report(database, tenant="report")
    assert line["requests"] == 3
    assert line["cost"] == pytest.approx(sum(row["cost"] for row in rows), abs=1e-5)
    assert line["output_tokens"] == 30
