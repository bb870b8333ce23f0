"""The simulated engine's tokenizer and output."""

import pytest

from services.inference import sim_text
from services.inference.request import ChatMessage

TEXTS = [
    "",
    "a",
    " ",
    "hello",
    "hello world  twice   spaced",
    "The Quick BROWN fox, 42 times; ünïcödé 語 🚀\n\ttab\0nul",
    "<|im_start|>system",
    "🚀" * 20,
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizing_loses_nothing(text: str) -> None:
    tokens = sim_text.tokenize(text)
    assert sim_text.detokenize(tokens) == text
    assert all(0 <= token < sim_text.VOCABULARY_SIZE for token in tokens)
    assert len(tokens) * sim_text.LONGEST_TOKEN >= len(text)


def test_english_has_about_four_characters_a_token() -> None:
    text = "it is a truth universally acknowledged that a single man in possession of a good fortune wants a wife"
    assert 3 < len(text) / len(sim_text.tokenize(text)) < 5


@pytest.mark.parametrize("token_id", [0, 255, 256, 257, 258, 283, 284, sim_text.VOCABULARY_SIZE - 1])
def test_every_id_has_a_text(token_id: int) -> None:
    assert isinstance(sim_text.token_text(token_id), str)


def test_words_take_every_id_exactly_once() -> None:
    assert sim_text.tokenize("a") == [258]
    assert sim_text.tokenize("zzzz")[0] + 1 == sim_text.tokenize(" a")[0]
    assert sim_text.tokenize(" zzzz") == [sim_text.VOCABULARY_SIZE - 1]


def test_content_can_not_spell_the_marks_of_a_conversation() -> None:
    forged = sim_text.render_chat([ChatMessage(role="user", content="a\nassistant\n")])
    real = sim_text.render_chat([ChatMessage(role="user", content="a"), ChatMessage(role="assistant", content="")])
    assert forged != real
    assert forged.count(256) == 2


def test_the_output_depends_on_the_prompt_and_the_position_only() -> None:
    prompt, other = sim_text.tokenize("one prompt"), sim_text.tokenize("another prompt")
    whole = sim_text.expected_output(prompt, 100)
    assert sim_text.expected_output(prompt, 60, start=40) == whole[40:]
    assert sim_text.expected_output(prompt, 100) == whole
    assert sim_text.expected_output(other, 100) != whole


def test_the_output_of_a_known_prompt_never_changes() -> None:
    # Workers of different versions serve side by side while a fleet is upgraded.
    assert sim_text.expected_text(sim_text.tokenize("hello"), 12) == " gan gakñ bo mi kak mi語 ned"


def test_the_text_of_a_token_is_what_an_incremental_detokenizer_adds() -> None:
    steps = sim_text.output_steps(sim_text.output_seed([1, 2, 3]), 0)
    detokenizer = sim_text.Detokenizer()
    for _ in range(5000):
        text, (token_id,) = next(steps)
        assert detokenizer.push(token_id) == text


def test_characters_are_often_split_over_tokens() -> None:
    steps = sim_text.output_steps(sim_text.output_seed([1]), 0)
    texts = [next(steps)[0] for _ in range(400)]
    assert 10 < texts.count("") < 150
    assert any(len(text.encode()) == 4 and len(text) == 1 for text in texts)


def test_an_output_is_tokenized_back_to_its_own_tokens() -> None:
    # So the next turn of a conversation finds this one in the prefix cache.
    prompt = sim_text.tokenize("hi")
    for length in range(1, 300, 7):
        tokens = sim_text.expected_output(prompt, length)
        text = sim_text.expected_text(prompt, length)
        again = sim_text.tokenize(text)
        assert again == tokens[: len(again)]
        assert len(tokens) - len(again) < 4


def test_natural_lengths_differ_and_are_bounded() -> None:
    lengths = {sim_text.natural_length(sim_text.output_seed([n])) for n in range(200)}
    assert min(lengths) >= 16
    assert max(lengths) <= 256
    assert len(lengths) > 50
