"""The clients that people use, unchanged, in one list of scenarios against real vLLM.

The official SDK for Python, which is installed for tests, always plays, with what `make up` starts. All others do after
`scripts/client-venvs`, and then there is more to ask: a model that thinks, and one that embeds.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from services.common.keystore import KeyStore
from services.common.quota import KeyLimits
from tests.support.clients import CLIENT_PYTHON, PROGRAMS, Program, are_installed, running_programs
from tests.support.demo_model import demo_model
from tests.support.mesh import Mesh, running_mesh
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
CONFIG: Final = """\
models:
  - {{name: demo, path: {model}, tool_call_parser: hermes, reasoning_parser: deepseek_v3}}
  - {{name: demo-embed, path: {model}}}
pools:
  - name: talk
    serves: [demo]
    workers: [{{name: talk-0, engine_args: {{structured_outputs_config: {{enable_in_reasoning: true}}}}}}]
  - name: embed
    serves: [demo-embed]
    workers: [{{name: embed-0, engine_args: {{runner: pooling, convert: embed, max_model_len: 256}}}}]
"""
OURS: Final = "openai-python"
OPENAI: Final = (OURS, "openai-python-2", "openai-node")
ALL: Final = tuple(PROGRAMS)
INSTALLED: Final = are_installed()
MESSAGES: Final = [{"role": "user", "content": "How is the weather?"}]
WITHIN: Final = 90.0
ROOT: Final = Path(__file__).parents[2]


def clients(*names: str, of_demo: bool = True) -> pytest.MarkDecorator:
    """Runs a test with each of these clients, as far as they are installed.

    `of_demo`: whether the model that `make up` makes can do it.
    """
    missing = pytest.mark.skipif(not INSTALLED, reason="the clients are not installed: run scripts/client-venvs")
    plain = [pytest.param(name, marks=() if name == OURS and of_demo else missing) for name in names]
    return pytest.mark.parametrize("client", plain)


@dataclass(frozen=True, slots=True)
class Stage:
    """The mesh and those who ask it."""

    mesh: Mesh
    programs: dict[str, Program]
    target: dict[str, str]
    workers: tuple[str, ...]
    """Those that talk."""

    def play(self, client: str, scenario: str) -> dict[str, Any]:
        """What a client saw in a scenario."""
        self.programs[client].ask(scenario, self.target)
        return self.programs[client].answer(scenario, WITHIN)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """An answer without any SDK."""
        answer = httpx.post(f"{self.mesh.edge}/v1/{path}", json=body, headers=self.mesh.headers, timeout=60)
        assert answer.status_code == 200, answer.text
        parsed: dict[str, Any] = answer.json()
        return parsed

    def engines(self, metric: str) -> float:
        """A metric of vLLM's own, over all of them that talk."""
        return sum(self.mesh.metric(worker, f"vllm:{metric}") for worker in self.workers)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Stage]:
    """Everybody is there; the programs start while vLLM does."""
    folder = tmp_path_factory.mktemp("clients")
    with running_programs(ALL if INSTALLED else [OURS], folder) as programs, ExitStack() as meshes:
        if INSTALLED:
            config = folder / "mesh.yaml"
            config.write_text(CONFIG.format(model=demo_model()))
            mesh = meshes.enter_context(running_mesh(folder / "state", "--config", str(config), within=200))
        else:
            mesh = request.getfixturevalue("vllm_mesh")
        target = {"url": mesh.edge, "key": mesh.key, "limited_key": _limited_key(mesh.state_dir)}
        yield Stage(mesh, programs, target, ("talk-0",) if INSTALLED else ("worker-0", "worker-1"))


def _limited_key(state_dir: Path) -> str:
    """A key that may have one request at a time."""
    with KeyStore(state_dir / "keys.db") as store:
        return store.create("limited", limits=KeyLimits(concurrency=1))[1]


@pytest.fixture(scope="module")
def greedy(stage: Stage) -> str:
    """What the model says."""
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    text: str = stage.post("chat/completions", body)["choices"][0]["message"]["content"]
    assert text
    return text


@clients(*ALL)
def test_a_chat_says_what_the_model_says(stage: Stage, greedy: str, client: str) -> None:
    saw = stage.play(client, "chat")
    assert saw["text"] == greedy
    assert saw["finish"] == "length"
    assert saw["usage"] == [19, 12]


@clients(*ALL)
def test_a_streamed_chat_comes_in_pieces_with_its_usage(stage: Stage, greedy: str, client: str) -> None:
    saw = stage.play(client, "stream")
    assert "".join(saw["pieces"]) == greedy
    # Vercel's joins what has come by the time that it reads; that it reads while more comes is in the test of leaving.
    assert len(saw["pieces"]) > 5 or client == "vercel"
    assert saw["finish"] == "length"
    assert saw["usage"] == [19, 12]


def is_forecast(value: Any) -> bool:
    return set(value) == {"city", "days"} and value["city"] in ("Paris", "Rome") and 1 <= int(value["days"]) <= 9


@clients(*ALL)
def test_a_function_is_called_in_a_stream_and_its_result_goes_back(stage: Stage, client: str) -> None:
    saw = stage.play(client, "tools")
    assert saw["name"] == "get_weather"
    assert is_forecast(saw["arguments"])
    assert saw["streamed"]
    assert saw["after"]


@clients(*ALL)
def test_an_answer_is_parsed_into_the_type_that_was_asked_for(stage: Stage, client: str) -> None:
    assert is_forecast(stage.play(client, "structured"))


@clients(*ALL, of_demo=False)
def test_texts_are_embedded(stage: Stage, client: str) -> None:
    body = {"model": "demo-embed", "input": ["one", "two two", "three"]}
    expected = [entry["embedding"] for entry in stage.post("embeddings", body)["data"]]
    vectors = stage.play(client, "embeddings")["vectors"]
    assert len(vectors) == len(expected)
    for vector, right in zip(vectors, expected, strict=True):
        assert vector == pytest.approx(right, abs=1e-5)


@dataclass(frozen=True, slots=True)
class Failure:
    """How an error looks."""

    kind: str
    status: int
    code: str
    param: str | None
    message: str


FAILURES: Final = {
    "bad_key": Failure("AuthenticationError", 401, "invalid_api_key", None, "this API key is not valid"),
    "unknown_model": Failure("NotFoundError", 404, "model_not_found", "model", "'nothing' does not exist"),
    "bad_field": Failure("BadRequestError", 400, "decimal_above_max_value", "temperature", "temperature: expected"),
    "too_long": Failure("BadRequestError", 400, "context_length_exceeded", "messages", "2048 tokens"),
    "stream_error": Failure("BadRequestError", 400, "decimal_above_max_value", "top_p", "top_p: expected"),
}


@clients(*ALL)
@pytest.mark.parametrize("scenario", FAILURES)
def test_a_mistake_is_an_error_of_the_clients_own_kind_that_names_it(stage: Stage, scenario: str, client: str) -> None:
    expected, saw = FAILURES[scenario], stage.play(client, scenario)
    assert saw["class"] == (expected.kind if client != "vercel" else "AI_APICallError")
    assert (saw["status"], saw["code"], saw["param"]) == (expected.status, expected.code, expected.param)
    assert expected.message in saw["message"]
    assert saw["request_id"]
    assert not saw.get("retryable")


@clients(*ALL)
def test_a_refusal_is_tried_again_when_retry_after_says(stage: Stage, client: str) -> None:
    saw = stage.play(client, "busy")
    assert saw["statuses"][0] == 429
    assert saw["statuses"][-1] == 200
    assert saw["retry_after"][0] == "1"
    assert saw["waits"][0] >= 0.9


@clients(*ALL)
def test_a_stream_that_its_client_leaves_leaves_the_engine(stage: Stage, client: str) -> None:
    before = stage.engines("generation_tokens_total")
    assert stage.play(client, "cancel")["pieces"] == 5
    wait_until(lambda: stage.engines("num_requests_running") == 0, within=3)
    assert 5 <= stage.engines("generation_tokens_total") - before < 1900


@clients(*OPENAI, "langchain", "vercel")
def test_the_responses_api_answers_streams_remembers_and_calls(stage: Stage, greedy: str, client: str) -> None:
    saw = stage.play(client, "responses")
    assert saw["text"] == saw["streamed"] == saw["final"] == greedy
    assert saw.get("first_event", "response.created") == "response.created"
    first, second = saw["input_tokens"]
    assert second > first + 12
    assert is_forecast(saw["arguments"])
    assert saw["after"]
    assert is_forecast(saw["parsed"])


@clients(*OPENAI)
def test_a_batch_is_answered_line_by_line(stage: Stage, greedy: str, client: str) -> None:
    saw = stage.play(client, "batch")
    assert saw["status"] == "completed"
    assert saw["counts"] == {"total": 3, "completed": 3, "failed": 0}
    assert saw["ids"] == ["line-0", "line-1", "line-2"]
    assert saw["texts"] == [greedy] * 3
    assert saw["deleted"]


@clients(*ALL)
def test_log_probabilities_come_token_by_token(stage: Stage, greedy: str, client: str) -> None:
    saw = stage.play(client, "logprobs")
    # A token within a character has no text of its own, as with vLLM's own server.
    assert saw["text"] == greedy.replace("\N{REPLACEMENT CHARACTER}", "")
    assert len(saw["logprobs"]) == 12
    assert all(value <= 0 for value in saw["logprobs"])
    assert saw["alternatives"] == [2] * 12


@clients(*OPENAI, "langchain")
def test_several_choices_are_several_answers(stage: Stage, client: str) -> None:
    texts = stage.play(client, "several_choices")["texts"]
    assert len(texts) == len(set(texts)) == 3


@clients(*OPENAI, "langchain")
def test_several_prompts_have_an_answer_each_in_their_order(stage: Stage, client: str) -> None:
    body = {"model": "demo", "max_tokens": 5, "temperature": 0}
    expected = [stage.post("completions", {**body, "prompt": word})["choices"][0]["text"] for word in ("One", "Two")]
    assert stage.play(client, "several_prompts")["texts"] == expected


@clients(*OPENAI, "vercel", of_demo=False)
def test_thinking_is_told_from_the_answer(stage: Stage, client: str) -> None:
    saw = stage.play(client, "reasoning")
    assert saw == {"reasoning": "Rain, perhaps.", "content": "Fine.", "streamed": "Rain, perhaps."}


@clients(*OPENAI)
def test_models_are_listed_and_looked_up(stage: Stage, client: str) -> None:
    saw = stage.play(client, "models")
    assert ({"demo", "demo-embed"} if INSTALLED else {"demo"}) <= set(saw["ids"])
    assert saw["one"] == "demo"


@pytest.fixture(scope="module")
def outage(stage: Stage) -> None:
    """The gateway is killed while everybody asks, and started again by the launcher."""
    os.kill(int(stage.mesh.process("gateway")["pid"]), signal.SIGKILL)
    for program in stage.programs.values():
        program.ask("outage", stage.target)


@clients(*ALL)
@pytest.mark.usefixtures("outage")
def test_a_gateway_that_is_away_is_asked_again_until_it_is_back(stage: Stage, client: str) -> None:
    saw = stage.programs[client].answer("outage", WITHIN)
    assert saw["statuses"][0] == 503
    assert set(saw["statuses"][:-1]) == {503}
    assert saw["statuses"][-1] == 200
    assert saw["retry_after"][0] == "1"
    assert saw["waits"][0] >= 0.9
    assert saw["text"]


@pytest.mark.skipif(not INSTALLED, reason="the clients are not installed: run scripts/client-venvs")
def test_the_example_answers_from_the_paragraph_that_is_meant(stage: Stage, tmp_path: Path) -> None:
    """The demo model's vectors mean nothing, except that a text is nearest to itself."""
    texts = ["A worker owns one engine.", "The router picks a worker.", "Envoy lets clients in.", "Redis is shared."]
    (tmp_path / "notes.md").write_text("\n\n".join(texts))
    store = tmp_path / "store"
    environment = {"PATH": os.environ["PATH"], "OPENAI_BASE_URL": f"{stage.mesh.edge}/v1"}
    for question in (texts[1], texts[3]):
        ran = subprocess.run(
            [CLIENT_PYTHON, "examples/rag.py", "--documents", str(tmp_path), "--store", str(store), "--sources", "2",
             "--max-tokens", "12", question],
            env={**environment, "OPENAI_API_KEY": stage.mesh.key},
            cwd=ROOT, capture_output=True, text=True, timeout=WITHIN, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        first, second, _, *answer = ran.stdout.splitlines()
        assert first == f"[1] {question}"
        assert second[4:] in texts
        assert "".join(answer).strip()
