"""The routes of what is answered in one piece: embeddings, reranking, scores and tokens."""

from typing import Any

from services.gateway.answers import Detokenized, Embeddings, Reranking, Scores, Tokenized
from services.gateway.embeddings import EMBEDDINGS
from services.gateway.endpoint import Limits
from services.gateway.metrics import GatewayMetrics
from services.gateway.routes import Route
from services.gateway.scoring import RERANK, SCORE
from services.gateway.tokenizing import DETOKENIZE, TOKENIZE
from services.gateway.unary import UnaryEndpoint, UnaryKind
from services.gateway.worker_calls import WorkerCalls

__all__ = ["pooling_routes"]


def pooling_routes(calls: WorkerCalls, metrics: GatewayMetrics, limits: Limits) -> list[Route]:
    """One route an endpoint."""
    kinds: dict[str, tuple[UnaryKind[Any], type]] = {
        "/v1/embeddings": (EMBEDDINGS, Embeddings),
        "/v1/rerank": (RERANK, Reranking),
        "/v1/score": (SCORE, Scores),
        "/v1/tokenize": (TOKENIZE, Tokenized),
        "/v1/detokenize": (DETOKENIZE, Detokenized),
    }
    return [
        Route("POST", path, UnaryEndpoint(kind, calls, metrics, limits), body=kind.shape, answer=shape, is_limited=True)
        for path, (kind, shape) in kinds.items()
    ]
