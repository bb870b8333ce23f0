"""Workers before servers with OpenAI's API that each do it in their own way, as they do it over a socket."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest

from services.common.config import ConfigError
from services.common.errors import MeshError, Reason
from services.common.settings_worker import UpstreamSettings, WatchdogSettings
from services.inference.engine import Capability
from services.inference.openai_engine import OpenAIEngine
from services.inference.output import EngineLostError, FinishReason
from services.inference.pooling import EmbedJob
from services.inference.request import ChatMessage, Sampling
from tests.support.far_server import Answer, FarServer, far_server, plain, streamed
from tests.support.sinks import Kept
from tests.support.upstreams import generation, run, settings_for
from tests.support.waiting import eventually

SAID = [ChatMessage(role="user", content="Hello")]
MODELS = plain({"object": "list", "data": [{"id": "demo", "object": "model", "owned_by": "library"}]})
CANARY = plain({"choices": [{"index": 0, "text": "a", "finish_reason": "length"}]})
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
Ask = Callable[[dict[str, Any]], Answer]


def piece(content: str | None = None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    delta: dict[str, Any] = {} if content is None else {"role": "assistant", "content": content}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **more}


USAGE = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}
WHOLE = (piece(""), piece("Hi "), piece("you"), piece(None, "stop"))


@asynccontextmanager
async def engine_before(
    answers: Mapping[str, Answer | Ask], environment: dict[str, str] | None = None, max_queued: int = 8, **given: Any
) -> AsyncIterator[tuple[OpenAIEngine, FarServer]]:
    async with far_server({"/v1/models": MODELS, TEXT: CANARY, CHAT: CANARY, **answers}) as far:
        settings = settings_for(far.url, max_queued=max_queued, **{"max_context_tokens": 64, **given})
        async with OpenAIEngine(settings, environment or {}) as engine:
            yield engine, far


async def test_ollama_tells_usage_at_the_end_and_nothing_of_its_context() -> None:
    async with engine_before({CHAT: streamed(*WHOLE, USAGE)}) as (engine, far):
        kept = await run(engine, generation(SAID))
        assert (kept.text, kept.token_ids, kept.reason) == ("Hi you", [], FinishReason.STOP)
        assert kept.usage is not None
        assert (kept.usage.prompt, kept.usage.output) == (4, 2)
        assert far.bodies(CHAT)[-1]["stream_options"] == {"include_usage": True}
        assert engine.card.max_context_tokens == 64
    with pytest.raises(ConfigError, match="max_context_tokens: missing"):
        async with engine_before({}, max_context_tokens=None):
            pass


async def test_llama_cpp_python_tells_no_usage_and_is_asked_to_count() -> None:
    answers = {CHAT: streamed(b": ping - 2026-11-21\r\n\r\n", *WHOLE), "/extras/tokenize/count": plain({"count": 5})}
    async with engine_before(answers, flavour="llama_cpp_python") as (engine, far):
        kept = await run(engine, generation(SAID))
        assert kept.usage is not None
        assert (kept.usage.prompt, kept.usage.output) == (5, 5)
        assert [body["input"] for body in far.bodies("/extras/tokenize/count")] == ["Hello", "Hi you"]


@pytest.mark.parametrize("is_done", [True, False])
async def test_a_server_that_tells_nothing_at_all_is_estimated_and_may_end_without_its_mark(is_done: bool) -> None:
    async with engine_before({CHAT: streamed(*WHOLE, done=is_done)}) as (engine, _):
        kept = await run(engine, generation(SAID))
        assert kept.usage is not None
        assert (kept.usage.prompt, kept.usage.output) == (2, 2)


async def test_events_may_be_cut_anywhere_and_end_with_either_line_end() -> None:
    whole = b"".join(streamed(*WHOLE, USAGE).pieces).replace(b"\n", b"\r\n")
    async with engine_before({CHAT: Answer(pieces=[bytes([byte]) for byte in whole])}) as (engine, _):
        assert (await run(engine, generation(SAID))).text == "Hi you"


REFUSALS = [
    (
        "ollama",
        plain({"error": {"message": 'model "demo" not found, try pulling it first', "type": "api_error"}}, 404),
        Reason.MODEL_NOT_FOUND,
    ),
    ("tgi", plain({"error": "Input validation error: `top_p` must be > 0", "error_type": "validation"}, 422), None),
    ("tgi overloaded", plain({"error": "Model is overloaded", "error_type": "overloaded"}, 429), Reason.NO_CAPACITY),
    ("fastapi", plain({"detail": [{"loc": ["body", "top_p"], "msg": "no"}]}, 422), None),
    ("a proxy", Answer(status=502, pieces=[b"<html>Bad Gateway</html>"]), Reason.ENGINE_FAILED),
    ("a redirect", plain({}, 307, location="http://127.0.0.1:1/v1"), Reason.ENGINE_FAILED),
    ("tgi's event", streamed({"error": "Request failed", "error_type": "generation"}), Reason.ENGINE_FAILED),
    ("vllm's event", streamed(piece("a"), {"error": {"message": "m", "code": 500}}), Reason.ENGINE_FAILED),
    ("no end", streamed(piece("a")), Reason.ENGINE_FAILED),
    ("broken off", streamed(piece("a"), done=False, breaks_off=True), Reason.ENGINE_FAILED),
    ("silence", streamed(piece("a"), done=False, is_silent=True), Reason.ENGINE_FAILED),
]


@pytest.mark.parametrize(("answer", "reason"), [each[1:] for each in REFUSALS], ids=[each[0] for each in REFUSALS])
async def test_what_goes_wrong_there_ends_one_generation_with_our_own_reason(
    answer: Answer, reason: Reason | None
) -> None:
    async with engine_before({CHAT: answer}, timeout_seconds=0.3) as (engine, _):
        with pytest.raises(MeshError) as caught:
            await run(engine, generation(SAID))
        assert caught.value.reason is (reason or Reason.INVALID_REQUEST)
        assert engine.load.running == 0


async def test_the_operators_key_is_sent_and_its_refusal_is_theirs_to_mend() -> None:
    async with engine_before({}, {"FAR_KEY": "sk-far"}, api_key_variable="FAR_KEY") as (_, far):
        assert {headers["authorization"] for _, _, headers in far.asked} == {"Bearer sk-far"}
    with pytest.raises(ConfigError, match="refuses the key"):
        async with engine_before({"/v1/models": plain({"error": {"message": "no"}}, 401)}):
            pass


async def test_what_is_full_is_refused_and_an_abort_hangs_up() -> None:
    silent = streamed(piece("a"), done=False, is_silent=True)
    async with engine_before({CHAT: silent}, max_running=1, max_queued=0) as (engine, far):
        kept = Kept()
        await engine.submit(generation(SAID), kept)
        await eventually(lambda: bool(kept.text), within=5)
        with pytest.raises(MeshError) as caught:
            await engine.submit(generation(SAID, id="two"), Kept())
        assert caught.value.reason is Reason.NO_CAPACITY
        engine.abort("one")
        await eventually(lambda: far.hung_up == 1, within=5)
        assert not kept.ended.is_set()


async def test_a_generation_that_is_aborted_before_its_first_turn_leaves_nothing() -> None:
    async with engine_before({CHAT: streamed(*WHOLE, USAGE)}) as (engine, _):
        submitting = asyncio.ensure_future(engine.submit(generation(SAID), Kept()))
        await asyncio.sleep(0)
        engine.abort("one")
        await asyncio.wait_for(submitting, 5)
        assert engine.load.running + engine.load.waiting == 0


async def test_a_server_that_is_away_is_known_to_be_and_must_work_to_be_taken_back() -> None:
    silent = streamed(piece("a"), done=False, is_silent=True)
    async with engine_before({CHAT: silent}, probe_seconds=0.05) as (engine, far):
        starts, kept = engine.load.starts, Kept()
        await engine.submit(generation(SAID), kept)
        far.answers["/v1/models"] = plain({"error": {"message": "starting"}}, 503)
        await eventually(lambda: bool(engine.load.trouble), within=5)
        await asyncio.wait_for(kept.ended.wait(), 5)
        assert kept.error is not None
        with pytest.raises(MeshError) as caught:
            await engine.submit(generation(SAID, id="two"), Kept())
        assert caught.value.reason is Reason.NO_READY_WORKER
        # It answers, but it does no work.
        far.answers |= {"/v1/models": MODELS, TEXT: plain({"error": {"message": "CUDA error"}}, 500)}
        tries = len(far.bodies(TEXT))
        await eventually(lambda: len(far.bodies(TEXT)) >= tries + 2, within=5)
        assert engine.load.trouble
        far.answers[TEXT] = CANARY
        await eventually(lambda: not engine.load.trouble, within=5)
        assert engine.load.starts == starts + 1


async def test_one_late_answer_is_no_trouble_and_several_are() -> None:
    async with engine_before({}, probe_seconds=0.05) as (engine, far):
        far.answers["/v1/models"] = plain({"error": {"message": "odd"}}, 500)
        asked = len(far.asked)
        await eventually(lambda: len(far.asked) > asked, within=5)
        assert not engine.load.trouble
        await eventually(lambda: bool(engine.load.trouble), within=5)
        assert len(far.asked) >= asked + 2


def wedged(_body: dict[str, Any]) -> Answer:
    """Its front answers everything, and nothing comes of it."""
    return Answer(is_silent=True)


FAR_VLLM = {"/health": Answer(), "/metrics": Answer()}
DEFAULT_PROBE: dict[str, Any] = {"probe_seconds": UpstreamSettings(url="http://far").probe_seconds}


# As often as may be, and as patient as may be: so that what takes seconds takes half a second.
SOON: dict[str, Any] = {"canary_seconds": 0.25, "watchdog": WatchdogSettings(silence_seconds=0.5)}


async def test_an_idle_server_whose_engine_is_wedged_is_known_within_3_s() -> None:
    async with engine_before(FAR_VLLM, flavour="vllm", **DEFAULT_PROBE) as (engine, far):
        await eventually(lambda: len(far.bodies(TEXT)) > 1, within=5)
        far.answers[TEXT] = wedged
        await eventually(lambda: bool(engine.load.trouble), within=3.2)
        assert engine.load.trouble == "the server behind this worker makes no progress"


@pytest.mark.parametrize("answer", [wedged, plain({"error": {"message": "CUDA error"}}, 500)], ids=["silent", "fails"])
async def test_a_stream_of_an_engine_that_is_wedged_behind_a_healthy_front_fails_within_3_s(answer: Answer) -> None:
    begun = streamed(piece("a"), done=False, is_silent=True)
    async with engine_before({CHAT: begun}, **DEFAULT_PROBE) as (engine, far):
        kept = Kept()
        await engine.submit(generation(SAID), kept)
        await eventually(lambda: bool(kept.text), within=2)
        far.answers[TEXT] = answer
        await asyncio.wait_for(kept.ended.wait(), 3.2)
        assert isinstance(kept.error, EngineLostError)
        assert engine.load.trouble


async def test_an_engine_that_works_again_is_taken_back() -> None:
    async with engine_before({}, flavour="llama_cpp_python", **SOON) as (engine, far):
        starts = engine.load.starts
        far.answers[TEXT] = plain({"error": {"message": "CUDA error"}}, 500)
        await eventually(lambda: bool(engine.load.trouble), within=3)
        far.answers[TEXT] = CANARY
        await eventually(lambda: not engine.load.trouble, within=3)
        assert engine.load.starts == starts + 1


async def test_an_idle_server_that_may_cost_money_is_not_made_to_work() -> None:
    async with engine_before({}, watchdog=WatchdogSettings(silence_seconds=0.5)) as (_, far):
        await asyncio.sleep(1.3)
        assert len(far.bodies(TEXT)) == 1


async def test_a_server_that_thinks_for_long_and_answers_others_is_left_alone() -> None:
    begun = streamed(piece("a"), done=False, is_silent=True)
    async with engine_before({CHAT: begun}, **SOON) as (engine, far):
        kept = Kept()
        await engine.submit(generation(SAID), kept)
        await asyncio.sleep(2)
        assert not kept.ended.is_set()
        assert not engine.load.trouble
        assert 3 <= len(far.bodies(TEXT)) <= 9


async def test_a_queue_of_others_before_an_engine_whose_counters_move_is_no_stall() -> None:
    steps = count()

    def metrics(_body: dict[str, Any]) -> Answer:
        return Answer(pieces=[b'vllm:iteration_tokens_total_count{model_name="demo"} %d' % next(steps)])

    async with engine_before({**FAR_VLLM, "/metrics": metrics}, flavour="vllm", **SOON) as (engine, far):
        far.answers[TEXT] = wedged
        await asyncio.sleep(1.5)
        assert not engine.load.trouble
        far.answers["/metrics"] = Answer()
        await eventually(lambda: bool(engine.load.trouble), within=3)


VECTORS = {"data": [{"index": 1, "embedding": [0.0, 1.0]}, {"index": 0, "embedding": [1.0, 0.0]}]}
EMBED = "/v1/embeddings"
ONE = plain({"data": [{"index": 0, "embedding": [1.0, 0.0]}], "usage": {"prompt_tokens": 1}})


def job(**fields: Any) -> EmbedJob:
    return EmbedJob(**{"id": "e", "inputs": ["a", "b"], "field": "texts", **fields})


async def test_embeddings_come_in_the_order_of_their_inputs() -> None:
    async with engine_before({EMBED: ONE}, capabilities=["embed"]) as (engine, far):
        assert engine.card.embedding_dimensions == 2
        assert engine.card.capabilities == {Capability.EMBED}
        assert engine.pooler is not None
        far.answers[EMBED] = plain({**VECTORS, "usage": {"prompt_tokens": 7}})
        embedded = await engine.pooler.embed(job(dimensions=2))
        assert (embedded.vectors, embedded.prompt_tokens) == ([[1.0, 0.0], [0.0, 1.0]], 7)
        assert far.bodies(EMBED)[-1] == {
            "model": "demo", "input": ["a", "b"], "encoding_format": "float", "dimensions": 2
        }  # fmt: skip  # one line
        with pytest.raises(MeshError) as caught:
            await run(engine, generation())
        assert caught.value.reason is Reason.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (ONE, Reason.ENGINE_FAILED),
        (plain({"data": [{"index": index, "embedding": [0.0]} for index in (0, 1)]}), Reason.ENGINE_FAILED),
        (plain({"data": "no"}), Reason.ENGINE_FAILED),
        (plain({"error": {"message": "exceeds the maximum context length"}}, 400), Reason.CONTEXT_LENGTH_EXCEEDED),
    ],
    ids=["too few", "too short", "no sense", "refused"],
)
async def test_embeddings_that_were_not_asked_for_are_an_error(answer: Answer, reason: Reason) -> None:
    async with engine_before({EMBED: ONE}, capabilities=["embed"]) as (engine, far):
        assert engine.pooler is not None
        far.answers[EMBED] = answer
        with pytest.raises(MeshError) as caught:
            await engine.pooler.embed(job())
        assert caught.value.reason is reason
        with pytest.raises(MeshError, match="prompt_token_limit"):
            await engine.pooler.embed(job(token_limit=3))
        assert engine.pooler.count == 0


async def test_embedding_is_bounded_and_hangs_up_when_it_is_cancelled() -> None:
    async with engine_before({EMBED: ONE}, capabilities=["embed"], max_running=1, max_queued=0) as (engine, far):
        assert engine.pooler is not None
        far.answers[EMBED], asked = Answer(is_silent=True), len(far.bodies(EMBED))
        first = asyncio.create_task(engine.pooler.embed(job()))
        await eventually(lambda: len(far.bodies(EMBED)) > asked, within=5)
        with pytest.raises(MeshError) as caught:
            await engine.pooler.embed(job())
        assert caught.value.reason is Reason.NO_CAPACITY
        first.cancel()
        await asyncio.wait([first])
        await eventually(lambda: far.hung_up == 1, within=5)
        assert engine.load.running == 0


async def test_an_answer_without_bound_is_cut_off() -> None:
    huge = Answer(pieces=[b"data: " + b"x" * (5 << 20)])
    async with engine_before({CHAT: huge}) as (engine, _):
        with pytest.raises(MeshError, match="too large"):
            await run(engine, generation(SAID, sampling=Sampling(max_tokens=1)))


async def test_vllms_metrics_tell_of_other_peoples_requests() -> None:
    lines = [
        'vllm:num_requests_running{engine="0",model_name="demo"} 3.0',
        'vllm:num_requests_waiting{engine="0",model_name="demo"} 2.0',
        'vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.25',
        'vllm:num_requests_running{engine="0",model_name="other"} 9.0',
    ]
    metrics = Answer(pieces=["\n".join(lines).encode()])
    answers = {"/health": Answer(), "/metrics": metrics}
    async with engine_before(answers, flavour="vllm", probe_seconds=0.05, max_running=4) as (engine, far):
        await eventually(lambda: engine.load.kv_usage == 0.25, within=5)
        assert (engine.load.running, engine.load.waiting) == (4, 1)
        far.answers["/metrics"] = Answer(pieces=[b"vllm:what{ no"])
        await eventually(lambda: engine.load.kv_usage == 0, within=5)
        assert not engine.load.trouble


async def test_a_models_context_is_the_servers_unless_the_operator_says_less() -> None:
    told = plain({"data": [{"id": "demo", "max_model_len": 32}]})
    for given, expected in ((None, 32), (16, 16), (99, 32)):
        async with engine_before({"/v1/models": told}, max_context_tokens=given) as (engine, _):
            assert engine.card.max_context_tokens == expected
    with pytest.raises(ConfigError, match="has no model 'nope', it has 'demo'"):
        async with engine_before({"/v1/models": told}, model="nope"):
            pass


def telling(*, said_again: int = 6, end: str = "length") -> dict[str, Answer | Ask]:
    """A server that takes and tells tokens, as vLLM's does. Text of 5, 6 and 7 is a, half of b and b."""

    def complete(body: dict[str, Any]) -> Answer:
        if not body.get("stream"):
            return plain({"choices": [{"index": 0, "token_ids": [said_again], "finish_reason": end}]})
        rest = {"index": 0, "text": "b", "token_ids": [6, 7], "finish_reason": "stop"}
        return streamed({"choices": [rest], "usage": {"prompt_tokens": 4, "completion_tokens": 2}})

    return {
        "/health": Answer(),
        "/metrics": Answer(),
        "/tokenize": plain({"tokens": [1, 2, 3]}),
        "/detokenize": lambda body: plain({"prompt": "a\ufffd" if body["tokens"][-1] == 6 else "a"}),
        TEXT: complete,
    }


async def test_what_began_elsewhere_goes_on_after_its_last_whole_character() -> None:
    async with engine_before(telling(), flavour="vllm") as (engine, far):
        kept = await run(engine, generation(SAID, emitted_token_ids=[5, 6]))
        asked = far.bodies(TEXT)
    assert (kept.text, kept.token_ids, kept.reason) == ("b", [7], FinishReason.STOP)
    assert kept.usage is not None
    assert (kept.usage.prompt, kept.usage.output) == (3, 3)
    assert [(each["prompt"], each["max_tokens"]) for each in asked[1:]] == [([1, 2, 3, 5], 1), ([1, 2, 3, 5], 11)]


async def test_what_is_drawn_goes_on_too_once_the_server_was_made_to_say_whether_it_had_ended() -> None:
    whole = telling(said_again=5) | {"/detokenize": plain({"prompt": "a"})}
    drawn = Sampling(temperature=1, max_tokens=12)
    async with engine_before(whole, flavour="vllm") as (engine, far):
        kept = await run(engine, generation(SAID, emitted_token_ids=[5], sampling=drawn))
        again, rest = far.bodies(TEXT)[1:]
    assert (kept.text, kept.token_ids, kept.reason) == ("b", [6, 7], FinishReason.STOP)
    assert (again["prompt"], again["max_tokens"], again["temperature"], again["logit_bias"]) == (
        [1, 2, 3],
        1,
        0,
        {"5": 100},
    )
    assert (rest["prompt"], rest["temperature"], rest.get("logit_bias")) == ([1, 2, 3, 5], 1, None)


async def test_what_is_drawn_does_not_go_on_inside_a_character() -> None:
    async with engine_before(telling(), flavour="vllm") as (engine, _):
        with pytest.raises(MeshError, match="inside a character"):
            await run(
                engine, generation(SAID, emitted_token_ids=[5, 6], sampling=Sampling(temperature=1, max_tokens=12))
            )


async def test_what_was_complete_elsewhere_is_not_asked_for_again() -> None:
    async with engine_before(telling(end="stop"), flavour="vllm") as (engine, far):
        kept = await run(engine, generation(SAID, emitted_token_ids=[5, 6]))
        assert (kept.text, kept.token_ids, kept.reason) == ("", [], FinishReason.STOP)
        assert not [body for body in far.bodies(TEXT) if body.get("stream")]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sampling": Sampling(temperature=0, max_tokens=12)}, Reason.ENGINE_FAILED),
        ({"sampling": Sampling(temperature=1, max_tokens=12, seed=3)}, Reason.NO_READY_WORKER),
        ({"sampling": Sampling(temperature=0, max_tokens=12, stop=("x",))}, Reason.NO_READY_WORKER),
        ({"sampling": Sampling(temperature=0, max_tokens=12, presence_penalty=1)}, Reason.NO_READY_WORKER),
    ],
    ids=[
        "it would say something else",
        "its draws are to be repeatable",
        "text was held back",
        "the output is counted",
    ],
)
async def test_what_could_not_go_on_exactly_is_turned_away(fields: dict[str, Any], reason: Reason) -> None:
    async with engine_before(telling(said_again=9), flavour="vllm") as (engine, _):
        with pytest.raises(MeshError) as caught:
            await run(engine, generation(SAID, emitted_token_ids=[5, 6], **fields))
        assert caught.value.reason is reason


async def test_a_traced_request_stays_one() -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with engine_before({CHAT: streamed(*WHOLE, USAGE)}) as (engine, far):
        await run(engine, generation(SAID, traceparent=trace))
        await run(engine, generation(SAID, traceparent="no trace\r\nx: y"))
    first, second = (headers for path, body, headers in far.asked if path == CHAT and body.get("stream"))
    assert first["traceparent"] == trace
    assert "traceparent" not in second
