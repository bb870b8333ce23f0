"""The strict decoding of OpenAI request bodies: each refusal names the field and has OpenAI's code."""

import json

import pytest

from services.common.errors import MeshError, Reason
from services.gateway.convert import from_chat, from_completion
from services.gateway.schema import ChatRequest, CompletionRequest, decode

MESSAGES = [{"role": "user", "content": "hi"}]


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
        ({"n": 2}, "n", "invalid_value"),
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
        decode(chat(**fields), ChatRequest)
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
        ({"prompt": ["a", "b"]}, "prompt", "array_above_max_length"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"9" * 30: 1}}, "logit_bias", "invalid_value"),
    ],
)
def test_a_bad_completion_field_is_refused_by_name(fields: dict[str, object], field: str, code: str) -> None:
    with pytest.raises(MeshError) as caught:
        from_completion(decode(completion(**fields), CompletionRequest))
    assert (caught.value.field, caught.value.code) == (field, code)


def test_null_means_the_default() -> None:
    nulls: dict[str, object] = dict.fromkeys(["temperature", "max_tokens", "stop", "seed", "n", "stream", "logprobs"])
    generate = from_chat(decode(chat(**nulls), ChatRequest))
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
    generate = from_chat(decode(body, ChatRequest))
    sampling = generate.sampling
    assert generate.chat.messages[0].content == "be brief"
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0, 0.5, 0, 7)
    assert (list(sampling.stop), sampling.seed, dict(sampling.logit_bias)) == (["END"], 3, {5: -100})
    assert sampling.logprob_count == 2


def test_a_completion_gives_16_tokens_unless_told_otherwise() -> None:
    assert from_completion(decode(completion(), CompletionRequest)).sampling.max_tokens == 16
    assert from_completion(decode(completion(max_tokens=3), CompletionRequest)).sampling.max_tokens == 3


def test_a_prompt_may_be_token_ids_or_a_list_of_one() -> None:
    assert from_completion(decode(completion(prompt=[1, 2]), CompletionRequest)).token_ids.ids == [1, 2]
    assert from_completion(decode(completion(prompt=["a"]), CompletionRequest)).text == "a"
    assert from_completion(decode(completion(prompt=[[4]]), CompletionRequest)).token_ids.ids == [4]
