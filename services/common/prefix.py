"""What a prompt begins with, as chained hashes of blocks: how gateway, router and worker name a shared prefix."""

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

__all__ = ["TEXT_BLOCK_BYTES", "chained", "root", "text_block_hashes", "token_block_hashes"]

TEXT_BLOCK_BYTES = 256

_HASH_BYTES = 8
_MOST_BLOCKS = 4096
"""Enough for a megabyte of text, or for 65,536 tokens in blocks of 16: what follows shares no cache worth knowing."""


def text_block_hashes(text: str, *, salt: str = "") -> list[int]:
    """One hash for each whole block of a text; equal hashes mean equal texts up to the end of that block.

    Args:
        text: The prompt in a canonical form: everything the model will see, in order.
        salt: What else keeps prefixes apart: the model's name and the request's cache salt.

    Returns:
        At most 4096 numbers of 64 bits.
    """
    data = text.encode("utf-8", "surrogatepass")
    blocks = min(len(data) // TEXT_BLOCK_BYTES, _MOST_BLOCKS)
    return _chain((data[i * TEXT_BLOCK_BYTES : (i + 1) * TEXT_BLOCK_BYTES] for i in range(blocks)), salt)


def token_block_hashes(token_ids: Sequence[int], block_tokens: int, *, salt: str = "") -> list[int]:
    """One hash for each whole block of tokens; equal hashes mean equal tokens up to the end of that block.

    Args:
        token_ids: The prompt, each id below 2**32.
        block_tokens: Tokens of a block, as the worker that is compared with says it.
        salt: What else keeps prefixes apart: the model's name and the request's cache salt.

    Returns:
        At most 4096 numbers of 64 bits.
    """
    blocks = min(len(token_ids) // block_tokens, _MOST_BLOCKS)
    packed = array("I", token_ids[: blocks * block_tokens]).tobytes()
    size = block_tokens * array("I").itemsize
    return _chain((packed[i * size : (i + 1) * size] for i in range(blocks)), salt)


def chained(parent: bytes, block: bytes) -> bytes:
    """The 8-byte hash of a block after `parent`, the hash of the block before it (or of the salt)."""
    return blake2b(block, digest_size=_HASH_BYTES, key=parent).digest()


def root(salt: str) -> bytes:
    """What the first block is chained to."""
    return blake2b(salt.encode(), digest_size=_HASH_BYTES).digest()


def _chain(blocks: Iterable[bytes], salt: str) -> list[int]:
    parent = root(salt)
    hashes = []
    for block in blocks:
        parent = chained(parent, block)
        hashes.append(int.from_bytes(parent, "little"))
    return hashes
