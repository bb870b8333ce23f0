"""What the real engine can be asked for beyond one plain output: choices, forms, the prompt, and what may be said."""

import asyncio
import json
import re
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import psutil
import pytest

from services.common.errors import MeshError, Reason
from services.inference.output import FinishReason
from services.inference.request import Generation, Sampling, StructuredOutput
from services.inference.vllm_engine import VllmEngine
from tests.support.engine_process import generate, refusal
from tests.support.resume import resume_everywhere
from tests.support.sinks import Kept
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.alone,
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="session"),
    # The engine starts with the first of them, and its model is made once.
    pytest.mark.timeout(150),
    # What they import and how is not ours; everything else is still an error.
    *(pytest.mark.filterwarnings(f"ignore:::{package}") for package in ("torch", "vllm", "transformers", "importlib")),
]

RUNNING = 16
PROMPT = [40, 50, 60, 70]
SAMPLED = {"temperature": 1.0, "seed": 3}


@pytest.fixture
def engine(seeing_engine: VllmEngine) -> VllmEngine:
    """One engine for all the tests."""
    return seeing_engine


def asked(name: str, *, prompt: Any = PROMPT, sampling: dict[str, Any] | None = None, **fields: Any) -> Generation:
    """A generation, greedy and of twelve tokens unless it is asked otherwise."""
    values: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | (sampling or {})
    kind: Any = "text" if isinstance(prompt, str) else "tokens"
    return Generation(id=name, model="demo", prompt=prompt, kind=kind, sampling=Sampling(**values), **fields)


def form(kind: Any, value: str = "", **sampling: Any) -> Generation:
    """A generation whose output is held to a form."""
    structured = StructuredOutput(kind=kind, value=value)
    values = {"ignore_eos": False, "max_tokens": 300, "temperature": 1.0, "seed": 1} | sampling
    return asked(f"form-{kind}", sampling=values, structured_output=structured)


def by_choice(sink: Kept) -> dict[int, list[int]]:
    """The tokens of each choice."""
    tokens: dict[int, list[int]] = {}
    for delta in sink.deltas:
        tokens.setdefault(delta.choice, []).extend(delta.token_ids)
    return tokens


async def test_several_choices_come_by_their_index_and_end_one_by_one(engine: VllmEngine) -> None:
    sink = await generate(engine, asked("n", sampling=SAMPLED, choices=4))
    tokens = by_choice(sink)
    assert {choice: len(found) for choice, found in tokens.items()} == dict.fromkeys(range(4), 12)
    assert len({tuple(found) for found in tokens.values()}) > 1
    assert sink.choice_ends == dict.fromkeys(range(4), (FinishReason.LENGTH, None))
    assert sink.usage is not None
    assert (sink.usage.prompt, sink.usage.output, sink.reason) == (4, 48, FinishReason.LENGTH)


async def test_each_choice_has_its_own_stop_and_its_own_log_probabilities(engine: VllmEngine) -> None:
    sampling = SAMPLED | {"logprob_count": 2, "ignore_eos": False, "logit_bias": {2: 8.0}, "max_tokens": 40}
    sink = await generate(engine, asked("n", sampling=sampling, choices=5))
    assert len({len(found) for found in by_choice(sink).values()}) > 1
    assert sorted(sink.choice_ends) == list(range(5))
    for delta in sink.deltas:
        assert [entry.chosen.token_id for entry in delta.logprobs] == list(delta.token_ids)


async def test_aborting_several_choices_frees_them_all(engine: VllmEngine) -> None:
    sink = Kept()
    await engine.submit(asked("n", sampling=SAMPLED | {"max_tokens": 2000}, choices=8), sink)
    await eventually(lambda: engine._stats.running == 8 and bool(sink.token_ids), within=5)
    assert engine.load.running == 8
    engine.abort("n")
    await eventually(lambda: engine._stats.running == 0 and engine.load.running == 0, within=2)
    processor = engine._life.backend.llm.output_processor
    assert (processor.request_states, processor.parent_requests, processor.external_req_ids) == ({}, {}, {})


async def test_a_prompt_is_returned_with_its_log_probabilities(engine: VllmEngine) -> None:
    text = "The river was bright in the morning"
    request = asked("echo", prompt=text, sampling={"prompt_logprob_count": 3}, echo=True)
    for sink in [await generate(engine, request), await generate(engine, request)]:
        assert sink.echo is not None
        assert sink.echo.text == text
        assert sink.echo.token_ids == await engine.tokenize(text)
        found = sink.echo.logprobs
        assert [entry.chosen.token_id for entry in found] == list(sink.echo.token_ids)[1:]
        assert all(len(entry.alternatives) == 3 for entry in found)
        assert all([other.rank for other in entry.alternatives] == [1, 2, 3] for entry in found)
        assert all(entry.chosen.rank >= 1 and entry.chosen.logprob <= entry.alternatives[0].logprob for entry in found)
    tokens = await generate(engine, asked("echo", echo=True))
    assert tokens.echo is not None
    assert tokens.echo.text == engine._life.backend.llm.get_tokenizer().decode(PROMPT)


async def test_tokens_inside_of_characters_have_no_text_and_the_last_one_has_all_of_it(engine: VllmEngine) -> None:
    wide = await engine.tokenize("日本語🚀é", special_tokens=False)
    echo = asked("wide-echo", prompt="日本語🚀é" * 4, sampling={"prompt_logprob_count": 1}, echo=True)
    sink = await generate(engine, echo)
    assert sink.echo is not None
    texts = [entry.chosen.token for entry in sink.echo.logprobs]
    # The first token of all has none, and so its character no beginning.
    assert "".join(texts).endswith("日本語🚀é" * 3)
    assert texts.count("") > len(texts) / 2
    sampling = {"logit_bias": dict.fromkeys(wide, 90.0), "logprob_count": 3, "max_tokens": 24}
    result = await resume_everywhere(engine, asked("wide", sampling=sampling))
    assert result.differences == []
    told = [entry.chosen.token for entry in result.whole.logprobs]
    assert "" in told
    # Bytes that make no character are in the text as U+FFFD, and nowhere among the tokens.
    assert set("".join(told)) <= set(result.whole.text)


async def test_a_prompt_token_limit_keeps_the_end_of_the_prompt(engine: VllmEngine) -> None:
    tokens = [40 + i % 200 for i in range(3000)]
    whole = await generate(engine, asked("end", prompt=tokens[-50:]))
    cut = await generate(engine, asked("cut", prompt=tokens, prompt_token_limit=50, echo=True))
    assert cut.token_ids == whole.token_ids
    assert cut.starts[0][0] == 50
    assert cut.echo is not None
    assert cut.echo.token_ids == tokens[-50:]


async def test_a_salt_keeps_prefix_caches_apart(engine: VllmEngine) -> None:
    prompt = list(range(300, 400))
    cached = [
        (await generate(engine, asked("salt", prompt=prompt, cache_salt=salt))).starts[0][1]
        for salt in ("a", "a", "b", "", "b")
    ]
    assert cached == [0, 96, 0, 0, 96]


async def test_tenants_that_are_kept_apart_share_no_cache_whatever_salts_they_choose(engine: VllmEngine) -> None:
    prompt = list(range(500, 600))
    cached = [
        (await generate(engine, asked("apart", prompt=prompt, cache_tenant=of, cache_salt=salt))).starts[0][1]
        for of, salt in (("a", ""), ("a", ""), ("b", ""), ("", ""), ("b", ""), ("b", "s"), ("a", "s"), ("", "a\0"))
    ]
    # Whoever has no tenant is behind the edge.
    assert cached == [0, 96, 0, 0, 96, 0, 0, 96]


async def test_only_allowed_tokens_come_and_bad_words_do_not(engine: VllmEngine) -> None:
    allowed = [40, 41, 42]
    sink = await generate(engine, asked("allowed", sampling=SAMPLED | {"allowed_token_ids": allowed}))
    assert set(sink.token_ids) <= set(allowed)
    free = await generate(engine, asked("free", sampling={"max_tokens": 30}))
    tokenizer = engine._life.backend.llm.get_tokenizer()
    # Those that are one token each: of others, other spellings may come.
    spelled = {token: tokenizer.decode([token]) for token in free.token_ids}
    words = {token: text for token, text in spelled.items() if tokenizer.encode(text.lstrip()) == [token]}
    without = await generate(engine, asked("bad", sampling={"max_tokens": 30, "bad_words": list(words.values())[:3]}))
    assert len(words) > 3
    assert not set(without.token_ids) & set(list(words)[:3])


async def test_special_tokens_and_the_stop_string_stay_where_they_are_asked_for(engine: VllmEngine) -> None:
    sampling = {"logit_bias": {2: 100.0}, "max_tokens": 3}
    assert (await generate(engine, asked("dropped", sampling=sampling))).text == ""
    kept = await generate(engine, asked("kept", sampling=sampling | {"keep_special_tokens": True}))
    assert kept.text == "<|im_end|>" * 3
    whole = await generate(engine, asked("whole", sampling={"max_tokens": 30}))
    stop = whole.text[20:24]
    included = await generate(
        engine, asked("in", sampling={"max_tokens": 30, "stop": [stop], "include_stop_string": True})
    )
    assert included.text == whole.text[: whole.text.index(stop) + len(stop)]


async def test_what_stopped_an_output_is_told(engine: VllmEngine) -> None:
    whole = await generate(engine, asked("whole"))
    text, token = whole.text[8:12], whole.token_ids[5]
    for sampling, cause in (
        ({"stop": ["never", text]}, text),
        ({"stop_token_ids": [token]}, token),
        ({}, None),
        ({"ignore_eos": False, "logit_bias": {2: 100.0}}, None),
    ):
        assert (await generate(engine, asked("cause", sampling=sampling))).stop_cause == cause


async def test_text_is_tokenized_as_it_is_without_special_tokens(engine: VllmEngine) -> None:
    sink = await generate(engine, asked("plain", prompt="a river", add_special_tokens=False, echo=True))
    assert sink.echo is not None
    assert sink.echo.token_ids == await engine.tokenize("a river", special_tokens=False)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


async def test_an_output_has_the_form_that_it_must_have(engine: VllmEngine) -> None:
    document = json.loads((await generate(engine, form("json_schema", json.dumps(SCHEMA)))).text)
    assert set(document) == {"name", "age"}
    matched = await generate(engine, form("regex", "[0-9]{3}-(yes|no)"))
    assert re.fullmatch("[0-9]{3}-(yes|no)", matched.text)
    assert matched.reason is FinishReason.STOP
    for grammar in ('root ::= ("ab" | "cd") "!"', 'start: ("ab" | "cd") "!"'):
        assert (await generate(engine, form("grammar", grammar))).text in {"ab!", "cd!"}
    choice = StructuredOutput(kind="choice", choices=("one", "two words", "drei\n"))
    several = asked("choice", sampling=SAMPLED | {"ignore_eos": False}, structured_output=choice, choices=3)
    sink = await generate(engine, several)
    assert {"".join(delta.text for delta in sink.deltas if delta.choice == index) for index in range(3)} <= set(
        choice.choices
    )


async def test_json_of_a_form_has_no_control_characters_and_no_whitespace_without_end(engine: VllmEngine) -> None:
    tokens = dict.fromkeys((engine._life.backend.llm.get_tokenizer().encode(" \n\t")), 20.0)
    for seed in range(6):
        sink = await generate(engine, form("json_object", seed=seed, logit_bias=tokens, max_tokens=200))
        # It may be cut off by max_tokens, but never is it anything else than the beginning of a document.
        assert not re.search(r"[\x00-\x1f]", sink.text)
        if sink.reason is FinishReason.STOP:
            assert isinstance(json.loads(sink.text), dict)


BOMBS = [
    form("json_schema", '{"type": "array", "minItems": 1000000000}'),
    form("json_schema", '{"$ref": "#"}'),
    form("json_schema", '{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}'),
    form("json_schema", '{"$ref": "http://169.254.169.254/schema"}'),
    form("json_schema", '{"type": "🤡"}'),
    form("regex", "(unclosed"),
    form("regex", ".*" * 1000),
    form("grammar", "start: x\nx: y\ny: x"),
    form("grammar", "nothing like a grammar"),
    form("grammar", "start: " + "(" * 3000 + '"a"' + ")" * 3000),
]


async def test_a_form_that_cannot_be_compiled_is_refused_before_the_engine_sees_it(engine: VllmEngine) -> None:
    running = Kept()
    await engine.submit(asked("bystander", sampling={"max_tokens": 1000}), running)
    await refusal(engine, BOMBS[0])
    for bomb in BOMBS:
        begun = time.monotonic()
        error = await refusal(engine, bomb)
        assert bomb.structured_output is not None
        assert error.reason is Reason.INVALID_REQUEST
        assert error.field == f"structured_output.{bomb.structured_output.kind}"
        assert error.message.startswith(error.field)
        assert len(error.message) < 400
        assert time.monotonic() - begun < 3
    engine.abort("bystander")
    assert running.error is None
    await eventually(lambda: not engine._life.backend.llm.output_processor.request_states, within=1)


@pytest.mark.parametrize(
    "expression", ["(a+)+$", "(a+)+", "(.*){1,50000}", "((((a{1,100}){1,100}){1,100}){1,100})", "(x|y)*x(x|y){500}"]
)
async def test_expressions_that_explode_elsewhere_are_matched_in_time(engine: VllmEngine, expression: str) -> None:
    begun = time.monotonic()
    await generate(engine, form("regex", expression, max_tokens=20))
    assert time.monotonic() - begun < 5


async def test_a_form_seen_before_costs_nothing_to_check(engine: VllmEngine) -> None:
    forms = engine._life.backend._forms
    assert forms is not None
    structured = StructuredOutput(kind="json_schema", value=json.dumps(SCHEMA | {"title": "again"}))
    await forms.check(structured)
    await forms.close()
    begun = time.perf_counter()
    for _ in range(100):
        await forms.check(structured)
    assert time.perf_counter() - begun < 0.1
    assert forms._process is None


async def test_the_checker_comes_back_when_its_process_is_killed(engine: VllmEngine) -> None:
    forms = engine._life.backend._forms
    assert forms is not None
    await forms.check(StructuredOutput(kind="regex", value="first"))
    assert forms._process is not None
    forms._process.kill()
    await forms._process.wait()
    await forms.check(StructuredOutput(kind="regex", value="second"))


async def test_too_many_new_forms_at_once_are_told_to_come_back(engine: VllmEngine) -> None:
    forms = engine._life.backend._forms
    assert forms is not None
    checks = [forms.check(StructuredOutput(kind="regex", value=f"new{i}")) for i in range(12)]
    found = await asyncio.gather(*checks, return_exceptions=True)
    refused = [error for error in found if error is not None]
    assert [error.reason for error in refused if isinstance(error, MeshError)] == [Reason.NO_CAPACITY] * 4


async def test_a_tenant_has_a_quota_of_new_forms_and_others_do_not_notice(engine: VllmEngine) -> None:
    # Kind of bad input 56: a thousand schemas a minute, of which nobody has seen any.
    forms = engine._life.backend._forms
    assert forms is not None
    checker = await forms._running()
    started = psutil.Process(checker.pid)
    await forms.check(StructuredOutput(kind="regex", value="warm"))
    before = started.memory_info().rss, psutil.Process().memory_info().rss
    reasons: Counter[Reason | None] = Counter()
    begun = time.monotonic()
    for number in range(1000):
        schema = SCHEMA | {"title": f"unique-{number}"}
        try:
            await forms.check(StructuredOutput(kind="json_schema", value=json.dumps(schema)), tenant="flood")
            reasons[None] += 1
        except MeshError as error:
            reasons[error.reason if error.retry_after_seconds is not None else Reason.INTERNAL] += 1
    # A minute's worth at once, and what the time since has brought.
    assert 120 <= reasons[None] <= 121 + 2 * (time.monotonic() - begun)
    assert reasons[Reason.RATE_LIMIT_EXCEEDED] == 1000 - reasons[None]
    # One that it has brought along before is no new one, and others have quotas of their own.
    await forms.check(
        StructuredOutput(kind="json_schema", value=json.dumps(SCHEMA | {"title": "unique-0"})), tenant="flood"
    )
    await forms.check(StructuredOutput(kind="regex", value="of another"), tenant="quiet")
    after = started.memory_info().rss, psutil.Process().memory_info().rss
    assert max(now - then for now, then in zip(after, before, strict=True)) < 16 << 20
    assert started.is_running()


async def test_a_tenant_leaves_others_places_among_the_forms_that_wait(engine: VllmEngine) -> None:
    forms = engine._life.backend._forms
    assert forms is not None
    wanted = [("greedy", number) for number in range(8)] + [("modest", number) for number in range(3)]
    checks = [forms.check(StructuredOutput(kind="regex", value=f"{of}{number}"), tenant=of) for of, number in wanted]
    found = await asyncio.gather(*checks, return_exceptions=True)
    assert Counter(of for (of, _), error in zip(wanted, found, strict=True) if error is None) == {
        "greedy": 4,
        "modest": 3,
    }


async def test_contradictory_wishes_do_not_harm_the_engine(engine: VllmEngine) -> None:
    before = await generate(engine, asked("before"))
    wishes = [
        form("regex", "[a-z]+", allowed_token_ids=[1500]),
        asked("eos-only", sampling={"allowed_token_ids": [2], "min_tokens": 5, "ignore_eos": False}),
        asked("sampled", sampling=SAMPLED | {"allowed_token_ids": [2], "min_tokens": 5}),
        asked("top", sampling=SAMPLED | {"top_k": 2**32 - 1, "min_p": 1.0, "top_p": 1e-6}),
        asked("odd", sampling=SAMPLED | {"logit_bias": dict.fromkeys(range(engine.card.vocabulary_size), -100.0)}),
    ]
    sinks = await asyncio.wait_for(asyncio.gather(*[generate(engine, wish) for wish in wishes]), 20)
    assert [sink.error for sink in sinks[1:]] == [None] * 4
    after = await generate(engine, asked("after"))
    assert after.token_ids == before.token_ids
    assert engine.load.alive


@pytest.mark.parametrize("cut_after", [0, 1, 50])
async def test_many_generations_cancelled_leave_an_idle_engine(engine: VllmEngine, cut_after: int) -> None:
    async def cancelled(number: int) -> None:
        name = f"{cut_after}-{number}"
        sink = Kept()
        choices = 1 + number % 2
        sampling = SAMPLED | {"max_tokens": 2000}
        await engine.submit(asked(name, prompt=[number + 5, *PROMPT], sampling=sampling, choices=choices), sink)
        while len(sink.token_ids) < cut_after:
            await asyncio.sleep(0.002)
        engine.abort(name)

    for _ in range(2):
        await asyncio.gather(*[cancelled(number) for number in range(50)])
    await eventually(lambda: engine._stats.running == 0 and engine.load.running == 0, within=2)
    processor = engine._life.backend.llm.output_processor
    assert (processor.request_states, processor.parent_requests, processor.external_req_ids) == ({}, {}, {})
    await eventually(lambda: engine.load.waiting == 0 and not engine._streams, within=2)


RESUMED: list[dict[str, Any]] = [
    {"logprob_count": 2, "repetition_penalty": 1.3, "min_tokens": 10, "ignore_eos": False},
    {"stop": ["wh", "er"], "include_stop_string": True, "logprob_count": 0},
    {"logit_bias": dict.fromkeys([165, 248, 101, 2, 107, 40], 80.0), "keep_special_tokens": True},
]


@pytest.mark.parametrize("sampling", RESUMED)
async def test_a_continuation_is_exact_whatever_is_asked_for(engine: VllmEngine, sampling: dict[str, Any]) -> None:
    request = asked("resumed", prompt=list(range(400, 430)), sampling={"max_tokens": 24} | sampling)
    result = await resume_everywhere(engine, request)
    assert not result.differences
    assert result.cuts > len(result.whole.token_ids) / 2


GREEDY: dict[str, Any] = {"temperature": 0.0, "seed": None, "max_tokens": 30}
HELD = [
    form("json_schema", json.dumps(SCHEMA), **GREEDY),
    form("json_object", **GREEDY),
    form("regex", "[0-9]{3}-(yes|no)", **GREEDY),
    form("grammar", 'root ::= ("ab" | "cd") "!" [x-z]{4}', **GREEDY),
    # Of what is drawn from one token alone it is known what it is.
    form("json_schema", json.dumps(SCHEMA), **GREEDY | {"temperature": 1.5, "top_k": 1, "presence_penalty": 0.5}),
]


@pytest.mark.parametrize("held", HELD, ids=lambda held: held.id)
async def test_a_form_goes_on_elsewhere_where_it_was(engine: VllmEngine, held: Generation) -> None:
    result = await resume_everywhere(engine, held)
    assert not result.differences
    assert result.cuts > len(result.whole.token_ids) / 2


async def test_what_was_emitted_has_to_have_the_form(engine: VllmEngine) -> None:
    held = form("regex", "[0-9]{3}", **GREEDY)
    letters = engine._life.backend.llm.get_tokenizer().encode("abc")
    assert (await generate(engine, replace(held, emitted_token_ids=letters))).error is not None
    assert (await generate(engine, held)).text.isdigit()


# As likely as each other, so that what counts over the output decides.
EVEN = dict.fromkeys(range(40, 60), 60.0)
COUNTED: list[dict[str, Any]] = [
    {"presence_penalty": 1.7, "frequency_penalty": 0.9, "repetition_penalty": 1.3, "logprob_count": 2},
    {"frequency_penalty": -1.1, "min_tokens": 10, "stop": ["zz"], "ignore_eos": False},
    {"bad_words": 3},
    {"presence_penalty": 0.6, "bad_words": 3, "logprob_count": 0},
]


@pytest.mark.parametrize("counted", COUNTED)
async def test_penalties_and_bad_words_count_what_was_emitted_elsewhere(
    engine: VllmEngine, counted: dict[str, Any]
) -> None:
    sampling: dict[str, Any] = {"max_tokens": 24, "logit_bias": EVEN, **counted}
    if "bad_words" in counted:
        sampling["bad_words"] = await said_in_two_tokens(engine, sampling | {"bad_words": ()}, counted["bad_words"])
    request = asked("counted", prompt=list(range(400, 430)), sampling=sampling)
    result = await resume_everywhere(engine, request)
    assert not result.differences
    assert result.cuts > len(result.whole.token_ids) / 2
    # Taken for prompt, the same tokens lead elsewhere.
    said = result.whole.token_ids
    for cut in range(1, 24):
        sampled = {"max_tokens": 24 - cut}
        taken = await generate(
            engine, asked("taken", prompt=[*request.prompt, *said[:cut]], sampling=sampling | sampled)
        )
        if taken.token_ids != said[cut:]:
            return
    pytest.fail("nothing that was emitted counted")


async def said_in_two_tokens(engine: VllmEngine, sampling: dict[str, Any], count: int) -> list[str]:
    """Texts of two tokens each that a generation says."""
    whole = await generate(engine, asked("said", prompt=list(range(400, 430)), sampling=sampling))
    tokenizer = engine._life.backend.llm.get_tokenizer()
    pairs = [list(pair) for pair in zip(whole.token_ids, whole.token_ids[1:], strict=False)]
    texts = dict.fromkeys(tokenizer.decode(pair) for pair in pairs if tokenizer.encode(tokenizer.decode(pair)) == pair)
    assert texts
    return list(texts)[:count]
