"""A far end that answers every request of OpenAI's API with the same events."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

__all__ = ["event_server"]


@asynccontextmanager
async def event_server(status: int, events: Sequence[dict[str, Any]], *, done: bool) -> AsyncIterator[str]:
    """Serves until the block is left; yields its URL. `done`: the events end as they should."""
    if status == 200:
        said = b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events)
        body = said + (b"data: [DONE]\n\n" if done else b"")
    else:
        body = json.dumps({"error": {"message": "no", "code": "rate_limit_exceeded"}}).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
