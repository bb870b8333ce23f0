"""What `make up` starts, with one worker more: real vLLM behind real Envoy."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2_grpc

from tests.support.demo_model import with_other_weights
from tests.support.failover import Strike, said
from tests.support.mesh import Mesh
from tests.support.waiting import wait_until

MODEL = "demo"
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240)]
MESSAGES = [{"role": "user", "content": "Tell me a story."}]


def chat(mesh: Mesh, **fields: object) -> dict[str, object]:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "temperature": 0, **fields}
    answer = httpx.post(f"{mesh.edge}/v1/chat/completions", json=body, headers=mesh.headers, timeout=30)
    assert answer.status_code == 200, answer.text
    parsed: dict[str, object] = answer.json()
    return parsed


def test_the_openai_sdk_streams_a_chat_from_vllm(vllm_mesh: Mesh) -> None:
    stream = vllm_mesh.sdk().chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell me a story."}],
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    whole = chat(vllm_mesh, ignore_eos=True)
    assert whole["choices"][0]["message"]["content"] == text  # type: ignore[index]


def test_a_grpc_stub_and_the_rest_bridge_say_what_the_sdk_says(vllm_mesh: Mesh) -> None:
    expected = chat(vllm_mesh, ignore_eos=True)["choices"][0]["message"]["content"]  # type: ignore[index]
    sampling = pb.SamplingParameters(max_tokens=24, temperature=0, ignore_eos=True)
    prompt = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="Tell me a story.")])
    with grpc.insecure_channel(vllm_mesh.edge_target) as channel:
        events = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            pb.GenerateRequest(model=MODEL, chat=prompt, sampling=sampling), metadata=vllm_mesh.metadata, timeout=30
        )
        assert "".join(event.delta.text for event in events) == expected
    body = {"model": MODEL, "chat": {"messages": MESSAGES}, "sampling": {"max_tokens": 24, "temperature": 0}}
    body["sampling"]["ignore_eos"] = True  # type: ignore[index]
    url = f"{vllm_mesh.edge}/api/v1/generate"
    with httpx.stream("POST", url, json=body, headers=vllm_mesh.headers, timeout=30) as response:
        streamed = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]
    assert "".join(event.get("delta", {}).get("text", "") for event in streamed) == expected


def test_stop_strings_log_probabilities_and_usage_are_vllms(vllm_mesh: Mesh) -> None:
    whole = chat(vllm_mesh, logprobs=True, top_logprobs=2, ignore_eos=True)
    content = whole["choices"][0]["logprobs"]["content"]  # type: ignore[index]
    assert len(content) == 24
    assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 for entry in content)
    text = whole["choices"][0]["message"]["content"]  # type: ignore[index]
    middle = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = chat(vllm_mesh, stop=middle, ignore_eos=True)["choices"][0]  # type: ignore[index]
    assert stopped["finish_reason"] == "stop"
    assert stopped["message"]["content"] == text[: text.index(middle)]


def test_a_prompt_that_is_too_long_is_refused_before_the_engine(vllm_mesh: Mesh) -> None:
    body = {"model": MODEL, "prompt": "word " * 20_000, "max_tokens": 4}
    answer = httpx.post(f"{vllm_mesh.edge}/v1/completions", json=body, headers=vllm_mesh.headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_the_launcher_prints_a_curl_that_works(vllm_mesh: Mesh) -> None:
    printed = (vllm_mesh.state_dir.parent / f"{vllm_mesh.state_dir.name}.log").read_text()
    command = printed[printed.index("curl ") :].partition("\n\n")[0]
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=True)
    assert ran.stdout.startswith("data: ")
    # Nobody is to take the demo model for what the mesh can do.
    assert "answers are gibberish" in printed
    assert "tokenloom up --model MODEL" in printed
    assert ran.stdout.endswith("data: [DONE]\n\n")


async def test_streams_survive_the_loss_of_a_worker_which_takes_its_engine_along_and_both_come_back(
    vllm_mesh: Mesh,
) -> None:
    prompts = [f"{index} mice lived in a small house" for index in range(32)]
    # Some are held to a form, and of some each token is drawn, from one.
    drawn: dict[str, Any] = {"temperature": 1.5, "top_k": 1}
    seeded = {"temperature": 1.0, "seed": 7}
    more: list[dict[str, Any]] = [{}, {"structured_outputs": {"regex": "[a-z ]{2000}"}}, drawn, seeded]
    undisturbed = await said(vllm_mesh, MODEL, prompts, tokens=200, more=more)
    assert {tokens for _, tokens in undisturbed.values()} == {200}
    pids = [int(vllm_mesh.process(name)["pid"]) for name in ("worker-0", "worker-1")]
    engines = {pid: psutil.Process(pid).children(recursive=True) for pid in pids}
    strike = Strike(vllm_mesh, 1)
    assert await said(vllm_mesh, MODEL, prompts, tokens=200, more=more, strike=strike) == undisturbed
    (killed,) = strike.pids.values()
    assert engines[killed]
    assert psutil.wait_procs(engines[killed], timeout=2)[1] == []
    strike.wait_until_replaced(within=90)
    assert await said(vllm_mesh, MODEL, prompts, tokens=200, more=more) == undisturbed


def test_vllms_own_metrics_stand_beside_the_workers_on_one_port(vllm_mesh: Mesh) -> None:
    def total(name: str) -> float:
        return sum(vllm_mesh.metric(worker, name) for worker in ("worker-0", "worker-1"))

    before = total("vllm:generation_tokens_total")
    vllm_mesh.sdk().completions.create(model="demo", prompt="Hi", max_tokens=7, extra_body={"ignore_eos": True})
    wait_until(lambda: total("vllm:generation_tokens_total") == before + 7, within=5)
    assert total("tokenloom_inference_tokens_total") > 0
    assert total("tokenloom_inference_engine_starts_total") == 2


def test_an_engine_process_that_is_stopped_is_reported_within_3_s_and_serves_again_when_it_goes_on(
    vllm_mesh: Mesh,
) -> None:
    worker = psutil.Process(vllm_mesh.process("worker-0")["pid"])
    (core,) = [child for child in worker.children(recursive=True) if "EngineCore" in child.name()]

    def load() -> dict[str, Any]:
        answer = httpx.get(f"{vllm_mesh.edge}/api/v1/workers", headers=vllm_mesh.headers, timeout=10).json()
        workers = {entry["registration"]["worker_id"]: entry["load"] for entry in answer["workers"]}
        found: dict[str, Any] = workers["worker-0"]
        return found

    core.suspend()
    try:
        wait_until(lambda: load()["state"] == "WORKER_STATE_UNAVAILABLE", within=3)
        assert load()["state_reason"] == "the engine's process is stopped"
    finally:
        core.resume()
    wait_until(lambda: load()["state"] == "WORKER_STATE_READY", within=3)
    answer = vllm_mesh.sdk().completions.create(model="demo", prompt="Hi", max_tokens=2)
    assert answer.choices[0].finish_reason == "length"


def test_rollouts_are_drawn_from_each_weights_in_turn_on_every_worker(vllm_mesh: Mesh, tmp_path: Path) -> None:
    own, prompts = vllm_mesh.state_dir / "models" / "demo", tmp_path / "prompts.txt"
    other = with_other_weights(own, tmp_path / "other")
    prompts.write_text("\n".join(f"{index} mice lived in a small house" for index in range(8)))
    command = [sys.executable, "examples/rollout.py", "--edge", vllm_mesh.edge, "--model", MODEL, "--samples", "2"]
    command += ["--max-tokens", "16", "--prompts", str(prompts), "--weights", str(other), "--weights", str(own)]
    environment = {**os.environ, "TOKENLOOM_API_KEY": vllm_mesh.key}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[0] for line in ran.stderr.splitlines()] == ["worker-0", "worker-1"] * 2
    samples = [json.loads(line) for line in ran.stdout.splitlines()]
    steps = [[sample for sample in samples if sample["step"] == step] for step in range(3)]
    assert [len(step) for step in steps] == [16, 16, 16]
    assert all(len(sample["logprobs"]) == len(sample["token_ids"]) > 0 for sample in samples)
    assert all(logprob <= 0 for sample in samples for logprob in sample["logprobs"])
    drawn = [[sample["token_ids"] for sample in step] for step in steps]
    assert drawn[0] == drawn[2]
    assert all(before != after for before, after in zip(drawn[0], drawn[1], strict=True))
