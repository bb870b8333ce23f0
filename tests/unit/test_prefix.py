"""Tests of the hashes that name a shared prefix."""

import pytest
from tokenloom.inference.v1 import generation_pb2 as pb

from services.common.prefix import TEXT_BLOCK_BYTES, text_block_hashes, token_block_hashes
from services.common.prompt_prefix import prompt_hashes


@pytest.mark.parametrize(
    ("length", "blocks"),
    [(0, 0), (TEXT_BLOCK_BYTES - 1, 0), (TEXT_BLOCK_BYTES, 1), (3 * TEXT_BLOCK_BYTES + 1, 3)],
)
def test_only_whole_blocks_of_a_text_are_hashed(length: int, blocks: int) -> None:
    assert len(text_block_hashes("x" * length)) == blocks


def test_texts_share_the_hashes_of_what_they_share() -> None:
    common = "common " * 100
    one, other = text_block_hashes(common + "a" * 600), text_block_hashes(common + "b" * 600)
    shared = len(common) // TEXT_BLOCK_BYTES
    assert one[:shared] == other[:shared]
    assert not set(one[shared:]) & set(other[shared:])


def test_a_block_after_another_beginning_has_another_hash() -> None:
    block = "b" * TEXT_BLOCK_BYTES
    assert text_block_hashes("a" * TEXT_BLOCK_BYTES + block)[1] != text_block_hashes(block + block)[1]


def test_another_salt_shares_nothing() -> None:
    text = "x" * 1024
    assert not set(text_block_hashes(text, salt="a")) & set(text_block_hashes(text, salt="b"))


def test_token_blocks_follow_the_workers_block_size() -> None:
    tokens = list(range(100))
    assert len(token_block_hashes(tokens, 16)) == 6
    assert token_block_hashes(tokens, 16)[:3] == token_block_hashes([*tokens[:48], 7, 8], 16)
    assert token_block_hashes(tokens, 16)[0] != token_block_hashes(tokens, 32)[0]


def test_the_number_of_blocks_is_bounded() -> None:
    assert len(text_block_hashes("x" * 3_000_000)) == 4096
    assert len(token_block_hashes([1] * 200_000, 16)) == 4096


def chat(*contents: str, model: str = "demo", cache_salt: str = "") -> pb.GenerateRequest:
    """A conversation."""
    request = pb.GenerateRequest(model=model, cache_salt=cache_salt)
    for place, content in enumerate(contents):
        request.chat.messages.add(role="user" if place % 2 == 0 else "assistant", content=content)
    return request


def test_a_conversation_that_goes_on_keeps_its_hashes() -> None:
    before = prompt_hashes(chat("a" * 2000))
    after = prompt_hashes(chat("a" * 2000, "b" * 2000, "c" * 2000))
    assert len(before) == 7
    assert after[: len(before)] == before
    assert len(after) == 23


def test_models_and_cache_salts_keep_prompts_apart() -> None:
    plain, salted = prompt_hashes(chat("a" * 600)), prompt_hashes(chat("a" * 600, cache_salt="s"))
    other = prompt_hashes(chat("a" * 600, model="other"))
    assert len({plain[0], salted[0], other[0]}) == 3


def test_who_said_it_is_part_of_a_prompt() -> None:
    one, two = (pb.GenerateRequest(model="demo") for _ in range(2))
    one.chat.messages.add(role="user", content="x" * 600)
    two.chat.messages.add(role="system", content="x" * 600)
    assert prompt_hashes(one)[0] != prompt_hashes(two)[0]


def test_images_are_part_of_a_prompt_and_a_prompt_of_tokens_has_no_text() -> None:
    one, two = (pb.GenerateRequest(model="demo") for _ in range(2))
    for request, byte in ((one, b"1"), (two, b"2")):
        # Files of one program begin alike, and for long.
        request.chat.messages.add(role="user").parts.add().image.content = b"0" * 200_000 + byte
    assert prompt_hashes(one) == prompt_hashes(one)
    assert not set(prompt_hashes(one)) & set(prompt_hashes(two))
    tokens = pb.GenerateRequest(model="demo", token_ids=pb.TokenIds(ids=range(600)))
    assert prompt_hashes(tokens) == []


def test_only_the_beginning_of_a_huge_prompt_is_hashed() -> None:
    assert len(prompt_hashes(pb.GenerateRequest(model="demo", text="x" * 1_000_000))) == 512
