"""Degradation levels: by the share of healthy workers, and not at every twitch."""

import pytest

from services.common.policy import DegradationPolicy
from services.router.degradation import Degradation, Level

POLICY = DegradationPolicy(
    short_outputs_below=0.75, refusing_below=0.4, worsen_after_seconds=2, recover_after_seconds=10, recover_margin=0.1
)


def levels(*steps: tuple[float, int], policy: DegradationPolicy = POLICY) -> list[Level]:
    """The level after each step: the time, and how many of 10 workers are healthy."""
    degradation, found = Degradation(), []
    for now, healthy in steps:
        degradation.observe(healthy, 10, policy, now)
        found.append(degradation.level)
    return found


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(0, 10), (1, 8), (9, 8)], [Level.NONE] * 3),
        ([(0, 7), (1, 7), (2, 7)], [Level.NONE, Level.NONE, Level.SHORT_OUTPUTS]),
        ([(0, 3), (2, 3)], [Level.NONE, Level.REFUSING]),
        # Ever worse: the clock does not start anew.
        ([(0, 7), (1.9, 3), (2, 3)], [Level.NONE, Level.NONE, Level.REFUSING]),
        # A twitch starts it anew.
        ([(0, 7), (1.5, 10), (1.6, 7), (3, 7), (3.6, 7)], [Level.NONE] * 4 + [Level.SHORT_OUTPUTS]),
        # At the bound again is not enough, above it is, after a while.
        ([(0, 7), (2, 7), (3, 8), (99, 8)], [Level.NONE] + [Level.SHORT_OUTPUTS] * 3),
        ([(0, 7), (2, 7), (3, 9), (12, 9), (13, 9)], [Level.NONE] + [Level.SHORT_OUTPUTS] * 3 + [Level.NONE]),
        ([(0, 3), (2, 3), (3, 6), (13, 6)], [Level.NONE, Level.REFUSING, Level.REFUSING, Level.SHORT_OUTPUTS]),
    ],
)
def test_levels_follow_the_share_with_hysteresis(steps: list[tuple[float, int]], expected: list[Level]) -> None:
    assert levels(*steps) == expected


def test_all_there_is_is_enough_whatever_the_margin() -> None:
    policy = DegradationPolicy(short_outputs_below=1.0, worsen_after_seconds=0, recover_after_seconds=0)
    assert levels((0, 9), (1, 10), policy=policy) == [Level.SHORT_OUTPUTS, Level.NONE]


def test_without_bounds_nothing_degrades() -> None:
    assert levels((0, 0), (100, 0), policy=DegradationPolicy()) == [Level.NONE, Level.NONE]


def test_a_fleet_that_nobody_expects_is_not_degraded() -> None:
    degradation = Degradation()
    assert not degradation.observe(0, 0, POLICY, 100)
    assert degradation.reason == ""
