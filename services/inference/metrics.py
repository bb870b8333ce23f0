"""What a worker tells Prometheus."""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.common.metrics import (
    QUEUE_SECONDS,
    REQUEST_SECONDS,
    TIME_PER_TOKEN_SECONDS,
    TIME_TO_FIRST_TOKEN_SECONDS,
)
from services.inference.engine import Load
from services.inference.output import Timings

__all__ = ["LoadCollector", "VllmCollector", "WorkerMetrics"]

Exemplar = dict[str, str] | None


class WorkerMetrics:
    """Counters of a worker's generations."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "tokenloom_inference_requests",
            "Requests that are over: generations by how they ended, what is pooled by what it was.",
            ["outcome"],
            registry=registry,
        )
        tokens = Counter(
            "tokenloom_inference_tokens",
            "Tokens of prompts, prompts found cached, and output.",
            ["kind"],
            registry=registry,
        )
        self._prompt, self._cached, self._output = (tokens.labels(kind) for kind in ("prompt", "cached", "output"))

        def histogram(name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"tokenloom_inference_{name}", meaning, buckets=buckets, registry=registry)

        self._first_token = histogram(
            "time_to_first_token_seconds", "From the submission to the first token.", TIME_TO_FIRST_TOKEN_SECONDS
        )
        self._time_per_token = histogram(
            "time_per_output_token_seconds",
            "Time between the tokens of a complete generation, on average.",
            TIME_PER_TOKEN_SECONDS,
        )
        self._queue = histogram("queue_seconds", "Waiting in the engine, of complete generations.", QUEUE_SECONDS)
        self._prefill = histogram(
            "prefill_seconds", "Work on the prompt, of complete generations.", TIME_TO_FIRST_TOKEN_SECONDS
        )
        self._duration = histogram(
            "request_duration_seconds", "From the submission to the end, of complete generations.", REQUEST_SECONDS
        )

    def first_token(self, seconds: float, prompt_tokens: int, cached_tokens: int, *, exemplar: Exemplar = None) -> None:
        """A generation has produced its first token, `seconds` after it came."""
        self._first_token.observe(seconds, exemplar)
        self._prompt.inc(prompt_tokens)
        self._cached.inc(cached_tokens)

    def completed(self, seconds: float, timings: Timings, output_tokens: int, *, exemplar: Exemplar = None) -> None:
        """A generation is complete, `seconds` after it came."""
        self._queue.observe(timings.queue, exemplar)
        self._prefill.observe(timings.prefill, exemplar)
        self._duration.observe(seconds, exemplar)
        if output_tokens > 1 and timings.decode > 0:
            self._time_per_token.observe(timings.decode / (output_tokens - 1), exemplar)

    def output(self, tokens: int) -> None:
        """Output was handed to the network."""
        self._output.inc(tokens)

    def pooled(self, operation: str, prompt_tokens: int, cached_tokens: int) -> None:
        """An embedding or a scoring is done."""
        self._requests.labels(operation).inc()
        self._prompt.inc(prompt_tokens)
        self._cached.inc(cached_tokens)

    def ended(self, outcome: str) -> None:
        """A request is over: "stop", "length", "cancelled", or a Reason in lower case."""
        self._requests.labels(outcome).inc()


class LoadCollector(Collector):
    """Reads the engine's load when Prometheus asks."""

    def __init__(self, load: Callable[[], Load | None]) -> None:
        self._load = load

    def collect(self) -> Iterable[Metric]:
        """The gauges; none while there is no engine."""
        load = self._load()
        if load is None:
            return
        values = {
            "tokenloom_inference_requests_running": ("Sequences that run.", load.running),
            "tokenloom_inference_requests_waiting": ("Sequences that wait inside the engine.", load.waiting),
            "tokenloom_inference_kv_usage_ratio": ("Used share of the KV cache.", load.kv_usage),
            "tokenloom_inference_pending_prefill_tokens": (
                "Prompt tokens accepted and not prefilled yet.",
                load.pending_prefill_tokens,
            ),
            "tokenloom_inference_output_tokens_per_second": (
                "Output, over the last seconds.",
                load.output_tokens_per_second,
            ),
            "tokenloom_inference_engine_up": ("1 while the engine is alive.", float(load.alive)),
        }
        yield CounterMetricFamily(
            "tokenloom_inference_engine_starts", "Starts of the engine, the first one included.", value=load.starts
        )
        for name, (documentation, value) in values.items():
            yield GaugeMetricFamily(name, documentation, value=value)


class VllmCollector(Collector):
    """vLLM's own metrics, which it keeps in the process's global registry, under its own names."""

    def collect(self) -> Iterable[Metric]:
        """Those whose names begin with `vllm:`; none before it has started."""
        return [metric for metric in REGISTRY.collect() if metric.name.startswith("vllm:")]
