"""The gateway over HTTP, with a real router and real workers behind it."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio

from services.common.settings_worker import SimSettings
from services.gateway import answers, answers_admin, answers_responses
from services.inference.sim_text import expected_text, tokenize
from tests.support.openai_lane import Lane, openai_lane

USER = {"role": "user", "content": "hi"}
pytestmark = pytest.mark.asyncio(loop_scope="module")
FAST = SimSettings(decode_step_ms=1, decode_step_ms_per_sequence=0, prefill_tokens_per_second=1e6, max_model_len=2048)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lane(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lane]:
    async with openai_lane(tmp_path_factory.mktemp("lane"), FAST) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(lane: Lane) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=lane.base_url, headers=lane.headers, timeout=10) as opened:
        yield opened


def events(answer: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]


async def test_the_text_is_what_the_engine_says(client: httpx.AsyncClient) -> None:
    body = {"model": "sim", "prompt": "what", "max_tokens": 60, "ignore_eos": True}
    answer = await client.post("/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"] == expected_text(tokenize("what"), 60)
    assert answer.json()["usage"]["completion_tokens"] == 60
    assert answer.json()["choices"][0]["finish_reason"] == "length"


async def test_a_stream_ends_with_finish_reason_usage_and_done(client: httpx.AsyncClient) -> None:
    body = {"model": "sim", "prompt": "what", "max_tokens": 60, "ignore_eos": True, "stream": True}
    answer = await client.post("/v1/completions", json={**body, "stream_options": {"include_usage": True}})
    *chunks, finish, usage, done = events(answer)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == expected_text(tokenize("what"), 60)
    assert json.loads(finish)["choices"][0]["finish_reason"] == "length"
    assert json.loads(usage)["usage"]["completion_tokens"] == 60
    assert done == "[DONE]"


async def test_log_probabilities_come_with_every_token(client: httpx.AsyncClient) -> None:
    body = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "ignore_eos": True}
    scored = {**body, "logprobs": True, "top_logprobs": 2}
    whole = (await client.post("/v1/chat/completions", json=scored)).json()
    assert len(whole["choices"][0]["logprobs"]["content"]) == 20
    streamed = [
        json.loads(chunk)
        for chunk in events(await client.post("/v1/chat/completions", json={**scored, "stream": True}))[:-1]
    ]
    entries = [entry for chunk in streamed for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert entries == whole["choices"][0]["logprobs"]["content"]


async def test_a_stop_string_ends_the_text_before_it(client: httpx.AsyncClient) -> None:
    text = expected_text(tokenize("what"), 60)
    stop = text[20:24]
    body = {"model": "sim", "prompt": "what", "max_tokens": 60, "ignore_eos": True, "stop": stop}
    choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "code"),
    [
        ("GET", "/v1/chat/completions", b"", {}, 405, "method_not_allowed"),
        ("POST", "/v1/models", b"{}", {}, 405, "method_not_allowed"),
        ("GET", "/v1/models/nope", b"", {}, 404, "model_not_found"),
        ("GET", "/nope", b"", {}, 404, "unknown_url"),
        ("POST", "/v1/completions", b"{}", {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        ("POST", "/v1/completions", b"{}", {"content-encoding": "gzip"}, 415, "unsupported_media_type"),
        ("POST", "/v1/completions", b" " * (1 << 21), {}, 413, "request_too_large"),
    ],
)
async def test_what_is_not_served_is_refused_with_the_right_status(
    client: httpx.AsyncClient, method: str, path: str, content: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    headers = {"content-type": "application/json", **headers}
    answer = await client.request(method, path, content=content, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.headers["x-request-id"]


async def test_a_body_without_a_length_is_cut_off_at_the_limit(client: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b" " * (1 << 16)

    answer = await client.post("/v1/completions", content=endless(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


async def test_only_keys_with_the_debug_right_see_the_worker(lane: Lane, client: httpx.AsyncClient) -> None:
    body = {"model": "sim", "prompt": "x", "max_tokens": 1}
    told = await client.post("/v1/completions", json=body)
    assert told.headers["x-tokenloom-worker"] == "worker-0"
    assert "first token" in told.headers["x-tokenloom-route"]
    plain = await lane.make_key("plain")
    answer = await client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {plain}"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("x-tokenloom")]


async def test_a_key_may_use_its_models_only(lane: Lane, client: httpx.AsyncClient) -> None:
    narrow = await lane.make_key("narrow", models=["other"])
    body = {"model": "sim", "prompt": "x", "max_tokens": 1}
    answer = await client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {narrow}"})
    assert answer.status_code == 403
    assert answer.json()["error"]["param"] == "model"


async def test_a_slow_reader_gets_every_token(lane: Lane) -> None:
    body = json.dumps(
        {"model": "sim", "prompt": "slow", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    ).encode()
    host, _, port = lane.base_url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 10)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {lane.key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    received = b""
    while data := await reader.read(1 << 12):
        received += data
        if len(received) < 1 << 15:
            await asyncio.sleep(0.05)
    writer.close()
    texts = [
        json.loads(line[6:])["choices"][0]["text"] for line in received.split(b"\n") if line.startswith(b"data: {")
    ]
    assert "".join(texts) == expected_text(tokenize("slow"), 1900)
    assert b"data: [DONE]" in received


async def test_many_streams_at_once_do_not_mix(client: httpx.AsyncClient) -> None:
    async def one(prompt: str) -> str:
        body = {"model": "sim", "prompt": prompt, "max_tokens": 40, "ignore_eos": True}
        return str((await client.post("/v1/completions", json=body)).json()["choices"][0]["text"])

    prompts = [f"prompt {index}" for index in range(60)]
    assert await asyncio.gather(*map(one, prompts)) == [expected_text(tokenize(prompt), 40) for prompt in prompts]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {}, {"seed": 1}], ids=str)
async def test_a_generation_that_outlasts_a_drain_goes_on_elsewhere(sampling: dict[str, Any], tmp_path: Path) -> None:
    async with openai_lane(tmp_path, FAST, workers=2) as lane, httpx.AsyncClient(timeout=20) as client:
        body = {"model": "sim", "prompt": "long", "max_tokens": 1500, "ignore_eos": True, **sampling}
        url, stream = f"{lane.base_url}/v1/completions", {**body, "stream": True}
        async with client.stream("POST", url, json=stream, headers=lane.headers) as response:
            lane.stop_worker(int(response.headers["x-tokenloom-worker"].removeprefix("worker-")))
            text = "".join([chunk async for chunk in response.aiter_text()])
        *chunks, finish, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        said = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
        assert said == expected_text(tokenize("long"), 1500)
        assert json.loads(finish)["choices"][0]["finish_reason"] == "length"
        assert done == "[DONE]"


async def test_a_generation_of_several_choices_that_outlasts_a_drain_ends_with_an_error(
    tmp_path: Path,
) -> None:
    async with openai_lane(tmp_path, FAST, workers=2) as lane, httpx.AsyncClient(timeout=20) as client:
        body = {"model": "sim", "prompt": "long", "max_tokens": 1500, "ignore_eos": True, "stream": True, "n": 2}
        url = f"{lane.base_url}/v1/completions"
        async with client.stream("POST", url, json=body, headers=lane.headers) as response:
            lane.stop_worker(int(response.headers["x-tokenloom-worker"].removeprefix("worker-")))
            text = "".join([chunk async for chunk in response.aiter_text()])
        assert json.loads(text.split("\n\n")[-2].removeprefix("data: "))["error"]["code"] == "engine_error"
        assert "[DONE]" not in text


async def test_the_openapi_document_describes_what_is_served(lane: Lane) -> None:
    async with httpx.AsyncClient(base_url=lane.base_url) as anybody:
        described = (await anybody.get("/openapi.json")).json()
    paths = described["paths"]
    assert {"/v1/chat/completions", "/v1/responses", "/v1/files/{file_id}", "/v1/models/{model}"} <= paths.keys()
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schemas = described["components"]["schemas"]
    chat = schemas[body["$ref"].rpartition("/")[2]]
    assert chat["additionalProperties"] is False
    assert {"model", "messages"} == set(chat["required"])
    assert set(schemas["CompletionRequest"]["required"]) == {"model", "prompt"}
    assert "\\Z" not in json.dumps(described)


ANSWERS: dict[str, tuple[type, list[dict[str, Any]]]] = {
    "/v1/chat/completions": (
        answers.ChatCompletion,
        [{"messages": [USER]}, {"messages": [USER], "logprobs": True, "top_logprobs": 1, "return_token_ids": True}],
    ),
    "/v1/completions": (
        answers.Completion,
        [{"prompt": "a"}, {"prompt": ["a", "b"], "logprobs": 1, "echo": True, "return_token_ids": True}],
    ),
    "/v1/responses": (answers_responses.ResponseObject, [{"input": "a", "top_logprobs": 1}, {"input": "b"}]),
    "/v1/tokenize": (answers.Tokenized, [{"prompt": "a", "return_token_strs": True}]),
    "/v1/detokenize": (answers.Detokenized, [{"tokens": [5]}]),
}


@pytest.mark.parametrize("path", ANSWERS)
async def test_answers_are_as_the_openapi_document_describes_them(client: httpx.AsyncClient, path: str) -> None:
    shape, bodies = ANSWERS[path]
    for body in bodies:
        answer = await client.post(path, json={"model": "sim", **body})
        assert answer.status_code == 200, answer.text
        msgspec.json.decode(answer.content, type=shape)


async def test_what_operators_are_told_is_as_the_openapi_document_describes_it(client: httpx.AsyncClient) -> None:
    shapes = {
        "keys": answers_admin.KeyList,
        "usage": answers_admin.UsageReport,
        "requests": answers_admin.RequestList,
        "audit": answers_admin.AuditTrail,
    }
    for path, shape in shapes.items():
        answer = await client.get(f"/v1/admin/{path}")
        assert msgspec.json.decode(answer.content, type=shape).data, path
    msgspec.json.decode((await client.get("/v1/models/sim")).content, type=answers.Model)


async def test_an_answer_to_many_prompts_says_once_who_answered(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"model": "sim", "prompt": ["a"] * 64, "max_tokens": 1})
    assert len(answer.json()["choices"]) == 64
    assert len(answer.headers.get_list("x-tokenloom-worker")) == 1
    assert len(answer.headers.get_list("x-tokenloom-route")) == 1


@pytest.mark.parametrize("query", ["&".join(f"p{index}=1" for index in range(65)), "after=%00"])
async def test_a_query_that_is_no_good_is_refused(client: httpx.AsyncClient, query: str) -> None:
    answer = await client.get(f"/v1/files?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_value"


async def test_a_stream_that_waits_says_where_it_stands_when_it_is_asked_to(tmp_path: Path) -> None:
    narrow = SimSettings(prefill_tokens_per_second=1e6, decode_step_ms=10, max_num_seqs=1)
    async with openai_lane(tmp_path, narrow) as lane, httpx.AsyncClient(base_url=lane.base_url, timeout=20) as client:
        body = {"model": "sim", "prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True}
        headers = {**lane.headers, "x-queue-status": "1"}
        asks = [client.post("/v1/completions", json=body, headers=headers) for _ in range(4)]
        texts = [answer.text for answer in await asyncio.gather(*asks)]
        assert any(": queued position=" in text for text in texts)
        assert all(text.endswith("data: [DONE]\n\n") for text in texts)
        quiet = [client.post("/v1/completions", json=body, headers=lane.headers) for _ in range(4)]
        assert not [answer for answer in await asyncio.gather(*quiet) if ": queued" in answer.text]


def framed(method: str, path: str, lane: Lane, body: bytes = b"", *more: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: mesh", f"authorization: {lane.headers['authorization']}", *more]
    if body:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def heard(lane: Lane, *sent: bytes, until: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(lane.base_url).port)
    try:
        said = b""
        for data in sent:
            writer.write(data)
            said += await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        while not said.endswith(until):
            said += await asyncio.wait_for(reader.read(1 << 16), 5)
        return said
    finally:
        writer.close()


async def test_heads_of_answers_go_out_whole_whatever_follows_them(lane: Lane) -> None:
    whole = framed("GET", "/healthz", lane)
    assert (await heard(lane, whole, whole, until=b'"ok"}')).count(b"HTTP/1.1 200 OK\r\n") == 2
    no_body = await heard(lane, framed("HEAD", "/", lane, b"", "connection: close"), until=b"\r\n\r\n")
    assert no_body.startswith(b"HTTP/1.1 200 OK\r\n")
    body = b'{"model": "sim", "prompt": "hi", "max_tokens": 2, "stream": true}'
    head, _, rest = framed("POST", "/v1/completions", lane, body, "expect: 100-continue").partition(b"\r\n\r\n")
    said = await heard(lane, head + b"\r\n\r\n", rest, until=b"0\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
