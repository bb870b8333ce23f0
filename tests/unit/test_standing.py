"""What a gateway may say itself of limits that it shares, and for how long."""

import pytest

from services.common.quota import KeyLimits
from services.gateway.limits import Decision, Level, Which
from services.gateway.standing import Standing, standing

RPM = KeyLimits(rpm=6)
BOTH = KeyLimits(rpm=6, tpm=600)


def refused(which: Which, wait: float, *, tokens: float | None = None) -> Decision:
    levels = Level(6, 0.5), None if tokens is None else Level(600, tokens)
    return Decision(allowed=False, which=which, wait_seconds=wait, requests=levels[0], tokens=levels[1])


@pytest.mark.parametrize(
    ("decision", "limits", "stands"),
    [
        pytest.param(refused("requests", 5), RPM, True, id="no requests left: none are given back"),
        pytest.param(Decision(allowed=True), RPM, False, id="let in"),
        pytest.param(refused("concurrency", 1), RPM, False, id="a place may come free"),
        pytest.param(refused("tokens", 5, tokens=0), BOTH, False, id="tokens may be given back"),
        pytest.param(refused("requests", 5, tokens=500), BOTH, False, id="one that wants more waits for tokens"),
        pytest.param(refused("requests", 5, tokens=580), BOTH, True, id="whatever it wants, requests are missing"),
    ],
)
def test_only_what_nothing_can_change_stands(decision: Decision, limits: KeyLimits, stands: bool) -> None:
    assert (standing(decision, limits, asked_at=100, heard_at=100.003) is not None) is stands


@pytest.fixture
def heard() -> Standing:
    known = standing(refused("requests", 5, tokens=595), BOTH, asked_at=100, heard_at=100.002)
    assert known is not None
    return known


@pytest.mark.parametrize(
    ("now", "wait", "requests", "tokens"),
    [(100.002, 5.0, 0.5, 595.0), (102.002, 3.0, 0.7, 600.0), (104.998, 0.004, 0.9996, 600.0)],
)
def test_it_is_told_as_buckets_fill_up(
    heard: Standing, now: float, wait: float, requests: float, tokens: float
) -> None:
    told = heard.decision_at(now, BOTH)
    assert told is not None
    assert told.requests is not None
    assert told.tokens is not None
    assert (told.allowed, told.which) == (False, "requests")
    assert (told.wait_seconds, told.requests.left, told.tokens.left) == pytest.approx((wait, requests, tokens))


def test_it_ends_before_the_limit_could_let_a_request_in(heard: Standing) -> None:
    # It was decided after it was asked, and its milliseconds are rounded up.
    assert heard.until < 100 + 5
    assert heard.decision_at(heard.until, BOTH) is None


def test_it_says_nothing_of_other_limits(heard: Standing) -> None:
    assert heard.decision_at(101, KeyLimits(rpm=7, tpm=600)) is None
