"""Where a request's time went, and why, in words."""

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from tokenloom.router.v1 import admin_pb2

from services.mesh.explain import decision_lines
from services.mesh.request_story import Story, told

ROW = {
    "model": "sim",
    "worker": "slow-0",
    "outcome": "ok",
    "prompt_tokens": 100,
    "cached_tokens": 40,
    "output_tokens": 21,
    "duration_seconds": 2.0,
    "ttft_seconds": 0.4,
    "tpot_seconds": 0.08,
    "queue_seconds": 0.1,
    "prefill_seconds": 0.05,
    "moves": [],
}


def duration(seconds: float) -> Duration:
    made = Duration()
    made.FromNanoseconds(round(seconds * 1e9))
    return made


def decision(*, queue: float = 0.0, out: str = "full") -> admin_pb2.Decision:
    """It chose slow-0, which writes a token every 80 ms; quick-0 would every 10 ms."""
    return admin_pb2.Decision(
        model="sim",
        worker_id="slow-0",
        queue_duration=duration(queue),
        candidates=[
            admin_pb2.Candidate(
                worker_id="slow-0",
                cost_duration=duration(2.0),
                predicted_time_per_output_token_duration=duration(0.08),
            ),
            admin_pb2.Candidate(
                worker_id="quick-0",
                excluded_reason=out,
                cost_duration=duration(3.0),
                predicted_time_per_output_token_duration=duration(0.01),
            ),
        ],
    )


def story(*decisions: admin_pb2.Decision, slow: dict[str, list[str]] | None = None, **row: Any) -> Story:
    return Story(row={**ROW, **row}, decisions=decisions, slow_workers=slow or {})


def test_the_phases_add_up_to_the_whole() -> None:
    phases = story(decision(queue=0.06)).phases
    assert [(one.name, round(one.seconds, 3)) for one in phases] == [
        ("in the router's queue", 0.06),
        ("in the engine's queue", 0.04),
        ("prefill", 0.05),
        ("else, until the first token", 0.25),
        ("decode", 1.6),
    ]
    assert sum(one.seconds for one in phases) == pytest.approx(2.0)
    assert phases[2].note == "100 tokens of the prompt, 40 of them cached"
    assert phases[4].note == "21 tokens, one every 80.0 ms"


def test_what_ended_before_its_first_token_has_no_decode() -> None:
    phases = story(ttft_seconds=None, tpot_seconds=None, outcome="engine_failed").phases
    assert [one.name for one in phases][-1] == "the rest"
    assert sum(one.seconds for one in phases) == pytest.approx(2.0)


NO_ROOM = "It waited 1.50 s in the router, since no worker for sim had room."
SLOWER = (
    "slow-0 wrote a token every 80.0 ms; quick-0 would have written one every 10.0 ms, "
    "but the whole answer was expected there in 3.00 s instead of 2.00 s."
)


@pytest.mark.parametrize(
    ("told_by", "said"),
    [
        (story(), []),
        (story(outcome="no_capacity"), ["It ended with the error no_capacity."]),
        (
            story(decision(queue=1.5), queue_seconds=1.5),
            [NO_ROOM],
        ),
        (story(queue_seconds=0.9), ["It waited 900.0 ms in the queue of slow-0's engine."]),
        (
            story(prefill_seconds=0.8),
            ["Its prompt took 800.0 ms: 60 tokens had to be computed, 40 were cached."],
        ),
        (story(prefill_seconds=0.03, queue_seconds=0.0, duration_seconds=0.04), []),
        (
            story(decision(out="")),
            [SLOWER],
        ),
        (
            story(decision(), slow={"slow-0": ["a decode step takes 80.0 ms"], "other": ["heat"]}),
            [
                "The others were out of the question: quick-0 (full).",
                "slow-0 is slow at present: a decode step takes 80.0 ms.",
            ],
        ),
        (
            story(moves=[{"worker": "quick-0", "at_seconds": 0.5, "emitted_tokens": 7, "cause": "it \x1bdied"}]),
            ["It was moved away from quick-0 500.0 ms after it began, with 7 tokens written: it ?died."],
        ),
    ],
)
def test_each_cause_is_a_sentence(told_by: Story, said: list[str]) -> None:
    assert told_by.causes == said


def test_the_phases_of_a_request_that_moved_add_up_too() -> None:
    move = {"worker": "quick-0", "at_seconds": 0.5, "emitted_tokens": 7, "cause": "it died"}
    phases = story(decision(), moves=[move], queue_seconds=1.0).phases
    assert [one.name for one in phases] == ["until the first token", "decode, moving included"]
    assert sum(one.seconds for one in phases) == pytest.approx(2.0)


def test_a_request_that_has_not_ended_has_no_phases() -> None:
    assert Story(row=None, decisions=[decision()], slow_workers={}).phases == []


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 ms"), (0.0001, "0.10 ms"), (0.0125, "12.5 ms"), (1.5, "1.50 s")])
def test_seconds_are_told_in_a_unit_that_fits(seconds: float, text: str) -> None:
    assert told(seconds) == text


def test_a_decision_tells_which_part_of_a_prediction_is_learnt_from_late_first_tokens() -> None:
    chosen = decision()
    late, usual = chosen.candidates[0], chosen.candidates.add(worker_id="other-0", cost_duration=duration(2.5))
    for one in (late, usual):
        one.predicted_time_to_first_token_duration.CopyFrom(duration(0.5))
    late.predicted_delay_duration.CopyFrom(duration(0.3))
    lines = [line.strip() for line in decision_lines(chosen)]
    told = {name: said for name, _, said in (line.partition(": ") for line in lines)}
    assert "first token in 500.0 ms (300.0 ms of it learnt: first tokens there came late), then" in told["slow-0"]
    assert told["other-0"].startswith("first token in 500.0 ms, then")
