"""Prometheus metrics of a process, on a port of their own that the edge never routes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

__all__ = ["serve_metrics"]


# How long stopping may take; the standard library's default would hold up every shutdown for half a second.
_POLL_SECONDS: Final = 0.05


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name is the base class's
        """Scrapes are not worth a line."""


@contextmanager
def serve_metrics(address: str, registry: CollectorRegistry) -> Iterator[int]:
    """Serves `registry` at http://ADDRESS/metrics and yields the port (useful when `address` asks for port 0)."""
    host, _, port = address.rpartition(":")
    server = make_server(host, int(port), make_wsgi_app(registry), _Server, _SilentHandler)
    thread = threading.Thread(target=server.serve_forever, args=(_POLL_SECONDS,), name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=2)
