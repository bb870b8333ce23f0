"""What a server with OpenAI's API is asked, what its answers mean, and what is refused by name."""

from dataclasses import replace
from typing import Any

import pytest

from services.common.config import ConfigError
from services.common.errors import MeshError, Reason
from services.common.settings_worker import UpstreamSettings
from services.inference.openai_answer import ChunkError, decode_chunk, delta_of
from services.inference.openai_flavours import Flavour, flavour_of
from services.inference.openai_request import check_possible, continued, request_of
from services.inference.openai_stream import Meters, Stream, usage_of
from services.inference.openai_upstream import error_of, key_of
from services.inference.output import FinishReason
from services.inference.request import (
    ChatMessage,
    ChatOptions,
    Generation,
    Media,
    Sampling,
    StructuredOutput,
    Tool,
    ToolCall,
)
from tests.support.sinks import Kept

SAID = [ChatMessage(role="user", content="Hello")]


def flavour(name: str = "openai", **more: Any) -> Flavour:
    return flavour_of(UpstreamSettings(url="http://127.0.0.1:1/v1", flavour=name, **more))  # type: ignore[arg-type]


def generation(prompt: Any = "Hello", **fields: Any) -> Generation:
    kind = "text" if isinstance(prompt, str) else "chat" if isinstance(prompt[0], ChatMessage) else "tokens"
    plain = Sampling(max_tokens=8)
    return Generation(**{"id": "1", "model": "m", "prompt": prompt, "kind": kind, "sampling": plain, **fields})


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": Sampling(**{"max_tokens": 8, **fields})}


# Fields of a generation, and what a server of each flavour is told of them; None: it is refused.
PARAMETERS = [
    ("sampling.top_k", sampling(top_k=5), {"top_k": 5}, {"top_k": 5}, None),
    ("sampling.min_p", sampling(min_p=0.5), {"min_p": 0.5}, {"min_p": 0.5}, None),
    (
        "sampling.repetition_penalty",
        sampling(repetition_penalty=1.5),
        {"repetition_penalty": 1.5},
        {"repeat_penalty": 1.5},
        None,
    ),
    ("sampling.min_tokens", sampling(min_tokens=2), {"min_tokens": 2}, {"min_tokens": 2}, None),
    ("sampling.stop_token_ids", sampling(stop_token_ids=(3,)), {"stop_token_ids": [3]}, None, None),
    ("sampling.ignore_eos", sampling(ignore_eos=True), {"ignore_eos": True}, None, None),
    ("sampling.bad_words", sampling(bad_words=("no",)), {"bad_words": ["no"]}, None, None),
    ("sampling.allowed_token_ids", sampling(allowed_token_ids=(1, 2)), {"allowed_token_ids": [1, 2]}, None, None),
    ("sampling.keep_special_tokens", sampling(keep_special_tokens=True), {"skip_special_tokens": False}, None, None),
    (
        "sampling.include_stop_string",
        sampling(include_stop_string=True),
        {"include_stop_str_in_output": True},
        None,
        None,
    ),
    ("sampling.prompt_logprob_count", sampling(prompt_logprob_count=1), None, None, None),
    ("sampling.stop", sampling(stop=("x",)), {"stop": ["x"]}, {"stop": ["x"]}, {"stop": ["x"]}),
    ("sampling.seed", sampling(seed=-1), {"seed": 2**62 - 1}, {"seed": 2**31 - 1}, {"seed": -1}),
    *(
        (f"sampling.{name}", sampling(**{name: 0.5}), {name: 0.5}, {name: 0.5}, {name: 0.5})
        for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty")
    ),
    (
        "sampling.logit_bias",
        sampling(logit_bias={7: 1.0}),
        {"logit_bias": {"7": 1.0}},
        {"logit_bias": {"7": 1.0}},
        {"logit_bias": {"7": 1.0}},
    ),
    ("choice_count", {"choices": 2}, {"n": 2}, None, {"n": 2}),
    ("cache_salt", {"cache_salt": "s"}, {"cache_salt": "s"}, None, None),
    ("prompt_token_limit", {"prompt_token_limit": 3}, {"truncate_prompt_tokens": 3}, None, None),
    ("without_special_tokens", {"add_special_tokens": False}, {"add_special_tokens": False}, None, None),
]


@pytest.mark.parametrize("index", [0, 1, 2], ids=["vllm", "llama_cpp_python", "openai"])
@pytest.mark.parametrize(
    ("field", "fields", "vllm", "llama_cpp_python", "openai"), PARAMETERS, ids=[p[0] for p in PARAMETERS]
)
def test_each_parameter_is_told_by_its_name_there_or_refused_by_its_name_here(
    field: str, fields: dict[str, Any], vllm: Any, llama_cpp_python: Any, openai: Any, index: int
) -> None:
    expected, known = (vllm, llama_cpp_python, openai)[index], flavour(("vllm", "llama_cpp_python", "openai")[index])
    if expected is None:
        with pytest.raises(MeshError, match=field.replace(".", r"\.")) as caught:
            check_possible(generation(**fields), known)
        assert (caught.value.reason, caught.value.field) == (Reason.UNIMPLEMENTED, field)
        return
    path, body = request_of(generation(**fields), known, "there")
    assert path == "/completions"
    assert expected.items() <= body.items()
    assert body["model"] == "there"


def test_an_operator_may_say_that_a_server_takes_more() -> None:
    body = request_of(generation(**sampling(top_k=5)), flavour(parameters=["top_k"]), "m").body
    assert body["top_k"] == 5


def test_our_defaults_are_said_where_a_server_has_its_own() -> None:
    body = request_of(generation(), flavour("llama_cpp_python"), "m").body
    said = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
    assert said.items() <= body.items()


def test_a_text_without_an_end_is_only_asked_of_servers_that_go_on() -> None:
    endless = generation(sampling=Sampling())
    assert request_of(endless, flavour("vllm"), "m").body["max_tokens"] is None
    with pytest.raises(MeshError, match="max_tokens: is required"):
        request_of(endless, flavour(), "m")
    assert "max_tokens" not in request_of(generation(SAID, sampling=Sampling()), flavour(), "m").body


def test_a_conversation_keeps_its_parts_calls_and_thoughts() -> None:
    call = ToolCall(id="c1", name="f", arguments_json='{"a": 1}')
    said = [
        ChatMessage(
            role="user", content="", parts=["look", Media(kind="image", mime_type="image/png", content=b"\x01")]
        ),
        ChatMessage(role="assistant", content="", tool_calls=[call], reasoning="hm"),
        ChatMessage(role="tool", content="2", tool_call_id="c1"),
    ]
    tools = [Tool(name="f", description="d", parameters_json='{"type": "object"}', strict=True)]
    options = ChatOptions(tools=tools, tool_choice="function", function_name="f", single_tool_call=True)
    path, body = request_of(generation(said, chat=options), flavour(), "m")
    assert path == "/chat/completions"
    assert body["messages"][0]["content"] == [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AQ=="}},
    ]
    assert body["messages"][1] == {
        "role": "assistant",
        "content": None,
        "reasoning": "hm",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    }
    assert body["messages"][2] == {"role": "tool", "content": "2", "tool_call_id": "c1"}
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    assert body["tools"] == [{"type": "function", "function": function}]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert body["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (StructuredOutput(kind="json_object"), {"response_format": {"type": "json_object"}}),
        (
            StructuredOutput(kind="json_schema", value='{"type": "object"}'),
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "output", "schema": {"type": "object"}, "strict": True},
                }
            },
        ),
        (StructuredOutput(kind="regex", value="a+"), {"structured_outputs": {"regex": "a+"}}),
        (StructuredOutput(kind="grammar", value="g"), {"structured_outputs": {"grammar": "g"}}),
        (StructuredOutput(kind="choice", choices=["a"]), {"structured_outputs": {"choice": ["a"]}}),
    ],
    ids=lambda value: value.kind if isinstance(value, StructuredOutput) else "",
)
def test_forms_are_told_to_servers_that_know_them(form: StructuredOutput, expected: dict[str, Any]) -> None:
    assert expected.items() <= request_of(generation(SAID, structured_output=form), flavour("vllm"), "m").body.items()
    asked = generation(SAID, structured_output=form)
    if form.kind.startswith("json"):
        assert "response_format" in request_of(asked, flavour("llama_cpp_python"), "m").body
    else:
        with pytest.raises(MeshError, match="structured_output"):
            check_possible(asked, flavour())


def test_what_goes_on_is_asked_of_tokens_with_what_is_left() -> None:
    asked = generation(SAID, sampling=Sampling(max_tokens=8, min_tokens=3), emitted_token_ids=[1, 2])
    path, body = continued(asked, [7, 8], [1, 2], flavour("vllm"), "m")
    assert path == "/completions"
    assert body["prompt"] == [7, 8, 1, 2]
    assert (body["max_tokens"], body["min_tokens"]) == (6, 1)
    assert "messages" not in body


ERRORS = [
    (400, ChunkError(message="top_p must be in (0, 1]", param="top_p"), Reason.INVALID_REQUEST, "top_p"),
    (400, ChunkError(message="bad", param="body.top_p"), Reason.INVALID_REQUEST, "top_p"),
    (400, ChunkError(message="This model's maximum context length is 9 tokens."), Reason.CONTEXT_LENGTH_EXCEEDED, None),
    (400, ChunkError(message="too long", code="context_length_exceeded"), Reason.CONTEXT_LENGTH_EXCEEDED, None),
    (422, ChunkError(message="no"), Reason.INVALID_REQUEST, None),
    (401, ChunkError(message="Incorrect key sk-secret"), Reason.ENGINE_FAILED, None),
    (404, ChunkError(message="The model `x` does not exist", param="model"), Reason.MODEL_NOT_FOUND, "model"),
    (404, ChunkError(message="Not Found"), Reason.UNIMPLEMENTED, None),
    (413, ChunkError(), Reason.REQUEST_TOO_LARGE, None),
    (429, ChunkError(), Reason.NO_CAPACITY, None),
    (500, ChunkError(message="Traceback"), Reason.ENGINE_FAILED, None),
    (302, ChunkError(), Reason.ENGINE_FAILED, None),
    (503, ChunkError(), Reason.NO_READY_WORKER, None),
]


@pytest.mark.parametrize(("status", "told", "reason", "field"), ERRORS, ids=[f"{e[0]} {e[1].message}" for e in ERRORS])
def test_statuses_become_reasons(status: int, told: ChunkError, reason: Reason, field: str | None) -> None:
    error = error_of(status, told, retry_after="7")
    assert (error.reason, error.field) == (reason, field)
    assert "sk-" not in error.message
    assert "Traceback" not in error.message
    if status in (429, 503):
        assert error.retry_after_seconds == 7


async def play(events: list[bytes], asked: Generation) -> tuple[Stream, Kept]:
    kept = Kept()
    stream = Stream(asked, kept, Meters())
    stream.accept()
    for event in events:
        stream.take([event])
    return stream, kept


async def test_a_stream_without_tokens_and_usage_is_counted() -> None:
    events = [
        b'{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}',
        b'{"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]}',
        b'{"choices": [{"index": 0, "delta": {"content": "Hi"}}]}',
        b'{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}',
    ]
    stream, kept = await play(events, generation(SAID))
    assert stream.is_complete
    assert (stream.told.pieces, stream.said) == (2, "hmHi")
    stream.complete(usage_of(stream, counted=(5, 2)))
    assert kept.starts == [(0, 0)]
    assert (kept.text, kept.token_ids, kept.reason) == ("Hi", [], FinishReason.STOP)
    assert [delta.reasoning for delta in kept.deltas] == ["hm", ""]
    assert kept.usage is not None
    assert (kept.usage.prompt, kept.usage.output) == (5, 2)


async def test_tokens_that_are_said_again_are_not_sent_again() -> None:
    kept = Kept()
    stream = Stream(generation(emitted_token_ids=[4, 5]), kept, Meters())
    stream.prompt_tokens, stream.repeated = 2, [5]
    stream.accept()
    usage = b'"usage": {"prompt_tokens": 3, "completion_tokens": 2}'
    stream.take(
        [b'{"choices": [{"index": 0, "text": "ab", "token_ids": [5, 6], "finish_reason": "stop"}], %b}' % usage]
    )
    stream.complete(usage_of(stream, counted=(0, 0)))
    assert (kept.text, kept.token_ids) == ("ab", [6])
    assert kept.usage is not None
    assert (kept.usage.prompt, kept.usage.output) == (2, 3)


@pytest.mark.parametrize(
    "event",
    [
        b"not JSON",
        b'{"choices": [{"index": 5, "text": "a"}]}',
        b'{"choices": [{"index": 0, "text": "", "finish_reason": "abort"}]}',
        b'{"error": {"message": "boom", "code": 500}}',
        b'{"error": {"message": "boom", "code": "server_error"}}',
    ],
)
async def test_what_makes_no_sense_fails_the_generation(event: bytes) -> None:
    with pytest.raises(MeshError) as caught:
        await play([event], generation())
    assert caught.value.reason is Reason.ENGINE_FAILED


async def test_a_closed_stream_says_nothing_more() -> None:
    stream, kept = await play([b'{"choices": [{"index": 0, "text": "a"}]}'], generation())
    stream.close()
    stream.take([b'{"choices": [{"index": 0, "text": "b", "finish_reason": "stop"}]}'])
    stream.complete(usage_of(stream, counted=(1, 1)))
    stream.fail(MeshError(Reason.INTERNAL, "late"))
    assert (kept.text, kept.reason, kept.error) == ("a", None, None)


async def test_a_stop_token_or_string_is_the_cause() -> None:
    event = b'{"choices": [{"index": 0, "text": "a", "token_ids": [1], "finish_reason": "stop", "stop_reason": 9}]}'
    stream, kept = await play([event], generation())
    stream.complete(usage_of(stream, counted=(1, 1)))
    assert kept.stop_cause == 9


async def test_a_failure_before_it_is_accepted_is_raised() -> None:
    kept = Kept()
    stream = Stream(generation(), kept, Meters())
    stream.fail(MeshError(Reason.NO_CAPACITY, "full"))
    with pytest.raises(MeshError, match="full"):
        await stream.accepted
    assert kept.error is None


def test_log_probabilities_have_as_many_alternatives_as_were_asked_for() -> None:
    event = (
        b'{"choices": [{"index": 0, "text": "a", "token_ids": [1], "logprobs": {"tokens": ["a"], "token_logprobs": '
        b'[-0.5], "top_logprobs": [{"b": -1.0, "a": -0.5, "c": -2.0}]}}]}'
    )
    (choice,) = decode_chunk(event).choices
    (entry,) = delta_of(choice, 2).logprobs
    assert (entry.chosen.token_id, entry.chosen.logprob) == (1, -0.5)
    assert [each.token for each in entry.alternatives] == ["a", "b"]


@pytest.mark.parametrize("url", ["ftp://x/v1", "http://", "http://u:p@x/v1", "http://x/v1?a=b", "/v1"])
def test_urls_that_can_not_be_asked_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        UpstreamSettings(url=url)


def test_a_key_comes_from_the_environment() -> None:
    settings = UpstreamSettings(url="http://x/v1", api_key_variable="KEY")
    assert key_of(settings, {"KEY": "k"}) == "k"
    for environment in ({}, {"KEY": ""}, {"KEY": "a\nb"}):
        with pytest.raises(ConfigError, match="KEY"):
            key_of(settings, environment)


def test_priorities_are_the_routers_affair_and_not_passed_on() -> None:
    asked = generation()
    assert request_of(replace(asked, priority=3), flavour(), "m") == request_of(asked, flavour(), "m")
