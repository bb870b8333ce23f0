"""POST /v1/rerank and /v1/score, as `vllm serve`, Jina and Cohere have them."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from tokenloom.inference.v1 import inference_pb2
from tokenloom.router.v1 import router_pb2

from services.gateway.embeddings import token_limit
from services.gateway.schema_pooling import RerankRequest, ScoreRequest
from services.gateway.unary import Ask, Part, UnaryKind

__all__ = ["RERANK", "SCORE"]

# What one call of a worker takes.
_TEXTS_A_CALL: Final = 256
_BYTES_PER_TOKEN: Final = 4
_TEXT: Final = re.compile(r"texts\[(?P<index>\d+)\]")


async def _rerank(body: RerankRequest, ask: Ask) -> dict[str, Any]:
    texts = body.texts
    single = isinstance(body.documents, str)
    names = _names("query", "documents", indexed=(False, not single))
    scores = await _scores(ask, [_part(body, body.query, part, names, start) for start, part in _batches(texts)])
    best = sorted(enumerate(scores), key=lambda found: found[1], reverse=True)[: body.top_n or None]
    shown = body.return_documents is not False
    return {
        "id": f"score-{ask.request_id}",
        "model": ask.model,
        "results": [
            {
                "index": index,
                **({"document": {"text": texts[index], "multi_modal": None}} if shown else {}),
                "relevance_score": score,
            }
            for index, score in best
        ],
        "usage": ask.usage,
    }


async def _score(body: ScoreRequest, ask: Ask) -> dict[str, Any]:
    queries, texts = body.sides()
    first, second = body.names()
    indexed = (isinstance(getattr(body, first), list), isinstance(getattr(body, second), list))
    names = _names(first, second, indexed=indexed)
    if len(queries) == 1:
        parts = [_part(body, queries[0], part, names, start) for start, part in _batches(texts)]
    else:
        pairs = enumerate(zip(queries, texts, strict=True))
        parts = [_part(body, query, [text], names, index, query_index=index) for index, (query, text) in pairs]
    scores = await _scores(ask, parts)
    return {
        "id": f"score-{ask.request_id}",
        "object": "list",
        "created": ask.created,
        "model": ask.model,
        "data": [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)],
        "usage": ask.usage,
    }


RERANK: Final = UnaryKind(operation="rerank", shape=RerankRequest, task=router_pb2.TASK_SCORE, answer=_rerank)
SCORE: Final = UnaryKind(operation="score", shape=ScoreRequest, task=router_pb2.TASK_SCORE, answer=_score)

# Of a field of a worker's, with the index of the first text and of the query, the client's name.
_Names = Callable[[str, int, int], str]


def _names(query: str, texts: str, *, indexed: tuple[bool, bool]) -> _Names:
    def name(field: str, start: int, query_index: int) -> str:
        if field == "query":
            return f"{query}[{query_index}]" if indexed[0] else query
        if field == "prompt_token_limit":
            return "truncate_prompt_tokens"
        found = _TEXT.fullmatch(field)
        if found is None:
            return field
        return f"{texts}[{start + int(found['index'])}]" if indexed[1] else texts

    return name


def _batches(texts: Sequence[str]) -> list[tuple[int, Sequence[str]]]:
    return [(start, texts[start : start + _TEXTS_A_CALL]) for start in range(0, len(texts), _TEXTS_A_CALL)]


def _part(
    body: RerankRequest | ScoreRequest,
    query: str,
    texts: Sequence[str],
    names: _Names,
    start: int,
    *,
    query_index: int = 0,
) -> Part:
    request = inference_pb2.ScoreRequest(model=body.model, query=query, texts=texts)
    if body.truncate_prompt_tokens is not None:
        request.prompt_token_limit = token_limit(body.truncate_prompt_tokens)
    tokens = sum(len(text) // _BYTES_PER_TOKEN + 1 for text in (query, *texts))
    return Part(
        method="Score",
        request=request,
        prompt_tokens=tokens,
        rename=lambda field: names(field, start, query_index),
    )


async def _scores(ask: Ask, parts: Sequence[Part]) -> list[float]:
    return [score for answer in await ask.all(parts) for score in answer.scores]
