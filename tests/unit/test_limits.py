"""Limits of one process: buckets, reservations, and what a refused request is told."""

import math
import random

import pytest

from services.common.quota import KeyLimits
from services.gateway.limits import LocalLimits


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limits(clock: Clock) -> LocalLimits:
    return LocalLimits(clock=clock)


def test_a_minute_s_requests_may_come_at_once_and_then_evenly(limits: LocalLimits, clock: Clock) -> None:
    key = KeyLimits(rpm=6)
    assert [limits.take("a", key, 0)[0].allowed for _ in range(7)] == [True] * 6 + [False]
    decision, _ = limits.take("a", key, 0)
    assert decision.which == "requests"
    assert decision.wait_seconds == pytest.approx(10)
    clock.now += decision.wait_seconds
    assert limits.take("a", key, 0)[0].allowed
    assert not limits.take("a", key, 0)[0].allowed


def test_waiting_as_long_as_told_always_helps(limits: LocalLimits, clock: Clock) -> None:
    key = KeyLimits(rpm=100, tpm=1000)
    for tokens in (900, 300, 5000, 1, 700):
        decision, _ = limits.take("a", key, tokens)
        if not decision.allowed:
            clock.now += decision.wait_seconds + 1e-9
            assert limits.take("a", key, tokens)[0].allowed


def test_keys_don_t_share(limits: LocalLimits) -> None:
    key = KeyLimits(rpm=1)
    assert limits.take("a", key, 0)[0].allowed
    assert limits.take("b", key, 0)[0].allowed
    assert not limits.take("a", key, 0)[0].allowed


def test_tokens_are_reserved_and_then_counted_exactly(limits: LocalLimits, clock: Clock) -> None:
    key = KeyLimits(tpm=600)
    decision, reservation = limits.take("a", key, 500)
    assert decision.tokens is not None
    assert decision.tokens.left == pytest.approx(100)
    assert limits.take("a", key, 200)[0].which == "tokens"
    limits.settle(reservation, 50)
    assert limits.take("a", key, 550)[0].allowed
    assert not limits.take("a", key, 10)[0].allowed
    clock.now += 1
    assert limits.take("a", key, 10)[0].allowed


def test_who_used_more_than_was_reserved_waits_for_it(limits: LocalLimits) -> None:
    key = KeyLimits(tpm=600)
    _, reservation = limits.take("a", key, 100)
    limits.settle(reservation, 1200)
    decision, _ = limits.take("a", key, 100)
    assert not decision.allowed
    assert decision.wait_seconds == pytest.approx(70)


def test_a_request_larger_than_a_minute_s_tokens_passes_when_nothing_else_ran(limits: LocalLimits) -> None:
    key = KeyLimits(tpm=100)
    assert limits.take("a", key, 5000)[0].allowed
    assert not limits.take("a", key, 1)[0].allowed


def test_requests_at_a_time_are_counted_and_given_back(limits: LocalLimits) -> None:
    key = KeyLimits(concurrency=2)
    _, first = limits.take("a", key, 0)
    limits.take("a", key, 0)
    assert limits.take("a", key, 0)[0].which == "concurrency"
    limits.settle(first, 0)
    assert limits.take("a", key, 0)[0].allowed


def test_what_is_refused_takes_nothing(limits: LocalLimits) -> None:
    key = KeyLimits(rpm=2, concurrency=1)
    limits.take("a", key, 0)
    for _ in range(5):
        limits.take("a", key, 0)
    decision, _ = limits.take("a", key, 0)
    assert decision.requests is not None
    assert decision.requests.left == pytest.approx(1)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_told_before_a_request_is_known_is_what_it_would_be_told(
    limits: LocalLimits, clock: Clock, seed: int
) -> None:
    chance = random.Random(seed)
    limits.share = chance.choice((1.0, 0.5))
    key = KeyLimits(rpm=chance.choice((None, 5)), tpm=chance.choice((None, 300)), concurrency=chance.choice((None, 3)))
    told = 0
    for _ in range(200):
        clock.now += chance.expovariate(0.3)
        refusal = limits.refusal("a", key)
        if refusal is not None:
            told += 1
            assert {limits.take("a", key, tokens)[0] for tokens in (0.0, 1.0, 200.0, math.inf)} == {refusal}
        elif key.tpm is None:
            # Nothing but its tokens tells one request from another.
            decision, reservation = limits.take("a", key, 0.0)
            assert decision.allowed
            if chance.random() < 0.5:
                limits.settle(reservation, 0.0)
        else:
            _, reservation = limits.take("a", key, chance.choice((1.0, 50.0)))
    assert (told > 0) == (key != KeyLimits() and key != KeyLimits(tpm=300))


def test_a_part_of_a_limit_is_a_part_of_everything(limits: LocalLimits) -> None:
    limits.share = 0.25
    key = KeyLimits(rpm=8, concurrency=8)
    assert [limits.take("a", key, 0)[0].allowed for _ in range(3)] == [True, True, False]


def test_keys_of_the_past_are_forgotten(limits: LocalLimits, clock: Clock) -> None:
    key = KeyLimits(rpm=1)
    for number in range(20_000):
        limits.take(str(number), key, 0)
        limits.settle(limits.take(str(number), key, 0)[1], 0)
    clock.now += 61
    limits.take("new", key, 0)
    assert len(limits.keys) == 1
