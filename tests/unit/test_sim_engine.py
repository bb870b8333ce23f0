"""The simulated engine: what it says, when, and what it holds."""

import asyncio
import time
from collections.abc import Sequence

import pytest

from services.common.errors import MeshError, Reason
from services.common.settings_worker import SimSettings
from services.inference import sim_text
from services.inference.output import FinishReason, Usage
from services.inference.request import Generation, Sampling
from services.inference.sim_engine import SimEngine
from tests.support.sinks import Kept

QUICK = SimSettings(decode_step_ms=0.01, decode_step_ms_per_sequence=0, prefill_tokens_per_second=10_000_000)
PROMPT = "a prompt of some words"
TOKENS = sim_text.tokenize(PROMPT)


def generation(
    id_: str = "g",
    prompt: str | Sequence[int] = PROMPT,
    *,
    emitted: Sequence[int] = (),
    priority: int = 0,
    sampling: Sampling | None = None,
) -> Generation:
    return Generation(
        id=id_,
        model="sim",
        prompt=prompt,
        kind="text" if isinstance(prompt, str) else "tokens",
        sampling=sampling or Sampling(max_tokens=20),
        emitted_token_ids=emitted,
        priority=priority,
    )


async def run(engine: SimEngine, request: Generation) -> Kept:
    recorder = Kept()
    await engine.submit(request, recorder)
    async with asyncio.timeout(10):
        await recorder.ended.wait()
    return recorder


async def refusal(engine: SimEngine, request: Generation) -> MeshError:
    with pytest.raises(MeshError) as raised:
        await engine.submit(request, Kept())
    return raised.value


async def test_the_output_is_what_anybody_can_compute() -> None:
    async with SimEngine(QUICK, "sim", 64) as engine:
        got = await run(engine, generation(sampling=Sampling(max_tokens=100)))
    assert got.token_ids == sim_text.expected_output(TOKENS, 100)
    assert got.text == sim_text.expected_text(TOKENS, 100)
    assert got.starts == [(len(TOKENS), 0)]
    assert got.reason is FinishReason.LENGTH
    assert got.usage == Usage(prompt=len(TOKENS), cached=0, output=100)


async def test_the_batch_the_cache_and_the_seed_change_nothing() -> None:
    settings = replace_settings(QUICK, max_num_seqs=7)
    async with SimEngine(settings, "sim", 64) as engine:
        requests = [
            generation(str(n), f"prompt {n % 5}", sampling=Sampling(max_tokens=50, temperature=n / 10, seed=n))
            for n in range(20)
        ]
        for n, got in enumerate(await asyncio.gather(*(run(engine, request) for request in requests))):
            assert got.token_ids == sim_text.expected_output(sim_text.tokenize(f"prompt {n % 5}"), 50)


async def test_without_a_limit_the_output_ends_naturally() -> None:
    async with SimEngine(QUICK, "sim", 64) as engine:
        got = await run(engine, generation(sampling=Sampling()))
    natural = sim_text.natural_length(sim_text.output_seed(TOKENS))
    assert (got.reason, len(got.token_ids)) == (FinishReason.STOP, natural)


async def test_ignoring_the_end_goes_on_to_the_end_of_the_context() -> None:
    async with SimEngine(replace_settings(QUICK, max_model_len=500), "sim", 64) as engine:
        got = await run(engine, generation(sampling=Sampling(ignore_eos=True)))
    assert (got.reason, len(got.token_ids)) == (FinishReason.LENGTH, 500 - len(TOKENS))


async def test_min_tokens_put_the_natural_end_off() -> None:
    async with SimEngine(QUICK, "sim", 64) as engine:
        got = await run(engine, generation(sampling=Sampling(min_tokens=400)))
    assert (got.reason, len(got.token_ids)) == (FinishReason.STOP, 400)


@pytest.mark.parametrize("cut", range(41))
async def test_a_continuation_goes_on_exactly_where_the_first_part_ended(cut: int) -> None:
    whole = sim_text.expected_output(TOKENS, 40)
    async with SimEngine(QUICK, "sim", 64) as engine:
        first = await run(engine, generation(sampling=Sampling(max_tokens=cut))) if cut else Kept()
        rest = await run(engine, generation(emitted=whole[:cut], sampling=Sampling(max_tokens=40)))
    assert first.token_ids + rest.token_ids == whole
    assert first.text + rest.text == sim_text.expected_text(TOKENS, 40)
    assert rest.usage == Usage(prompt=len(TOKENS), cached=rest.starts[0][1], output=40)
    assert rest.reason is FinishReason.LENGTH


async def test_a_continuation_keeps_what_was_held_back_for_a_stop_string() -> None:
    text = sim_text.expected_text(TOKENS, 40)
    stop = text[12:19]
    expected = text[: text.index(stop)]
    async with SimEngine(QUICK, "sim", 64) as engine:
        whole = await run(engine, generation(sampling=Sampling(max_tokens=40, stop=[stop])))
        assert (whole.text, whole.reason) == (expected, FinishReason.STOP)
        for cut in range(1, len(whole.token_ids)):
            first = "".join(delta.text for delta in whole.deltas[:cut])
            request = generation(emitted=whole.token_ids[:cut], sampling=Sampling(max_tokens=40, stop=[stop]))
            rest = await run(engine, request)
            assert first + rest.text == expected
            assert rest.usage is not None
            assert rest.usage.output == len(whole.token_ids)


async def test_a_continuation_of_what_is_complete_ends_at_once() -> None:
    whole = sim_text.expected_output(TOKENS, 40)
    stop = sim_text.expected_text(TOKENS, 40)[8:14]
    async with SimEngine(QUICK, "sim", 64) as engine:
        full = await run(engine, generation(emitted=whole, sampling=Sampling(max_tokens=40)))
        stopped = await run(engine, generation(emitted=whole, sampling=Sampling(max_tokens=80, stop=[stop])))
    assert (full.text, full.reason) == ("", FinishReason.LENGTH)
    assert (stopped.text, stopped.reason) == ("", FinishReason.STOP)


async def test_held_back_text_comes_out_when_no_stop_string_follows() -> None:
    text = sim_text.expected_text(TOKENS, 20)
    async with SimEngine(QUICK, "sim", 64) as engine:
        got = await run(engine, generation(sampling=Sampling(max_tokens=20, stop=[text[-3:] + "never"])))
    assert got.text == text
    assert got.token_ids == sim_text.expected_output(TOKENS, 20)


async def test_a_stop_token_ends_the_output_after_itself() -> None:
    whole = sim_text.expected_output(TOKENS, 20)
    async with SimEngine(QUICK, "sim", 64) as engine:
        got = await run(engine, generation(sampling=Sampling(max_tokens=20, stop_token_ids=[whole[7]])))
    assert got.token_ids == whole[: whole.index(whole[7]) + 1]
    assert got.reason is FinishReason.STOP


async def test_stops_count_after_min_tokens_only() -> None:
    text = sim_text.expected_text(TOKENS, 100)
    async with SimEngine(QUICK, "sim", 64) as engine:
        got = await run(engine, generation(sampling=Sampling(max_tokens=100, min_tokens=30, stop=[text[:2], " "])))
    assert len(got.token_ids) > 30
    assert got.text.startswith(sim_text.expected_text(TOKENS, 30))


async def test_log_probabilities_are_the_same_each_time() -> None:
    async with SimEngine(QUICK, "sim", 64) as engine:
        request = generation(sampling=Sampling(max_tokens=9, logprob_count=5))
        first, second = await run(engine, request), await run(engine, request)
        bare = await run(engine, generation(sampling=Sampling(max_tokens=3, logprob_count=0)))
    assert first.logprobs == second.logprobs
    assert [entry.chosen.token_id for entry in first.logprobs] == first.token_ids
    for entry in first.logprobs:
        ranked = [alternative.logprob for alternative in entry.alternatives]
        assert ranked == sorted(ranked, reverse=True)
        assert len({alternative.token_id for alternative in entry.alternatives}) == 5
    assert [entry.alternatives for entry in bare.logprobs] == [(), (), ()]


async def test_the_same_prompt_is_found_in_the_cache() -> None:
    prompt = list(range(300, 400))
    async with SimEngine(QUICK, "sim", 64) as engine:
        first = await run(engine, generation(prompt=prompt))
        second = await run(engine, generation(prompt=prompt))
        longer = await run(engine, generation(prompt=[*prompt, *first.token_ids, 1, 2, 3]))
        load = engine.load
    assert first.starts == [(100, 0)]
    assert second.starts == [(100, 96)]
    # Its own output was cached too: the next turn of a conversation is prefilled from there.
    assert longer.starts == [(123, 112)]
    assert (load.prefix_query_tokens, load.prefix_hit_tokens) == (323, 208)


async def test_a_prompt_that_fills_its_blocks_still_computes_its_last_token() -> None:
    async with SimEngine(QUICK, "sim", 64) as engine:
        await run(engine, generation(prompt=list(range(300, 332))))
        again = await run(engine, generation(prompt=list(range(300, 332))))
    assert again.starts == [(32, 16)]


async def test_the_cache_forgets_what_it_has_no_room_for() -> None:
    settings = replace_settings(QUICK, kv_blocks=8, max_model_len=128)
    async with SimEngine(settings, "sim", 64) as engine:
        await run(engine, generation(prompt=list(range(300, 350))))
        await run(engine, generation(prompt=list(range(400, 500))))
        again = await run(engine, generation(prompt=list(range(300, 350))))
    assert again.starts == [(50, 0)]


async def test_a_request_waits_for_blocks_even_when_slots_are_free() -> None:
    settings = SimSettings(decode_step_ms=1, kv_blocks=8, max_model_len=128, decode_step_ms_per_sequence=0)
    async with SimEngine(settings, "sim", 64) as engine:
        first, second = Kept(), Kept()
        await engine.submit(generation("1", list(range(300, 390)), sampling=Sampling(max_tokens=30)), first)
        await engine.submit(generation("2", list(range(400, 490)), sampling=Sampling(max_tokens=5)), second)
        await asyncio.sleep(0.01)
        assert (engine.load.running, engine.load.waiting) == (1, 1)
        await second.ended.wait()
        assert first.ended.is_set()


async def test_sequences_that_outgrow_the_cache_take_turns_and_lose_nothing() -> None:
    settings = replace_settings(QUICK, kv_blocks=12, max_model_len=160)
    async with SimEngine(settings, "sim", 64) as engine:
        prompts = [list(range(300 + 50 * n, 320 + 50 * n)) for n in range(5)]
        requests = [generation(str(n), prompts[n], sampling=Sampling(max_tokens=120)) for n in range(5)]
        for prompt, got in zip(prompts, await asyncio.gather(*(run(engine, each) for each in requests)), strict=True):
            assert got.token_ids == sim_text.expected_output(prompt, 120)
            assert got.text == sim_text.expected_text(prompt, 120)
            assert len(got.starts) == 1
        assert (engine.load.kv_usage, engine.load.pending_prefill_tokens) == (0, 0)


async def test_a_sequence_may_fill_the_whole_cache() -> None:
    settings = replace_settings(QUICK, kv_blocks=4, max_model_len=8192)
    async with SimEngine(settings, "sim", 64) as engine:
        assert engine.card.max_context_tokens == 64
        got = await run(engine, generation(prompt=[300] * 20, sampling=Sampling(max_tokens=44)))
        done = await run(engine, generation(prompt=[300] * 20, emitted=[1] * 44, sampling=Sampling(max_tokens=44)))
    assert got.usage == Usage(prompt=20, cached=0, output=44)
    assert done.usage is not None
    assert done.usage.output == 44


async def test_priority_goes_first_and_equals_go_in_order() -> None:
    async with SimEngine(replace_settings(QUICK, max_num_seqs=1), "sim", 64) as engine:
        order: list[str] = []

        async def note(request: Generation) -> None:
            await run(engine, request)
            order.append(request.id)

        async with asyncio.TaskGroup() as tasks:
            for name, priority in (("a", 1), ("b", 1), ("urgent", -5), ("late", 2), ("c", 1)):
                tasks.create_task(note(generation(name, priority=priority)))
    assert order == ["urgent", "a", "b", "c", "late"]


async def test_a_full_queue_refuses() -> None:
    async with SimEngine(SimSettings(max_num_seqs=2, decode_step_ms=50), "sim", 1) as engine:
        for n in range(3):
            await engine.submit(generation(str(n)), Kept())
        error = await refusal(engine, generation("one too many"))
        assert error.reason is Reason.NO_CAPACITY
        engine.abort("1")
        await engine.submit(generation("fits"), Kept())


REFUSED = [
    (generation(prompt=[0] * 8192), Reason.CONTEXT_LENGTH_EXCEEDED),
    (generation(prompt="a " * 8192), Reason.CONTEXT_LENGTH_EXCEEDED),
    (generation(sampling=Sampling(max_tokens=8192)), Reason.CONTEXT_LENGTH_EXCEEDED),
    (generation(sampling=Sampling(min_tokens=10**9)), Reason.CONTEXT_LENGTH_EXCEEDED),
    (generation(prompt=[sim_text.VOCABULARY_SIZE]), Reason.INVALID_REQUEST),
    (generation(emitted=[2**32 - 1]), Reason.INVALID_REQUEST),
    (generation(sampling=Sampling(stop_token_ids=[2**31])), Reason.INVALID_REQUEST),
    (generation(sampling=Sampling(logit_bias={2**31: 1.0})), Reason.INVALID_REQUEST),
]


@pytest.mark.parametrize(("request_", "reason"), REFUSED)
async def test_what_does_not_fit_the_model_is_refused(request_: Generation, reason: Reason) -> None:
    async with SimEngine(QUICK, "sim", 64) as engine:
        assert (await refusal(engine, request_)).reason is reason
        assert engine.load.waiting == 0


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding"])
async def test_an_aborted_generation_says_nothing_more_and_holds_nothing(when: str) -> None:
    settings = SimSettings(decode_step_ms=2, prefill_tokens_per_second=100_000, max_num_seqs=1)
    async with SimEngine(settings, "sim", 64) as engine:
        other, recorder = Kept(), Kept()
        if when == "waiting":
            await engine.submit(generation("other", sampling=Sampling(max_tokens=30)), other)
        await engine.submit(generation("g", list(range(300, 2300)), sampling=Sampling(max_tokens=500)), recorder)
        await asyncio.sleep(0.06 if when == "decoding" else 0.008)
        assert bool(recorder.token_ids) == (when == "decoding")
        engine.abort("g")
        heard = len(recorder.token_ids)
        if when == "waiting":
            await other.ended.wait()
        load = engine.load
        assert (load.running, load.waiting, load.kv_usage, load.pending_prefill_tokens) == (0, 0, 0, 0)
        await asyncio.sleep(0.01)
        assert len(recorder.token_ids) == heard
        assert not recorder.ended.is_set()
        engine.abort("unknown")


async def test_a_sink_may_abort_any_generation_from_within() -> None:
    class Aborting(Kept):
        def delta(self, text: str, token_ids: Sequence[int]) -> None:
            super().delta(text, token_ids)
            for name in ("me", "next", "first"):
                engine.abort(name)

    async with SimEngine(QUICK, "sim", 64) as engine:
        first, me, after = Kept(), Aborting(), Kept()
        for name, sink in (("first", first), ("me", me), ("next", after)):
            await engine.submit(generation(name), sink)
        await asyncio.sleep(0.05)
        assert (len(first.token_ids), len(me.token_ids), len(after.token_ids)) == (1, 1, 0)
        assert engine.load.running == 0


async def test_steps_take_the_time_that_the_batch_costs_and_do_not_drift() -> None:
    settings = SimSettings(decode_step_ms=4, decode_step_ms_per_sequence=1, prefill_tokens_per_second=1_000_000)
    async with SimEngine(settings, "sim", 64) as engine:
        requests = [generation(str(n), f"prompt {n}", sampling=Sampling(max_tokens=51)) for n in range(5)]
        results = await asyncio.gather(*(run(engine, request) for request in requests))
        load = engine.load
    for got in results:
        assert got.times[-1] - got.times[0] == pytest.approx(50 * 0.008, rel=0.15)
    assert load.decode_step_seconds is not None
    assert load.decode_step_seconds == pytest.approx(0.008, rel=0.2)


async def test_prefill_takes_the_time_that_the_tokens_cost() -> None:
    settings = SimSettings(decode_step_ms=1, prefill_tokens_per_second=10_000)
    async with SimEngine(settings, "sim", 64) as engine:
        begun = time.monotonic()
        recorder = Kept()
        await engine.submit(generation(prompt=list(range(300, 2300)), sampling=Sampling(max_tokens=2)), recorder)
        assert engine.load.pending_prefill_tokens == 2000
        await recorder.ended.wait()
        assert recorder.times[0] - begun == pytest.approx(0.201, rel=0.2)
        load = engine.load
    assert load.pending_prefill_tokens == 0
    assert load.prefill_tokens_per_second == pytest.approx(10_000, rel=0.2)
    assert recorder.timings is not None
    assert recorder.timings.prefill == pytest.approx(0.2, rel=0.2)


async def test_a_stalled_loop_is_not_made_up_for_in_a_burst() -> None:
    settings = SimSettings(decode_step_ms=10, prefill_tokens_per_second=1_000_000)
    async with SimEngine(settings, "sim", 64) as engine:
        recorder = Kept()
        await engine.submit(generation(sampling=Sampling(max_tokens=100)), recorder)
        await asyncio.sleep(0.05)
        time.sleep(0.2)  # noqa: ASYNC251  # the stall itself
        before = len(recorder.token_ids)
        await asyncio.sleep(0.03)
        assert len(recorder.token_ids) - before <= 6


async def test_leaving_the_engine_fails_what_runs_and_refuses_what_comes() -> None:
    recorder = Kept()
    async with SimEngine(SimSettings(), "sim", 64) as engine:
        await engine.submit(generation(), recorder)
    assert recorder.error is not None
    assert recorder.error.reason is Reason.NO_READY_WORKER
    assert not engine.load.alive
    assert (await refusal(engine, generation())).reason is Reason.NO_READY_WORKER


def replace_settings(settings: SimSettings, **changes: int) -> SimSettings:
    return SimSettings(**{name: getattr(settings, name) for name in settings.__struct_fields__} | changes)
