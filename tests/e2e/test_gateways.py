"""Several gateways behind one edge: any of them may die."""

import asyncio
import json
import os
import signal
from functools import partial
from typing import Any

import httpx
import openai
import pytest

from services.inference.sim_text import expected_text, tokenize
from tests.support.commands import command, tokenloom
from tests.support.mesh import Mesh
from tests.support.waiting import eventually, wait_until


@pytest.fixture(scope="module")
def mesh(doubled_mesh: Mesh) -> Mesh:
    """Two gateways."""
    return doubled_mesh


def kill(mesh: Mesh, name: str) -> None:
    os.kill(mesh.process(name)["pid"], signal.SIGKILL)


def serves(mesh: Mesh, name: str) -> bool:
    try:
        return mesh.metric(name, "tokenloom_gateway_open_requests") >= 0
    except OSError:
        return False


async def until_both_serve(mesh: Mesh) -> None:
    """Asks until both gateways were asked: the edge may have to look again before it takes one for healthy."""
    names = ("gateway-0", "gateway-1")
    before = {name: mesh.metric(name, "tokenloom_gateway_requests_total") for name in names}

    def asked(name: str) -> bool:
        return mesh.metric(name, "tokenloom_gateway_requests_total") > before[name] + 5

    async with mesh.async_sdk(max_retries=2) as client, asyncio.timeout(20):
        while not all(map(asked, names)):
            asks = (client.completions.create(model="sim", prompt="x", max_tokens=2) for _ in range(20))
            await asyncio.gather(*asks)


def opens(url: str, headers: dict[str, str]) -> bool:
    return httpx.get(url, headers=headers).status_code == 200


async def test_both_gateways_serve(mesh: Mesh) -> None:
    await until_both_serve(mesh)


def test_a_key_of_the_command_line_opens_every_gateway(mesh: Mesh) -> None:
    made = json.loads(tokenloom(mesh, "keys", "create", "--name", "ada", "--json").stdout)
    headers = {"authorization": f"Bearer {made['key']}"}
    for name in ("gateway-0", "gateway-1"):
        models = f"http://127.0.0.1:{mesh.process(name)['ports']['http']}/v1/models"
        wait_until(partial(opens, models, headers), within=5)
    listed = json.loads(tokenloom(mesh, "keys", "list", "--json").stdout)
    assert [key["name"] for key in listed] == ["admin", "ada"]


def test_keys_usage_and_audit_of_a_mesh_elsewhere_are_reached_through_its_edge(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENLOOM_API_KEY", mesh.key)

    def far(*arguments: str) -> Any:
        ran = command(*arguments, "--json", "--edge", mesh.edge)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    def near(*arguments: str) -> Any:
        return json.loads(tokenloom(mesh, *arguments, "--json").stdout)

    made = far(
        "keys", "create", "--name", "far", "--endpoints", "completions,models", "--rpm", "600", "--expires", "1h"
    )
    assert far("keys") == near("keys", "list")
    headers = {"authorization": f"Bearer {made['key']}"}
    wait_until(partial(opens, f"{mesh.edge}/v1/models", headers), within=5)
    body = {"model": "sim", "prompt": "x", "max_tokens": 3}
    assert httpx.post(f"{mesh.edge}/v1/completions", json=body, headers=headers).status_code == 200
    wait_until(lambda: bool(far("usage", "--tenant", "far")), within=5)
    (line,) = far("usage", "--tenant", "far", "--model", "sim")
    assert (line["requests"], [line]) == (1, near("usage", "--tenant", "far"))
    assert far("keys", "rotate", made["id"], "--grace", "1m")["id"] == made["id"]
    assert command("keys", "revoke", made["id"], "--edge", mesh.edge).stdout == f"{made['id']} is revoked\n"
    erased = command("usage", "--edge", mesh.edge, "erase", "--tenant", "far")
    assert erased.stdout == "1 row of 'far' is erased\n"
    trail = far("audit", "--limit", "4")
    assert trail == near("audit", "--limit", "4")
    (admin,) = [key["id"] for key in near("keys") if key["name"] == "admin"]
    assert [(entry["action"], entry["actor"]) for entry in reversed(trail)] == [
        ("keys.create", admin),
        ("keys.rotate", admin),
        ("keys.revoke", admin),
        ("usage.erase", admin),
    ]
    unknown = command("keys", "revoke", made["id"], "--edge", mesh.edge)
    assert (unknown.returncode, unknown.stderr) == (1, f"tokenloom: there is no key '{made['id']}'\n")


async def test_with_an_sdks_own_retries_no_request_fails_when_a_gateway_is_killed(mesh: Mesh) -> None:
    async with mesh.async_sdk(max_retries=2) as client:

        async def ask(number: int) -> str:
            await asyncio.sleep(number * 0.01)
            prompt = f"prompt {number}"
            answer = await client.completions.create(
                model="sim", prompt=prompt, max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
            )
            assert answer.choices[0].text == expected_text(tokenize(prompt), 20)
            return prompt

        asking = [asyncio.create_task(ask(number)) for number in range(200)]
        await asyncio.sleep(0.7)
        kill(mesh, "gateway-0")
        assert len(await asyncio.gather(*asking)) == 200
    await eventually(lambda: serves(mesh, "gateway-0"), within=15)


async def test_a_stream_of_a_killed_gateway_never_looks_finished(mesh: Mesh) -> None:
    ended: list[str] = []
    await eventually(lambda: serves(mesh, "gateway-0") and serves(mesh, "gateway-1"), within=15)
    await until_both_serve(mesh)

    async def read(client: openai.AsyncOpenAI) -> None:
        finish = None
        try:
            stream = await client.completions.create(
                model="sim", prompt="long", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
            )
            async for chunk in stream:
                finish = chunk.choices[0].finish_reason
        except (openai.APIError, openai.APIConnectionError, OSError) as error:
            ended.append(f"failed: {type(error).__name__}")
        except Exception as error:  # noqa: BLE001  # the SDK passes on what its HTTP library raises midway
            ended.append(f"failed: {type(error).__name__}")
        else:
            ended.append(f"finished: {finish}")

    async with mesh.async_sdk() as client:
        reading = [asyncio.create_task(read(client)) for _ in range(20)]
        await eventually(lambda: mesh.metric("gateway-1", "tokenloom_gateway_open_requests") > 0, within=10)
        kill(mesh, "gateway-1")
        await asyncio.gather(*reading)
    assert len(ended) == 20
    assert set(ended) - {"finished: length"}, "the killed gateway had no stream"
    assert all(how == "finished: length" or how.startswith("failed") for how in ended), ended
