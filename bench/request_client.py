"""Sends chat requests for one token each over connections that stay open, as cheaply as Python can.

    python -m bench.request_client HOST:PORT KEY CONNECTIONS REQUESTS [whole]

"whole": answers come in one piece instead of as events.

Opens the connections, says "ready", and begins once it is told something on its standard input. Prints one JSON
object: the seconds that all took, and those of each request, sorted.
"""

import asyncio
import json
import re
import sys
import time
from collections.abc import Iterator
from typing import Final

import uvloop

_LENGTH: Final = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


def request_for(target: str, key: str, *, whole: bool) -> bytes:
    """A request for one token, streamed or not."""
    message = {"role": "user", "content": "hello"}
    body = json.dumps({"model": "sim", "messages": [message], "max_tokens": 1, "stream": not whole}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {target}\r\nauthorization: Bearer {key}\r\n"
    return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, request: bytes) -> None:
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if length is None:
            body, end = await self._reader.readuntil(b"\r\n0\r\n\r\n"), b"data: [DONE]"
        else:
            body, end = await self._reader.readexactly(int(length[1])), b'"usage"'
        if not head.startswith(b"HTTP/1.1 200") or end not in body:
            raise ConnectionError(f"{head!r} {body!r}")


async def _ask(connection: _Connection, request: bytes, turns: Iterator[int], took: list[float]) -> None:
    for _ in turns:
        began = time.perf_counter()
        await connection.ask(request)
        took.append(time.perf_counter() - began)


async def main(target: str, key: str, connections: int, requests: int, *, whole: bool) -> None:
    """Runs them all once."""
    turns, took = iter(range(requests)), list[float]()
    request = request_for(target, key, whole=whole)
    host, _, port = target.rpartition(":")
    streams = [await asyncio.open_connection(host, int(port)) for _ in range(connections)]
    opened = [_Connection(*each) for each in streams]
    await asyncio.gather(*(each.ask(request) for each in opened))
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    await asyncio.gather(*(_ask(each, request, turns, took) for each in opened))
    print(json.dumps({"seconds": time.perf_counter() - began, "request_seconds": sorted(took)}))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), whole="whole" in sys.argv[5:]))
