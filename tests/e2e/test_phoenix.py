"""A tracing backend that others wrote has whole traces of both lanes and of a failover, read back through its own API.

It is installed by scripts/phoenix-venv; `make test-phoenix` does both.
"""

import os
import secrets
import signal
from collections.abc import Iterator
from typing import Final

import grpc
import httpx
import pytest
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2_grpc

from tests.support.mesh import Mesh, running_mesh
from tests.support.phoenix import Phoenix, needs_phoenix, running_phoenix
from tests.support.waiting import wait_until

pytestmark = [needs_phoenix, pytest.mark.timeout(300)]

PHASES: Final = {("generate", phase) for phase in ("queue", "prefill", "decode")}


@pytest.fixture(scope="module")
def phoenix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Phoenix]:
    with running_phoenix(tmp_path_factory.mktemp("phoenix")) as server:
        yield server


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, phoenix: Phoenix) -> Iterator[Mesh]:
    """Two simulated workers, which send their spans there."""
    engines = ("--engine", "sim", "--workers", "2", "--sim", "decode_step_ms=20")
    folder = tmp_path_factory.mktemp("mesh")
    with running_mesh(folder / "state", *engines, "--otlp-endpoint", phoenix.endpoint) as running:
        yield running


def new_trace() -> tuple[str, str]:
    """A trace id and the `traceparent` of a client that began it."""
    trace_id = secrets.token_hex(16)
    return trace_id, f"00-{trace_id}-{secrets.token_hex(8)}-01"


def assert_edges(phoenix: Phoenix, trace_id: str, expected: set[tuple[str, str]]) -> None:
    try:
        wait_until(lambda: expected <= phoenix.edges(trace_id), within=20)
    except TimeoutError:
        found = phoenix.edges(trace_id)
        pytest.fail(f"missing edges: {sorted(expected - found)}\nfound: {sorted(found)}")


def test_the_openai_lane_is_one_whole_trace(phoenix: Phoenix, mesh: Mesh) -> None:
    trace_id, traceparent = new_trace()
    body = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0.5}
    headers = {**mesh.headers, "traceparent": traceparent}
    assert httpx.post(f"{mesh.edge}/v1/chat/completions", json=body, headers=headers).status_code == 200
    edges = {
        ("ingress", "chat sim"),
        ("chat sim", "router.acquire"),
        ("router.acquire", "schedule"),
        ("chat sim", "worker.generate"),
        ("worker.generate", "generate"),
        *PHASES,
    }
    assert_edges(phoenix, trace_id, edges)
    spans = {span.name: span for span in phoenix.trace(trace_id)}
    assert len(spans) == len(phoenix.trace(trace_id)) == 1 + len(edges)
    whole = spans["chat sim"]
    assert whole.events == ("first token",)
    assert whole.attributes["gen_ai.operation.name"] == "chat"
    assert whole.attributes["gen_ai.request.temperature"] == 0.5
    assert whole.attributes["gen_ai.usage.output_tokens"] == 4
    assert spans["schedule"].attributes["tokenloom.worker"] == spans["generate"].attributes["tokenloom.worker"]


def test_the_typed_lane_is_one_whole_trace(phoenix: Phoenix, mesh: Mesh) -> None:
    trace_id, traceparent = new_trace()
    request = pb.GenerateRequest(model="sim", text="hi", sampling=pb.SamplingParameters(max_tokens=4))
    with grpc.insecure_channel(mesh.edge_target) as channel:
        metadata = (*mesh.metadata, ("traceparent", traceparent))
        list(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, metadata=metadata, timeout=30))
    assert_edges(phoenix, trace_id, {("ingress", "generate"), *PHASES})
    # Envoy's own span of the call to the picker stands between, whatever its name is.
    wait_until(lambda: any(child == "pick" for _, child in phoenix.edges(trace_id)), within=10)
    ids = {span.span_id for span in phoenix.trace(trace_id)}
    assert [span.name for span in phoenix.trace(trace_id) if span.parent_id not in ids] == ["ingress"]


def test_a_request_whose_worker_is_killed_is_one_whole_trace(phoenix: Phoenix, mesh: Mesh) -> None:
    trace_id, traceparent = new_trace()
    body = {"model": "sim", "prompt": "hi", "max_tokens": 60, "temperature": 0, "stream": True, "ignore_eos": True}
    headers = {**mesh.headers, "traceparent": traceparent}
    with (
        httpx.Client(base_url=mesh.edge, headers=headers, timeout=20) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lost = answer.headers["x-tokenloom-worker"]
        lines = answer.iter_lines()
        next(lines)
        os.kill(mesh.process(lost)["pid"], signal.SIGKILL)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    request = "text_completion sim"
    edges = {
        ("ingress", request),
        (request, "router.acquire"),
        ("router.acquire", "schedule"),
        (request, "worker.generate"),
        ("worker.generate", "generate"),
        *PHASES,
    }
    assert_edges(phoenix, trace_id, edges)
    wait_until(lambda: sum(span.name == "schedule" for span in phoenix.trace(trace_id)) == 2, within=10)
    trace = phoenix.trace(trace_id)
    picks = {
        span.attributes["tokenloom.attempt"]: span.attributes["tokenloom.worker"]
        for span in trace
        if span.name == "schedule"
    }
    assert picks[1] == lost != picks[2]
    (whole,) = [span for span in trace if span.name == request]
    assert whole.events == ("first token", "failover")
    (second,) = [span for span in trace if span.name == "generate"]
    assert second.attributes["tokenloom.worker"] == picks[2]
    assert second.attributes["tokenloom.emitted_tokens"] > 0
    assert sum(span.name == "worker.generate" for span in trace) == 2
