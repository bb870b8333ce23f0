"""One trace tells a request's whole way: every edge of both lanes, by name."""

import secrets

import grpc
import httpx
import pytest
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2_grpc

from tests.support.mesh import Mesh
from tests.support.otlp import Receiver
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240)]


PHASES = {
    ("tokenloom-inference: generate", f"tokenloom-inference: {phase}") for phase in ("queue", "prefill", "decode")
}


def new_trace() -> tuple[str, str]:
    """A trace id and the `traceparent` of a client that began it."""
    trace_id = secrets.token_hex(16)
    return trace_id, f"00-{trace_id}-{secrets.token_hex(8)}-01"


def assert_edges(spans: Receiver, trace_id: str, expected: set[tuple[str, str]]) -> None:
    try:
        wait_until(lambda: expected <= spans.edges(trace_id), within=10)
    except TimeoutError:
        missing = expected - spans.edges(trace_id)
        found = "\n".join(f"{span.service}: {span.name}" for span in spans.trace(trace_id))
        pytest.fail(f"missing edges: {missing}\nspans:\n{found}\nedges: {spans.edges(trace_id)}")


def test_the_openai_lane_is_one_trace_from_edge_to_engine(vllm_mesh: Mesh, spans: Receiver) -> None:
    trace_id, traceparent = new_trace()
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True}
    answer = httpx.post(
        f"{vllm_mesh.edge}/v1/chat/completions", json=body, headers={**vllm_mesh.headers, "traceparent": traceparent}
    )
    assert answer.status_code == 200
    assert_edges(
        spans,
        trace_id,
        {
            ("tokenloom-edge: ingress", "tokenloom-gateway: chat demo"),
            ("tokenloom-gateway: chat demo", "tokenloom-gateway: router.acquire"),
            ("tokenloom-gateway: router.acquire", "tokenloom-router: schedule"),
            ("tokenloom-gateway: chat demo", "tokenloom-gateway: worker.generate"),
            ("tokenloom-gateway: worker.generate", "tokenloom-inference: generate"),
            ("tokenloom-inference: generate", "tokenloom-inference: llm_request"),
            *PHASES,
        },
    )
    trace = {span.name: span for span in spans.trace(trace_id) if span.service != "tokenloom-edge"}
    for name, span in trace.items():
        if name != "llm_request":
            assert span.attributes["gen_ai.operation.name"] in ("chat", "generate_content"), name
            assert span.attributes["gen_ai.request.model"] == "demo", name
    assert "first token" in trace["chat demo"].events
    assert "first token" in trace["generate"].events
    assert trace["router.acquire"].attributes["tokenloom.reason"] == trace["schedule"].attributes["tokenloom.reason"]
    assert trace["schedule"].attributes["tokenloom.worker"] == answer.headers["x-tokenloom-worker"]
    assert trace["schedule"].attributes["tokenloom.predicted_ttft_seconds"] > 0


def test_the_requests_span_says_what_the_genai_conventions_have_names_for(vllm_mesh: Mesh, spans: Receiver) -> None:
    trace_id, traceparent = new_trace()
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 3,
        "stream": True,
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
        "seed": 7,
        "stop": "never",
        "ignore_eos": True,
        "response_format": {"type": "text"},
    }
    headers = {**vllm_mesh.headers, "traceparent": traceparent, "x-session-id": "conversation-1"}
    answer = httpx.post(f"{vllm_mesh.edge}/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200
    wait_until(lambda: any(span.name == "chat demo" for span in spans.trace(trace_id)), within=10)
    (span,) = [span for span in spans.trace(trace_id) if span.name == "chat demo"]
    told = dict(span.attributes)
    reasons = [value.string_value for value in told.pop("gen_ai.response.finish_reasons").values]
    stops = [value.string_value for value in told.pop("gen_ai.request.stop_sequences").values]
    assert (reasons, stops) == (["length"] * len(reasons), ["never"])
    assert 0 < told.pop("gen_ai.response.time_to_first_chunk") < 30
    assert told.pop("gen_ai.response.id") in answer.text
    assert told.pop("tokenloom.request_id") == answer.headers["x-request-id"]
    assert told.pop("gen_ai.usage.input_tokens") > 0
    assert told == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tokenloom",
        "gen_ai.conversation.id": "conversation-1",
        "gen_ai.output.type": "text",
        "gen_ai.request.model": "demo",
        "gen_ai.request.stream": True,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 20,
        "gen_ai.request.frequency_penalty": 0.1,
        "gen_ai.request.presence_penalty": 0.2,
        "gen_ai.request.seed": 7,
        "gen_ai.response.model": "demo",
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "tokenloom.worker": answer.headers["x-tokenloom-worker"],
    }


def test_several_prompts_are_told_of_together_and_what_was_not_said_is_not(vllm_mesh: Mesh, spans: Receiver) -> None:
    trace_id, traceparent = new_trace()
    body = {"model": "demo", "prompt": ["one", "two"], "max_tokens": 3, "ignore_eos": True}
    headers = {**vllm_mesh.headers, "traceparent": traceparent}
    assert httpx.post(f"{vllm_mesh.edge}/v1/completions", json=body, headers=headers).status_code == 200
    name = "text_completion demo"
    wait_until(lambda: any(span.name == name for span in spans.trace(trace_id)), within=10)
    (span,) = [span for span in spans.trace(trace_id) if span.name == name]
    assert span.attributes["gen_ai.usage.output_tokens"] == 6
    assert [value.string_value for value in span.attributes["gen_ai.response.finish_reasons"].values] == ["length"] * 2
    asked = {key for key in span.attributes if key.startswith("gen_ai.request.")}
    assert asked == {"gen_ai.request.model", "gen_ai.request.max_tokens"}
    assert "gen_ai.response.time_to_first_chunk" not in span.attributes


@pytest.mark.parametrize("lane", ["grpc", "rest"])
def test_the_typed_lane_is_one_trace_from_edge_to_engine(vllm_mesh: Mesh, spans: Receiver, lane: str) -> None:
    trace_id, traceparent = new_trace()
    if lane == "grpc":
        request = pb.GenerateRequest(model="demo", text="hi", sampling=pb.SamplingParameters(max_tokens=4))
        with grpc.insecure_channel(vllm_mesh.edge_target) as channel:
            metadata = (*vllm_mesh.metadata, ("traceparent", traceparent))
            list(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, metadata=metadata, timeout=30))
    else:
        body = {"model": "demo", "text": "hi", "sampling": {"max_tokens": 4}}
        headers = {**vllm_mesh.headers, "traceparent": traceparent}
        assert httpx.post(f"{vllm_mesh.edge}/api/v1/generate", json=body, headers=headers).status_code == 200
    assert_edges(
        spans,
        trace_id,
        {
            ("tokenloom-edge: ingress", "tokenloom-inference: generate"),
            ("tokenloom-inference: generate", "tokenloom-inference: llm_request"),
            *PHASES,
        },
    )
    # Envoy's own span of the call to the picker stands between; the trace is one all the same.
    passed = {"tokenloom-edge", "tokenloom-router", "tokenloom-inference"}
    wait_until(lambda: {span.service for span in spans.trace(trace_id)} >= passed, within=10)
    assert any(child == "tokenloom-router: pick" for _, child in spans.edges(trace_id))


def test_the_engines_span_tells_where_the_time_went(vllm_mesh: Mesh, spans: Receiver) -> None:
    trace_id, traceparent = new_trace()
    body = {"model": "demo", "prompt": "hi", "max_tokens": 3, "ignore_eos": True}
    headers = {**vllm_mesh.headers, "traceparent": traceparent}
    assert httpx.post(f"{vllm_mesh.edge}/v1/completions", json=body, headers=headers).status_code == 200
    wait_until(lambda: any(span.name == "llm_request" for span in spans.trace(trace_id)), within=10)
    # vLLM's own, and once: it has no second provider.
    (engine,) = [span for span in spans.trace(trace_id) if span.name == "llm_request"]
    assert engine.service == "tokenloom-inference"
    assert engine.attributes["gen_ai.usage.completion_tokens"] == 3
    assert engine.attributes["gen_ai.latency.time_to_first_token"] > 0
