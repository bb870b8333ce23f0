"""uvicorn as one task among others: its signals and its shutdown are ours."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn

from services.gateway.checks import ShortCut, protocol_with
from services.gateway.exchange import WhenNoted
from services.gateway.http import Receive, Send

__all__ = ["serve_http"]

Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
"""An ASGI application."""
_SEND_BUFFER_BYTES = 128 << 10
_KEEP_ALIVE_SECONDS = 75
"""Longer than the edge keeps an idle connection, so that never both ends close it while a request is on its way."""


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to the process."""
        yield


@asynccontextmanager
async def serve_http(
    app: Application, address: str, *, short_cuts: Sequence[ShortCut], when_noted: WhenNoted, drain_seconds: float
) -> AsyncIterator[int]:
    """Serves HTTP/1.1 on `host:port` until the block is left, then lets running answers finish for `drain_seconds`.

    `short_cuts` are tried in their order before `app` is asked; ends of answers wait for `when_noted`.

    Yields the port, which is useful when `address` asks for port 0.

    Raises:
        OSError: the address is in use or not ours.
    """
    host, _, port = address.rpartition(":")
    listener = socket.create_server((host, int(port)), backlog=2048)
    # Connections inherit it. The kernel would take megabytes for a client that reads nothing, and its generation would
    # go on meanwhile.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    config = uvicorn.Config(
        app,
        loop="none",
        http=protocol_with(short_cuts, when_noted),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, int(drain_seconds)),
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await asyncio.wait([serving], timeout=drain_seconds + 2)
        listener.close()
        serving.cancel()
