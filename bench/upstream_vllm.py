"""The engine that is a server with OpenAI's API, before a real `vllm serve`: `python -m pytest bench/upstream_vllm.py`.

What starts half a minute and is asked beside it, over every parameter; tests/e2e/test_pooling.py has the same server.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from services.common.errors import MeshError, Reason
from services.common.settings_worker import UpstreamSettings, WorkerSettings
from services.inference.engine import Capability
from services.inference.openai_engine import OpenAIEngine
from services.inference.output import EngineLostError, FinishReason
from services.inference.request import ChatMessage, ChatOptions, Generation, Sampling, StructuredOutput, Tool
from tests.support.sinks import Kept
from tests.support.upstreams import generation, run, settings_for
from tests.support.vllm_server import vllm_server
from tests.support.waiting import eventually

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240)]
GREEDY = Sampling(temperature=0, max_tokens=12, ignore_eos=True)
SAID = [ChatMessage(role="user", content="Tell me a story.")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of vLLM's own server."""
    arguments = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-prompt-tokens-details")
    with vllm_server(tmp_path_factory.mktemp("upstream"), *arguments) as running:
        yield running.wait(within=200).url


@asynccontextmanager
async def engine_on(url: str, **upstream: Any) -> AsyncIterator[OpenAIEngine]:
    async with OpenAIEngine(settings_for(url, flavour="vllm", **upstream), {}) as engine:
        yield engine


def ask(server: str, path: str, **body: Any) -> Any:
    answer = httpx.post(f"{server}{path}", json={"model": "demo", **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_text_tokens_and_chat_say_what_the_server_says(server: str) -> None:
    common = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    expected = ask(server, "/v1/completions", prompt="Once upon a time", **common)
    (choice,) = expected["choices"]
    async with engine_on(server) as engine:
        assert engine.card.max_context_tokens == 2048
        assert Capability.CHAT in engine.card.capabilities
        for prompt in ("Once upon a time", choice["prompt_token_ids"]):
            kept = await run(engine, generation(prompt))
            assert (kept.text, kept.token_ids) == (choice["text"], choice["token_ids"])
            assert kept.starts[0][0] == expected["usage"]["prompt_tokens"]
            assert kept.reason is FinishReason.LENGTH
            assert kept.usage is not None
            assert (kept.usage.prompt, kept.usage.output) == (expected["usage"]["prompt_tokens"], 12)
        messages = [{"role": "user", "content": SAID[0].content}]
        (answer,) = ask(server, "/v1/chat/completions", messages=messages, **common)["choices"]
        kept = await run(engine, generation(SAID))
        assert (kept.text, kept.token_ids) == (answer["message"]["content"], answer["token_ids"])
        assert engine.load.decode_step_seconds is not None
        assert engine.load.running == engine.load.waiting == 0


async def test_every_parameter_means_there_what_it_means_here(server: str) -> None:
    async with engine_on(server) as engine:
        plain = await run(engine, generation())
        stop = plain.text[8:11]
        stopped = await run(engine, generation(sampling=replace(GREEDY, stop=(stop,))))
        assert (stopped.text, stopped.reason) == (plain.text[: plain.text.index(stop)], FinishReason.STOP)
        assert stopped.stop_cause == stop
        by_token = await run(engine, generation(sampling=replace(GREEDY, stop_token_ids=(plain.token_ids[3],))))
        assert by_token.stop_cause == plain.token_ids[3]
        first = plain.token_ids[0]
        banned = await run(engine, generation(sampling=replace(GREEDY, logit_bias={first: -100.0})))
        assert first not in banned.token_ids
        allowed = await run(engine, generation(sampling=replace(GREEDY, allowed_token_ids=tuple(plain.token_ids[:2]))))
        assert set(allowed.token_ids) <= set(plain.token_ids[:2])
        one = Sampling(temperature=1.5, top_k=1, max_tokens=12, ignore_eos=True, seed=7)
        assert (await run(engine, generation(sampling=one))).token_ids == plain.token_ids
        seeded = Sampling(temperature=1.5, max_tokens=12, ignore_eos=True, seed=7)
        twice = [(await run(engine, generation(sampling=seeded))).token_ids for _ in range(2)]
        assert twice[0] == twice[1] != plain.token_ids
        short = await run(engine, generation(prompt_token_limit=2))
        assert short.usage is not None
        assert short.usage.prompt == 2


async def test_choices_logprobs_forms_and_echo_are_the_servers(server: str) -> None:
    async with engine_on(server) as engine:
        some = await run(engine, generation(choices=2, sampling=replace(GREEDY, temperature=1.0, seed=3)))
        assert set(some.choice_ends) == {0, 1}
        assert some.usage is not None
        assert some.usage.output == 24
        for prompt in ("Once upon a time", SAID):
            told = await run(engine, generation(prompt, sampling=replace(GREEDY, logprob_count=2)))
            assert len(told.logprobs) == 12
            assert [each.chosen.token_id for each in told.logprobs] == told.token_ids
            assert all(len(each.alternatives) == 2 and each.chosen.logprob <= 0 for each in told.logprobs)
        form = StructuredOutput(kind="choice", choices=("yes", "no"))
        for prompt in ("Is it?", SAID):
            held = await run(engine, generation(prompt, structured_output=form, sampling=Sampling(temperature=0)))
            assert held.text in ("yes", "no")
        echoed = await run(engine, generation(echo=True))
        assert echoed.echo is not None
        assert echoed.echo.text == "Once upon a time"
        assert len(echoed.echo.token_ids) == echoed.starts[0][0]


async def test_a_forced_call_comes_as_a_call(server: str) -> None:
    schema = '{"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}'
    tool = Tool(name="weather", description="Tells the weather.", parameters_json=schema)
    options = ChatOptions(tools=[tool], tool_choice="function", function_name="weather")
    async with engine_on(server, capabilities=["generate", "chat", "tools"]) as engine:
        kept = await run(engine, generation(SAID, chat=options, sampling=Sampling(temperature=0, max_tokens=64)))
    calls = [call for delta in kept.deltas for call in delta.tool_calls]
    assert calls[0].name == "weather"
    assert msgspec.json.decode("".join(call.arguments_json for call in calls)) is not Ellipsis
    assert kept.token_ids


async def test_tokens_go_both_ways(server: str) -> None:
    async with engine_on(server) as engine:
        ids = await engine.tokenize("Once upon a time")
        assert await engine.detokenize(ids) == "Once upon a time"
        assert "".join(await engine.token_texts(ids)) == "Once upon a time"
        assert len(await engine.tokenize(SAID)) > len(await engine.tokenize(SAID[0].content))


@pytest.mark.parametrize(
    ("asked", "reason", "field"),
    [
        (generation(sampling=Sampling(max_tokens=5000)), Reason.CONTEXT_LENGTH_EXCEEDED, "max_tokens"),
        (generation("word " * 3000), Reason.CONTEXT_LENGTH_EXCEEDED, None),
        (generation(structured_output=StructuredOutput(kind="regex", value="((")), Reason.INVALID_REQUEST, None),
        (
            generation(sampling=replace(GREEDY, prompt_logprob_count=1)),
            Reason.UNIMPLEMENTED,
            "sampling.prompt_logprob_count",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Reason) else None,
)
async def test_what_the_server_refuses_is_told_as_ours(
    server: str, asked: Generation, reason: Reason, field: str | None
) -> None:
    async with engine_on(server) as engine:
        with pytest.raises(MeshError) as caught:
            await run(engine, asked)
        assert caught.value.reason is reason
        assert field is None or caught.value.field == field


async def test_an_abort_stops_the_server(server: str) -> None:
    async with engine_on(server) as engine:
        kept = Kept()
        await engine.submit(generation(sampling=Sampling(temperature=0, max_tokens=1900, ignore_eos=True)), kept)
        await eventually(lambda: bool(kept.token_ids), within=10)
        engine.abort("one")
        came = len(kept.token_ids)
        await eventually(lambda: not _running(server), within=10)
        assert len(kept.token_ids) == came
        assert not kept.ended.is_set()
        assert engine.load.running == 0


def _running(server: str) -> float:
    metrics = httpx.get(f"{server}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in metrics if line.startswith("vllm:num_requests_running{"))


@pytest.mark.parametrize("prompt", ["Once upon a time", SAID, [5, 6, 7, 8]], ids=["text", "chat", "tokens"])
async def test_a_generation_goes_on_where_it_was(server: str, prompt: Any) -> None:
    async with engine_on(server) as engine:
        whole = await run(engine, generation(prompt))
        for count in (1, 5, 11, 12):
            emitted = whole.token_ids[:count]
            rest = await run(engine, generation(prompt, emitted_token_ids=emitted))
            assert [*emitted, *rest.token_ids] == whole.token_ids
            assert whole.text.endswith(rest.text)
            assert rest.usage is not None
            assert whole.usage is not None
            assert (rest.usage.prompt, rest.usage.output) == (whole.usage.prompt, 12)
            assert rest.reason is FinishReason.LENGTH
        other = [*whole.token_ids[:3], (whole.token_ids[3] + 1) % 500]
        with pytest.raises(MeshError, match="something else"):
            await run(engine, generation(prompt, emitted_token_ids=other))


async def test_a_model_that_is_not_there_is_named_at_the_start(server: str) -> None:
    with pytest.raises(Exception, match="has no model 'nope', it has 'demo'"):
        async with OpenAIEngine(_other_model(settings_for(server)), {}):
            pass


async def test_an_engine_that_hangs_behind_a_healthy_server_is_known_to_within_3_s(tmp_path: Path) -> None:
    default = UpstreamSettings(url="http://far").probe_seconds
    with vllm_server(tmp_path, own_process=True) as server:
        await asyncio.to_thread(server.wait, within=200)
        async with engine_on(server.url, probe_seconds=default) as engine:
            # A prompt that fills several steps is none.
            assert (await run(engine, generation("word " * 700))).error is None
            kept, core = Kept(), server.engine_core()
            await engine.submit(generation(sampling=replace(GREEDY, max_tokens=1_500)), kept)
            await eventually(lambda: len(kept.token_ids) > 10, within=10)
            core.suspend()
            try:
                await asyncio.wait_for(kept.ended.wait(), 3)
                assert isinstance(kept.error, EngineLostError)
                assert engine.load.trouble == "the server behind this worker makes no progress"
                assert (await asyncio.to_thread(httpx.get, f"{server.url}/health")).status_code == 200
            finally:
                core.resume()
            await eventually(lambda: not engine.load.trouble, within=5)
            assert (await run(engine, generation())).reason is FinishReason.LENGTH


def _other_model(settings: WorkerSettings) -> WorkerSettings:
    assert settings.upstream is not None
    upstream = msgspec.structs.replace(settings.upstream, model="nope")
    return msgspec.structs.replace(settings, upstream=upstream)
