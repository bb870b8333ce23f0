"""Every documented bound of a generate request, and the way back to protos."""

import math
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2
from tokenloom.router.v1 import router_pb2

from services.common.errors import MeshError, Reason
from services.inference import convert
from services.inference.engine import (
    Capability,
    ChatMessage,
    EngineCard,
    FinishReason,
    Load,
    Sampling,
    Timings,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)

CARD = EngineCard(
    kind="sim",
    model="sim",
    max_context_tokens=1000,
    vocabulary_size=500,
    capabilities=frozenset({Capability.CHAT, Capability.GENERATE}),
    max_running=4,
    kv_cache_tokens=4000,
)


def request(**sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(model="sim", text="hello", sampling=pb.SamplingParameters(**sampling))


def refused(message: pb.GenerateRequest) -> tuple[Reason, str | None, str]:
    with pytest.raises(MeshError) as raised:
        convert.generation_from_proto(message, CARD, generation_id="g")
    return raised.value.reason, raised.value.field, raised.value.code


BELOW, ABOVE = "decimal_below_min_value", "decimal_above_max_value"

DECIMALS = [
    ("temperature", -0.01, BELOW), ("temperature", 2.01, ABOVE), ("temperature", 1e38, ABOVE),
    ("top_p", 0, BELOW), ("top_p", -1, BELOW), ("top_p", 1.01, ABOVE),
    ("min_p", -0.01, BELOW), ("min_p", 1.01, ABOVE),
    ("presence_penalty", -2.01, BELOW), ("presence_penalty", 2.01, ABOVE),
    ("frequency_penalty", -2.01, BELOW), ("frequency_penalty", 2.01, ABOVE),
    ("repetition_penalty", 0, BELOW), ("repetition_penalty", 10.1, ABOVE),
    ("temperature", math.inf, ABOVE), ("presence_penalty", -math.inf, BELOW),
    *((name, math.nan, "invalid_value") for name in ("temperature", "top_p", "min_p", "presence_penalty",
                                                     "frequency_penalty", "repetition_penalty")),
]  # fmt: skip  # a table


@pytest.mark.parametrize(("name", "value", "code"), DECIMALS)
def test_a_decimal_out_of_its_range_is_refused(name: str, value: float, code: str) -> None:
    assert refused(request(**{name: value})) == (Reason.INVALID_REQUEST, f"sampling.{name}", code)


BOUNDS: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 2}, {"top_p": 1}, {"top_p": 0.001}, {"min_p": 0}, {"min_p": 1},
    {"presence_penalty": -2}, {"presence_penalty": 2}, {"frequency_penalty": -2}, {"frequency_penalty": 2},
    {"repetition_penalty": 10}, {"repetition_penalty": 0.001}, {"max_tokens": 1}, {"min_tokens": 5, "max_tokens": 5},
    {"logprob_count": 0}, {"logprob_count": 20}, {"stop": ["s" * 256] * 16}, {"stop_token_ids": [1] * 64},
    {"logit_bias": {1: -100, 2: 100}}, {"logit_bias": dict.fromkeys(range(1024), 0.0)}, {"seed": -(2**63)},
]  # fmt: skip  # a table


@pytest.mark.parametrize("sampling", BOUNDS)
def test_the_bounds_themselves_are_taken(sampling: dict[str, Any]) -> None:
    converted = convert.generation_from_proto(request(**sampling), CARD, generation_id="g").sampling
    for name, value in sampling.items():
        got = getattr(converted, name)
        assert got == (pytest.approx(value) if isinstance(value, float | int) else type(got)(value))


OTHERS = [
    (request(max_tokens=0), "sampling.max_tokens", "integer_below_min_value"),
    (request(max_tokens=3, min_tokens=4), "sampling.min_tokens", "integer_above_max_value"),
    (request(logprob_count=21), "sampling.logprob_count", "integer_above_max_value"),
    (request(stop=["x"] * 17), "sampling.stop", "array_above_max_length"),
    (request(stop=["x", ""]), "sampling.stop[1]", "invalid_value"),
    (request(stop=["x" * 257]), "sampling.stop[0]", "string_above_max_length"),
    (request(stop_token_ids=[1] * 65), "sampling.stop_token_ids", "array_above_max_length"),
    (request(logit_bias=dict.fromkeys(range(1025), 0.0)), "sampling.logit_bias", "array_above_max_length"),
    (request(logit_bias={7: 100.5}), "sampling.logit_bias[7]", ABOVE),
    (request(logit_bias={7: math.nan}), "sampling.logit_bias[7]", "invalid_value"),
    (pb.GenerateRequest(text="x"), "model", "missing_required_parameter"),
    (pb.GenerateRequest(model="m" * 257, text="x"), "model", "string_above_max_length"),
    (pb.GenerateRequest(model="sim"), "prompt", "missing_required_parameter"),
    (pb.GenerateRequest(model="sim", text=""), "text", "invalid_value"),
    (pb.GenerateRequest(model="sim", token_ids=pb.TokenIds()), "token_ids.ids", "empty_array"),
    (pb.GenerateRequest(model="sim", chat=pb.ChatPrompt()), "chat.messages", "empty_array"),
    (
        pb.GenerateRequest(
            model="sim",
            chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user"), pb.ChatMessage(role="root", content="x")]),
        ),
        "chat.messages[1].role",
        "invalid_value",
    ),
    (pb.GenerateRequest(model="sim", text="x", emitted_token_ids=[1]), "sampling.temperature", "invalid_value"),
    (
        pb.GenerateRequest(
            model="sim",
            text="x",
            emitted_token_ids=[1],
            sampling=pb.SamplingParameters(temperature=0, logprob_count=1),
        ),
        "sampling.logprob_count",
        "invalid_value",
    ),
]


@pytest.mark.parametrize(("message", "field", "code"), OTHERS)
def test_what_breaks_a_rule_is_refused_by_field(message: pb.GenerateRequest, field: str, code: str) -> None:
    assert refused(message) == (Reason.INVALID_REQUEST, field, code)


def test_an_unknown_model_is_not_found() -> None:
    message = pb.GenerateRequest(model="gpt", text="x")
    assert refused(message) == (Reason.MODEL_NOT_FOUND, "model", "model_not_found")


def test_more_tokens_than_the_context_are_refused_before_they_are_copied() -> None:
    message = pb.GenerateRequest(model="sim", token_ids=pb.TokenIds(ids=[1] * 1000))
    assert refused(message) == (Reason.CONTEXT_LENGTH_EXCEEDED, None, "context_length_exceeded")


def test_every_role_of_the_proto_is_taken() -> None:
    roles = ["system", "developer", "user", "assistant", "tool"]
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role=role, content="c", name="n") for role in roles])
    generation = convert.generation_from_proto(pb.GenerateRequest(model="sim", chat=chat), CARD, generation_id="g")
    assert generation.kind == "chat"
    assert generation.prompt == [ChatMessage(role=role, content="c", name="n") for role in roles]


def test_absent_scalars_take_the_defaults() -> None:
    generation = convert.generation_from_proto(
        pb.GenerateRequest(model="sim", token_ids=pb.TokenIds(ids=[1, 2])),
        CARD,
        generation_id="g",
        priority=3,
        traceparent="00-x",
    )
    assert generation.sampling == Sampling()
    assert (generation.prompt, generation.kind) == ([1, 2], "tokens")
    assert (generation.id, generation.priority, generation.traceparent) == ("g", 3, "00-x")


def test_a_continuation_keeps_what_was_emitted() -> None:
    message = pb.GenerateRequest(
        model="sim", text="x", emitted_token_ids=[4, 5], sampling=pb.SamplingParameters(temperature=0)
    )
    assert convert.generation_from_proto(message, CARD, generation_id="g").emitted_token_ids == [4, 5]


def test_a_tokenize_request_needs_a_prompt() -> None:
    with pytest.raises(MeshError) as raised:
        convert.tokenize_prompt_from_proto(inference_pb2.TokenizeRequest(model="sim"), CARD)
    assert raised.value.field == "prompt"
    assert convert.tokenize_prompt_from_proto(inference_pb2.TokenizeRequest(model="sim", text=""), CARD) == ""


def test_a_completion_tells_usage_and_timings() -> None:
    completed = convert.completed_to_proto(
        FinishReason.STOP, Usage(prompt=5, cached=2, output=7), Timings(queue=0.5, prefill=-1e-9, decode=2.25)
    )
    assert completed == pb.Completed(
        finish_reason=pb.FINISH_REASON_STOP,
        usage=pb.Usage(prompt_token_count=5, cached_token_count=2, output_token_count=7),
        timings=pb.Timings(
            queue_duration=Duration(nanos=500_000_000),
            prefill_duration=Duration(),
            decode_duration=Duration(seconds=2, nanos=250_000_000),
        ),
    )


def test_a_delta_keeps_its_log_probabilities() -> None:
    chosen, other = (TokenLogprob(token_id=n, token=str(n), logprob=-n) for n in (1, 2))
    delta = convert.delta_to_proto("1", [1], [TokenLogprobs(chosen=chosen, alternatives=[chosen, other])])
    assert delta.text == "1"
    assert [score.token_id for score in delta.logprobs[0].alternatives] == [1, 2]
    assert delta.logprobs[0].chosen.logprob == -1


def test_what_is_not_measured_yet_is_absent_from_a_report() -> None:
    report = convert.load_to_proto(Load(running=1), router_pb2.WORKER_STATE_READY)
    assert report == router_pb2.LoadReport(running_count=1, state=router_pb2.WORKER_STATE_READY)
    assert not report.HasField("decode_step_duration")


def test_a_report_tells_everything_that_is_known() -> None:
    load = Load(
        running=1,
        waiting=2,
        kv_usage=0.5,
        pending_prefill_tokens=3,
        prefill_tokens_per_second=4.5,
        decode_step_seconds=0.01,
        decode_step_seconds_per_sequence=0.0,
        prefix_query_tokens=6,
        prefix_hit_tokens=5,
    )
    assert convert.load_to_proto(load, router_pb2.WORKER_STATE_DRAINING) == router_pb2.LoadReport(
        running_count=1,
        waiting_count=2,
        kv_usage_ratio=0.5,
        pending_prefill_token_count=3,
        prefill_tokens_per_second=4.5,
        decode_step_duration=Duration(nanos=10_000_000),
        decode_step_per_sequence_duration=Duration(),
        prefix_query_token_count=6,
        prefix_hit_token_count=5,
        state=router_pb2.WORKER_STATE_DRAINING,
    )


def test_a_model_card_lists_what_the_model_can() -> None:
    assert convert.model_card_to_proto(CARD) == inference_pb2.ModelCard(
        name="sim",
        max_context_token_count=1000,
        capabilities=[inference_pb2.CAPABILITY_GENERATE, inference_pb2.CAPABILITY_CHAT],
        vocabulary_size=500,
    )
