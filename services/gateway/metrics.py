"""The gateway's Prometheus metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["GatewayMetrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class GatewayMetrics:
    """What the gateway counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "tokenloom_gateway_requests",
            "Requests by endpoint and outcome (ok, client_left, or an error's reason).",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self.open_requests = Gauge(
            "tokenloom_gateway_open_requests", "Requests that are being answered.", registry=registry
        )
        self.request_seconds = Histogram(
            "tokenloom_gateway_request_duration_seconds",
            "From a request's arrival to the end of its answer.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.time_to_first_token = Histogram(
            "tokenloom_gateway_time_to_first_token_seconds",
            "From a generation's start, queueing included, to its first text.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._tokens = Counter(
            "tokenloom_gateway_tokens", "Tokens of complete generations by kind.", ["kind"], registry=registry
        )

        self.limited = Counter(
            "tokenloom_gateway_limited",
            "Requests refused by their key's limit on requests, tokens, concurrency or budget.",
            ["limit"],
            registry=registry,
        )
        self.journal_failures = Gauge(
            "tokenloom_gateway_journal_failures", "Writes of usage that the disk refused at first.", registry=registry
        )
        self.usage_waiting = Gauge(
            "tokenloom_gateway_usage_waiting", "1 while usage waits for a database that is away.", registry=registry
        )
        self.limits_shared = Gauge(
            "tokenloom_gateway_limits_shared", "1 while limits are shared through Redis.", registry=registry
        )

    def count_tokens(self, prompt: int, cached: int, output: int) -> None:
        """Counts the tokens of a complete generation."""
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("cached").inc(cached)
        self._tokens.labels("output").inc(output)
