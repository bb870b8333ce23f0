"""Is a process ready? Asked the way Kubernetes would ask; `python -m services.mesh.probe HOST:PORT` for containers."""

import asyncio
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.rpc import channel

__all__ = ["Probe", "grpc_health", "http_ok", "lists_models", "poll"]

Probe = Callable[[], Awaitable[bool]]
"""Tells once whether something is ready; takes two seconds at most."""

_TIMEOUT_SECONDS = 2.0
_POLL_SECONDS = 0.05


def grpc_health(address: str) -> Probe:
    """grpc.health.v1 says SERVING."""

    async def probe() -> bool:
        async with channel(address) as connection:
            stub = health_pb2_grpc.HealthStub(connection)
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_SECONDS)
            except grpc.aio.AioRpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    return probe


def http_ok(url: str) -> Probe:
    """A GET is answered with 200."""

    async def probe() -> bool:
        return await asyncio.to_thread(_get, url, {}) is not None

    return probe


def lists_models(url: str, key: str, names: set[str]) -> Probe:
    """The OpenAI API lists all of these models."""

    async def probe() -> bool:
        body = await asyncio.to_thread(_get, f"{url}/v1/models", {"authorization": f"Bearer {key}"})
        listed: dict[str, Any] = json.loads(body) if body else {}
        return names <= {str(model.get("id")) for model in listed.get("data", [])}

    return probe


async def poll(probe: Probe) -> None:
    """Returns once the probe says yes. The caller sets the deadline."""
    while not await probe():  # noqa: ASYNC110  # another process becomes ready, which sets no event here
        await asyncio.sleep(_POLL_SECONDS)


def _get(url: str, headers: dict[str, str]) -> bytes | None:
    request = urllib.request.Request(url, headers=headers)  # noqa: S310  # always http, always ours
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310  # as above
            body: bytes = answer.read()
    except (OSError, urllib.error.HTTPError):
        return None
    return body


def main() -> int:
    """Exit code 0 when grpc.health.v1 at the address given says SERVING."""
    return 0 if asyncio.run(_check(sys.argv[1])) else 1


async def _check(address: str) -> bool:
    return await grpc_health(address)()


if __name__ == "__main__":
    sys.exit(main())
