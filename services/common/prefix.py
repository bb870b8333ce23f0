"""What a prompt begins with, as chained hashes of blocks: how gateway, router and worker name a shared prefix."""

import struct
from array import array
from collections.abc import Sequence
from hashlib import blake2b

__all__ = ["TEXT_BLOCK_BYTES", "chained", "root", "salt_of", "tenant_salt", "text_block_hashes", "token_block_hashes"]

TEXT_BLOCK_BYTES = 256

_HASH_BYTES = 8
_MOST_BLOCKS = 4096
"""Enough for a megabyte of text, or for 65,536 tokens in blocks of 16: what follows shares no cache worth knowing."""


def salt_of(model: str, cache_salt: str = "") -> str:
    """What keeps the prefixes of a request apart from others: its model, and its own cache salt if it has one."""
    return f"{model}\0{cache_salt}" if cache_salt else model


def tenant_salt(tenant: str, cache_salt: str = "") -> str:
    """A cache salt that no request of another tenant has; without a tenant the request's own."""
    return f"{tenant}\0{cache_salt}" if tenant else cache_salt


def text_block_hashes(text: str, *, salt: str = "") -> list[int]:
    """One hash for each whole block of a text; equal hashes mean equal texts up to the end of that block.

    Args:
        text: The prompt in a canonical form: everything the model will see, in order.
        salt: What else keeps prefixes apart, from `salt_of`.

    Returns:
        At most 4096 numbers of 64 bits.
    """
    data = text.encode("utf-8", "surrogatepass")
    return _chain(data, TEXT_BLOCK_BYTES, salt)


def token_block_hashes(token_ids: Sequence[int], block_tokens: int, *, salt: str = "") -> list[int]:
    """One hash for each whole block of tokens; equal hashes mean equal tokens up to the end of that block.

    Args:
        token_ids: The prompt, each id below 2**32.
        block_tokens: Tokens of a block, as the worker that is compared with says it.
        salt: What else keeps prefixes apart, from `salt_of`.

    Returns:
        At most 4096 numbers of 64 bits.
    """
    packed = array("I", token_ids[: _MOST_BLOCKS * block_tokens])
    return _chain(packed.tobytes(), block_tokens * packed.itemsize, salt)


def chained(parent: bytes, block: bytes) -> bytes:
    """The 8-byte hash of a block after `parent`, the hash of the block before it (or of the salt)."""
    return blake2b(block, digest_size=_HASH_BYTES, key=parent).digest()


def root(salt: str) -> bytes:
    """What the first block is chained to."""
    return blake2b(salt.encode(), digest_size=_HASH_BYTES).digest()


def _chain(data: bytes, size: int, salt: str) -> list[int]:
    count = min(len(data) // size, _MOST_BLOCKS)
    if not count:
        return []
    # Written out, since a long prompt has hundreds of blocks: 0.7 us for each.
    parent = root(salt)
    hashes = []
    for start in range(0, count * size, size):
        parent = blake2b(data[start : start + size], digest_size=_HASH_BYTES, key=parent).digest()
        hashes.append(parent)
    return list(struct.unpack(f"<{count}Q", b"".join(hashes)))
