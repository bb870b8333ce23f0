"""Opens many chat streams at once and counts what comes, as cheaply as Python can.

    python -m bench.sse_client HOST:PORT KEY STREAMS MAX_TOKENS

Prints one JSON object: events, seconds from the first event to the last, and the time to first event of each stream.
"""

import asyncio
import json
import sys
import time

import uvloop


async def _stream(host: str, port: int, request: bytes) -> tuple[int, float, float]:
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    writer.write(request)
    events, first = 0, 0.0
    tail = b""
    while True:
        data = await reader.read(1 << 16)
        if not data:
            raise ConnectionError(f"stream ended early: {tail!r}")
        if not first and b"data: " in data:
            first = time.perf_counter() - began
        events += data.count(b'"content":')
        tail = (tail + data)[-64:]
        if b"data: [DONE]" in tail:
            writer.close()
            return events, first, time.perf_counter()


async def main(target: str, key: str, streams: int, max_tokens: int) -> None:
    """Runs all streams once."""
    host, _, port = target.rpartition(":")
    body = {
        "model": "sim",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": max_tokens,
        "stream": True,
        "ignore_eos": True,
    }
    encoded = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {target}\r\nauthorization: Bearer {key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(encoded)}\r\n\r\n"
    began = time.perf_counter()
    results = await asyncio.gather(*(_stream(host, int(port), head.encode() + encoded) for _ in range(streams)))
    print(
        json.dumps(
            {
                "events": sum(events for events, _, _ in results),
                "seconds": max(ended for _, _, ended in results) - began,
                "first_event_seconds": sorted(first for _, first, _ in results),
            }
        )
    )


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
