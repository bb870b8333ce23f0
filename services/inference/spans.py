"""One span for each generation of a worker, after OpenTelemetry's GenAI conventions."""

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.types import AttributeValue

from services.common.errors import MeshError
from services.common.metrics import exemplar_of
from services.common.tracing import FIRST_OUTPUT, context_from, gen_ai, traceparent_of
from services.inference.output import FinishReason, Timings, Usage
from services.inference.request import Generation

__all__ = ["GenerationSpan", "PoolingSpan", "Spans"]


class GenerationSpan:
    """The span of one generation, from its submission to its end."""

    def __init__(self, tracer: Tracer, span: Span, asked: Mapping[str, AttributeValue]) -> None:
        """`asked` is what every span of it says."""
        self._tracer = tracer
        self._span = span
        self._asked = asked
        self._began = time.time_ns()

    @property
    def traceparent(self) -> str:
        """The trace context for the engine's own span; empty when this one isn't sampled."""
        return traceparent_of(self._span)

    @property
    def exemplar(self) -> dict[str, str] | None:
        """What leads from a measurement to this span's trace; None where that is not kept."""
        return exemplar_of(self._span)

    def first_token(self) -> None:
        """The first token is there."""
        self._span.add_event(FIRST_OUTPUT)

    def completed(self, reason: FinishReason, usage: Usage, timings: Timings) -> None:
        """The output is complete."""
        self._add_phases(timings)
        self._span.set_attributes(
            {
                "gen_ai.response.finish_reasons": [reason.value],
                "gen_ai.usage.input_tokens": usage.prompt,
                "gen_ai.usage.cache_read.input_tokens": usage.cached,
                "gen_ai.usage.output_tokens": usage.output,
            }
        )
        self._span.end()

    def _add_phases(self, timings: Timings) -> None:
        """Spans of what the engine did, told once it is over: they end now, one after the other."""
        if not self._span.is_recording():
            return
        parent = set_span_in_context(self._span)
        end = time.time_ns()
        phases = []
        for name, seconds in (("decode", timings.decode), ("prefill", timings.prefill), ("queue", timings.queue)):
            start = max(self._began, end - int(seconds * 1e9))
            phases.append((name, start, end))
            end = start
        for name, start, stop in reversed(phases):
            span = self._tracer.start_span(name, context=parent, attributes=self._asked, start_time=start)
            span.end(stop)

    def failed(self, error: MeshError) -> None:
        """It failed."""
        self._span.set_attribute("error.type", error.reason.value)
        self._span.set_status(Status(StatusCode.ERROR, error.message))
        self._span.end()

    def cancelled(self) -> None:
        """Nobody wants it any more."""
        self._span.set_attribute("tokenloom.cancelled", True)
        self._span.end()


class PoolingSpan:
    """The span of one embedding or scoring; without a tracer there is none."""

    def __init__(self, span: Span | None, traceparent: str) -> None:
        self._span = span
        self.traceparent = traceparent
        """The trace context for the engine's own span."""

    def pooled(self, prompt_tokens: int, cached_tokens: int) -> None:
        """It is done, and that is what it cost."""
        if self._span is not None:
            self._span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": prompt_tokens,
                    "gen_ai.usage.cache_read.input_tokens": cached_tokens,
                }
            )


class Spans:
    """Starts the spans of a worker's generations."""

    def __init__(self, tracer: Tracer | None, *, worker: str) -> None:
        """Without a tracer there are no spans, and trace context is passed on as it came."""
        self._tracer = tracer
        self._worker = worker

    @contextmanager
    def pooling(self, operation: str, model: str, request_id: str, traceparent: str) -> "Iterator[PoolingSpan]":
        """The span of an embedding or a scoring, for as long as the block; what fails it is told."""
        if self._tracer is None:
            yield PoolingSpan(None, traceparent)
            return
        span = self._tracer.start_span(
            operation,
            context=context_from(traceparent),
            kind=SpanKind.SERVER,
            attributes={
                **gen_ai(operation, model),
                "tokenloom.request_id": request_id,
                "tokenloom.worker": self._worker,
            },
        )
        try:
            yield PoolingSpan(span, traceparent_of(span))
        except MeshError as error:
            span.set_attribute("error.type", error.reason.value)
            span.set_status(Status(StatusCode.ERROR, error.message))
            raise
        except asyncio.CancelledError:
            span.set_attribute("tokenloom.cancelled", True)
            raise
        finally:
            span.end()

    def start(self, generation: Generation, request_id: str) -> GenerationSpan | None:
        """The span of a generation, a child of what its `traceparent` names."""
        if self._tracer is None:
            return None
        span = self._tracer.start_span(
            "generate",
            context=context_from(generation.traceparent),
            kind=SpanKind.SERVER,
            attributes=_attributes(generation, request_id, self._worker),
        )
        return GenerationSpan(self._tracer, span, _asked(generation))


def _asked(generation: Generation) -> dict[str, AttributeValue]:
    return gen_ai("chat" if generation.kind == "chat" else "text_completion", generation.model)


def _attributes(generation: Generation, request_id: str, worker: str) -> Mapping[str, AttributeValue]:
    sampling = generation.sampling
    attributes: dict[str, AttributeValue] = {
        **_asked(generation),
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "tokenloom.request_id": request_id,
        "tokenloom.worker": worker,
    }
    if sampling.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = sampling.max_tokens
    if generation.emitted_token_ids:
        attributes["tokenloom.emitted_tokens"] = len(generation.emitted_token_ids)
    return attributes
