"""What guardrails find in texts, whole and bit by bit."""

import random

import pytest

from services.common.settings_guardrails import PatternsFilter
from services.gateway.guard_filters import PII_KINDS, PatternFilter, PiiFilter
from services.gateway.guard_text import BlockedError, Rule, TextStream, filtered

PII = Rule(PiiFilter(PII_KINDS), "mask")
SECRETS = Rule(PatternFilter("secret", {"project": r"\bproject-[a-z]{3,8}\b", "digits": r"#\d+"}), "mask")
FORBIDDEN = Rule(PatternFilter("forbidden", [r"(?i)launch\s+codes?"]), "refuse")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("mail bob.b+x@mail.example.com!", "mail <EMAIL_ADDRESS>!"),
        ("bob@localhost is no address", "bob@localhost is no address"),
        ("card 4111 1111 1111 1111.", "card <CREDIT_CARD>."),
        ("card 4111-1111-1111-1112.", "card 4111-1111-1111-1112."),
        ("order 0000000000000000", "order 0000000000000000"),
        ("IBAN DE89 3704 0044 0532 0130 00 please", "IBAN <IBAN_CODE> please"),
        ("IBAN DE89370400440532013000", "IBAN <IBAN_CODE>"),
        ("DE88 3704 0044 0532 0130 00", "DE88 3704 0044 0532 0130 00"),
        ("from 10.1.2.3 to 2001:db8::1.", "from <IP_ADDRESS> to <IP_ADDRESS>."),
        ("version 1.2.3.400 of 1:2", "version 1.2.3.400 of 1:2"),
        ("ssn 123-45-6789, not 000-12-3456", "ssn <US_SSN>, not 000-12-3456"),
        ("call +49 30 901820 now", "call <PHONE_NUMBER> now"),
        ("3.14159 and 2024-01-01 and 100000", "3.14159 and 2024-01-01 and 100000"),
        ("Grüße, 你好, 🤡", "Grüße, 你好, 🤡"),
        ("", ""),
    ],
)
def test_personal_data_is_masked_and_nothing_else(text: str, masked: str) -> None:
    assert filtered(text, [PII]) == masked


def test_patterns_are_masked_under_their_labels() -> None:
    assert (
        filtered("see project-abc and #12, not xproject-abc", [SECRETS])
        == "see <PROJECT> and <DIGITS>, not xproject-abc"
    )


def test_what_is_refused_says_by_which_rule_and_what_came_before() -> None:
    with pytest.raises(BlockedError) as caught:
        filtered("mail a@b.example: the Launch  codes are", [PII, FORBIDDEN])
    assert (caught.value.rule, caught.value.before) == ("forbidden", "mail <EMAIL_ADDRESS>: the ")


@pytest.mark.parametrize("seed", range(40))
def test_a_text_in_bits_is_filtered_as_a_whole_one(seed: int) -> None:
    source = random.Random(seed)
    words = [
        "hello ",
        "project-abc",
        "project-",
        "#",
        "#7",
        "bob@x.example ",
        "4111 1111 1111 1111",
        "é",
        "+49 30 901820",
    ]
    # Numbers that follow each other with nothing between could be one or two, whoever reads them.
    text = "".join(source.choice(words) + source.choice([", and ", "; ", " or "]) for _ in range(60))
    stream, said, position = TextStream([PII, SECRETS]), "", 0
    while position < len(text):
        size = source.randint(1, 9)
        said += stream.feed(text[position : position + size])
        position += size
    assert said + stream.finish() == filtered(text, [PII, SECRETS])


def test_a_refused_text_in_bits_never_lets_a_part_of_it_out() -> None:
    stream, said = TextStream([FORBIDDEN]), ""

    def say(text: str) -> None:
        nonlocal said
        for letter in text:
            said += stream.feed(letter)

    with pytest.raises(BlockedError) as caught:
        say("here are the launch codes: 1234")
    assert said + caught.value.before == "here are the "


def test_plain_text_is_let_out_at_once_where_nothing_could_begin() -> None:
    stream = TextStream([FORBIDDEN])
    assert stream.feed("hello ") == "hello "
    assert stream.feed("l") == ""
    assert stream.feed("ong") == "long"


@pytest.mark.parametrize("pattern", ["(", "a*", ""])
def test_a_pattern_that_makes_no_sense_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"regular expression|empty text"):
        PatternsFilter(name="x", patterns=[pattern])


def test_a_pattern_that_explodes_is_stopped() -> None:
    with pytest.raises(TimeoutError):
        PatternFilter("x", [r"(a+)+$b|(?:(?:a|a)+)+c"]).find("a" * 40 + "!", 0)
