"""The engine that is a server with OpenAI's API, before a real llama.cpp."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from services.common.errors import MeshError, Reason
from services.common.settings_worker import UpstreamSettings
from services.inference.openai_engine import OpenAIEngine
from services.inference.output import FinishReason
from services.inference.request import ChatMessage, Generation, Sampling, StructuredOutput
from tests.support.llama_server import LlamaServer, llama_server
from tests.support.sinks import Kept
from tests.support.upstreams import generation, run, settings_for
from tests.support.waiting import eventually

pytestmark = pytest.mark.alone

GREEDY = Sampling(temperature=0, max_tokens=12, ignore_eos=True)
SAID = [ChatMessage(role="user", content="Tell me a story.")]
SCHEMA = '{"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": false}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    with llama_server(tmp_path_factory.mktemp("llama")) as running:
        yield running


@asynccontextmanager
async def engine_on(server: LlamaServer) -> AsyncIterator[OpenAIEngine]:
    async with OpenAIEngine(settings_for(server.url, flavour="llama_cpp"), {}) as engine:
        yield engine


def ask(server: LlamaServer, path: str, **body: Any) -> Any:
    answer = httpx.post(f"{server.url}{path}", json={"model": "demo", **body}, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_texts_tokens_and_conversations_say_what_the_server_says(server: LlamaServer) -> None:
    # What it does when it is not told, llama.cpp samples otherwise than OpenAI.
    plain = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "top_k": 0, "min_p": 0.0, "top_p": 1.0}
    ids = ask(server, "/tokenize", content="Once upon a time")["tokens"]
    text = ask(server, "/v1/completions", prompt="Once upon a time", **plain)
    messages = [{"role": "user", "content": SAID[0].content}]
    said = ask(server, "/v1/chat/completions", messages=messages, **plain)
    async with engine_on(server) as engine:
        assert (engine.card.max_context_tokens, engine.card.vocabulary_size) == (1024, 2048)
        for prompt in ("Once upon a time", ids):
            kept = await run(engine, generation(prompt, sampling=GREEDY))
            assert kept.text == text["choices"][0]["text"]
            assert kept.reason is FinishReason.LENGTH
            assert kept.usage is not None
            assert (kept.usage.prompt, kept.usage.output) == (len(ids), 12)
        kept = await run(engine, generation(SAID, sampling=GREEDY))
        assert kept.text == said["choices"][0]["message"]["content"]
        assert kept.usage is not None
        assert kept.usage.prompt == said["usage"]["prompt_tokens"]
        assert engine.load.decode_step_seconds is not None
        assert engine.load.running == engine.load.waiting == 0


async def test_parameters_mean_there_what_they_mean_here(server: LlamaServer) -> None:
    async with engine_on(server) as engine:
        plain = await run(engine, generation(sampling=replace(GREEDY, logprob_count=2)))
        ids = [each.chosen.token_id for each in plain.logprobs]
        assert "".join(each.chosen.token for each in plain.logprobs) == plain.text
        assert all(len(each.alternatives) == 2 for each in plain.logprobs)
        stop = plain.text[8:11]
        stopped = await run(engine, generation(sampling=replace(GREEDY, stop=(stop,))))
        assert (stopped.text, stopped.reason) == (plain.text[: plain.text.index(stop)], FinishReason.STOP)
        banned = await run(engine, generation(sampling=replace(GREEDY, logit_bias={ids[0]: -100.0}, logprob_count=1)))
        assert ids[0] not in [each.chosen.token_id for each in banned.logprobs]
        one = Sampling(temperature=1.5, top_k=1, max_tokens=12, ignore_eos=True, seed=-7)
        assert (await run(engine, generation(sampling=one))).text == plain.text
        seeded = Sampling(temperature=1.5, max_tokens=12, ignore_eos=True, seed=7)
        twice = [(await run(engine, generation(sampling=seeded))).text for _ in range(2)]
        assert twice[0] == twice[1] != plain.text


@pytest.mark.parametrize("prompt", ["Is it?", SAID], ids=["text", "chat"])
async def test_outputs_keep_to_a_schema(server: LlamaServer, prompt: Any) -> None:
    form = StructuredOutput(kind="json_schema", value=SCHEMA)
    async with engine_on(server) as engine:
        held = await run(engine, generation(prompt, structured_output=form, sampling=Sampling(temperature=0, seed=1)))
    assert msgspec.json.decode(held.text) == {"a": "x"}


@pytest.mark.parametrize(
    ("asked", "reason", "field"),
    [
        (generation("word " * 3000), Reason.CONTEXT_LENGTH_EXCEEDED, None),
        (generation(sampling=Sampling(min_tokens=2)), Reason.UNIMPLEMENTED, "sampling.min_tokens"),
        (generation(emitted_token_ids=[5]), Reason.NO_READY_WORKER, "emitted_token_ids"),
    ],
    ids=lambda value: value.name if isinstance(value, Reason) else None,
)
async def test_what_it_can_not_do_is_refused_as_ours(
    server: LlamaServer, asked: Generation, reason: Reason, field: str | None
) -> None:
    async with engine_on(server) as engine:
        with pytest.raises(MeshError) as caught:
            await run(engine, asked)
        assert (caught.value.reason, caught.value.field) == (reason, field)
        with pytest.raises(MeshError, match="doesn't tell of tokens"):
            await engine.tokenize("a")


async def test_an_abort_stops_the_server(server: LlamaServer) -> None:
    async with engine_on(server) as engine:
        kept = Kept()
        long = Sampling(temperature=0, max_tokens=900, ignore_eos=True)
        await engine.submit(generation(sampling=long), kept)
        await eventually(lambda: bool(kept.text), within=5)
        engine.abort("one")
        came = kept.text
        # Until it has noticed, its metrics say nothing.
        await eventually(lambda: _is_idle(server), within=5)
        assert kept.text == came
        assert not kept.ended.is_set()
        assert engine.load.running == 0


def _is_idle(server: LlamaServer) -> bool:
    return not any(slot["is_processing"] for slot in httpx.get(f"{server.url}/slots").json())


async def test_a_server_that_hangs_is_known_to_within_3_s_and_taken_back(server: LlamaServer) -> None:
    default = UpstreamSettings(url=server.url).probe_seconds
    async with OpenAIEngine(settings_for(server.url, flavour="llama_cpp", probe_seconds=default), {}) as engine:
        starts = engine.load.starts
        kept = Kept()
        await engine.submit(generation(sampling=replace(GREEDY, max_tokens=900)), kept)
        server.hang()
        try:
            await eventually(lambda: bool(engine.load.trouble), within=3)
            with pytest.raises(MeshError) as caught:
                await run(engine, generation())
            assert caught.value.reason is Reason.NO_READY_WORKER
            async with asyncio.timeout(5):
                await kept.ended.wait()
            assert kept.error is not None
        finally:
            server.go_on()
        await eventually(lambda: not engine.load.trouble, within=5)
        assert engine.load.starts == starts + 1
        assert (await run(engine, generation(sampling=GREEDY))).reason is FinishReason.LENGTH


async def test_a_server_that_is_slow_with_a_long_prompt_is_left_alone(tmp_path: Path) -> None:
    with llama_server(tmp_path, context=16_384) as server:
        default = UpstreamSettings(url=server.url).probe_seconds
        async with OpenAIEngine(settings_for(server.url, flavour="llama_cpp", probe_seconds=default), {}) as engine:
            kept = Kept()
            begun = time.monotonic()
            crawling = asyncio.create_task(_crawl(server))
            try:
                await engine.submit(generation("word " * 3_500, sampling=GREEDY), kept)
                await asyncio.wait_for(kept.ended.wait(), 30)
            finally:
                crawling.cancel()
                await asyncio.wait([crawling])
                server.go_on()
            assert time.monotonic() - begun > 3
            assert kept.reason is FinishReason.LENGTH
            assert (engine.load.trouble, engine.load.starts) == ("", 1)


async def _crawl(server: LlamaServer) -> None:
    """Lets it have a ninth of the time, in pieces."""
    while True:
        server.hang()
        await asyncio.sleep(0.2)
        server.go_on()
        await asyncio.sleep(0.025)
