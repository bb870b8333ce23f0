"""Clients that abuse what is not forbidden, over the whole mesh: hammering, and ids that belong to somebody else."""

import json
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse

import httpx
import pytest

from services.common.database import Database
from services.common.tables import USAGE
from services.inference.sim_text import expected_text, tokenize
from tests.support.bad_inputs import assert_harmless
from tests.support.commands import tokenloom
from tests.support.mesh import Mesh
from tests.support.waiting import wait_until

_SECONDS = 2.0
_FEWEST_A_SECOND = 100


def _key(mesh: Mesh, name: str, *options: str) -> str:
    created = tokenloom(mesh, "keys", "create", "--name", name, "--json", *options)
    key = str(json.loads(created.stdout)["key"])
    headers = {"authorization": f"Bearer {key}"}
    wait_until(lambda: httpx.get(f"{mesh.edge}/v1/models", headers=headers).status_code == 200, within=2)
    return key


@pytest.mark.parametrize("id_header", ["x-request-id", "idempotency-key"])
def test_ids_that_tenants_share_by_chance_or_not_mix_nothing(sim_mesh: Mesh, id_header: str) -> None:
    # 101
    names = [f"{id_header}-{side}" for side in ("left", "right")]
    keys = {name: _key(sim_mesh, name) for name in names}

    def ask(name: str) -> httpx.Response:
        body = {"model": "sim", "prompt": f"I am {name}", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
        headers = {"authorization": f"Bearer {keys[name]}", id_header: "the-same"}
        return httpx.post(f"{sim_mesh.edge}/v1/completions", json=body, headers=headers, timeout=10)

    with ThreadPoolExecutor(8) as pool:
        answers = list(zip(names * 4, pool.map(ask, names * 4), strict=True))
    for name, answer in answers:
        assert answer.json()["choices"][0]["text"] == expected_text(tokenize(f"I am {name}"), 30)
    ids = [answer.headers["x-request-id"] for _, answer in answers]
    assert len(set(ids)) == len(ids)
    assert "the-same" not in ids

    def ledger() -> dict[str, set[str]]:
        with Database(sim_mesh.state_dir / "keys.db") as database, database.reading() as connection:
            found = connection.execute(USAGE.select().where(USAGE.c.tenant.in_(names))).mappings()
            rows = [(str(row["tenant"]), str(row["request_id"])) for row in found]
        return {name: {request_id for tenant, request_id in rows if tenant == name} for name in names}

    told = {name: {answer.headers["x-request-id"] for asked, answer in answers if asked == name} for name in names}
    wait_until(lambda: ledger() == told, within=5)


def _hammer(mesh: Mesh, key: str, until: float) -> Counter[int]:
    """The statuses of requests that follow each other as fast as they are answered."""
    host, _, port = mesh.edge_target.rpartition(":")
    body = b'{"model": "sim", "prompt": "hi", "max_tokens": 1}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: edge\r\nauthorization: Bearer {key}\r\n"
    request = f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
    statuses: Counter[int] = Counter()
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        while time.monotonic() < until:
            connection.sendall(request)
            with HTTPResponse(connection) as response:
                response.begin()
                assert response.headers["retry-after"] or response.status == 200
                response.read()
                statuses[response.status] += 1
    return statuses


def test_who_ignores_that_it_has_had_enough_is_refused_cheaply_and_harms_nobody(sim_mesh: Mesh) -> None:
    # 103: bench/hostile.py measures how many a core refuses, and what an admitted client notices.
    key = _key(sim_mesh, "hammer", "--rpm", "3")
    with assert_harmless(sim_mesh) as asked, ThreadPoolExecutor(4) as pool:
        until = time.monotonic() + _SECONDS
        statuses = sum(pool.map(lambda _: _hammer(sim_mesh, key, until), range(4)), Counter())
        asked.accepted = statuses[200]
    assert statuses[200] <= 4
    assert statuses.keys() <= {200, 429}
    assert statuses[429] > _FEWEST_A_SECOND * _SECONDS
