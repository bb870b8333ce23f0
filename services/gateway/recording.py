"""What a generation's span, its log line and the gateway's metrics say of it."""

from time import monotonic
from typing import Any

from opentelemetry import trace

from services.common.tracing import gen_ai
from services.gateway.generation import Generation
from services.gateway.http import Response
from services.gateway.identity import Identity
from services.gateway.metrics import GatewayMetrics
from services.gateway.schema import GenerationRequest

__all__ = ["describe", "record", "show_route"]


def describe(operation: str, body: GenerationRequest) -> None:
    """Says on the request's span what is asked for; `operation` is `gen_ai.operation.name`."""
    span = trace.get_current_span()
    if span.is_recording():
        span.update_name(f"{operation} {body.model}")
        wanted: dict[str, Any] = {
            **gen_ai(operation, body.model),
            "gen_ai.request.stream": bool(body.stream),
            "gen_ai.request.max_tokens": body.max_tokens,
            "gen_ai.request.temperature": body.temperature,
            "gen_ai.request.top_p": body.top_p,
            "gen_ai.request.choice.count": body.n,
        }
        span.set_attributes({key: value for key, value in wanted.items() if value is not None})


def show_route(generation: Generation, response: Response, identity: Identity) -> None:
    """Says in headers who answers, as far as the caller may know it; too late once the answer has begun.

    Of a request with many prompts the first to be answered is told of: with one header each, an answer would have more
    headers than HTTP's parsers take.
    """
    if response.started:
        return
    if generation.degraded:
        response.add_header("x-tokenloom-degraded", generation.model, once=True)
    if identity.debug:
        response.add_header("x-tokenloom-worker", generation.worker_id, once=True)
        response.add_header("x-tokenloom-route", generation.route, once=True)


def record(generation: Generation, model: str, response: Response, metrics: GatewayMetrics) -> None:
    """Says what a generation took, complete or not."""
    span, facts = trace.get_current_span(), response.facts
    facts.update(model=model, worker=generation.worker_id)
    ending, first_at, last_at = generation.ending, generation.first_token_at, monotonic()
    if first_at is not None:
        seconds = first_at - generation.started_at
        metrics.first_token(seconds, generation.model, lane="openai")
        span.set_attribute("gen_ai.response.time_to_first_chunk", seconds)
        facts["ttft_ms"] = round(1000 * seconds, 1)
    metrics.moved(generation.moves)
    if ending is None:
        return
    metrics.count_tokens(
        generation.model, ending.prompt_tokens, ending.cached_tokens, ending.output_tokens, lane="openai"
    )
    facts.update(
        input_tokens=ending.prompt_tokens, cached_tokens=ending.cached_tokens, output_tokens=ending.output_tokens
    )
    if first_at is not None and ending.output_tokens > 1:
        seconds = (last_at - first_at) / (ending.output_tokens - 1)
        metrics.time_per_token(seconds, generation.model, lane="openai")
        facts["tpot_ms"] = round(1000 * seconds, 2)
    span.set_attributes(
        {
            "gen_ai.response.model": generation.model,
            "gen_ai.response.finish_reasons": [ending.finish_reason],
            "gen_ai.usage.input_tokens": ending.prompt_tokens,
            "gen_ai.usage.output_tokens": ending.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": ending.cached_tokens,
            "tokenloom.worker": generation.worker_id,
        }
    )
