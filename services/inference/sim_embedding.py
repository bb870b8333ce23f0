"""The simulated engine's embeddings: unit vectors that depend on the tokens alone, closer where words are shared."""

import hashlib
import math
import struct
from collections.abc import Sequence
from functools import lru_cache

from services.inference import sim_text

__all__ = ["cosine", "embedding", "expected_embedding"]

# Bytes of a hash around nought.
_MIDDLE = 127.5


def expected_embedding(text: str, dimensions: int) -> list[float]:
    """The unit vector that every simulated engine of so many dimensions gives for a text."""
    return embedding(sim_text.tokenize(text), dimensions)


def embedding(token_ids: Sequence[int], dimensions: int, *, keep: int | None = None) -> list[float]:
    """A unit vector for tokens; `keep` shortens it to its first components and makes it a unit vector again."""
    whole = struct.pack(f"<{len(token_ids)}I", *token_ids)
    # The order of the words counts too, as much as one word does.
    columns = zip(*(_token_bytes(token, dimensions) for token in token_ids), _bytes(whole, dimensions), strict=True)
    middle = _MIDDLE * (len(token_ids) + 1)
    return _unit([sum(column) - middle for column in columns][:keep])


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """The cosine similarity of two unit vectors, -1 to 1."""
    return max(-1.0, min(1.0, sum(map(float.__mul__, one, other))))


@lru_cache(maxsize=1 << 14)
def _token_bytes(token_id: int, dimensions: int) -> bytes:
    return _bytes(token_id.to_bytes(8, "little"), dimensions)


def _bytes(what: bytes, dimensions: int) -> bytes:
    return hashlib.shake_128(what).digest(dimensions)


def _unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]
