"""What clients can ask for, under one name in both lanes: in keys' rights, in limits and in the usage ledger."""

from functools import lru_cache
from typing import Final

__all__ = ["ENDPOINTS", "endpoint_of"]

_OF_SEGMENT: Final = {
    "chat": "chat",
    "completions": "completions",
    "embeddings": "embeddings",
    "responses": "responses",
    "files": "files",
    "batches": "batches",
    "tokenize": "tokenize",
    "detokenize": "tokenize",
    "models": "models",
    "admin": "admin",
    "rerank": "score",
    "score": "score",
    "generate": "generate",
    "embed": "embeddings",
    "listmodels": "models",
}

ENDPOINTS: Final = tuple(sorted(set(_OF_SEGMENT.values())))
"""Every name there is, besides "other"."""


@lru_cache(256)
def endpoint_of(path: str) -> str:
    """The name of what a path asks for: `/v1/chat/completions`, `/api/v1/generate`, `/…InferenceService/Generate`."""
    parts = path.partition("?")[0].strip("/").lower().split("/")
    if parts[0] == "v1" and len(parts) > 1:
        return _OF_SEGMENT.get(parts[1], "other")
    return _OF_SEGMENT.get(parts[-1].partition(":")[0], "other")
