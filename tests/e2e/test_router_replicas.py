"""Two routers: the second one knows the fleet, too, and steps in when the first is killed."""

import json
import os
import signal

import httpx
import pytest

from tests.support.mesh import Mesh
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def mesh(doubled_mesh: Mesh) -> Mesh:
    """Two routers."""
    return doubled_mesh


def granted(mesh: Mesh, router: str) -> float:
    try:
        return mesh.metric(router, "tokenloom_router_decisions_total")
    except OSError:
        return 0


def complete(mesh: Mesh, client: httpx.Client) -> str:
    body = {"model": "sim", "prompt": "hi", "max_tokens": 2}
    answer = client.post(f"{mesh.edge}/v1/completions", json=body, headers=mesh.headers)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-tokenloom-route"]


def generate(mesh: Mesh, client: httpx.Client) -> None:
    body = {"model": "sim", "text": "hi", "sampling": {"max_tokens": 2}}
    answer = client.post(f"{mesh.edge}/api/v1/generate", json=body, headers=mesh.headers)
    assert answer.status_code == 200, answer.text


def test_what_one_router_is_told_the_other_one_obeys(mesh: Mesh) -> None:
    policy = {"policy_json": json.dumps({"aliases": {"chat": "sim"}})}
    assert httpx.put(f"{mesh.edge}/api/v1/policy", json=policy, headers=mesh.headers).status_code == 200
    for router in ("router", "router-1"):
        wait_until(lambda router=router: mesh.metric(router, "tokenloom_router_policy_version") == 2, within=2)  # type: ignore[misc]


def test_the_second_router_steps_in_on_both_lanes_and_the_first_one_takes_over_again(mesh: Mesh) -> None:
    with httpx.Client(timeout=10) as client:

        def second_decides() -> bool:
            before = granted(mesh, "router-1")
            complete(mesh, client)
            generate(mesh, client)
            return granted(mesh, "router-1") > before

        # The first requests of all may find the first router still starting.
        wait_until(lambda: not second_decides(), within=10)
        before = granted(mesh, "router-1")
        pid = mesh.process("router")["pid"]
        os.kill(pid, signal.SIGKILL)
        for _ in range(30):
            complete(mesh, client)
            generate(mesh, client)
        wait_until(lambda: "away" not in complete(mesh, client), within=2)
        assert granted(mesh, "router-1") > before
        workers = client.get(f"{mesh.edge}/api/v1/workers", headers=mesh.headers)
        assert workers.status_code == 200
        assert len(workers.json()["workers"]) == 2
        wait_until(lambda: mesh.process("router")["pid"] != pid, within=20)

        def first_decides() -> bool:
            before = granted(mesh, "router")
            complete(mesh, client)
            return granted(mesh, "router") > before

        wait_until(first_decides, within=10)
        generate(mesh, client)
