"""What an engine's own steps say about its speed."""

import random

import pytest

from services.inference.calibration import DecodeModel, MovingMean, PrefillMeter


def observed(steps: list[tuple[int, float]]) -> DecodeModel:
    """A model that has seen these steps: batch, seconds."""
    model = DecodeModel()
    for batch, seconds in steps:
        model.observe(batch, seconds)
    return model


def line(base: float, slope: float, batches: list[int]) -> list[tuple[int, float]]:
    """Exact steps of an engine with these coefficients."""
    return [(batch, base + slope * (batch - 1)) for batch in batches]


@pytest.mark.parametrize(
    ("steps", "base", "slope"),
    [
        (line(0.010, 0.0002, [1, 2, 8, 64, 32, 5] * 20), 0.010, 0.0002),
        (line(0.010, 0.0, [1, 9, 30]), 0.010, 0.0),
        # One batch size says nothing about others.
        ([(16, 0.02)] * 50, 0.02, 0.0),
        # Larger batches that are faster are noise.
        ([(1, 0.03), (10, 0.02)] * 20, 0.025, 0.0),
        # A line that would start below zero starts at zero.
        ([(11, 0.001), (21, 0.021)] * 20, 0.0, 0.00086),
    ],
)
def test_a_decode_step_is_a_line_over_the_batch(steps: list[tuple[int, float]], base: float, slope: float) -> None:
    model = observed(steps)
    assert model.base_seconds == pytest.approx(base, rel=0.01, abs=1e-9)
    assert model.seconds_per_sequence == pytest.approx(slope, rel=0.02, abs=1e-7)


def test_nothing_is_known_before_the_first_step() -> None:
    model = DecodeModel()
    assert model.base_seconds is None
    assert model.seconds_per_sequence is None
    assert PrefillMeter().tokens_per_second is None


def test_steps_that_were_held_up_hardly_count() -> None:
    draw = random.Random(1)
    steps = line(0.010, 0.0002, [draw.randint(1, 64) for _ in range(400)])
    steps[50::50] = [(batch, seconds * 100) for batch, seconds in steps[50::50]]
    assert observed(steps).base_seconds == pytest.approx(0.010, rel=0.2)


def test_an_engine_that_became_slower_is_followed() -> None:
    batches = [1, 8, 32, 64] * 400
    model = observed(line(0.010, 0.0002, batches) + line(0.050, 0.0002, batches))
    assert model.base_seconds == pytest.approx(0.050, rel=0.1)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_durations_are_ignored(seconds: float) -> None:
    assert observed([(1, 0.01), (1, seconds)]).base_seconds == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("prompts", "rate"),
    [
        ([(1000, 0.0, 0.1)], 10_000),
        ([(1000, 0.0, 0.1), (1000, 5.0, 5.1), (32, 9.0, 9.0032)], 10_000),
        # Together in one step.
        ([(500, 0.0, 0.1), (500, 0.0, 0.1), (64, 1.0, 1.0064)], 10_000),
        # The second one waited for the first: the time is counted once.
        ([(1000, 0.0, 0.1), (1000, 0.0, 0.2), (64, 1.0, 1.0064)], 10_000),
        # All but cached.
        ([(1000, 0.0, 0.1), (1, 1.0, 1.1), (2, 2.0, 2.1), (1000, 3.0, 3.1), (64, 4.0, 4.0064)], 10_000),
    ],
)
def test_prefill_speed_is_tokens_over_the_time_in_which_prompts_were_computed(
    prompts: list[tuple[int, float, float]], rate: float
) -> None:
    meter = PrefillMeter()
    for tokens, started, ended in prompts:
        meter.observe(tokens, started, ended)
    assert meter.tokens_per_second == pytest.approx(rate, rel=0.01)


def test_a_card_that_throttles_is_noticed_within_some_prompts() -> None:
    meter = PrefillMeter()
    for number in range(200):
        seconds = 0.1 if number < 100 else 0.4
        meter.observe(2000, float(number), number + seconds)
    assert meter.tokens_per_second == pytest.approx(5000, rel=0.1)


def test_a_moving_mean_starts_with_the_first_value_and_moves_by_its_share() -> None:
    mean = MovingMean(0.5)
    assert mean.value is None
    mean.observe(4.0)
    mean.observe(8.0)
    assert mean.value == 6.0
