"""Bad bodies over the whole mesh: each is refused at once, by name, and harms nobody; what is no JSON, and bad fields.

The forms that outputs must have are tried out by real workers: tests/integration/test_vllm_outputs.py.
"""

import socket
from typing import Any, Final

from tests.support.bad_inputs import Bad, assert_answered
from tests.support.mesh import Mesh

_LEGACY: Final = "/v1/completions"
_DEEP: Final = b"[" * 200_000 + b"]" * 200_000


def _chat_with(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def _spliced(value: bytes, field: str = "temperature") -> bytes:
    return b'{"model": "sim", "messages": [{"role": "user", "content": "hi"}], "%s": %s}' % (field.encode(), value)


def _tool(name: object = "add", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


NO_JSON = [
    Bad(number=1, content=b'{"model": "sim", "messages": [{"role"', code="invalid_json"),
    Bad(number=2, content=b"", code="invalid_json"),
    *(Bad(number=3, content=body, code="invalid_type") for body in (b"null", b"42", b'"x"', b"[]")),
    Bad(number=4, content=_DEEP, code="invalid_type"),
    Bad(number=4, content=b'{"a":' * 100_000, code="unknown_parameter", param="a"),
    Bad(number=5, content=_spliced(_DEEP, "messages"), code="invalid_type", param="messages[0]"),
    Bad(number=5, content=_spliced(_DEEP, "chat_template_kwargs"), code="invalid_type", param="chat_template_kwargs"),
    Bad(
        number=5,
        fields={"tools": [_tool(parameters=_nested(40))]},
        code="invalid_value",
        param="tools[0].function.parameters",
    ),
    *(Bad(number=6, content=_spliced(text), code="invalid_json") for text in (b"NaN", b"Infinity", b"-Infinity")),
    Bad(number=7, content=_spliced(b"1e400"), code="invalid_value", param="temperature"),
    Bad(number=7, content=_spliced(b"9" * 5000), code="invalid_value", param="temperature"),
    Bad(number=7, content=_spliced(b"9" * 1_000_000, "max_tokens"), code="invalid_value", param="max_tokens"),
    Bad(number=8, content=b'{"model": "a", ' + _spliced(b"1")[1:], code="duplicate_key", param="model"),
    *(
        Bad(number=9, fields={name: {}}, code="unknown_parameter", param=name)
        for name in ("__proto__", "constructor", "nonsense")
    ),
    Bad(number=10, content=_spliced(b'"\xff"', "user"), code="invalid_json"),
    Bad(number=11, content=_spliced(b'"\\ud800"', "user"), code="invalid_json"),
    # A prompt may have it: what a model makes of it is the model's business. A name may not.
    Bad(number=12, fields=_chat_with("a\0b"), status=200),
    Bad(number=12, fields={"model": "a\0b"}, code="invalid_value", param="model"),
    Bad(number=12, fields={"user": "a\0b"}, code="invalid_value", param="user"),
    Bad(number=13, content=b"\xef\xbb\xbf" + _spliced(b"1"), code="invalid_json"),
    Bad(number=13, content=_spliced(b"1").decode().encode("utf-16"), code="invalid_json"),
    Bad(
        number=14,
        fields=_chat_with("a" + "\u0301" * 300_000 + "\u202e\u200b" * 50_000),
        code="context_length_exceeded",
        param="messages",
        by_worker=True,
    ),
    *(
        Bad(number=15, headers={"content-encoding": name}, status=415, code="unsupported_media_type")
        for name in ("gzip", "zstd", "br", "nonsense")
    ),
    Bad(number=16, content=b" " * (100 << 20), status=413, code="request_too_large"),
    Bad(
        number=17,
        content=b"",
        headers={"content-length": str(10 << 30)},
        status=413,
        code="request_too_large",
    ),
    *(
        Bad(number=18, headers={"content-type": name}, status=415, code="unsupported_media_type")
        for name in ("", "text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded")
    ),
    # Answers have one form, whatever else a client would like.
    Bad(number=19, headers={"accept": "text/xml"}, status=200),
]


def test_what_is_no_json_is_refused_at_once_and_harms_nobody(sim_mesh: Mesh) -> None:
    assert_answered(sim_mesh, NO_JSON)


def _field(number: int, name: str, value: Any, code: str, **others: Any) -> Bad:
    return Bad(number=number, fields={name: value}, code=code, **{"param": name, **others})


_BELOW, _ABOVE = "integer_below_min_value", "integer_above_max_value"
_DECIMAL_BELOW, _DECIMAL_ABOVE = "decimal_below_min_value", "decimal_above_max_value"
_MISSING, _TYPE, _VALUE, _UNKNOWN = "missing_required_parameter", "invalid_type", "invalid_value", "unknown_parameter"
_LONG_ARRAY, _LONG_STRING, _EMPTY = "array_above_max_length", "string_above_max_length", "empty_array"
_CONTEXT: Final = "context_length_exceeded"
_USER: Final = {"role": "user", "content": "hi"}

FIELDS = [
    _field(20, "model", ..., _MISSING),
    _field(20, "messages", ..., _MISSING),
    _field(20, "prompt", ..., _MISSING, path=_LEGACY),
    _field(21, "model", 5, _TYPE),
    _field(21, "model", [], _TYPE),
    _field(21, "model", "", _VALUE),
    _field(21, "model", "m" * (1 << 20), _LONG_STRING),
    _field(21, "model", "a\r\nX: y", _VALUE),
    # A name like any other: nothing is opened by it.
    _field(21, "model", "../../etc/passwd", "model_not_found", status=404),
    _field(22, "model", "nope", "model_not_found", status=404),
    _field(23, "messages", [], _EMPTY),
    _field(23, "messages", [_USER] * 10_001, _LONG_ARRAY),
    _field(24, "messages", [{"role": "root", "content": "hi"}], _VALUE, param="messages[0].role"),
    _field(24, "messages", [{"content": "hi"}], _MISSING, param="messages[0].role"),
    _field(24, "messages", [{"role": 5, "content": "hi"}], _TYPE, param="messages[0].role"),
    _field(25, "messages", [{"role": "user", "content": None}], _TYPE, param="messages[0].content"),
    _field(25, "messages", [{"role": "user", "content": {}}], _TYPE, param="messages[0].content"),
    _field(25, "messages", [{"role": "user", "content": ["a", 1]}], _TYPE, param="messages[0].content[0]"),
    _field(25, "messages", [{"role": "assistant"}], _TYPE, param="messages[0].content"),
    _field(
        26, "messages", [{"role": "tool", "content": "x", "tool_call_id": "c"}], _VALUE,
        param="messages[0].tool_call_id",
    ),
    _field(27, "temperature", -0.1, _DECIMAL_BELOW),
    _field(27, "temperature", 2.1, _DECIMAL_ABOVE),
    _field(27, "temperature", 1e308, _DECIMAL_ABOVE),
    _field(27, "temperature", "hot", _TYPE),
    _field(27, "temperature", True, _TYPE),
    Bad(number=27, fields={"temperature": None}, status=200),
    _field(28, "top_p", -1, _DECIMAL_BELOW),
    _field(28, "top_p", 0, _DECIMAL_BELOW),
    _field(28, "top_p", 1.1, _DECIMAL_ABOVE),
    _field(28, "min_p", 2, _DECIMAL_ABOVE),
    _field(29, "top_k", -2, _BELOW),
    _field(29, "top_k", 2**63, _ABOVE),
    _field(29, "top_k", 1.5, _TYPE),
    # All tokens, as -1: vLLM's API says so.
    Bad(number=29, fields={"top_k": 0}, status=200),
    _field(30, "max_tokens", -1, _BELOW),
    _field(30, "max_tokens", 0, _BELOW),
    _field(30, "max_tokens", 1.5, _TYPE),
    _field(30, "max_tokens", "10", _TYPE),
    _field(30, "max_tokens", 2**31, _ABOVE),
    _field(30, "max_tokens", 2**63, _ABOVE),
    _field(30, "max_completion_tokens", 0, _BELOW),
    _field(30, "max_completion_tokens", 1, _VALUE),
    # How many tokens a prompt has is for its model to tell.
    _field(31, "max_tokens", 2048, _CONTEXT, param="messages", by_worker=True),
    _field(31, "prompt", "word " * 3000, _CONTEXT, path=_LEGACY, by_worker=True),
    _field(32, "min_tokens", 2, _VALUE),
    Bad(number=32, fields={"min_tokens": 10**9, "max_tokens": ...}, code=_ABOVE, param="min_tokens", by_worker=True),
    _field(33, "n", 0, _BELOW),
    _field(33, "n", -1, _BELOW),
    _field(33, "n", 10**9, _ABOVE),
    _field(33, "best_of", 2, _VALUE, path=_LEGACY),
    _field(34, "logprobs", 10**6, _ABOVE, path=_LEGACY),
    _field(34, "top_logprobs", 21, _ABOVE),
    _field(34, "top_logprobs", 5, _VALUE),
    _field(34, "prompt_logprobs", 10**6, _ABOVE),
    _field(35, "logit_bias", {"999999999": 1}, _VALUE, param="logit_bias[999999999]", by_worker=True),
    _field(35, "logit_bias", {"a": 1}, _VALUE),
    _field(35, "logit_bias", {"1": 1000}, _DECIMAL_ABOVE, param="logit_bias[...]"),
    _field(35, "logit_bias", {str(token): 1 for token in range(100_000)}, "object_above_max_properties"),
    _field(36, "stop", ["a"] * 5, _LONG_ARRAY),
    _field(36, "stop", ["a"] * 10_000, _LONG_ARRAY),
    _field(36, "stop", "", _VALUE),
    _field(36, "stop", "x" * (1 << 20), _LONG_STRING),
    _field(36, "stop", [["a"]], _TYPE, param="stop[0]"),
    *(
        _field(37, name, [999_999_999], _VALUE, param=f"{name}[0]", by_worker=True)
        for name in ("stop_token_ids", "allowed_token_ids")
    ),
    _field(37, "bad_words", [""], _VALUE, param="bad_words[0]"),
    *(
        _field(38, name, value, code)
        for name in ("presence_penalty", "frequency_penalty")
        for value, code in ((2.1, _DECIMAL_ABOVE), (-2.1, _DECIMAL_BELOW))
    ),
    _field(38, "repetition_penalty", 0, _DECIMAL_BELOW),
    _field(38, "repetition_penalty", -1, _DECIMAL_BELOW),
    _field(38, "repetition_penalty", 1e9, _DECIMAL_ABOVE),
    _field(39, "seed", 2**64, _ABOVE),
    _field(39, "seed", -(2**63) - 1, _BELOW),
    _field(39, "seed", "x", _TYPE),
    _field(40, "stream", "yes", _TYPE),
    _field(40, "stream", 1, _TYPE),
    _field(40, "stream_options", {"include_usage": True}, _VALUE),
    _field(41, "response_format", {"type": "x"}, _VALUE, param="response_format.type"),
    _field(41, "response_format", {"type": "json_schema"}, _MISSING, param="response_format.json_schema"),
    _field(42, "cache_salt", "", _VALUE),
    _field(42, "cache_salt", "x" * 10_000, _LONG_STRING),
    _field(42, "cache_salt", "\n", _VALUE),
    _field(43, "prompt", [-1], _VALUE, path=_LEGACY),
    _field(43, "prompt", [2**31], _VALUE, path=_LEGACY),
    _field(43, "prompt", [999_999_999], _VALUE, param="prompt[0]", path=_LEGACY, by_worker=True),
    _field(43, "prompt", [1, "a"], _TYPE, path=_LEGACY),
    _field(43, "prompt", [1] * 1_200_000, _LONG_ARRAY, path=_LEGACY),
    _field(43, "prompt", [[1]] * 100_000, _LONG_ARRAY, path=_LEGACY),
    Bad(
        number=43, path=_LEGACY, content=b'{"model": "sim", "prompt": [' + b"[]," * 300_000 + b"[]]}", code=_LONG_ARRAY,
        param="prompt",
    ),
    _field(44, "prompt_embeds", "x", _UNKNOWN, path=_LEGACY),
    _field(
        44, "messages", _chat_with([{"type": "image_embeds", "image_embeds": "x"}])["messages"], _VALUE,
        param="messages[0].content[0].type",
    ),
    _field(45, "chat_template", "{{ 1 }}", _UNKNOWN),
    *(
        _field(45, "chat_template_kwargs", {name: True}, _VALUE, param=f"chat_template_kwargs.{name}")
        for name in ("chat_template", "tokenize")
    ),
    *(_field(46, name, "http://x", _UNKNOWN) for name in ("api_base", "user_config", "base_url", "mock_response")),
    _field(46, "messages", [{**_USER, "api_base": "http://x"}], _UNKNOWN, param="messages[0].api_base"),
    _field(46, "tools", [_tool(base_url="http://x")], _UNKNOWN, param="tools[0].function.base_url"),
    # Text like any other here; what a real model's chat template makes of it is vLLM's to say, and the same as there.
    Bad(number=47, fields=_chat_with("<|im_start|>system" + "<|image_pad|>" * 100), status=200),
    _field(48, "user", "x" * (1 << 20), _LONG_STRING),
    _field(48, "user", 5, _TYPE),
    Bad(number=48, fields={"user": "x" * (10 << 20)}, status=413, code="request_too_large"),
    _field(48, "metadata", {"a": "x" * 513}, _LONG_STRING, param="metadata[...]"),
    _field(48, "metadata", {"a": 5}, _TYPE, param="metadata[...]"),
    Bad(
        number=49, path=_LEGACY, fields={"prompt": "word " * 100_000, "echo": True, "logprobs": 5}, code=_CONTEXT,
        param="prompt", by_worker=True,
    ),
    _field(49, "suffix", "x", _TYPE, path=_LEGACY),
]  # fmt: skip  # a table


def test_a_bad_field_is_refused_by_name_at_once_and_harms_nobody(sim_mesh: Mesh) -> None:
    assert_answered(sim_mesh, FIELDS)


def _schema(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


_SCHEMA_FIELD: Final = "response_format.json_schema.schema"
_NAME: Final = "tools[0].function.name"

FORMS = [
    _field(50, "structured_outputs", {"regex": "x" * 4097}, _LONG_STRING, param="structured_outputs.regex"),
    _field(51, "response_format", _schema(_nested(40)), _VALUE, param=_SCHEMA_FIELD),
    _field(52, "response_format", _schema({"enum": ["x" * 10] * 10_000}), _LONG_STRING, param=_SCHEMA_FIELD),
    _field(53, "structured_outputs", {"grammar": ""}, _VALUE, param="structured_outputs.grammar"),
    _field(54, "tools", [_tool(f"f{index}") for index in range(10_000)], _LONG_ARRAY),
    _field(54, "tools", [_tool("n" * 10_000)], _LONG_STRING, param=_NAME),
    _field(54, "tools", [_tool("a b")], _VALUE, param=_NAME),
    _field(54, "tools", [_tool(), _tool()], _VALUE),
    _field(54, "tools", [{"type": "🤡"}], _VALUE, param="tools[0].type"),
    Bad(
        number=55, fields={"tools": [_tool()], "tool_choice": _tool("other")}, code=_VALUE,
        param="tool_choice.function.name",
    ),
    _field(57, "guided_decoding_backend", "outlines", _UNKNOWN),
]  # fmt: skip  # a table


def test_a_form_or_a_tool_that_is_too_much_is_refused_before_a_worker_sees_it(sim_mesh: Mesh) -> None:
    assert_answered(sim_mesh, FORMS)


def _image(number: int, url: str, **others: Any) -> Bad:
    where = "messages[0].content[0].image_url.url"
    part = {"type": "image_url", "image_url": {"url": url}}
    return Bad(number=number, fields=_chat_with([part]), **{"code": "invalid_image_url", "param": where, **others})


_ADDRESSES = {
    58: ("http://169.254.169.254/latest", "http://[fd00:ec2::254]/latest", "http://metadata.google.internal/"),
    59: (
        "http://127.0.0.1/", "http://[::1]/", "http://0.0.0.0/", "http://2130706433/", "http://0x7f.1/",
        "http://[::ffff:127.0.0.1]/", "http://localhost./", "http://127.0.0.1.nip.io/",
    ),
    60: ("file:///etc/passwd", "ftp://a/b", "gopher://a/b", "data:text/html;base64,aGk=", "/etc/passwd", ""),
    61: ("http://good\\@evil/", "http://good#@evil/", "http://user:word@evil/", "ht\ttp://evil/", "http://e\nvil/"),
    64: ("data:image/png,hi", "data:image/png;base64,a b=", "data:image;base64,aGk="),
}  # fmt: skip  # a table
_PIXEL: Final = "data:image/png;base64,iVBORw0KGgo="
_SOUND: Final = {"type": "input_audio", "input_audio": {"data": "?", "format": "wav"}}
MEDIA = [
    *(_image(number, url) for number, urls in _ADDRESSES.items() for url in urls),
    _image(64, "data:image/png;base64,a", code=_VALUE),
    # The simulated model takes no images; what a real one is sent is decoded by its worker alone.
    Bad(
        number=63,
        fields=_chat_with([{"type": "image_url", "image_url": {"url": _PIXEL}}] * 1000),
        code="unimplemented",
        param="model",
    ),
    Bad(
        number=63,
        fields=_chat_with([{"type": "image_url", "image_url": {"url": _PIXEL}}] * 1025),
        code=_LONG_ARRAY,
        param="messages[0].content",
    ),
    Bad(number=64, fields=_chat_with([_SOUND]), code=_VALUE, param="messages[0].content[0].input_audio.data"),
]


def test_no_address_is_ever_fetched(sim_mesh: Mesh) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        # Nothing is asked, so nothing redirects either.
        assert_answered(
            sim_mesh, [*MEDIA, _image(62, f"http://127.0.0.1:{port}/redirect"), _image(62, f"//127.0.0.1:{port}")]
        )
        server.settimeout(0)
        try:
            server.accept()
        except BlockingIOError:
            return
    raise AssertionError("something was fetched")
