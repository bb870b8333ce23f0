"""What a worker tells Prometheus."""

from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.inference.engine import Load

__all__ = ["LoadCollector", "VllmCollector", "WorkerMetrics"]

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


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
        self._first_token = Histogram(
            "tokenloom_inference_time_to_first_token_seconds",
            "From the submission to the first token.",
            buckets=_SECONDS,
            registry=registry,
        )

    def first_token(self, seconds: float, prompt_tokens: int, cached_tokens: int) -> None:
        """A generation has produced its first token, `seconds` after it came."""
        self._first_token.observe(seconds)
        self._prompt.inc(prompt_tokens)
        self._cached.inc(cached_tokens)

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
