"""The gateway's Prometheus metrics."""

from collections.abc import Sequence
from typing import Final

from opentelemetry.trace import Span
from prometheus_client import CollectorRegistry, Counter, Gauge

from services.common.ledger import UsageRow
from services.common.metrics import (
    REQUEST_SECONDS,
    TIME_PER_TOKEN_SECONDS,
    TIME_TO_FIRST_TOKEN_SECONDS,
    BoundedLabel,
    Spread,
    Tally,
    exemplar_of,
)

__all__ = ["GatewayMetrics"]

_MOST_MODELS: Final = 100
_MOST_TENANTS: Final = 200
_LIMITS: Final = ("requests", "tokens", "concurrency", "budget")
_GOOD: Final = frozenset({"ok", "client_left"})


class GatewayMetrics:
    """What the gateway counts. Their meanings are in deploy/observability/metrics.yaml."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._models, self._tenants = BoundedLabel(_MOST_MODELS), BoundedLabel(_MOST_TENANTS)
        self._requests = self._tally(
            "requests",
            "Requests by how they ended: ok, client_left, or an error's reason.",
            "lane",
            "endpoint",
            "outcome",
        )
        self.open_requests = 0
        """Requests of the OpenAI lane that are being answered."""
        self._gauge("open_requests", "Requests of the OpenAI lane that are being answered.").set_function(
            lambda: self.open_requests
        )
        self._request_seconds = self._spread(
            "request_duration_seconds",
            "From a request's arrival to the end of its answer.",
            REQUEST_SECONDS,
            "lane",
            "endpoint",
        )
        self._time_to_first_token = self._spread(
            "time_to_first_token_seconds",
            "From a generation's start, queueing included, to its first output.",
            TIME_TO_FIRST_TOKEN_SECONDS,
            "lane",
            "model",
        )
        self._time_per_token = self._spread(
            "time_per_output_token_seconds",
            "Time between the tokens of a complete generation, on average.",
            TIME_PER_TOKEN_SECONDS,
            "lane",
            "model",
        )
        self._tokens = self._tally("tokens", "Tokens of complete requests.", "lane", "model", "kind")
        self._moves = self._counter("moved_generations", "Generations that left a worker and went on elsewhere.")
        self._limited = self._tally("limited", "Requests refused by a limit of their key.", "limit")
        for limit in _LIMITS:
            # From zero on, so that the first one is an increase.
            self._limited.add(0, limit)
        self.journal_failures = self._counter("journal_failures", "Writes of usage that the disk refused at first.")
        self.usage_waiting = self._gauge("usage_waiting", "1 while usage waits for a database that is away.")
        self.limits_shared = self._gauge("limits_shared", "1 while limits are shared through Redis.")
        self._tenant_requests = self._tally(
            "tenant_requests", "Requests that were let in and are over, by tenant.", "tenant", "lane"
        )
        self._tenant_tokens = self._tally("tenant_tokens", "Tokens by tenant.", "tenant", "kind")
        self._tenant_gpu_seconds = self._tally(
            "tenant_gpu_seconds", "Seconds of workers' time by tenant, shared by what runs at once.", "tenant"
        )
        self._tenant_cost = self._tally("tenant_cost", "Cost by tenant, in the currency of the prices.", "tenant")

    def ended(self, endpoint: str, outcome: str, seconds: float, *, span: Span | None = None, lane: str) -> None:
        """A request is over."""
        exemplar = exemplar_of(span)
        self._requests.add(1, lane, endpoint, outcome)
        if exemplar is not None and outcome not in _GOOD:
            self._requests.mark(exemplar, lane, endpoint, outcome)
        self._request_seconds.observe(seconds, exemplar, lane, endpoint)

    def first_token(self, seconds: float, model: str, *, span: Span | None = None, lane: str) -> None:
        """A generation's first output came after so long."""
        self._time_to_first_token.observe(seconds, exemplar_of(span), lane, self._models.of(model))

    def time_per_token(self, seconds: float, model: str, *, span: Span | None = None, lane: str) -> None:
        """A generation is complete, and took so long a token after the first one."""
        self._time_per_token.observe(seconds, exemplar_of(span), lane, self._models.of(model))

    def count_tokens(self, model: str, prompt: int, cached: int, output: int, *, lane: str) -> None:
        """Counts the tokens of a complete request."""
        name, add = self._models.of(model), self._tokens.add
        add(prompt, lane, name, "prompt")
        add(cached, lane, name, "cached")
        add(output, lane, name, "output")

    def limited(self, limit: str) -> None:
        """A request is refused by a limit of its key."""
        self._limited.add(1, limit)

    def moved(self, times: int) -> None:
        """A generation left so many workers."""
        self._moves.inc(times)

    def charge(self, row: UsageRow) -> None:
        """Counts what a request took, for its tenant."""
        tenant, add_tokens = self._tenants.of(row.tenant), self._tenant_tokens.add
        self._tenant_requests.add(1, tenant, row.lane)
        add_tokens(row.prompt_tokens, tenant, "prompt")
        add_tokens(row.cached_tokens, tenant, "cached")
        add_tokens(row.output_tokens, tenant, "output")
        self._tenant_gpu_seconds.add(row.gpu_seconds, tenant)
        self._tenant_cost.add(row.cost, tenant)

    def _tally(self, name: str, meaning: str, *labels: str) -> Tally:
        return Tally(f"tokenloom_gateway_{name}", meaning, *labels, registry=self._registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"tokenloom_gateway_{name}", meaning, labels, registry=self._registry)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(f"tokenloom_gateway_{name}", meaning, registry=self._registry)

    def _spread(self, name: str, meaning: str, buckets: Sequence[float], *labels: str) -> Spread:
        return Spread(f"tokenloom_gateway_{name}", meaning, buckets, *labels, registry=self._registry)
