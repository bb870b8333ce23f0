"""What the spans, the log line and the gateway's metrics say of a request and its generations."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from operator import attrgetter
from time import monotonic
from typing import Any, Final

from opentelemetry.trace import Span, SpanKind
from opentelemetry.util.types import AttributeValue

from services.common import trace_words
from services.common.logs import trace_id_of
from services.common.trace_spans import Recorded
from services.common.tracing import context_from, current, gen_ai, tracer
from services.gateway.caller import Caller
from services.gateway.generation import Generation
from services.gateway.identity import Identity
from services.gateway.metrics import GatewayMetrics
from services.gateway.pieces import Totals
from services.gateway.request_log import log_request
from services.gateway.response import Response
from services.gateway.routes import UNKNOWN_PATH
from services.gateway.schema import GenerationRequest
from services.gateway.schema_chat import ChatRequest

__all__ = ["describe", "record", "request_ended", "request_span", "show_route"]

_NUMBERS: Final = (
    "gen_ai.request.max_tokens",
    "gen_ai.request.temperature",
    "gen_ai.request.top_p",
    "gen_ai.request.top_k",
    "gen_ai.request.frequency_penalty",
    "gen_ai.request.presence_penalty",
    "gen_ai.request.seed",
)
# What is said of a choice is kept, what is said of many is not.
_MOST_KEPT: Final = 4
_asked_of: Final = attrgetter(
    *("model", "stream", "n"),
    *("max_tokens", "temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed"),
)
_asked_of_chats: Final = attrgetter("reasoning_effort", "max_completion_tokens")


def request_span(
    method: str, endpoint: str, request_id: str, traceparent: str | None, tracestate: str | None
) -> AbstractContextManager[Span]:
    """The span of a request, which is the current one in the block; its headers tell of the client's."""
    span = tracer().start_span(
        f"{method} {endpoint}", context=context_from(traceparent, tracestate), kind=SpanKind.SERVER
    )
    if type(span) is Recorded:
        span.say(_begun, method, endpoint, request_id)
    return current(span)


def request_ended(
    metrics: GatewayMetrics,
    span: Span,
    *,
    request_id: str,
    endpoint: str,
    outcome: str,
    status: int,
    seconds: float,
    facts: Mapping[str, object],
) -> None:
    """Says how a request ended; `status` 0: nothing was answered. `facts` are for the log line."""
    if status and type(span) is Recorded:
        span.say(_status, status)
    metrics.ended(endpoint, outcome, seconds, span=span, lane="openai")
    log_request(
        trace_id=trace_id_of(span),
        request_id=request_id,
        lane="openai",
        endpoint=endpoint,
        outcome=outcome,
        status=status,
        seconds=seconds,
        facts=facts,
    )


def describe(operation: str, body: GenerationRequest, caller: Caller) -> None:
    """Says on the request's span what is asked for; `operation` is `gen_ai.operation.name`."""
    span = caller.span
    if type(span) is Recorded:
        form = body.response_format
        span.update_name(f"{operation} {body.model}")
        # Not the body itself: prompts may be large, and spans wait for a while.
        effort, completion = _asked_of_chats(body) if type(body) is ChatRequest else (None, None)
        span.say(
            _asked, body.stop, caller.session_id, operation, form and form.type, effort, completion, _asked_of(body)
        )


def _begun(method: str, endpoint: str, request_id: str) -> bytes:
    return _route(method, endpoint) + trace_words.text("tokenloom.request_id", request_id)


@lru_cache(1024)
def _route(method: str, endpoint: str) -> bytes:
    known = {"http.route": endpoint} if endpoint != UNKNOWN_PATH else {}
    return trace_words.said({"http.request.method": method, **known})


@lru_cache(1024)
def _status(status: int) -> bytes:
    return trace_words.said({"http.response.status_code": status})


def _first_chunk(seconds: float) -> bytes:
    return trace_words.fraction("gen_ai.response.time_to_first_chunk", seconds)


def _asked(stop: str | list[str] | None, session_id: str, *usual: Any) -> bytes:
    """What OpenTelemetry's GenAI conventions have names for, as far as the client has said it and it matters."""
    asked = _usually_asked(*usual)
    if stop:
        asked += trace_words.said({"gen_ai.request.stop_sequences": (stop,) if isinstance(stop, str) else stop})
    if session_id:
        asked += trace_words.text("gen_ai.conversation.id", session_id)
    return asked


@lru_cache(1024)  # of each fact there is one type
def _usually_asked(
    operation: str, form: str | None, effort: str | None, completion: int | None, asked_of: tuple[Any, ...]
) -> bytes:
    model, stream, n, *numbers = asked_of
    asked = gen_ai(operation, model)
    for name, number in zip(_NUMBERS, numbers, strict=True):
        if number is not None:
            asked[name] = number
    more: dict[str, AttributeValue | None] = {
        "gen_ai.request.stream": stream or None,
        "gen_ai.request.choice.count": n if n != 1 else None,
        "gen_ai.output.type": None if form is None else "text" if form == "text" else "json",
        "gen_ai.request.reasoning.level": effort,
        "gen_ai.request.max_tokens": completion or None,
    }
    asked.update((name, value) for name, value in more.items() if value is not None)
    return trace_words.said(asked)


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


def record(
    generation: Generation,
    model: str,
    response: Response,
    metrics: GatewayMetrics,
    *,
    answer_id: str,
    streamed: bool | None,
) -> None:
    """Says what a generation took, complete or not; of several for one request, what they took together."""
    span, facts = generation.caller.span, response.facts
    facts.update(model=model, worker=generation.worker_id)
    ending, first_at, last_at = generation.ending, generation.first_token_at, monotonic()
    if first_at is not None:
        seconds = first_at - generation.started_at
        metrics.first_token(seconds, generation.model, span=span, lane="openai")
        if streamed and type(span) is Recorded:
            span.say(_first_chunk, seconds)
        facts["ttft_ms"] = round(1000 * seconds, 1)
    if generation.moves:
        metrics.moved(generation.moves)
    if ending is None:
        return
    metrics.count_tokens(
        generation.model, ending.prompt_tokens, ending.cached_tokens, ending.output_tokens, lane="openai"
    )
    if first_at is not None and ending.output_tokens > 1:
        seconds = (last_at - first_at) / (ending.output_tokens - 1)
        metrics.time_per_token(seconds, generation.model, span=span, lane="openai")
        facts["tpot_ms"] = round(1000 * seconds, 2)
    totals = response.totals
    totals.add(ending)
    facts.update(
        input_tokens=totals.prompt_tokens, cached_tokens=totals.cached_tokens, output_tokens=totals.output_tokens
    )
    _tell_of_answer(span, generation, totals, answer_id)


def _tell_of_answer(span: Span, generation: Generation, totals: Totals, answer_id: str) -> None:
    if type(span) is Recorded:
        span.say(
            *(_answered, answer_id, (generation.model, generation.worker_id, *totals.finish_reasons)),
            *(totals.prompt_tokens, totals.output_tokens, totals.cached_tokens, totals.reasoning_tokens),
        )


def _answered(  # noqa: PLR0917  # as they stand in spans
    answer_id: str, how: tuple[str, ...], prompt: int, output: int, cached: int, reasoning: int
) -> bytes:
    number = trace_words.number
    return b"".join(
        (
            trace_words.text("gen_ai.response.id", answer_id),
            _commonly_answered(*how) if len(how) <= _MOST_KEPT else _answered_so(*how),
            number("gen_ai.usage.input_tokens", prompt),
            number("gen_ai.usage.output_tokens", output),
            number("gen_ai.usage.cache_read.input_tokens", cached),
            number("gen_ai.usage.reasoning.output_tokens", reasoning) if reasoning else b"",
        )
    )


def _answered_so(model: str, worker: str, *reasons: str) -> bytes:
    return trace_words.said(
        {"gen_ai.response.model": model, "gen_ai.response.finish_reasons": reasons, "tokenloom.worker": worker}
    )


_commonly_answered: Final = lru_cache(1024)(_answered_so)
