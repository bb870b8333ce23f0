"""The span of one decision."""

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from services.common.tracing import context_from
from services.router.request import Request
from services.router.ticket import Ticket

__all__ = ["end_span", "start_span"]


def start_span(tracer: Tracer, name: str, traceparent: str | None, request: Request) -> Span:
    """Starts the span of a decision below the caller's."""
    span = tracer.start_span(name, context=context_from(traceparent), kind=SpanKind.SERVER)
    if span.is_recording():
        span.set_attribute("gen_ai.request.model", request.model or "")
        span.set_attribute("tokenloom.request_id", request.request_id)
    return span


def end_span(span: Span, ticket: Ticket) -> None:
    """Says what was decided, if anything was, and ends the span; one that has ended stays as it is."""
    if not span.is_recording():
        return
    span.set_attribute("tokenloom.queue_seconds", ticket.queue_seconds)
    if ticket.decision is not None:
        span.set_attribute("tokenloom.candidates", len(ticket.decision.looked_at))
        span.set_attribute("tokenloom.reason", ticket.reason)
        if ticket.decision.prediction is not None:
            span.set_attribute("tokenloom.predicted_ttft_seconds", ticket.decision.prediction[0])
    if ticket.lease is not None:
        span.set_attribute("tokenloom.worker", ticket.lease.worker.worker_id)
    if ticket.error is not None:
        span.set_attribute("error.type", ticket.error.reason.value)
        span.set_status(Status(StatusCode.ERROR, ticket.error.message))
    span.end()
