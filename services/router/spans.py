"""The span of one decision, with what speaks for it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from opentelemetry.trace import INVALID_SPAN, NoOpTracer, ProxyTracer, Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

from services.common.trace_untraced import Untraced
from services.common.tracing import context_from, gen_ai
from services.router.request import Request
from services.router.scheduler import Decision
from services.router.ticket import Ticket
from services.router.worker import Worker

__all__ = ["end_span", "start_span"]

# Of a large fleet the best and some of those that are out tell enough; `tokenloom explain` has all of them.
_MOST_TOLD: Final = 8
# What a process without a provider has: a span of theirs tells nobody anything, and takes 20 us of a rested processor.
_NO_TRACERS: Final = frozenset({NoOpTracer, ProxyTracer, Untraced})
_OPERATIONS: Final = {"generate": "generate_content", "embed": "embeddings"}


def start_span(tracer: Tracer, name: str, traceparent: str | None, request: Request) -> Span:
    """Starts the span of a decision below the caller's; where nothing is traced, none that would have to be made."""
    if type(tracer) in _NO_TRACERS:
        return INVALID_SPAN
    span = tracer.start_span(name, context=context_from(traceparent), kind=SpanKind.SERVER)
    if span.is_recording():
        span.set_attributes(gen_ai(_OPERATIONS.get(request.task, request.task), request.model))
        span.set_attribute("tokenloom.request_id", request.request_id)
        span.set_attribute("tokenloom.attempt", request.attempt)
    return span


def end_span(span: Span, ticket: Ticket, why_slow: Callable[[Worker], Sequence[str]]) -> None:
    """Says what was decided and why, if anything was, and ends the span; one that has ended stays as it is.

    `why_slow` tells why requests take longer on a worker than they would elsewhere.
    """
    if not span.is_recording():
        return
    span.set_attribute("tokenloom.queue_seconds", ticket.queue_seconds)
    if ticket.decision is not None:
        span.set_attribute("tokenloom.reason", ticket.reason)
        span.set_attributes(dict(_explained(ticket.decision)))
    if ticket.way.rule:
        span.set_attribute("tokenloom.rule", ticket.way.rule)
    if ticket.lease is not None:
        worker = ticket.lease.worker
        span.set_attribute("tokenloom.worker", worker.worker_id)
        if reasons := why_slow(worker):
            span.set_attribute("tokenloom.worker_slow", reasons)
    if ticket.error is not None:
        span.set_attribute("error.type", ticket.error.reason.value)
        span.set_status(Status(StatusCode.ERROR, ticket.error.message))
    span.end()


def _explained(decision: Decision) -> Iterator[tuple[str, AttributeValue]]:
    """Each worker that could have it with its predicted cost, the cheapest first, and each that could not, with why."""
    looks = list(decision.looked_at)
    yield "tokenloom.candidates", len(looks)
    costs = sorted((prediction[2], name) for name, why, prediction in looks if not why)
    yield "tokenloom.compared", [f"{name}: {cost:.3f} s" for cost, name in costs[:_MOST_TOLD]]
    yield "tokenloom.excluded", [f"{name}: {why}" for name, why, _ in looks if why][:_MOST_TOLD]
    if decision.prediction is not None:
        ttft, tpot, cost, _, cached, _ = decision.prediction
        yield "tokenloom.predicted_ttft_seconds", ttft
        yield "tokenloom.predicted_tpot_seconds", tpot
        yield "tokenloom.predicted_cost_seconds", cost
        yield "tokenloom.predicted_cached_tokens", cached
