"""Stop strings in text that arrives in pieces."""

import itertools

import pytest

from services.inference.sim_stop import StopMatcher

CASES = [
    (["END"], "one END two", "one ", True),
    (["END"], "one EN", "one EN", False),
    (["END"], "EEEND", "EE", True),
    (["aab"], "aaab", "a", True),
    (["later", "soon"], "soon later", "", True),
    (["xyz", "yz"], "wxyz", "w", True),
    (["é"], "caf\u00e9!", "caf", True),
    (["\n\n"], "a\nb\n\nc", "a\nb", True),
]


def splits(text: str) -> list[list[str]]:
    cuts = itertools.combinations(range(1, len(text)), 2)
    return [list(text), [text], *([text[:a], text[a:b], text[b:]] for a, b in cuts)]


@pytest.mark.parametrize(("stops", "text", "passed", "stopped"), CASES)
def test_the_pieces_make_no_difference(stops: list[str], text: str, passed: str, stopped: bool) -> None:
    for pieces in splits(text):
        matcher, got, found = StopMatcher(stops), "", None
        for piece in pieces:
            part, found = matcher.push(piece)
            got += part
            if found is not None:
                break
        got += matcher.flush()
        assert (got, found is not None) == (passed, stopped), pieces


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.push("text ST") == ("text ", None)
    assert matcher.push("AY ") == ("STAY ", None)
    assert matcher.push("S") == ("", None)
    assert matcher.flush() == "S"
    assert matcher.flush() == ""


def test_the_stop_that_begins_first_is_told_and_passed_on_where_it_is_to_be_included() -> None:
    assert StopMatcher(["later", "soon", "soon l"]).push("now soon later") == ("now ", "soon l")
    assert StopMatcher(["later", "soon"], include=True).push("now soon later") == ("now soon", "soon")
