"""Every documented bound of a generate request, and the way back to protos."""

import math
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2
from tokenloom.router.v1 import router_pb2

from services.common.errors import MeshError, Reason
from services.inference import convert, convert_events
from services.inference.engine import Capability, EngineCard, Load
from services.inference.output import Delta, FinishReason, Timings, TokenLogprob, TokenLogprobs, Usage
from services.inference.request import ChatMessage, ChatOptions, Media, Sampling, StructuredOutput, Tool, ToolCall

CARD = EngineCard(
    kind="sim",
    model="sim",
    max_context_tokens=1000,
    vocabulary_size=500,
    capabilities=frozenset({Capability.CHAT, Capability.GENERATE}),
    max_running=4,
    kv_cache_tokens=4000,
)
ABLE = replace(CARD, capabilities=frozenset(Capability))


def request(**sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(model="sim", text="hello", sampling=pb.SamplingParameters(**sampling))


def refused(message: pb.GenerateRequest, card: EngineCard = ABLE) -> tuple[Reason, str | None, str]:
    with pytest.raises(MeshError) as raised:
        convert.generation_from_proto(message, card, generation_id="g")
    error = raised.value
    assert error.field is None or error.field in error.message or error.reason is Reason.MODEL_NOT_FOUND
    return error.reason, error.field, error.code


def generate(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(model="sim", text="hello", **fields)


def tokens(ids: list[int], **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(model="sim", token_ids=pb.TokenIds(ids=ids), **fields)


def form(**fields: Any) -> pb.GenerateRequest:
    return generate(structured_output=pb.StructuredOutput(**fields))


def continued(*, prompt_logprob_count: int | None = None, **fields: Any) -> pb.GenerateRequest:
    sampling = pb.SamplingParameters(temperature=0, prompt_logprob_count=prompt_logprob_count)
    return generate(**({"emitted_token_ids": [1], "sampling": sampling} | fields))


def chat(*messages: pb.ChatMessage, **fields: Any) -> pb.GenerateRequest:
    said = messages or (pb.ChatMessage(role="user", content="hi"),)
    return pb.GenerateRequest(model="sim", chat=pb.ChatPrompt(messages=said, **fields))


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
    {"logit_bias": {1: -100, 2: 100}}, {"logit_bias": dict.fromkeys(range(500), 0.0)}, {"seed": -(2**63)},
    {"min_tokens": 999}, {"prompt_logprob_count": 20}, {"bad_words": ["b" * 256] * 64}, {"top_k": 2**32 - 1},
    {"allowed_token_ids": [499] * 1024}, {"keep_special_tokens": True}, {"include_stop_string": True},
]  # fmt: skip  # a table


@pytest.mark.parametrize("sampling", BOUNDS)
def test_the_bounds_themselves_are_taken(sampling: dict[str, Any]) -> None:
    converted = convert.generation_from_proto(request(**sampling), ABLE, generation_id="g").sampling
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
    (request(min_tokens=1000), "sampling.min_tokens", "integer_above_max_value"),
    (request(min_tokens=10**9), "sampling.min_tokens", "integer_above_max_value"),
    (request(prompt_logprob_count=21), "sampling.prompt_logprob_count", "integer_above_max_value"),
    (request(bad_words=["x"] * 65), "sampling.bad_words", "array_above_max_length"),
    (request(bad_words=["x", "y" * 257]), "sampling.bad_words[1]", "string_above_max_length"),
    (request(bad_words=[""]), "sampling.bad_words[0]", "invalid_value"),
    (request(allowed_token_ids=[1] * 1025), "sampling.allowed_token_ids", "array_above_max_length"),
    (request(allowed_token_ids=[1, 2, 3, 500]), "sampling.allowed_token_ids[3]", "invalid_value"),
    (request(stop_token_ids=[500]), "sampling.stop_token_ids[0]", "invalid_value"),
    (request(logit_bias={500: 1}), "sampling.logit_bias[500]", "invalid_value"),
    (generate(choice_count=5), "choice_count", "integer_above_max_value"),
    (generate(choice_count=2**32 - 1), "choice_count", "integer_above_max_value"),
    (generate(choice_count=2, sampling=pb.SamplingParameters(temperature=0)), "choice_count", "invalid_value"),
    (generate(cache_salt="s" * 257), "cache_salt", "string_above_max_length"),
    (generate(cache_salt="a\nb"), "cache_salt", "invalid_value"),
    (generate(prompt_token_limit=0), "prompt_token_limit", "integer_below_min_value"),
    (generate(prompt_token_limit=1000), "prompt_token_limit", "integer_above_max_value"),
    (tokens([1, 500]), "token_ids.ids[1]", "invalid_value"),
    (tokens([1], without_special_tokens=True), "without_special_tokens", "invalid_value"),
    (generate(structured_output=pb.StructuredOutput()), "structured_output", "missing_required_parameter"),
    (form(json_schema="{"), "structured_output.json_schema", "invalid_value"),
    (form(json_schema="[]"), "structured_output.json_schema", "invalid_value"),
    (form(json_schema='{"minimum": NaN}'), "structured_output.json_schema", "invalid_value"),
    (form(json_schema='{"a": 1, "a": 2}'), "structured_output.json_schema", "invalid_value"),
    (form(json_schema='{"a":' * 65 + "1" + "}" * 65), "structured_output.json_schema", "invalid_value"),
    (form(json_schema="[" * 200_000), "structured_output.json_schema", "string_above_max_length"),
    (form(json_schema="[" * 60_000), "structured_output.json_schema", "invalid_value"),
    (form(json_schema='{"minimum": ' + "9" * 5000 + "}"), "structured_output.json_schema", "invalid_value"),
    (form(regex=""), "structured_output.regex", "invalid_value"),
    (form(regex="a" * 4097), "structured_output.regex", "string_above_max_length"),
    (form(regex="é" * 4000), "structured_output.regex", "string_above_max_length"),
    (form(grammar=""), "structured_output.grammar", "invalid_value"),
    (form(grammar="a" * 65537), "structured_output.grammar", "string_above_max_length"),
    (form(choices=pb.Choices()), "structured_output.choices.texts", "empty_array"),
    (form(choices=pb.Choices(texts=["a"] * 1025)), "structured_output.choices.texts", "array_above_max_length"),
    (form(choices=pb.Choices(texts=["a", ""])), "structured_output.choices.texts[1]", "invalid_value"),
    (form(choices=pb.Choices(texts=["a" * 1025])), "structured_output.choices.texts[0]", "string_above_max_length"),
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
    (continued(emitted_token_ids=[500]), "emitted_token_ids[0]", "invalid_value"),
    (continued(prompt_logprob_count=1), "sampling.prompt_logprob_count", "invalid_value"),
]


@pytest.mark.parametrize(("message", "field", "code"), OTHERS)
def test_what_breaks_a_rule_is_refused_by_field(message: pb.GenerateRequest, field: str, code: str) -> None:
    assert refused(message) == (Reason.INVALID_REQUEST, field, code)


def assistant(**fields: Any) -> pb.ChatMessage:
    return pb.ChatMessage(role="assistant", **fields)


def called(**fields: Any) -> pb.ChatMessage:
    return assistant(tool_calls=[pb.ToolCall(**({"id": "c", "name": "f"} | fields))])


def user(*parts: pb.ContentPart, **fields: Any) -> pb.ChatMessage:
    return pb.ChatMessage(role="user", parts=parts, **fields)


def choose(mode: pb.ToolChoiceMode.ValueType, name: str = "", tools: tuple[str, ...] = ("f",)) -> pb.GenerateRequest:
    return chat(tools=[pb.Tool(name=tool) for tool in tools], tool_choice=pb.ToolChoice(mode=mode, function_name=name))


TEXT, IMAGE = pb.ContentPart(text="t"), pb.Media(mime_type="image/png", content=b"png")
FIRST, SECOND = "chat.messages[0]", "chat.messages[1]"

CHATS = [
    (chat(*[pb.ChatMessage(role="user")] * 10_001), "chat.messages", "array_above_max_length"),
    (chat(pb.ChatMessage(role="user", name="n" * 257)), f"{FIRST}.name", "string_above_max_length"),
    (chat(user(TEXT, content="c")), f"{FIRST}.parts", "invalid_value"),
    (chat(user(TEXT, pb.ContentPart())), f"{FIRST}.parts[1]", "missing_required_parameter"),
    (chat(user(*[TEXT] * 1025)), f"{FIRST}.parts", "array_above_max_length"),
    (chat(user(*[pb.ContentPart(image=IMAGE)] * 17)), "chat.messages", "array_above_max_length"),
    (
        chat(user(*[pb.ContentPart(image=pb.Media(mime_type="image/png", content=b"p" * (2 << 20)))] * 2)),
        "chat.messages",
        "string_above_max_length",
    ),
    (chat(user(pb.ContentPart(audio=IMAGE))), f"{FIRST}.parts[0].audio.mime_type", "invalid_value"),
    (
        chat(user(pb.ContentPart(image=pb.Media(mime_type="image/png")))),
        f"{FIRST}.parts[0].image.content",
        "invalid_value",
    ),
    (chat(pb.ChatMessage(role="user", reasoning="r")), f"{FIRST}.reasoning", "invalid_value"),
    (chat(pb.ChatMessage(role="user", tool_calls=[pb.ToolCall()])), f"{FIRST}.tool_calls", "invalid_value"),
    (chat(called(id="")), f"{FIRST}.tool_calls[0].id", "invalid_value"),
    (chat(called(name="a b")), f"{FIRST}.tool_calls[0].name", "invalid_value"),
    (chat(called(arguments_json="{")), f"{FIRST}.tool_calls[0].arguments_json", "invalid_value"),
    (chat(called(), pb.ChatMessage(role="tool", tool_call_id="d")), f"{SECOND}.tool_call_id", "invalid_value"),
    (chat(called(), pb.ChatMessage(role="user", tool_call_id="c")), f"{SECOND}.tool_call_id", "invalid_value"),
    (chat(tools=[pb.Tool(name=f"f{i}") for i in range(129)]), "chat.tools", "array_above_max_length"),
    (chat(tools=[pb.Tool(name="f"), pb.Tool(name="f")]), "chat.tools[1].name", "invalid_value"),
    (chat(tools=[pb.Tool(name="n" * 65)]), "chat.tools[0].name", "invalid_value"),
    (chat(tools=[pb.Tool(name="\U0001f921")]), "chat.tools[0].name", "invalid_value"),
    (chat(tools=[pb.Tool(name="f\n")]), "chat.tools[0].name", "invalid_value"),
    (
        chat(tools=[pb.Tool(name="f", description="d" * 4097)]),
        "chat.tools[0].description",
        "string_above_max_length",
    ),
    (chat(tools=[pb.Tool(name="f", parameters_json="1")]), "chat.tools[0].parameters_json", "invalid_value"),
    (choose(pb.TOOL_CHOICE_MODE_REQUIRED, tools=()), "chat.tool_choice.mode", "invalid_value"),
    (choose(pb.TOOL_CHOICE_MODE_FUNCTION, "g"), "chat.tool_choice.function_name", "invalid_value"),
    (choose(pb.TOOL_CHOICE_MODE_AUTO, "f"), "chat.tool_choice.function_name", "invalid_value"),
    (choose(99), "chat.tool_choice.mode", "invalid_value"),  # type: ignore[arg-type]  # what a newer client may send
    (
        chat(template_arguments_json='{"chat_template": "x", "tokenize": true}'),
        "chat.template_arguments_json",
        "invalid_value",
    ),
    (chat(template_arguments_json='{"a b": 1}'), "chat.template_arguments_json", "invalid_value"),
    (chat(template_arguments_json="x" * 4097), "chat.template_arguments_json", "string_above_max_length"),
    (chat(continue_final_message=True), "chat.continue_final_message", "invalid_value"),
]


@pytest.mark.parametrize(("message", "field", "code"), CHATS)
def test_what_is_wrong_with_a_conversation_is_named(message: pb.GenerateRequest, field: str, code: str) -> None:
    assert refused(message) == (Reason.INVALID_REQUEST, field, code)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (form(regex="a"), "structured_output"),
        (request(logprob_count=1), "sampling.logprob_count"),
        (request(prompt_logprob_count=1), "sampling.prompt_logprob_count"),
        (chat(tools=[pb.Tool(name="f")]), "chat.tools"),
        (chat(user(pb.ContentPart(image=IMAGE))), f"{FIRST}.parts[0].image"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(message: pb.GenerateRequest, field: str) -> None:
    assert refused(message, CARD) == (Reason.UNIMPLEMENTED, field, "unimplemented")


def test_functions_that_nothing_reads_the_calls_of_name_the_setting_unless_none_is_to_be_called() -> None:
    with pytest.raises(MeshError, match="tool_call_parser"):
        convert.generation_from_proto(chat(tools=[pb.Tool(name="f")]), CARD, generation_id="g")
    unwanted = chat(tools=[pb.Tool(name="f")], tool_choice=pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_NONE))
    assert convert.generation_from_proto(unwanted, CARD, generation_id="g").chat.tools


def test_a_whole_conversation_arrives_with_everything_that_it_says() -> None:
    message = chat(
        user(TEXT, pb.ContentPart(image=IMAGE)),
        assistant(content="a", reasoning="r", tool_calls=[pb.ToolCall(id="c", name="f", arguments_json='{"x": 1}')]),
        pb.ChatMessage(role="tool", content="42", tool_call_id="c"),
        assistant(content="So"),
        tools=[pb.Tool(name="f", description="d", parameters_json="{}", strict=True)],
        tool_choice=pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_FUNCTION, function_name="f"),
        single_tool_call=True,
        template_arguments_json='{"enable_thinking": false}',
        continue_final_message=True,
    )
    generation = convert.generation_from_proto(message, ABLE, generation_id="g")
    assert generation.prompt == [
        ChatMessage(role="user", content="", parts=("t", Media(kind="image", mime_type="image/png", content=b"png"))),
        ChatMessage(
            role="assistant",
            content="a",
            reasoning="r",
            tool_calls=(ToolCall(id="c", name="f", arguments_json='{"x": 1}'),),
        ),
        ChatMessage(role="tool", content="42", tool_call_id="c"),
        ChatMessage(role="assistant", content="So"),
    ]
    assert generation.chat == ChatOptions(
        tools=(Tool(name="f", description="d", parameters_json="{}", strict=True),),
        tool_choice="function",
        function_name="f",
        single_tool_call=True,
        template_arguments={"enable_thinking": False},
        generation_prompt=False,
        continue_final_message=True,
    )


def test_everything_beside_the_prompt_arrives() -> None:
    message = generate(
        choice_count=4,
        structured_output=pb.StructuredOutput(choices=pb.Choices(texts=["a", "b"])),
        echo=True,
        cache_salt="tenant 1",
        prompt_token_limit=999,
        without_special_tokens=True,
    )
    generation = convert.generation_from_proto(message, ABLE, generation_id="g")
    assert (generation.choices, generation.echo, generation.cache_salt) == (4, True, "tenant 1")
    assert (generation.prompt_token_limit, generation.add_special_tokens) == (999, False)
    assert generation.structured_output == StructuredOutput(kind="choice", choices=("a", "b"))


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


@pytest.mark.parametrize("sampling", [{"temperature": 0.7}, {}, {"temperature": 0, "seed": 1}], ids=str)
def test_what_is_drawn_without_a_seed_can_go_on_anywhere(sampling: dict[str, Any]) -> None:
    message = continued(sampling=pb.SamplingParameters(**sampling))
    assert convert.generation_from_proto(message, CARD, generation_id="g").emitted_token_ids == [1]


def test_a_continuation_keeps_what_was_emitted() -> None:
    message = pb.GenerateRequest(
        model="sim", text="x", emitted_token_ids=[4, 5], sampling=pb.SamplingParameters(temperature=0)
    )
    assert convert.generation_from_proto(message, CARD, generation_id="g").emitted_token_ids == [4, 5]


def test_a_tokenize_request_needs_a_prompt() -> None:
    with pytest.raises(MeshError) as raised:
        convert.tokenize_prompt_from_proto(inference_pb2.TokenizeRequest(model="sim"), CARD)
    assert raised.value.field == "prompt"
    assert convert.tokenize_prompt_from_proto(inference_pb2.TokenizeRequest(model="sim", text=""), CARD)[0] == ""


def test_a_completion_tells_usage_and_timings() -> None:
    completed = convert_events.completed_to_proto(
        FinishReason.STOP, Usage(prompt=5, cached=2, output=7), Timings(queue=0.5, prefill=-1e-9, decode=2.25, gpu=1.5)
    )
    assert completed == pb.Completed(
        finish_reason=pb.FINISH_REASON_STOP,
        usage=pb.Usage(prompt_token_count=5, cached_token_count=2, output_token_count=7),
        timings=pb.Timings(
            queue_duration=Duration(nanos=500_000_000),
            prefill_duration=Duration(),
            decode_duration=Duration(seconds=2, nanos=250_000_000),
            gpu_duration=Duration(seconds=1, nanos=500_000_000),
        ),
    )


def test_a_delta_keeps_its_log_probabilities() -> None:
    chosen, other = (TokenLogprob(token_id=n, token=str(n), logprob=-n) for n in (1, 2))
    delta = convert_events.delta_to_proto(
        Delta(text="1", token_ids=[1], logprobs=[TokenLogprobs(chosen=chosen, alternatives=[chosen, other])])
    )
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


@pytest.mark.parametrize(
    ("text", "priority"),
    [("", 0), ("-5", -5), ("7", 7), ("x", 0), ("1.5", 0), ("--1", 0), ("99999999999", 2**31 - 1), ("9" * 12, 0)],
)
def test_a_priority_is_what_the_edge_wrote(text: str, priority: int) -> None:
    assert convert.priority_from_metadata(text) == priority
