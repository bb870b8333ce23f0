"""Calls of an OTLP backend over gRPC, as OpenTelemetry's own variables want them."""

import os
from typing import Final

import grpc
from opentelemetry.util.re import parse_env_headers

__all__ = ["PASSING", "channel_to", "headers_of"]

PASSING: Final = frozenset(
    {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""What OTLP says may be sent again."""


def channel_to(endpoint: str) -> grpc.Channel:
    """A channel to `host:port`; OTEL_EXPORTER_OTLP_COMPRESSION=gzip compresses what goes over it."""
    # A backend that comes back is found again within the pauses between two attempts.
    options = (("grpc.max_reconnect_backoff_ms", 5000),)
    is_gzip = os.environ.get("OTEL_EXPORTER_OTLP_COMPRESSION", "").strip().lower() == "gzip"
    compression = grpc.Compression.Gzip if is_gzip else grpc.Compression.NoCompression
    return grpc.insecure_channel(endpoint, options=options, compression=compression)


def headers_of(signal: str) -> tuple[tuple[str, str], ...]:
    """What every request is to carry, a key of the backend for example; `signal` is "traces" or "metrics"."""
    general = os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", "")
    told = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_HEADERS", general)
    return tuple(parse_env_headers(told, liberal=True).items())
