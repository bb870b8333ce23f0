"""The operators' HTTP API over a real gateway: keys, usage, and who changed what."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from services.common import audit
from services.common.database import Database
from services.common.keystore import KeyStore
from services.common.settings_worker import SimSettings
from tests.support.openai_lane import Lane, openai_lane

pytestmark = pytest.mark.asyncio(loop_scope="module")
FAST = SimSettings(prefill_tokens_per_second=1e6, decode_step_ms=1)
ASK = {"model": "sim", "prompt": "x", "max_tokens": 2}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lane(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lane]:
    async with openai_lane(tmp_path_factory.mktemp("admin"), FAST) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def admin(lane: Lane) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=lane.base_url, headers=lane.headers, timeout=10) as opened:
        yield opened


async def asked_with(lane: Lane, key: str, until: int) -> httpx.Response:
    """Asks with a key until the answer has this status, for a second as promised and some for a busy machine."""
    async with httpx.AsyncClient(base_url=lane.base_url, headers={"authorization": f"Bearer {key}"}) as client:
        async with asyncio.timeout(5):
            while (answer := await client.post("/v1/completions", json=ASK)).status_code != until:
                await asyncio.sleep(0.05)
        return answer


async def test_a_key_is_made_used_rotated_and_revoked(lane: Lane, admin: httpx.AsyncClient) -> None:
    made = (await admin.post("/v1/admin/keys", json={"name": "app", "tenant": "acme", "rpm": 600})).json()
    answer = await asked_with(lane, made["key"], 200)
    assert answer.headers["x-ratelimit-limit-requests"] == "600"
    listed = {key["id"]: key for key in (await admin.get("/v1/admin/keys")).json()["data"]}
    assert listed[made["id"]]["tenant"] == "acme"
    assert made["key"] not in str(listed)
    rotated = (await admin.post(f"/v1/admin/keys/{made['id']}/rotate", json={})).json()
    await asked_with(lane, rotated["key"], 200)
    await asked_with(lane, made["key"], 401)
    assert (await admin.delete(f"/v1/admin/keys/{made['id']}")).json() == {"id": made["id"], "revoked": True}
    await asked_with(lane, rotated["key"], 401)
    assert (await admin.delete(f"/v1/admin/keys/{made['id']}")).status_code == 404
    trail = (await admin.get("/v1/admin/audit?limit=3")).json()["data"]
    assert [entry["action"] for entry in trail] == ["keys.revoke", "keys.rotate", "keys.create"]
    with KeyStore(lane.keys) as store:
        own = next(record.id for record in store.list() if record.admin)
    assert {entry["actor"] for entry in trail} == {own}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a", "rpm": 0}, "rpm"),
        ({"name": "a", "endpoints": ["x"]}, "endpoints[0]"),
        ({"name": "a", "more": 1}, "more"),
        ({"name": "a", "budget": -1}, "budget"),
    ],
)
async def test_a_bad_field_is_refused_by_name(admin: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    answer = await admin.post("/v1/admin/keys", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/admin/keys"),
        ("GET", "/v1/admin/keys"),
        ("DELETE", "/v1/admin/keys/x"),
        ("POST", "/v1/admin/keys/x/rotate"),
        ("GET", "/v1/admin/usage"),
        ("DELETE", "/v1/admin/usage"),
        ("GET", "/v1/admin/audit"),
    ],
)
async def test_others_may_do_nothing_of_this(lane: Lane, method: str, path: str) -> None:
    headers = {"authorization": f"Bearer {lane.new_key('plain')}"}
    async with httpx.AsyncClient(base_url=lane.base_url, headers=headers) as plain, asyncio.timeout(5):
        while (answer := await plain.request(method, path, json={"name": "a"})).status_code == 401:
            await asyncio.sleep(0.05)
    assert answer.status_code == 403


async def test_usage_is_told_and_erased(lane: Lane, admin: httpx.AsyncClient) -> None:
    await asked_with(lane, lane.new_key("spender"), 200)

    async def lines() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await admin.get("/v1/admin/usage?tenant=spender")).json()["data"]
        return found

    async with asyncio.timeout(5):
        while not await lines():
            await asyncio.sleep(0.05)
    assert (await lines())[0]["requests"] == 1
    assert (await admin.delete("/v1/admin/usage")).status_code == 400
    assert (await admin.delete("/v1/admin/usage?tenant=spender")).json() == {"tenant": "spender", "erased": 1}
    assert await lines() == []


async def test_what_operators_change_through_the_edge_is_written_down(lane: Lane) -> None:
    headers = {**lane.headers, "x-tokenloom-right": "admin", "x-tokenloom-form": "grpc"}
    service = "/authz/tokenloom.router.v1.RouterAdminService"
    async with httpx.AsyncClient(base_url=lane.base_url, headers=headers) as edge:
        assert (await edge.post(f"{service}/ListWorkers")).status_code == 200
        assert (await edge.post(f"{service}/DrainWorker")).status_code == 200
        rest = {"x-tokenloom-form": "rest"}
        assert (await edge.get("/authz/api/v1/workers", headers=rest)).status_code == 200
        assert (await edge.put("/authz/api/v1/policy", headers=rest)).status_code == 200
    with Database(str(Path(lane.keys))) as database:
        calls = [entry["target"] for entry in audit.read(database) if entry["action"] == "call"]
    assert calls == ["api/v1/policy", "tokenloom.router.v1.RouterAdminService/DrainWorker"]
