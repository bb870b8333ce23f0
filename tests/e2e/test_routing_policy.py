"""The routing policy over a whole mesh: names, canaries, pools, smaller models, degradation, changed while it runs."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tokenloom.inference.v1 import generation_pb2, inference_pb2, inference_pb2_grpc

from tests.support.commands import tokenloom
from tests.support.mesh import Mesh, running_mesh
from tests.support.waiting import eventually, wait_until

pytestmark = [pytest.mark.beside_others, pytest.mark.timeout(180)]

SIM = "{decode_step_ms: 5, max_num_seqs: 16, max_model_len: 4096}"
MESH = f"""
models: [{{name: base}}, {{name: next}}, {{name: tiny}}]
pools:
  - name: large
    serves: [base, next]
    workers:
      - {{name: base-large, engine: sim, model: base, sim: {SIM}}}
      - {{name: next-large, engine: sim, model: next, sim: {{decode_step_ms: 5, max_num_seqs: 1}}}}
  - name: small
    serves: [base, tiny]
    workers:
      - {{name: base-small, engine: sim, model: base, sim: {SIM}}}
      - {{name: tiny-small, engine: sim, model: tiny, sim: {SIM}}}
"""
POLICY: dict[str, Any] = {
    "aliases": {
        "fast": "tiny",
        "chat": {"models": [{"model": "base", "weight": 3}, {"model": "next", "weight": 1}]},
    },
    "rules": [
        {
            "name": "short",
            "when": {"models": ["base"], "max_prompt_tokens": 64, "max_output_tokens": 20},
            "pools": ["small"],
            "backup_pools": ["large"],
        },
        {"name": "long", "when": {"models": ["base"], "min_prompt_tokens": 256}, "pools": ["large"]},
    ],
    "degrade": {"next": "tiny"},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("policy") / "mesh.yaml"
    write(file, POLICY)
    return file


@pytest.fixture(scope="module")
def mesh(config: Path) -> Iterator[Mesh]:
    with running_mesh(config.parent / "state", "--config", str(config)) as running:
        yield running


def write(file: Path, policy: dict[str, Any]) -> None:
    file.write_text(MESH + f"routing: {json.dumps(policy)}\n")


def apply(mesh: Mesh, policy: dict[str, Any]) -> None:
    answer = httpx.put(f"{mesh.edge}/api/v1/policy", json={"policy_json": json.dumps(policy)}, headers=mesh.headers)
    assert answer.status_code == 200, answer.text


def complete(mesh: Mesh, model: str, *, key: str = "", **body: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key or mesh.key}", **body.pop("headers", {})}
    return httpx.post(
        f"{mesh.edge}/v1/completions",
        json={"model": model, "prompt": "hi", "max_tokens": 2, **body},
        headers=headers,
        timeout=15,
    )


def worker_of(mesh: Mesh, model: str, **body: Any) -> str:
    answer = complete(mesh, model, **body)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-tokenloom-worker"]


def key(mesh: Mesh, *options: str) -> str:
    made = tokenloom(mesh, "keys", "create", "--json", "--name", f"k{time.monotonic_ns()}", *options)
    assert made.returncode == 0, made.stderr
    found = str(json.loads(made.stdout)["key"])
    # A key works within a second.
    wait_until(lambda: complete(mesh, "base", key=found).status_code != 401, within=3)
    return found


def test_an_alias_is_listed_and_the_answer_says_which_model_it_was(mesh: Mesh) -> None:
    assert {model.id for model in mesh.sdk().models.list()} == {"base", "next", "tiny", "fast", "chat"}
    with grpc.insecure_channel(mesh.edge_target) as channel:
        typed = inference_pb2_grpc.InferenceServiceStub(channel).ListModels(
            inference_pb2.ListModelsRequest(), metadata=mesh.metadata, timeout=10
        )
    assert [model.name for model in typed.models] == ["base", "chat", "fast", "next", "tiny"]
    assert typed.models[2].max_context_token_count == typed.models[4].max_context_token_count == 4096
    listed = httpx.get(f"{mesh.edge}/api/v1/models", headers=mesh.headers).json()["models"]
    assert [model["name"] for model in listed] == ["base", "chat", "fast", "next", "tiny"]
    answer = complete(mesh, "fast")
    assert answer.json()["model"] == "tiny"
    assert "x-tokenloom-degraded" not in answer.headers
    stream = mesh.sdk().completions.create(model="fast", prompt="hi", max_tokens=2, stream=True)
    assert {chunk.model for chunk in stream} == {"tiny"}


def test_a_canary_gets_its_share_and_a_session_stays_with_its_version(mesh: Mesh) -> None:
    client = mesh.sdk()
    models = Counter(client.completions.create(model="chat", prompt="hi", max_tokens=1).model for _ in range(160))
    # 40 of 160 are expected; further from it than this is one run in a hundred thousand.
    assert 17 <= models["next"] <= 65
    assert models["next"] + models["base"] == 160
    for session in map(str, range(5)):
        headers = {"x-session-id": session}
        kept = {
            client.completions.create(model="chat", prompt="hi", max_tokens=1, extra_headers=headers).model
            for _ in range(6)
        }
        assert len(kept) == 1


def test_rules_send_short_prompts_to_the_small_pool_and_long_ones_to_the_large(mesh: Mesh) -> None:
    assert {worker_of(mesh, "base") for _ in range(10)} == {"base-small"}
    assert {worker_of(mesh, "base", prompt="word " * 300) for _ in range(10)} == {"base-large"}


def test_a_backup_pool_steps_in_while_its_pool_is_out_of_service(mesh: Mesh) -> None:
    drained = tokenloom(mesh, "workers", "drain", "base-small")
    assert drained.returncode == 0, drained.stderr
    try:
        assert {worker_of(mesh, "base") for _ in range(5)} == {"base-large"}
        listed = tokenloom(mesh, "workers", "list")
        (line,) = [line for line in listed.stdout.splitlines() if line.startswith("base-small")]
        assert "drained" in line
    finally:
        assert tokenloom(mesh, "workers", "undrain", "base-small").returncode == 0
    wait_until(lambda: worker_of(mesh, "base") == "base-small", within=5)


def test_a_cordoned_worker_gets_nothing_and_an_unknown_one_is_named(mesh: Mesh) -> None:
    assert tokenloom(mesh, "workers", "cordon", "base-small").returncode == 0
    assert worker_of(mesh, "base") == "base-large"
    assert tokenloom(mesh, "workers", "undrain", "base-small").returncode == 0
    unknown = tokenloom(mesh, "workers", "drain", "nobody")
    assert (unknown.returncode, unknown.stderr) == (1, "tokenloom: no worker of this name is registered\n")


async def test_a_smaller_model_answers_for_a_full_one_where_the_key_allows_it_and_says_so(mesh: Mesh) -> None:
    allowed = key(mesh, "--allow-degrade")
    body = {"model": "next", "prompt": "x", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    url = f"{mesh.edge}/v1/completions"

    async def hold(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", url, json=body, headers=mesh.headers) as running:
            async for _ in running.aiter_lines():
                pass

    async with httpx.AsyncClient(timeout=30) as client:
        # It has one slot, and one more request may wait in its engine.
        held = [asyncio.create_task(hold(client)) for _ in range(2)]
        try:
            await eventually(lambda: leases(mesh)["next-large"] == 2, within=5)
            request = {**body, "stream": False, "max_tokens": 2}
            answer = await client.post(url, json=request, headers={"authorization": f"Bearer {allowed}"})
            assert answer.status_code == 200
            assert (answer.json()["model"], answer.headers["x-tokenloom-degraded"]) == ("tiny", "tiny")
            typed = {"model": "next", "text": "x", "sampling": {"max_tokens": 2}}
            own = {"authorization": f"Bearer {allowed}"}
            told = await client.post(f"{mesh.edge}/api/v1/generate", json=typed, headers=own)
            assert (told.status_code, told.headers["x-tokenloom-degraded"]) == (200, "tiny")
            with pytest.raises(httpx.ReadTimeout):
                await client.post(url, json=request, headers=mesh.headers, timeout=0.5)
        finally:
            for task in held:
                task.cancel()
            await asyncio.wait(held)
    explained = tokenloom(mesh, "explain", answer.headers["x-request-id"])
    assert explained.returncode == 0, explained.stderr
    assert "chosen: tiny-small" in explained.stdout
    assert "degraded: a smaller model than was asked for" in explained.stdout
    assert "next-large: out of the question: full" in explained.stdout


def test_the_typed_lane_knows_the_same_names_and_limits(mesh: Mesh) -> None:
    body = {"model": "fast", "text": "hi", "sampling": {"max_tokens": 8, "ignore_eos": True}}

    def generate(path: str = "/api/v1/generate", **more: Any) -> httpx.Response:
        return httpx.post(f"{mesh.edge}{path}", json={**body, **more}, headers=mesh.headers, timeout=10)

    events = [json.loads(line.removeprefix("data: ")) for line in generate().text.splitlines() if line]
    assert events[0]["started"]["model"] == "tiny"
    assert events[-1]["completed"]["usage"]["output_token_count"] == 8
    assert generate("/api/v1/tokenize").status_code == 200
    assert generate(model="nothing").status_code == 404
    unknown = httpx.post(
        f"{mesh.edge}/api/v1/generate", json=body, headers={**mesh.headers, "x-slo-class": "asap"}, timeout=10
    )
    assert unknown.status_code == 400
    assert unknown.json()["error"]["message"] == "there is no SLO class 'asap'"
    hurried = httpx.post(
        f"{mesh.edge}/api/v1/generate", json=body, headers={**mesh.headers, "x-priority": "first"}, timeout=10
    )
    assert hurried.status_code == 400
    assert hurried.json()["error"]["message"] == "x-priority: expected a whole number from -1000 to 1000"
    with grpc.insecure_channel(mesh.edge_target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = generation_pb2.GenerateRequest(model="fast", text="hi")
        request.sampling.max_tokens = 3
        call = stub.Generate(request, metadata=(*mesh.metadata, ("x-priority", "5")), timeout=10)
        assert next(call).started.model == "tiny"
        told = {key: value for key, value in call.initial_metadata()}  # noqa: C416  # entries that dict() does not take
    assert told["x-tokenloom-worker"] == "tiny-small"
    assert "first token" in told["x-tokenloom-route"]
    assert generate().headers["x-tokenloom-worker"] == "tiny-small"
    plain = {"authorization": f"Bearer {key(mesh)}"}
    answer = httpx.post(f"{mesh.edge}/api/v1/generate", json=body, headers=plain, timeout=10)
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("x-tokenloom-")]


def leases(mesh: Mesh) -> dict[str, int]:
    answer = httpx.get(f"{mesh.edge}/api/v1/workers", headers=mesh.headers).json()
    return {entry["registration"]["worker_id"]: entry.get("lease_count", 0) for entry in answer["workers"]}


def test_a_decision_is_explained_in_plain_words_and_an_unknown_request_is_not(mesh: Mesh) -> None:
    request_id = complete(mesh, "base").headers["x-request-id"]
    told = tokenloom(mesh, "explain", request_id)
    assert told.returncode == 0, told.stderr
    assert "chosen: base-small" in told.stdout
    assert "rule of the policy: short" in told.stdout
    assert "base-large: out of the question: outside the pool" in told.stdout
    assert "first token in" in told.stdout
    unknown = tokenloom(mesh, "explain", "nonsense")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "no decision of this request is known" in unknown.stderr


def test_operating_needs_an_admin_key(mesh: Mesh) -> None:
    plain = {"authorization": f"Bearer {key(mesh)}"}
    for method, path, body in (
        ("GET", "/api/v1/workers", None),
        ("GET", "/api/v1/policy", None),
        ("PUT", "/api/v1/policy", {"policy_json": "{}"}),
        ("POST", "/api/v1/workers/base-small:cordon", {}),
        ("GET", "/api/v1/decisions/x", None),
    ):
        answer = httpx.request(method, f"{mesh.edge}{path}", json=body, headers=plain)
        assert answer.status_code == 403, path
        assert answer.json()["error"]["code"] == "permission_denied"


def test_a_policy_is_changed_while_the_mesh_runs_and_a_wrong_one_is_refused_by_its_key(
    mesh: Mesh, config: Path, tmp_path: Path
) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("aliases: {quick: tiny}\n")
    applied = tokenloom(mesh, "policy", "apply", str(file))
    assert applied.returncode == 0, applied.stderr
    assert complete(mesh, "quick").json()["model"] == "tiny"
    assert complete(mesh, "fast").status_code == 404
    file.write_text("aliases: {quick: huge}\n")
    refused = tokenloom(mesh, "policy", "apply", str(file))
    assert refused.returncode == 1
    assert "routing.aliases.quick: there is no model 'huge'" in refused.stderr
    assert json.loads(tokenloom(mesh, "policy", "show").stdout) == {"aliases": {"quick": "tiny"}}
    write(config, {"aliases": {"fast": "nope"}})
    wait_until(lambda: "routing.aliases.fast" in (config.parent / "state.log").read_text(), within=5)
    assert complete(mesh, "quick").status_code == 200
    write(config, {**POLICY, "aliases": {**POLICY["aliases"], "faster": "tiny"}})
    wait_until(lambda: complete(mesh, "faster").status_code == 200, within=5)
    wait_until(lambda: "faster" in {model.id for model in mesh.sdk().models.list()}, within=5)
    apply(mesh, POLICY)


def test_with_workers_missing_outputs_are_short_and_then_only_important_requests_are_taken(mesh: Mesh) -> None:
    important = key(mesh, "--priority", "-5")
    assert complete(mesh, "base", max_tokens=30, prompt="word " * 100).json()["usage"]["completion_tokens"] == 30
    bounds = {"output_token_limit": 5, "worsen_after_seconds": 0, "recover_after_seconds": 0}
    stopped = int(mesh.process("tiny-small")["pid"])
    os.kill(stopped, signal.SIGSTOP)
    try:
        apply(mesh, {**POLICY, "degradation": {**bounds, "short_outputs_below": 0.9}})
        wait_until(lambda: mesh.metric("router", "tokenloom_router_degradation_level") == 1, within=10)
        answer = complete(mesh, "base", max_tokens=30, prompt="word " * 100).json()
        assert answer["usage"]["completion_tokens"] == 5
        assert answer["choices"][0]["finish_reason"] == "length"
        generate = {"model": "base", "text": "word " * 100, "sampling": {"max_tokens": 30, "ignore_eos": True}}
        typed = httpx.post(f"{mesh.edge}/api/v1/generate", json=generate, headers=mesh.headers, timeout=10)
        (last,) = [line for line in typed.text.splitlines() if "completed" in line]
        assert json.loads(last.removeprefix("data: "))["completed"]["usage"]["output_token_count"] == 5
        apply(mesh, {**POLICY, "degradation": {**bounds, "short_outputs_below": 0.9, "refusing_below": 0.8}})
        wait_until(lambda: mesh.metric("router", "tokenloom_router_degradation_level") == 2, within=5)
        refused = complete(mesh, "base")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert complete(mesh, "base", key=important).status_code == 200
    finally:
        os.kill(stopped, signal.SIGCONT)
    wait_until(lambda: mesh.metric("router", "tokenloom_router_degradation_level") == 0, within=10)
    assert complete(mesh, "base").status_code == 200
    apply(mesh, POLICY)


@pytest.mark.parametrize("text", ["hi", "abcdefghijklmnop " * 1000], ids=["short", "in several frames"])
def test_the_typed_lane_has_the_aliases_too(mesh: Mesh, text: str) -> None:
    apply(mesh, {"aliases": {"quick": "tiny"}})
    sampling = generation_pb2.SamplingParameters(max_tokens=2, ignore_eos=True)
    request = generation_pb2.GenerateRequest(model="quick", text=text, sampling=sampling)
    with grpc.insecure_channel(mesh.edge_target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        events = list(stub.Generate(request, metadata=mesh.metadata, timeout=15))
    assert events[0].started.model == "tiny"
    assert events[-1].WhichOneof("event") == "completed"
    body = {"model": "quick", "text": text[:100], "sampling": {"max_tokens": 2}}
    answer = httpx.post(f"{mesh.edge}/api/v1/generate", json=body, headers=mesh.headers, timeout=15)
    assert answer.status_code == 200
    assert '"model":"tiny"' in answer.text
