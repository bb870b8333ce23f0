"""Embeddings, reranking, scores and tokens over HTTP: a gateway with a real router and real simulated workers."""

import asyncio
import base64
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import openai
import pytest

from services.common.settings_worker import SimSettings
from services.inference import sim_text
from services.inference.request import ChatMessage
from services.inference.sim_embedding import cosine, expected_embedding
from tests.support.openai_lane import Lane, openai_lane

POOLING = SimSettings(
    runner="pooling",
    embedding_dimensions=48,
    max_model_len=64,
    decode_step_ms=1.0,
    prefill_tokens_per_second=1_000_000.0,
)
SLOW = SimSettings(runner="pooling", decode_step_ms=400.0, max_num_seqs=4)
TEXTS = ["a quiet garden", "engines burn fuel", "the garden is quiet today"]


@asynccontextmanager
async def client_of(lane: Lane) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=lane.base_url, headers=lane.headers, timeout=20) as client:
        yield client


def tokens(*texts: str) -> int:
    return sum(len(sim_text.tokenize(text)) for text in texts)


async def test_the_openai_sdk_gets_embeddings_in_both_encodings_and_all_forms_of_input(tmp_path: Path) -> None:
    async with (
        openai_lane(tmp_path, POOLING) as lane,
        openai.AsyncOpenAI(base_url=f"{lane.base_url}/v1", api_key=lane.key, max_retries=0) as sdk,
    ):
        default = await sdk.embeddings.create(model="sim", input=TEXTS)
        floats = await sdk.embeddings.create(model="sim", input=TEXTS, encoding_format="float")
        one = await sdk.embeddings.create(model="sim", input=TEXTS[0])
        ids = await sdk.embeddings.create(model="sim", input=sim_text.tokenize(TEXTS[0]))
        lists = await sdk.embeddings.create(model="sim", input=[sim_text.tokenize(text) for text in TEXTS])
        short = await sdk.embeddings.create(model="sim", input=TEXTS[0], dimensions=8)
        many = await sdk.embeddings.create(model="sim", input=["word"] * 600)
    for answer in (default, floats, lists):
        assert [entry.index for entry in answer.data] == [0, 1, 2]
        for entry, text in zip(answer.data, TEXTS, strict=True):
            assert entry.embedding == pytest.approx(expected_embedding(text, 48), abs=1e-6)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens(*TEXTS)
    assert one.data[0].embedding == pytest.approx(ids.data[0].embedding)
    assert (default.object, default.data[0].object, default.model) == ("list", "embedding", "sim")
    assert len(short.data[0].embedding) == 8
    assert [entry.index for entry in many.data] == list(range(600))
    assert many.usage.prompt_tokens == 600 * tokens("word")


async def test_base64_is_little_endian_floats_and_truncation_keeps_the_beginning_as_vllm_does(tmp_path: Path) -> None:
    async with openai_lane(tmp_path, POOLING) as lane, client_of(lane) as client:
        body = {"model": "sim", "input": TEXTS[0]}
        raw = (await client.post("/v1/embeddings", json={**body, "encoding_format": "base64"})).json()
        plain = (await client.post("/v1/embeddings", json=body)).json()
        sides = [
            (await client.post("/v1/embeddings", json={**body, "truncate_prompt_tokens": 2, **side})).json()
            for side in ({}, {"truncation_side": "right"}, {"truncation_side": "left"})
        ]
        whole = await client.post("/v1/embeddings", json={**body, "input": "word " * 100, "truncate_prompt_tokens": -1})
    decoded = struct.unpack("<48f", base64.b64decode(raw["data"][0]["embedding"]))
    assert list(decoded) == pytest.approx(plain["data"][0]["embedding"])
    spelled = sim_text.tokenize(TEXTS[0])
    kept = [expected_embedding(sim_text.detokenize(part), 48) for part in (spelled[:2], spelled[:2], spelled[-2:])]
    for answer, vector in zip(sides, kept, strict=True):
        assert answer["data"][0]["embedding"] == pytest.approx(vector, abs=1e-6)
        assert answer["usage"]["prompt_tokens"] == 2
    assert whole.json()["usage"]["prompt_tokens"] == 64


async def test_reranking_sorts_and_scores_are_in_the_order_of_the_texts(tmp_path: Path) -> None:
    wanted = expected_embedding("a quiet garden", 48)
    expected = [cosine(wanted, expected_embedding(text, 48)) for text in TEXTS]
    async with openai_lane(tmp_path, POOLING) as lane, client_of(lane) as client:
        body: dict[str, Any] = {"model": "sim", "query": "a quiet garden", "documents": TEXTS}
        ranked = (await client.post("/v1/rerank", json=body)).json()
        best = (await client.post("/v1/rerank", json={**body, "top_n": 1, "return_documents": False})).json()
        objects = {**body, "documents": [{"text": text} for text in TEXTS]}
        as_objects = (await client.post("/v1/rerank", json=objects)).json()
        one_to_many = (
            await client.post("/v1/score", json={"model": "sim", "queries": "a quiet garden", "documents": TEXTS})
        ).json()
        pairs = (await client.post("/v1/score", json={"model": "sim", "text_1": TEXTS, "text_2": TEXTS})).json()
    order = sorted(range(3), key=lambda index: -expected[index])
    assert [entry["index"] for entry in ranked["results"]] == order
    assert [entry["relevance_score"] for entry in ranked["results"]] == pytest.approx(
        [expected[index] for index in order], abs=1e-6
    )
    assert ranked["results"][0]["document"] == {"text": "a quiet garden", "multi_modal": None}
    assert ranked["usage"]["prompt_tokens"] == tokens("a quiet garden", *TEXTS)
    assert best["results"] == [{"index": order[0], "relevance_score": ranked["results"][0]["relevance_score"]}]
    assert as_objects["results"] == ranked["results"]
    assert [entry["score"] for entry in one_to_many["data"]] == pytest.approx(expected, abs=1e-6)
    assert [entry["score"] for entry in pairs["data"]] == pytest.approx([1.0] * 3, abs=1e-6)
    assert one_to_many["object"] == "list"
    assert one_to_many["data"][1]["index"] == 1


async def test_texts_and_conversations_are_tokenized_and_tokens_turned_back(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello"}]
    generating = SimSettings(decode_step_ms=1.0, max_model_len=512)
    async with openai_lane(tmp_path, generating) as lane, client_of(lane) as client:
        plain = (await client.post("/v1/tokenize", json={"model": "sim", "prompt": "hello world"})).json()
        with_texts = {"model": "sim", "prompt": "hello world", "return_token_strs": True}
        texts = (await client.post("/v1/tokenize", json=with_texts)).json()
        rendered = (await client.post("/v1/tokenize", json={"model": "sim", "messages": chat})).json()
        open_ended = {"model": "sim", "messages": chat, "add_generation_prompt": False}
        unopened = (await client.post("/v1/tokenize", json=open_ended)).json()
        back = (await client.post("/v1/detokenize", json={"model": "sim", "tokens": plain["tokens"]})).json()
    spelled = sim_text.tokenize("hello world")
    assert plain == {"count": len(spelled), "max_model_len": 512, "tokens": spelled, "token_strs": None}
    assert texts["token_strs"] == [sim_text.token_text(token) for token in spelled]
    assert rendered["tokens"] == sim_text.render_chat([ChatMessage(role="user", content="hello")])
    assert 0 < unopened["count"] < rendered["count"]
    assert back == {"prompt": "hello world"}


LONG = "word " * 70
REFUSED: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("embeddings", {}, "input", "missing_required_parameter"),
    ("embeddings", {"input": []}, "input", "empty_array"),
    ("embeddings", {"input": ""}, "input", "invalid_value"),
    ("embeddings", {"input": ["a", ""]}, "input[1]", "invalid_value"),
    ("embeddings", {"input": ["a", 1]}, "input", "invalid_type"),
    ("embeddings", {"input": [1, "a"]}, "input", "invalid_type"),
    ("embeddings", {"input": [[1], []]}, "input[1]", "empty_array"),
    ("embeddings", {"input": [True]}, "input", "invalid_type"),
    ("embeddings", {"input": [-1]}, "input", "invalid_value"),
    ("embeddings", {"input": {"text": "a"}}, "input", "invalid_type"),
    ("embeddings", {"input": ["a"] * 2049}, "input", "array_above_max_length"),
    ("embeddings", {"input": [*["a"] * 300, LONG]}, "input[300]", "context_length_exceeded"),
    ("embeddings", {"input": LONG}, "input", "context_length_exceeded"),
    ("embeddings", {"input": [[1], [2, 10**8]]}, "input[1][1]", "invalid_value"),
    ("embeddings", {"input": [2, 10**8]}, "input[1]", "invalid_value"),
    ("embeddings", {"input": "a", "dimensions": 0}, "dimensions", "integer_below_min_value"),
    ("embeddings", {"input": "a", "dimensions": 49}, "dimensions", "integer_above_max_value"),
    ("embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format", "invalid_value"),
    ("embeddings", {"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "integer_below_min_value"),
    ("embeddings", {"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "integer_below_min_value"),
    ("embeddings", {"input": "a", "surprise": 1}, "surprise", "unknown_parameter"),
    ("embeddings", {"input": "a", "model": "other"}, "model", "model_not_found"),
    ("rerank", {"documents": ["a"]}, "query", "missing_required_parameter"),
    ("rerank", {"query": "a", "documents": []}, "documents", "empty_array"),
    ("rerank", {"query": "a", "documents": ["a", LONG]}, "documents[1]", "context_length_exceeded"),
    ("rerank", {"query": LONG, "documents": ["a"]}, "query", "context_length_exceeded"),
    ("rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n", "integer_below_min_value"),
    ("score", {}, "queries", "missing_required_parameter"),
    ("score", {"queries": "a"}, "documents", "missing_required_parameter"),
    ("score", {"queries": "a", "text_2": "b"}, "text_2", "invalid_value"),
    ("score", {"queries": ["a", "b"], "documents": ["a", "b", "c"]}, "queries", "invalid_value"),
    ("score", {"text_1": ["a", LONG], "text_2": ["a", "b"]}, "text_1[1]", "context_length_exceeded"),
    ("score", {"data_1": "a", "data_2": ["a", LONG]}, "data_2[1]", "context_length_exceeded"),
    ("tokenize", {}, "prompt", "missing_required_parameter"),
    ("tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt", "invalid_value"),
    ("tokenize", {"prompt": "a", "tools": []}, "tools", "invalid_value"),
    ("tokenize", {"prompt": "x" * 100_000}, "prompt", "context_length_exceeded"),
    ("detokenize", {"tokens": [1, 10**9]}, "tokens[1]", "invalid_value"),
    ("detokenize", {"tokens": [1] * 65}, "tokens", "context_length_exceeded"),
    ("detokenize", {"tokens": "a"}, "tokens", "invalid_type"),
]


async def test_bad_bodies_are_refused_in_the_clients_terms(tmp_path: Path) -> None:
    async with openai_lane(tmp_path, POOLING) as lane, client_of(lane) as client:
        for path, fields, param, code in REFUSED:
            answer = await client.post(f"/v1/{path}", json={"model": "sim", **fields})
            error = answer.json()["error"]
            assert (error["param"], error["code"]) == (param, code), (path, fields, error)
            assert answer.status_code == (404 if code == "model_not_found" else 400)
            assert param in (None, "model") or param in error["message"]
        assert (await client.get("/v1/embeddings")).status_code == 405
        fine = await client.post("/v1/embeddings", json={"model": "sim", "input": "still there"})
        assert fine.status_code == 200


async def test_a_call_moves_when_its_worker_stops_before_it_has_answered(tmp_path: Path) -> None:
    async with openai_lane(tmp_path, SLOW, workers=2) as lane, client_of(lane) as client:
        body = {"model": "sim", "input": "a"}
        first = await client.post("/v1/embeddings", json=body)
        assert first.status_code == 200
        # Both workers are busy with some of these when one of them goes.
        calls = [asyncio.create_task(client.post("/v1/embeddings", json=body)) for _ in range(4)]
        await asyncio.sleep(0.2)
        lane.stop_worker(int(first.headers["x-tokenloom-worker"].rpartition("-")[2]))
        answers = [await call for call in calls]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.json()["data"][0]["embedding"][0] for answer in answers}) == 1


async def test_a_client_that_leaves_frees_the_engine_for_the_next(tmp_path: Path) -> None:
    slow = SimSettings(runner="pooling", decode_step_ms=1.0, prefill_tokens_per_second=4)
    async with openai_lane(tmp_path, slow) as lane, client_of(lane) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/embeddings", json={"model": "sim", "input": "word " * 60}, timeout=0.3)
        began = monotonic()
        answer = await client.post("/v1/embeddings", json={"model": "sim", "input": "a"})
        assert answer.status_code == 200
        assert monotonic() - began < 3
