"""An OpenAI-compatible server that does little else than stream: one chunk a step for each stream, on a fixed schedule.

What HTTP proxies are measured against. All streams step together, as an engine's do.

    python -m bench.sse_backend PORT TOKENS_PER_SECOND
"""

import asyncio
import json
import sys
from typing import Any

import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_MODELS = json.dumps({"object": "list", "data": [{"id": "sim", "object": "model", "owned_by": "bench"}]}).encode()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event(text: str, finish: str | None = None) -> bytes:
    body = {
        "id": "chatcmpl-bench",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "sim",
        "choices": [{"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}],
    }
    return _chunk(b"data: " + json.dumps(body).encode() + b"\n\n")


def _whole(text: str, tokens: int) -> bytes:
    body = {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1,
        "model": "sim",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens},
    }
    return _sized(json.dumps(body).encode())


def _sized(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


class Backend:
    """Streams that step together."""

    def __init__(self, tokens_per_second: float) -> None:
        self._period = 1 / tokens_per_second
        self._streams: dict[asyncio.StreamWriter, int] = {}
        self._token = _event("word ")

    async def step_forever(self) -> None:
        """One token a period for each stream."""
        due = asyncio.get_running_loop().time()
        while True:
            due += self._period
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            for writer, left in list(self._streams.items()):
                writer.write(self._token if left else _event("", "length") + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
                if left:
                    self._streams[writer] = left - 1
                else:
                    del self._streams[writer]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode("latin-1").lower().split("\r\n")
                length = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), 0)
                body = await reader.readexactly(length)
                if lines[0].startswith("post"):
                    self._begin(writer, json.loads(body))
                else:
                    writer.write(_sized(_MODELS if "/models" in lines[0] else b"{}"))
        except (asyncio.IncompleteReadError, ConnectionError):
            self._streams.pop(writer, None)
            writer.close()

    def _begin(self, writer: asyncio.StreamWriter, asked: dict[str, Any]) -> None:
        tokens = asked["max_tokens"]
        if asked.get("stream"):
            writer.write(_HEAD)
            self._streams[writer] = tokens
        else:
            answer = _whole("word " * tokens, tokens)
            asyncio.get_running_loop().call_later(tokens * self._period, writer.write, answer)


async def main(port: int, tokens_per_second: float) -> None:
    """Serves until killed."""
    backend = Backend(tokens_per_second)
    server = await asyncio.start_server(backend.serve, "127.0.0.1", port)
    async with server, asyncio.TaskGroup() as tasks:
        tasks.create_task(backend.step_forever())
        tasks.create_task(server.serve_forever())


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2])))
