"""The routes of what is answered in one piece: embeddings, reranking, scores and tokens."""

from typing import Any

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
    kinds: dict[str, UnaryKind[Any]] = {
        "/v1/embeddings": EMBEDDINGS,
        "/v1/rerank": RERANK,
        "/v1/score": SCORE,
        "/v1/tokenize": TOKENIZE,
        "/v1/detokenize": DETOKENIZE,
    }
    return [
        Route("POST", path, UnaryEndpoint(kind, calls, metrics, limits), body=kind.shape)
        for path, kind in kinds.items()
    ]
