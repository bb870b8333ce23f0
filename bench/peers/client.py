"""Plays a trace against an OpenAI-compatible server, each request at its time, and notes what came of it."""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.peers.contenders import MODEL, Target

__all__ = ["Heard", "play"]

_CONTENT: Final = re.compile(rb'"content": ?"[^"]')
_CACHED: Final = re.compile(rb'"cached_tokens": ?(\d+)')
_MOST_SECONDS: Final = 120.0


@dataclass(slots=True)
class Heard:
    """What a client saw of one request. Times are seconds."""

    at: float
    """When it was due, from the beginning of the trace."""
    prompt_tokens: int
    ttft: float | None = None
    """From when it was due; None when there was no answer."""
    ended: float = 0.0
    cached_tokens: int = 0
    events: int = 0
    refusal: str = ""
    """What was said instead of an answer."""
    refused_after: float | None = None
    says_when: bool = False
    """Whether a refusal said when to come again."""


async def play(
    target: Target, texts: Sequence[str], due: Sequence[tuple[float, int]], *, slo_class: str = ""
) -> list[Heard]:
    """Sends each text at its time; `due` has that, in seconds, and the tokens of its prompt."""
    heard = [Heard(at, tokens) for at, tokens in due]
    begin = time.monotonic() + 0.5
    async with asyncio.TaskGroup() as tasks:
        for one, text in zip(heard, texts, strict=True):
            tasks.create_task(_send(target, _request(target, text, slo_class), one, begin + one.at))
    return heard


async def _send(target: Target, request: bytes, heard: Heard, due: float) -> None:
    await asyncio.sleep(max(0.0, due - time.monotonic()))
    try:
        async with asyncio.timeout(_MOST_SECONDS):
            await _exchange(target, request, heard, due)
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        heard.ttft, heard.refusal = None, repr(error)


def _request(target: Target, text: str, slo_class: str) -> bytes:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    encoded = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {target.host}\r\nauthorization: Bearer {target.key}\r\n"
    head += f"x-slo-class: {slo_class}\r\n" if slo_class else ""
    return f"{head}content-type: application/json\r\ncontent-length: {len(encoded)}\r\n\r\n".encode() + encoded


async def _exchange(target: Target, request: bytes, heard: Heard, due: float) -> None:
    host, _, port = target.host.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    try:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        status = head.partition(b"\r\n")[0]
        if b" 200 " not in status:
            heard.refusal = status.decode("latin-1")
            heard.refused_after, heard.says_when = time.monotonic() - due, b"\nretry-after:" in head.lower()
            return
        await _listen(reader, heard, due)
    finally:
        writer.close()


async def _listen(reader: asyncio.StreamReader, heard: Heard, due: float) -> None:
    tail = b""
    while data := await reader.read(1 << 16):
        now = time.monotonic() - due
        tail = (tail + data)[-4096:]
        if heard.ttft is None and _CONTENT.search(tail):
            heard.ttft = now
        heard.events += data.count(b'"content":')
        if b"data: [DONE]" in tail:
            heard.ended = now
            cached = _CACHED.search(tail)
            heard.cached_tokens = int(cached.group(1)) if cached else 0
            return
    raise ConnectionError("the stream ended early")
