"""Embeddings, reranking, scores and tokens over the whole mesh, simulated and by real vLLM, which says the same."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from tokenloom.inference.v1 import inference_pb2, inference_pb2_grpc

from services.inference import sim_text
from services.inference.sim_embedding import expected_embedding
from tests.support.demo_model import demo_model
from tests.support.mesh import Mesh, running_mesh
from tests.support.vllm_server import VllmServer, vllm_server
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.beside_others, pytest.mark.vllm, pytest.mark.timeout(240)]
TEXTS = ["a quiet garden", "the engine of a large machine", "hello world"]
CONFIG = """\
models:
  - {{name: talk}}
  - {{name: sim-embed}}
  - {{name: demo, path: {model}}}
  - {{name: far}}
pools:
  - name: talk
    serves: [talk]
    workers: [{{name: talk-0, engine: sim}}]
  - name: sim-embed
    serves: [sim-embed]
    workers:
      - {{name: embed-0, engine: sim, sim: {{runner: pooling, decode_step_ms: 5}}}}
      - {{name: embed-1, engine: sim, sim: {{runner: pooling, decode_step_ms: 5}}}}
  - name: embed
    serves: [demo]
    workers:
      - {{name: vllm-0, engine_args: {{runner: pooling, convert: embed, max_model_len: 256}}}}
  - name: far
    serves: [far]
    workers:
      - name: far-0
        engine: openai
        upstream: {{url: "{url}/v1", model: demo, flavour: vllm, capabilities: [embed]}}
"""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, server: VllmServer) -> Iterator[Mesh]:
    """A mesh with a worker of each kind."""
    folder = tmp_path_factory.mktemp("pooling")
    config = folder / "mesh.yaml"
    config.write_text(CONFIG.format(model=demo_model(), url=server.url))
    with running_mesh(folder / "state", "--config", str(config), within=180) as running:
        server.wait(within=120)
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """vLLM's own server, which starts while the mesh does."""
    arguments = ("--runner", "pooling", "--convert", "embed", "--max-model-len", "256")
    with vllm_server(tmp_path_factory.mktemp("server"), *arguments, forks=True) as running:
        yield running


def post(mesh: Mesh, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(f"{mesh.edge}{path}", json=body, headers=mesh.headers, timeout=30)
    assert answer.status_code == 200, answer.text
    parsed: dict[str, Any] = answer.json()
    return parsed


def theirs(server: VllmServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    parsed: dict[str, Any] = answer.json()
    return parsed


def test_the_openai_sdk_embeds_over_the_edge(mesh: Mesh) -> None:
    answer = mesh.sdk().embeddings.create(model="sim-embed", input=TEXTS)
    for entry, text in zip(answer.data, TEXTS, strict=True):
        assert entry.embedding == pytest.approx(expected_embedding(text, 64), abs=1e-6)
    assert answer.usage.prompt_tokens == sum(len(sim_text.tokenize(text)) for text in TEXTS)


def test_a_stub_and_the_rest_bridge_embed_on_the_typed_lane(mesh: Mesh) -> None:
    with grpc.insecure_channel(mesh.edge_target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        answer = stub.Embed(
            inference_pb2.EmbedRequest(model="sim-embed", texts=TEXTS), metadata=mesh.metadata, timeout=10
        )
        scored = stub.Score(
            inference_pb2.ScoreRequest(model="sim-embed", query=TEXTS[0], texts=TEXTS),
            metadata=mesh.metadata,
            timeout=10,
        )
        back = stub.Detokenize(
            inference_pb2.DetokenizeRequest(model="talk", token_ids=sim_text.tokenize(TEXTS[0])),
            metadata=mesh.metadata,
            timeout=10,
        )
    assert scored.scores[0] == pytest.approx(1.0, abs=1e-6)
    assert back.text == TEXTS[0]
    rest = post(mesh, "/api/v1/embed", {"model": "sim-embed", "texts": TEXTS})
    for embedding, bridged, text in zip(answer.embeddings, rest["embeddings"], TEXTS, strict=True):
        assert list(embedding.values) == pytest.approx(expected_embedding(text, 64), abs=1e-6)
        assert bridged["values"] == pytest.approx(expected_embedding(text, 64), abs=1e-6)


def test_embeddings_are_those_of_vllms_own_server(mesh: Mesh, server: VllmServer) -> None:
    bodies: list[dict[str, Any]] = [
        {"input": TEXTS},
        {"input": "hello world"},
        {"input": [74, 467, 81]},
        {"input": [[74, 467, 81], [5, 6]]},
        {"input": TEXTS[1], "truncate_prompt_tokens": 3},
        {"input": TEXTS[1], "truncate_prompt_tokens": 3, "truncation_side": "left"},
        {"input": "word " * 400, "truncate_prompt_tokens": -1},
    ]
    for body in bodies:
        wanted = theirs(server, "/v1/embeddings", {"model": "demo", **body})
        answer = post(mesh, "/v1/embeddings", {"model": "demo", **body})
        assert answer["usage"]["prompt_tokens"] == wanted["usage"]["prompt_tokens"]
        assert answer.keys() == wanted.keys()
        for entry, expected in zip(answer["data"], wanted["data"], strict=True):
            assert entry["embedding"] == pytest.approx(expected["embedding"], abs=1e-4)
            assert entry["index"] == expected["index"]


def test_a_worker_before_that_server_says_what_it_says(mesh: Mesh, server: VllmServer) -> None:
    for given in (TEXTS, "hello world", [74, 467, 81]):
        wanted = theirs(server, "/v1/embeddings", {"model": "demo", "input": given})
        answer = post(mesh, "/v1/embeddings", {"model": "far", "input": given})
        assert answer["usage"]["prompt_tokens"] == wanted["usage"]["prompt_tokens"]
        for entry, expected in zip(answer["data"], wanted["data"], strict=True):
            assert entry["embedding"] == pytest.approx(expected["embedding"], abs=1e-6)
    wanted = theirs(server, "/tokenize", {"model": "demo", "prompt": "a quiet gärden"})
    assert post(mesh, "/v1/tokenize", {"model": "far", "prompt": "a quiet gärden"})["tokens"] == wanted["tokens"]
    # Nobody has to wait for somebody who can.
    body = {"model": "far", "queries": "a", "documents": ["b"]}
    scored = httpx.post(f"{mesh.edge}/v1/score", json=body, headers=mesh.headers)
    assert (scored.status_code, scored.json()["error"]["code"]) == (400, "unimplemented")


def test_reranking_and_scores_are_those_of_vllms_own_server(mesh: Mesh, server: VllmServer) -> None:
    rerank = {"model": "demo", "query": "hello garden", "documents": TEXTS, "top_n": 2}
    wanted, answer = theirs(server, "/v1/rerank", rerank), post(mesh, "/v1/rerank", rerank)
    assert answer.keys() == wanted.keys()
    assert answer["usage"]["prompt_tokens"] == wanted["usage"]["prompt_tokens"]
    for entry, expected in zip(answer["results"], wanted["results"], strict=True):
        assert entry["relevance_score"] == pytest.approx(expected["relevance_score"], abs=1e-4)
        assert (entry["index"], entry["document"]) == (expected["index"], expected["document"])
    for body in (
        {"queries": "hello garden", "documents": TEXTS},
        {"text_1": TEXTS, "text_2": TEXTS[::-1]},
        {"text_1": TEXTS[0], "text_2": TEXTS[1], "truncate_prompt_tokens": 2},
    ):
        wanted, answer = (
            theirs(server, "/v1/score", {"model": "demo", **body}),
            post(mesh, "/v1/score", {"model": "demo", **body}),
        )
        assert answer.keys() == wanted.keys()
        assert answer["usage"]["prompt_tokens"] == wanted["usage"]["prompt_tokens"]
        for entry, expected in zip(answer["data"], wanted["data"], strict=True):
            assert entry == {**expected, "score": pytest.approx(expected["score"], abs=1e-4)}


def test_tokens_are_those_of_vllms_own_server(mesh: Mesh, server: VllmServer) -> None:
    chat = [{"role": "user", "content": "hello garden"}]
    for body in ({"prompt": "a quiet gärden"}, {"prompt": "a b", "add_special_tokens": False}, {"messages": chat}):
        wanted = theirs(server, "/tokenize", {"model": "demo", **body})
        assert post(mesh, "/v1/tokenize", {"model": "demo", **body}) == wanted
        back = {"model": "demo", "tokens": wanted["tokens"]}
        assert post(mesh, "/v1/detokenize", back) == theirs(server, "/detokenize", back)


def test_a_prompt_that_is_too_long_is_refused_as_vllms_own_server_does(mesh: Mesh, server: VllmServer) -> None:
    body = {"model": "demo", "input": ["hello", "word " * 400]}
    assert httpx.post(f"{server.url}/v1/embeddings", json=body).status_code == 400
    answer = httpx.post(f"{mesh.edge}/v1/embeddings", json=body, headers=mesh.headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input[1]")


def test_embedding_goes_on_while_a_worker_is_killed_and_comes_back(mesh: Mesh) -> None:
    pid = int(mesh.process("embed-0")["pid"])
    os.kill(pid, signal.SIGKILL)
    body = {"model": "sim-embed", "input": TEXTS[0]}
    wanted = expected_embedding(TEXTS[0], 64)
    for _ in range(40):
        assert post(mesh, "/v1/embeddings", body)["data"][0]["embedding"] == pytest.approx(wanted, abs=1e-6)
    wait_until(lambda: mesh.process("embed-0")["pid"] != pid, within=30)


def test_models_say_what_they_are(mesh: Mesh) -> None:
    names = {model.id for model in mesh.sdk().models.list()}
    assert names == {"talk", "sim-embed", "demo", "far"}
