"""Tests of the hashes that name a shared prefix."""

import pytest

from services.common.prefix import TEXT_BLOCK_BYTES, text_block_hashes, token_block_hashes


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
