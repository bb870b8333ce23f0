"""What is checked before vLLM sees a generation, and what it is then asked for."""

from dataclasses import replace
from typing import Any

import pytest

from services.common.errors import MeshError, Reason
from services.inference.request import Generation, Sampling
from services.inference.vllm_params import EMITTED_ARGUMENT, Limits, plan

LIMITS = Limits(context_tokens=100, vocabulary=1000, logprobs=20, end_ids=frozenset({2}))
PROMPT = [5, 6, 7, 8]


def generation(*, emitted: tuple[int, ...] = (), kind: Any = "tokens", **sampling: Any) -> Generation:
    """A generation with some sampling parameters."""
    values: dict[str, Any] = {"temperature": 0.0} | sampling
    return Generation(
        id="g", model="m", prompt=PROMPT, kind=kind, sampling=Sampling(**values), emitted_token_ids=emitted
    )


@pytest.mark.parametrize(
    ("asked", "prompt", "reason", "field", "says"),
    [
        (generation(max_tokens=97), PROMPT, Reason.CONTEXT_LENGTH_EXCEEDED, "prompt", "100 tokens"),
        (generation(max_tokens=97, kind="chat"), PROMPT, Reason.CONTEXT_LENGTH_EXCEEDED, "messages", "100 tokens"),
        (generation(), [5] * 100, Reason.CONTEXT_LENGTH_EXCEEDED, "prompt", "100 in the prompt"),
        (generation(), [], Reason.INVALID_REQUEST, "prompt", "at least one token"),
        (generation(), [5, 1000], Reason.INVALID_REQUEST, "prompt", "below 1000"),
        (generation(), [5, -1], Reason.INVALID_REQUEST, "prompt", "token id -1"),
        (generation(stop_token_ids=[1000]), PROMPT, Reason.INVALID_REQUEST, "sampling.stop_token_ids", "below 1000"),
        (generation(logit_bias={2**32: 1.0}), PROMPT, Reason.INVALID_REQUEST, "sampling.logit_bias", "below 1000"),
        (generation(emitted=(1000,)), PROMPT, Reason.INVALID_REQUEST, "emitted_token_ids", "below 1000"),
        (generation(min_tokens=6, max_tokens=5), PROMPT, Reason.INVALID_REQUEST, "sampling.min_tokens", "at most 5"),
        (generation(min_tokens=10**9), PROMPT, Reason.INVALID_REQUEST, "sampling.min_tokens", "at most 96"),
        (generation(logprob_count=21), PROMPT, Reason.INVALID_REQUEST, "sampling.logprob_count", "at most 20"),
        (generation(emitted=(9,) * 6, max_tokens=5), PROMPT, Reason.INVALID_REQUEST, "emitted_token_ids", "at most 5"),
        (generation(emitted=(9,), prompt_logprob_count=0), PROMPT, Reason.INVALID_REQUEST, "emitted_token_ids", "log-"),
        (generation(allowed_token_ids=[1000]), PROMPT, Reason.INVALID_REQUEST, "sampling.allowed_token_ids", "below"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_by_field_and_bound(
    asked: Generation, prompt: list[int], reason: Reason, field: str, says: str
) -> None:
    with pytest.raises(MeshError) as caught:
        plan(asked, prompt, LIMITS)
    assert caught.value.reason is reason
    assert caught.value.field == field
    assert says in caught.value.message


def test_without_max_tokens_the_output_may_fill_the_context() -> None:
    assert plan(generation(), PROMPT, LIMITS).max_tokens == 96


def test_a_prompt_and_output_that_fill_the_context_exactly_are_taken() -> None:
    assert plan(generation(max_tokens=96), PROMPT, LIMITS).arguments()["max_tokens"] == 96


def test_a_continuation_counts_what_was_emitted() -> None:
    todo = plan(generation(emitted=(11, 12), max_tokens=10, min_tokens=5), PROMPT, LIMITS)
    assert todo.tokens == [5, 6, 7, 8, 11, 12]
    assert todo.arguments()["max_tokens"] == 8
    assert todo.arguments()["min_tokens"] == 3


def test_a_continuation_has_room_for_its_whole_output_only_once() -> None:
    todo = plan(generation(emitted=(11,) * 90, max_tokens=96), PROMPT, LIMITS)
    assert todo.remaining_tokens == 6


@pytest.mark.parametrize(
    "sampling",
    [{"presence_penalty": 1.0}, {"frequency_penalty": -1.0}, {"bad_words": ("no",)}],
    ids=lambda it: next(iter(it)),
)
def test_what_counts_over_the_output_alone_is_counted_by_us_in_a_continuation_where_the_engine_can(
    sampling: dict[str, Any],
) -> None:
    asked = generation(emitted=(11, 12), repetition_penalty=1.5, **sampling)
    penalties = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.5}
    penalties |= {name: value for name, value in sampling.items() if name in penalties}
    arguments = plan(asked, PROMPT, LIMITS).arguments()
    assert arguments["extra_args"] == {EMITTED_ARGUMENT: {"count": 2, **penalties}}
    assert not penalties.keys() & arguments.keys()
    assert arguments["bad_words"] == (["no"] if "bad_words" in sampling else None)
    with pytest.raises(MeshError, match=f"{next(iter(sampling))} can't be continued exactly") as caught:
        plan(asked, PROMPT, replace(LIMITS, counts_emitted=False))
    assert caught.value.reason is Reason.NO_READY_WORKER


def test_a_repetition_penalty_can_be_continued_since_it_looks_at_prompt_and_output_alike() -> None:
    asked = generation(emitted=(11,), repetition_penalty=1.5)
    for limits in (LIMITS, replace(LIMITS, counts_emitted=False)):
        arguments = plan(asked, PROMPT, limits).arguments()
        assert (arguments["max_tokens"], arguments["repetition_penalty"]) == (95, 1.5)
        assert "extra_args" not in arguments


@pytest.mark.parametrize(
    ("asked", "ended"),
    [
        (generation(emitted=(11, 2)), True),
        (generation(emitted=(2, 11)), False),
        (generation(emitted=(11, 2), ignore_eos=True), False),
        (generation(emitted=(11, 12), stop_token_ids=[12]), True),
        (generation(emitted=(11, 12), stop_token_ids=[12], ignore_eos=True), True),
    ],
)
def test_a_last_token_that_stops_leaves_nothing_to_generate(asked: Generation, *, ended: bool) -> None:
    todo = plan(asked, PROMPT, LIMITS)
    assert todo.ended_by_token is ended
    assert (todo.remaining_tokens == 0) is ended


def test_every_sampling_parameter_reaches_vllm() -> None:
    sampling = Sampling(
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        max_tokens=20,
        min_tokens=3,
        stop=("END",),
        stop_token_ids=(9,),
        seed=7,
        ignore_eos=True,
        logit_bias={4: -5.0},
        logprob_count=2,
        prompt_logprob_count=4,
        bad_words=("no",),
        allowed_token_ids=(9, 10),
        keep_special_tokens=True,
        include_stop_string=True,
    )
    assert plan(replace(generation(), sampling=sampling, choices=3), PROMPT, LIMITS).arguments() == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "max_tokens": 20,
        "min_tokens": 3,
        "stop": ["END"],
        "stop_token_ids": [9],
        "seed": 7,
        "ignore_eos": True,
        "logit_bias": {4: -5.0},
        "logprobs": 2,
        "n": 3,
        "prompt_logprobs": 4,
        "bad_words": ["no"],
        "allowed_token_ids": [9, 10],
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }


def test_a_seed_is_one_that_vllm_takes_for_a_seed_and_counts_up_from() -> None:
    for seed, sent in {7: 7, -1: 2**62 - 1, -(2**63): 0, 2**63 - 1: 2**62 - 1}.items():
        assert plan(generation(seed=seed), PROMPT, LIMITS).arguments()["seed"] == sent


def test_a_prompt_token_limit_keeps_the_end() -> None:
    asked = replace(generation(max_tokens=50), prompt_token_limit=50)
    assert plan(asked, list(range(200)), LIMITS).prompt_token_ids == list(range(150, 200))
    assert plan(asked, PROMPT, LIMITS).prompt_token_ids == PROMPT


def test_log_probabilities_of_a_prompt_are_bounded_with_its_length() -> None:
    limits = replace(LIMITS, context_tokens=100_000)
    assert plan(generation(prompt_logprob_count=20), [5] * 1560, limits)
    with pytest.raises(MeshError, match="at most 15 for a prompt of 2000 tokens"):
        plan(generation(prompt_logprob_count=20), [5] * 2000, limits)
    with pytest.raises(MeshError, match="can't be given for a prompt of 40000 tokens"):
        plan(generation(prompt_logprob_count=0), [5] * 40_000, limits)


@pytest.mark.parametrize(
    ("asked", "cause"),
    [(generation(emitted=(11, 2)), None), (generation(emitted=(11, 3)), 3), (generation(emitted=(12,)), 12)],
)
def test_a_stop_token_is_the_cause_of_an_end_and_the_end_of_sequence_is_not(
    asked: Generation, cause: int | None
) -> None:
    asked = replace(asked, sampling=replace(asked.sampling, stop_token_ids=(12,)))
    limits = replace(LIMITS, end_ids=frozenset({2, 3}), end_id=2)
    assert plan(asked, PROMPT, limits).stop_token_id == cause
