"""Sends chat requests for one token each over connections that stay open, as cheaply as Python can.

    python -m bench.request_client HOST:PORT KEY CONNECTIONS REQUESTS

Prints one JSON object: the seconds that all took, and those of each request, sorted.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator

import uvloop


def request_for(target: str, key: str) -> bytes:
    """A request for one streamed token."""
    message = {"role": "user", "content": "hello"}
    body = json.dumps({"model": "sim", "messages": [message], "max_tokens": 1, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {target}\r\nauthorization: Bearer {key}\r\n"
    return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def _ask(target: str, request: bytes, turns: Iterator[int], took: list[float]) -> None:
    host, _, port = target.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for _ in turns:
        began = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readuntil(b"\r\n0\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200") or b"data: [DONE]" not in body:
            raise ConnectionError(f"{head!r} {body!r}")
        took.append(time.perf_counter() - began)
    writer.close()


async def main(target: str, key: str, connections: int, requests: int) -> None:
    """Runs them all once."""
    turns, took = iter(range(requests)), list[float]()
    request, began = request_for(target, key), time.perf_counter()
    await asyncio.gather(*(_ask(target, request, turns, took) for _ in range(connections)))
    print(json.dumps({"seconds": time.perf_counter() - began, "request_seconds": sorted(took)}))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
