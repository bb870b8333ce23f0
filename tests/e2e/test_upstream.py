"""Workers before somebody else's servers, here llama.cpp's own, which is killed and comes back."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.support.llama_server import LlamaServer, llama_server
from tests.support.mesh import Mesh, running_mesh
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.beside_others, pytest.mark.timeout(180)]
CONFIG = """\
models:
  - {{name: far}}
pools:
  - name: far
    serves: [far]
    workers:
      - name: far-0
        engine: openai
        upstream: {{url: "{url}/v1", model: demo, flavour: llama_cpp}}
"""
SAID: Any = [{"role": "user", "content": "Tell me a story."}]
# More than it says within a second.
LONG: dict[str, Any] = {"model": "far", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 16_000}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    with llama_server(tmp_path_factory.mktemp("llama"), context=16_384) as running:
        yield running


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, server: LlamaServer) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("upstream")
    config = folder / "mesh.yaml"
    config.write_text(CONFIG.format(url=server.url))
    with running_mesh(folder / "state", "--config", str(config)) as running:
        yield running


def say(client: openai.OpenAI) -> str:
    answer = client.chat.completions.create(model="far", messages=SAID, temperature=0, max_tokens=8)
    return answer.choices[0].message.content or ""


def load(mesh: Mesh) -> dict[str, Any]:
    answer = httpx.get(f"{mesh.edge}/api/v1/workers", headers=mesh.headers, timeout=10)
    (entry,) = answer.json()["workers"]
    found: dict[str, Any] = entry["load"]
    return found


def test_the_mesh_says_what_the_server_says(mesh: Mesh, server: LlamaServer) -> None:
    body = {"messages": SAID, "temperature": 0, "max_tokens": 8, "top_k": 0, "min_p": 0.0, "top_p": 1.0}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=10)
    assert say(mesh.sdk()) == answer.json()["choices"][0]["message"]["content"]
    with pytest.raises(openai.BadRequestError, match="min_tokens") as caught:
        mesh.sdk().chat.completions.create(model="far", messages=SAID, extra_body={"min_tokens": 2})
    assert caught.value.param == "min_tokens"


def test_a_server_that_is_killed_costs_its_streams_and_is_taken_back_when_it_returns(
    mesh: Mesh, server: LlamaServer
) -> None:
    client = mesh.sdk()
    before = say(client)
    stream = client.completions.create(**LONG, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    server.hang()
    server.kill()
    # The server tells no tokens, so that nobody could go on where it was.
    with pytest.raises(openai.APIError) as caught:
        for _ in stream:
            pass
    assert caught.value.code == "engine_error"
    wait_until(lambda: load(mesh).get("state") == "WORKER_STATE_UNAVAILABLE", within=3)
    assert load(mesh)["state_reason"] == "the server behind this worker does not answer"
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(say, client)
        server.start()
        assert waiting.result(20) == before
    assert load(mesh)["state"] == "WORKER_STATE_READY"
    assert load(mesh).get("running_count", 0) == 0
