"""Prometheus metrics of a process, on a port of their own that the edge never routes."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

__all__ = ["serve_metrics"]


@contextmanager
def serve_metrics(address: str, registry: CollectorRegistry) -> Iterator[int]:
    """Serves `registry` at http://ADDRESS/metrics and yields the port (useful when `address` asks for port 0)."""
    host, _, port = address.rpartition(":")
    server, thread = start_http_server(int(port), addr=host, registry=registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=2)
