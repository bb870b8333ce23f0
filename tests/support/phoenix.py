"""A real Arize Phoenix, the tracing backend, and the traces that it gives back through its own API."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.support.ports import free_port
from tests.support.waiting import wait_until

__all__ = ["Phoenix", "StoredSpan", "needs_phoenix", "running_phoenix"]

_PROGRAM: Final = Path(__file__).parents[2] / ".phoenix" / "bin" / "phoenix"
# It brings its database up to date at its first start.
_START_SECONDS: Final = 120.0

needs_phoenix = pytest.mark.skipif(not _PROGRAM.exists(), reason="needs Phoenix: run scripts/phoenix-venv")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSpan:
    """A span as Phoenix shows it. It does not keep which service a span is of."""

    name: str
    span_id: str
    parent_id: str | None
    attributes: dict[str, Any]
    events: tuple[str, ...]
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Phoenix:
    """A server that is ready."""

    endpoint: str
    """Where it takes OTLP over gRPC."""
    client: httpx.Client

    def trace(self, trace_id: str) -> list[StoredSpan]:
        """The spans of one trace so far."""
        answer = self.client.get("/v1/projects/default/spans", params={"trace_id": trace_id, "limit": 1000})
        if answer.status_code == 404:  # no span has come at all
            return []
        assert answer.status_code == 200, answer.text
        return [
            StoredSpan(
                name=span["name"],
                span_id=span["context"]["span_id"],
                parent_id=span["parent_id"],
                attributes=span["attributes"],
                events=tuple(event["name"] for event in span["events"]),
                status=span["status_code"],
            )
            for span in answer.json()["data"]
        ]

    def edges(self, trace_id: str) -> set[tuple[str, str]]:
        """The names of parent and child of every edge of one trace."""
        names = {span.span_id: span for span in self.trace(trace_id)}
        return {
            (names[span.parent_id].name, span.name)
            for span in names.values()
            if span.parent_id is not None and span.parent_id in names
        }


@contextmanager
def running_phoenix(folder: Path) -> Iterator[Phoenix]:
    """Runs it on a database of its own until the block is left."""
    http, grpc = free_port(), free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_PORT": str(http),
        "PHOENIX_GRPC_PORT": str(grpc),
        "PHOENIX_WORKING_DIR": str(folder),
        "PHOENIX_TELEMETRY_ENABLED": "false",
        "PHOENIX_ALLOW_EXTERNAL_RESOURCES": "false",
    }
    log = folder / "phoenix.log"
    with log.open("wb") as output:
        process = subprocess.Popen([_PROGRAM, "serve"], env=environment, stdout=output, stderr=output)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{http}", timeout=10, trust_env=False) as client:
            wait_until(lambda: process.poll() is not None or _is_ready(client), within=_START_SECONDS)
            assert process.poll() is None, log.read_text()
            yield Phoenix(endpoint=f"127.0.0.1:{grpc}", client=client)
    finally:
        process.terminate()
        process.wait(20)


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False
