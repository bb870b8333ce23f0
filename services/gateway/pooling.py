"""The routes of what is answered in one piece: embeddings, reranking, scores and tokens."""

from services.gateway.embeddings import EMBEDDINGS
from services.gateway.endpoint import Limits
from services.gateway.metrics import GatewayMetrics
from services.gateway.routes import Route
from services.gateway.scoring import RERANK, SCORE
from services.gateway.tokenizing import DETOKENIZE, TOKENIZE
from services.gateway.unary import UnaryEndpoint
from services.gateway.worker_calls import WorkerCalls

__all__ = ["pooling_routes"]


def pooling_routes(calls: WorkerCalls, metrics: GatewayMetrics, limits: Limits) -> list[Route]:
    """One route an endpoint."""
    return [
        Route("POST", "/v1/embeddings", UnaryEndpoint(EMBEDDINGS, calls, metrics, limits), body=EMBEDDINGS.shape),
        Route("POST", "/v1/rerank", UnaryEndpoint(RERANK, calls, metrics, limits), body=RERANK.shape),
        Route("POST", "/v1/score", UnaryEndpoint(SCORE, calls, metrics, limits), body=SCORE.shape),
        Route("POST", "/v1/tokenize", UnaryEndpoint(TOKENIZE, calls, metrics, limits), body=TOKENIZE.shape),
        Route("POST", "/v1/detokenize", UnaryEndpoint(DETOKENIZE, calls, metrics, limits), body=DETOKENIZE.shape),
    ]
