"""What the simulated engine can be asked for beyond one plain output."""

import asyncio
from typing import Any

import msgspec
import pytest

from services.common.errors import MeshError, Reason
from services.common.settings_worker import SimSettings
from services.inference import sim_text
from services.inference.output import FinishReason
from services.inference.request import ChatMessage, ChatOptions, Generation, Sampling, StructuredOutput
from services.inference.sim_engine import SimEngine
from tests.support.sinks import Kept
from tests.support.waiting import eventually

QUICK = SimSettings(decode_step_ms=0.01, decode_step_ms_per_sequence=0, prefill_tokens_per_second=10_000_000)
PROMPT = "a prompt of some words"
TOKENS = sim_text.tokenize(PROMPT)


def asking(id_: str = "g", *, sampling: Sampling | None = None, **fields: Any) -> Generation:
    """A generation of twenty tokens, unless it is asked otherwise."""
    values: dict[str, Any] = {
        "prompt": PROMPT,
        "kind": "text",
        "sampling": sampling or Sampling(max_tokens=20),
    } | fields
    return Generation(id=id_, model="sim", **values)


async def run(engine: SimEngine, request: Generation) -> Kept:
    sink = Kept()
    await engine.submit(request, sink)
    async with asyncio.timeout(10):
        await sink.ended.wait()
    return sink


async def test_each_of_several_choices_says_something_of_its_own_and_the_first_what_one_would() -> None:
    async with SimEngine(QUICK, "sim", 64) as sim:
        alone = await run(sim, asking("alone"))
        several = await run(sim, asking("several", choices=3))
        again = await run(sim, asking("again", choices=3))
    texts = ["".join(delta.text for delta in several.deltas if delta.choice == choice) for choice in range(3)]
    assert texts[0] == alone.text
    assert len(set(texts)) == 3
    assert texts == ["".join(d.text for d in again.deltas if d.choice == choice) for choice in range(3)]
    assert several.choice_ends == dict.fromkeys(range(3), (FinishReason.LENGTH, None))
    assert several.usage is not None
    assert (several.usage.prompt, several.usage.output) == (len(TOKENS), 60)
    assert sum(len(delta.token_ids) for delta in several.deltas) == 60


async def test_aborting_several_choices_leaves_nothing() -> None:
    async with SimEngine(QUICK, "sim", 64) as sim:
        sink = Kept()
        await sim.submit(asking("several", choices=3, sampling=Sampling(max_tokens=5000)), sink)
        await eventually(lambda: len(sink.deltas) > 10, within=2)
        sim.abort("several")
        heard = len(sink.deltas)
        assert (sim.load.running, sim.load.waiting, sim.load.kv_usage) == (0, 0, 0)
        await asyncio.sleep(0.01)
        assert len(sink.deltas) == heard
        assert not sink.ended.is_set()


async def test_several_choices_fail_once() -> None:
    failures: list[MeshError] = []

    class Counting(Kept):
        def failed(self, error: MeshError) -> None:
            failures.append(error)

    async with SimEngine(QUICK, "sim", 64) as sim:
        await sim.submit(asking(choices=3, sampling=Sampling(max_tokens=5000)), Counting())
    assert [error.reason for error in failures] == [Reason.NO_READY_WORKER]


async def test_a_prompt_is_returned_with_log_probabilities_that_anybody_can_compute() -> None:
    async with SimEngine(QUICK, "sim", 64) as sim:
        sampling = Sampling(max_tokens=3, prompt_logprob_count=2)
        first, again = [await run(sim, asking(f"{i}", echo=True, sampling=sampling)) for i in range(2)]
        assert (await run(sim, asking("none"))).echo is None
    assert first.echo is not None
    assert (first.echo.text, list(first.echo.token_ids)) == (PROMPT, TOKENS)
    assert [entry.chosen.token_id for entry in first.echo.logprobs] == TOKENS[1:]
    assert [other.rank for other in first.echo.logprobs[0].alternatives] == [1, 2]
    assert first.echo == again.echo


async def test_a_salt_keeps_prompts_apart_in_the_cache() -> None:
    prompt = list(range(300, 400))
    async with SimEngine(QUICK, "sim", 64) as sim:
        found = [
            (await run(sim, asking(f"{i}", prompt=prompt, kind="tokens", cache_salt=salt))).starts[0][1] > 0
            for i, salt in enumerate(("a", "a", "b", "", ""))
        ]
    assert found == [False, True, False, False, True]


async def test_a_prompt_token_limit_keeps_the_end_of_the_prompt() -> None:
    async with SimEngine(QUICK, "sim", 64) as sim:
        cut = await run(sim, asking(prompt_token_limit=3))
        assert cut.token_ids == sim_text.expected_output(TOKENS[-3:], 20)
        assert cut.starts == [(3, 0)]


async def test_what_stopped_an_output_is_told_also_when_it_stopped_before() -> None:
    text = sim_text.expected_text(TOKENS, 20)
    stop, token = text[5:9], sim_text.expected_output(TOKENS, 20)[4]
    async with SimEngine(QUICK, "sim", 64) as sim:
        for sampling, cause in (
            (Sampling(temperature=0, max_tokens=20, stop=["never", stop]), stop),
            (Sampling(temperature=0, max_tokens=20, stop_token_ids=[token]), token),
            (Sampling(temperature=0, max_tokens=20), None),
        ):
            whole = await run(sim, asking("whole", sampling=sampling))
            rest = await run(sim, asking("rest", sampling=sampling, emitted_token_ids=whole.token_ids))
            assert (whole.stop_cause, rest.stop_cause, rest.token_ids) == (cause, cause, [])
        included = Sampling(temperature=0, max_tokens=20, stop=[stop], include_stop_string=True)
        assert (await run(sim, asking("in", sampling=included))).text == text[: text.index(stop) + len(stop)]


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (asking(sampling=Sampling(bad_words=["a"])), "sampling.bad_words"),
        (asking(sampling=Sampling(allowed_token_ids=[1])), "sampling.allowed_token_ids"),
        (asking(structured_output=StructuredOutput(kind="json_object")), "structured_output"),
        (asking(chat=ChatOptions(template_arguments={"a": 1})), "chat.template_arguments_json"),
    ],
)
async def test_what_a_settled_output_cannot_do_is_refused_by_name(asked: Generation, field: str) -> None:
    async with SimEngine(QUICK, "sim", 64) as sim:
        with pytest.raises(MeshError) as raised:
            await sim.submit(asked, Kept())
    assert (raised.value.reason, raised.value.field) == (Reason.UNIMPLEMENTED, field)


async def test_a_conversation_ends_where_it_is_to_be_continued() -> None:
    said = [ChatMessage(role="user", content="", parts=("a", "b")), ChatMessage(role="assistant", content="So")]
    opened = sim_text.render_chat(said)
    closed = sim_text.render_chat(said, ChatOptions(generation_prompt=False))
    continued = sim_text.render_chat(said, ChatOptions(generation_prompt=False, continue_final_message=True))
    assert opened[: len(closed)] == closed
    assert closed[: len(continued)] == continued
    assert sim_text.detokenize(continued).endswith("assistant\nSo")
    assert "a\nb" in sim_text.detokenize(continued)


@pytest.mark.parametrize("cut_after", [0, 1, 50])
async def test_a_thousand_generations_cancelled_leave_an_idle_engine(cut_after: int) -> None:
    async with SimEngine(msgspec.structs.replace(QUICK, max_num_seqs=1000, kv_blocks=1_000_000), "sim", 1000) as sim:

        async def cancelled(number: int) -> None:
            sink = Kept()
            asked = asking(f"{number}", choices=1 + number % 2, sampling=Sampling(max_tokens=4000))
            await sim.submit(asked, sink)
            while len(sink.token_ids) < cut_after:
                await asyncio.sleep(0.005)
            sim.abort(asked.id)

        for start in range(0, 1000, 250):
            await asyncio.gather(*[cancelled(start + number) for number in range(250)])
        assert (sim.load.running, sim.load.waiting, sim.load.kv_usage, sim.load.pending_prefill_tokens) == (0, 0, 0, 0)
        assert (sim._scheduler._sequences, sim._scheduler._generations, sim._scheduler._waiting) == ({}, {}, [])
