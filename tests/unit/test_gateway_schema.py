"""The strict decoding of OpenAI request bodies: each refusal names the field and has OpenAI's code."""

import json
from typing import get_args

import pytest

from services.common.endpoints import ENDPOINTS
from services.common.errors import MeshError, Reason
from services.gateway.admin_api import Endpoint
from services.gateway.convert import from_completion
from services.gateway.convert_chat import from_chat
from services.gateway.decoding import decode
from services.gateway.schema import CompletionRequest
from services.gateway.schema_chat import ChatRequest

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}, "strict": True}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
NESTED: object = {"a": 1}
for _ in range(70):
    NESTED = {"a": NESTED}


def decoded_chat(**fields: object) -> ChatRequest:
    request = decode(chat(**fields), ChatRequest)
    request.check()
    return request


def decoded_completion(**fields: object) -> CompletionRequest:
    request = decode(completion(**fields), CompletionRequest)
    request.check()
    return request


def chat(**fields: object) -> bytes:
    return json.dumps({"model": "m", "messages": MESSAGES} | fields).encode()


def completion(**fields: object) -> bytes:
    return json.dumps({"model": "m", "prompt": "hi"} | fields).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "m", "messages": [',
        b'{"model": "m", "temperature": NaN}',
        b'{"model": "m", "temperature": Infinity}',
        b'{"model": "\xff"}',
        b"\xef\xbb\xbf{}",
        '{"model": "m"}'.encode("utf-16"),
        b'{"model": "\\ud800"}',
    ],
)
def test_what_is_not_json_is_refused_as_invalid_json(body: bytes) -> None:
    with pytest.raises(MeshError) as caught:
        decode(body, ChatRequest)
    assert (caught.value.reason, caught.value.code) == (Reason.INVALID_REQUEST, "invalid_json")


@pytest.mark.parametrize("body", [b"null", b"42", b'"x"', b"[]", b"[" * 200_000])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(MeshError) as caught:
        decode(body, ChatRequest)
    assert caught.value.code in ("invalid_type", "invalid_json")


@pytest.mark.parametrize(
    ("fields", "field", "code"),
    [
        ({"model": 5}, "model", "invalid_type"),
        ({"model": ""}, "model", "invalid_value"),
        ({"model": "a\r\nX: y"}, "model", "invalid_value"),
        ({"model": "m" * 257}, "model", "string_above_max_length"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": MESSAGES * 10_001}, "messages", "array_above_max_length"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": [{"role": "root", "content": "hi"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content", "invalid_type"),
        ({"temperature": -0.1}, "temperature", "decimal_below_min_value"),
        ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"top_p": 0}, "top_p", "decimal_below_min_value"),
        ({"top_p": 1.1}, "top_p", "decimal_above_max_value"),
        ({"top_k": -2}, "top_k", "integer_below_min_value"),
        ({"top_k": 1.5}, "top_k", "invalid_type"),
        ({"min_p": 2}, "min_p", "decimal_above_max_value"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_tokens": "10"}, "max_tokens", "invalid_type"),
        ({"max_tokens": 2**31}, "max_tokens", "integer_above_max_value"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens", "invalid_value"),
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": 10**9}, "n", "integer_above_max_value"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "invalid_value"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "invalid_value"),
        ({"cache_salt": ""}, "cache_salt", "invalid_value"),
        ({"cache_salt": "a\n"}, "cache_salt", "invalid_value"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "empty_array"),
        ({"bad_words": [""]}, "bad_words[0]", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "missing_required_parameter",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": [1]}}},
            "response_format.json_schema.schema",
            "invalid_type",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"json": NESTED}}, "structured_outputs.json", "invalid_value"),
        ({"guided_decoding_backend": "x"}, "guided_decoding_backend", "unknown_parameter"),
        ({"tools": [TOOL, TOOL]}, "tools", "invalid_value"),
        ({"tools": [TOOL] * 129}, "tools", "array_above_max_length"),
        ({"tools": [{"type": "x"}]}, "tools[0].type", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice.function.name",
            "invalid_value",
        ),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content", "invalid_type"),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]},
            "messages[0].tool_call_id",
            "invalid_value",
        ),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template", "invalid_value"),
        ({"chat_template_kwargs": {"a": "x" * 5000}}, "chat_template_kwargs", "string_above_max_length"),
        ({"top_logprobs": 5}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"stop": ["a"] * 5}, "stop", "array_above_max_length"),
        ({"stop": [[]]}, "stop[0]", "invalid_type"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": "x" * 257}, "stop", "string_above_max_length"),
        ({"presence_penalty": 2.1}, "presence_penalty", "decimal_above_max_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "decimal_below_min_value"),
        ({"seed": 2**64}, "seed", "integer_above_max_value"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"response_format": {"type": "x"}}, "response_format.type", "invalid_value"),
        ({"user": "x" * 513}, "user", "string_above_max_length"),
        ({"api_base": "http://x"}, "api_base", "unknown_parameter"),
        ({"__proto__": {}}, "__proto__", "unknown_parameter"),
        ({"chat_template": "x"}, "chat_template", "unknown_parameter"),
    ],
)
def test_a_bad_field_is_refused_by_name(fields: dict[str, object], field: str, code: str) -> None:
    with pytest.raises(MeshError) as caught:
        decoded_chat(**fields)
    assert (caught.value.reason, caught.value.field, caught.value.code) == (Reason.INVALID_REQUEST, field, code)
    assert field in caught.value.message


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_missing_field_is_refused_by_name(missing: str) -> None:
    body = {"model": "m", "messages": MESSAGES}
    del body[missing]
    with pytest.raises(MeshError) as caught:
        decode(json.dumps(body).encode(), ChatRequest)
    assert (caught.value.field, caught.value.code) == (missing, "missing_required_parameter")


@pytest.mark.parametrize(
    ("fields", "field", "code"),
    [
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "empty_array"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_type"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": [2**31]}, "prompt", "invalid_value"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_type"),
        ({"prompt": [True]}, "prompt", "invalid_type"),
        ({"prompt": ["a"] * 65}, "prompt", "array_above_max_length"),
        ({"prompt": ["a", []]}, "prompt", "empty_array"),
        ({"suffix": "x"}, "suffix", "invalid_type"),
        ({"best_of": 2}, "best_of", "invalid_value"),
        ({"prompt_embeds": "x"}, "prompt_embeds", "unknown_parameter"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"9" * 30: 1}}, "logit_bias", "invalid_value"),
    ],
)
def test_a_bad_completion_field_is_refused_by_name(fields: dict[str, object], field: str, code: str) -> None:
    with pytest.raises(MeshError) as caught:
        from_completion(decoded_completion(**fields))
    assert (caught.value.field, caught.value.code) == (field, code)


def test_null_means_the_default() -> None:
    nulls: dict[str, object] = dict.fromkeys(["temperature", "max_tokens", "stop", "seed", "n", "stream", "logprobs"])
    (generate,) = from_chat(decoded_chat(**nulls))
    assert not generate.sampling.HasField("temperature")
    assert not generate.sampling.HasField("max_tokens")


def test_a_chat_request_keeps_every_field() -> None:
    body = chat(
        messages=[{"role": "system", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]}],
        temperature=0,
        top_p=0.5,
        top_k=-1,
        max_completion_tokens=7,
        stop="END",
        seed=3,
        logit_bias={"5": -100},
        logprobs=True,
        top_logprobs=2,
    )
    request = decode(body, ChatRequest)
    request.check()
    (generate,) = from_chat(request)
    sampling = generate.sampling
    assert [part.text for part in generate.chat.messages[0].parts] == ["be ", "brief"]
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0, 0.5, 0, 7)
    assert (list(sampling.stop), sampling.seed, dict(sampling.logit_bias)) == (["END"], 3, {5: -100})
    assert sampling.logprob_count == 2


def test_a_completion_gives_16_tokens_unless_told_otherwise() -> None:
    assert from_completion(decoded_completion())[0].sampling.max_tokens == 16
    assert from_completion(decoded_completion(max_tokens=3))[0].sampling.max_tokens == 3
    assert from_completion(decoded_completion(min_tokens=30))[0].sampling.max_tokens == 30


def test_a_prompt_may_be_token_ids_or_a_list_of_either() -> None:
    assert from_completion(decoded_completion(prompt=[1, 2]))[0].token_ids.ids == [1, 2]
    assert [generate.text for generate in from_completion(decoded_completion(prompt=["a", "b"]))] == ["a", "b"]
    assert from_completion(decoded_completion(prompt=[[4], "c"]))[0].token_ids.ids == [4]


def test_an_echo_with_log_probabilities_scores_the_prompt_too() -> None:
    (generate,) = from_completion(decoded_completion(echo=True, logprobs=2))
    assert generate.echo
    assert generate.sampling.prompt_logprob_count == generate.sampling.logprob_count == 2


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}}, "json_schema"),
        ({"structured_outputs": {"json": {"type": "object"}}}, "json_schema"),
        ({"structured_outputs": {"regex": "a+"}}, "regex"),
        ({"structured_outputs": {"grammar": "root ::= 1"}}, "grammar"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choices"),
        ({"structured_outputs": {"json_object": True}}, "json_object"),
    ],
)
def test_either_way_to_ask_for_a_form_gives_that_form(fields: dict[str, object], form: str | None) -> None:
    (generate,) = from_chat(decoded_chat(**fields))
    assert generate.structured_output.WhichOneof("form") == form


def test_a_conversation_with_calls_keeps_every_part_of_them() -> None:
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    choice = {"type": "function", "function": {"name": "add"}}
    (generate,) = from_chat(
        decoded_chat(messages=messages, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
    )
    said, answered = generate.chat.messages[1:]
    assert (said.reasoning, said.tool_calls[0].id, said.tool_calls[0].arguments_json) == ("hm", "c1", "{}")
    assert answered.tool_call_id == "c1"
    assert (generate.chat.tools[0].name, generate.chat.tools[0].strict) == ("add", True)
    assert generate.chat.tools[0].parameters_json == '{"type": "object"}'
    assert generate.chat.tool_choice.function_name == "add"
    assert generate.chat.single_tool_call


def test_an_image_travels_as_bytes() -> None:
    url = "data:image/png;base64,aGk="
    parts = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": url}}]
    (generate,) = from_chat(decoded_chat(messages=[{"role": "user", "content": parts}]))
    text, image = generate.chat.messages[0].parts
    assert (text.text, image.image.mime_type, image.image.content) == ("see", "image/png", b"hi")


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "http://127.0.0.1/x.png",
        "https://example.com/x.png",
        "file:///etc/passwd",
        "data:text/html;base64,aGk=",
        "data:image/png;base64,a",
        "data:image/png,hi",
        "gopher://x",
        "",
    ],
)
def test_an_image_that_is_an_address_is_refused_and_never_fetched(url: str) -> None:
    request = decoded_chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    with pytest.raises(MeshError) as caught:
        from_chat(request)
    assert caught.value.code in ("invalid_image_url", "invalid_value")
    assert caught.value.field == "messages[0].content[0].image_url.url"


def test_a_reasoning_effort_reaches_the_template() -> None:
    (generate,) = from_chat(decoded_chat(reasoning_effort="none"))
    assert json.loads(generate.chat.template_arguments_json) == {"reasoning_effort": "none", "enable_thinking": False}


def test_a_key_that_is_there_twice_is_refused_at_any_depth() -> None:
    for body in (
        b'{"model":"a","model":"b"}',
        b'{"model":"a","messages":[{"role":"user","role":"user","content":""}]}',
    ):
        with pytest.raises(MeshError) as caught:
            decode(body, ChatRequest)
        assert caught.value.reason is Reason.INVALID_REQUEST


def test_operators_may_name_every_endpoint_there_is() -> None:
    assert set(get_args(Endpoint)) == set(ENDPOINTS)
