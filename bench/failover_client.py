"""Many streams at once, with the time of every piece: what comes of each is read only when all of them have ended."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

__all__ = ["Said", "Streamed", "stream_all"]

_END = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Said:
    """What a client got: two of these are equal where it can see no difference."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    usage: tuple[int, int]
    """Tokens of the prompt and of the output, as the server counts them."""
    error: str | None
    """What it ended with other than [DONE]."""


@dataclass(slots=True)
class Streamed:
    """One stream as it came."""

    raw: bytearray = field(default_factory=bytearray)
    times: list[float] = field(default_factory=list)
    """When each piece came."""
    broke: str | None = None

    @property
    def longest_gap(self) -> float:
        """Seconds between two pieces, the longest of them."""
        return max((later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)), default=0.0)

    def said(self) -> Said:
        """What is in it."""
        head, _, body = bytes(self.raw).partition(b"\r\n\r\n")
        status = head.partition(b"\r\n")[0].decode(errors="replace")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            return Said("", (), None, (0, 0), self.broke or f"{status} {body[:300]!r}")
        data = [line[6:] for line in _unchunked(body).split(b"\n") if line.startswith(b"data: ")]
        events = [json.loads(line) for line in data if line != b"[DONE]"]
        return _said(events, self.broke or (None if data and data[-1] == b"[DONE]" else "no [DONE]"))


def _said(events: Sequence[dict[str, Any]], error: str | None) -> Said:
    text, ids, reason, usage = list[str](), list[int](), None, (0, 0)
    for event in events:
        if "error" in event:
            error = json.dumps(event["error"])
        for choice in event.get("choices", ()):
            text.append(choice["text"] if "text" in choice else choice["delta"].get("content") or "")
            ids += choice.get("token_ids") or ()
            reason = choice.get("finish_reason") or reason
        if told := event.get("usage"):
            usage = told["prompt_tokens"], told["completion_tokens"]
    return Said("".join(text), tuple(ids), reason, usage, error)


def _unchunked(body: bytes) -> bytes:
    whole, at = bytearray(), 0
    while (end := body.find(b"\r\n", at)) >= 0 and (size := int(body[at:end], 16)):
        whole += body[end + 2 : end + 2 + size]
        at = end + 4 + size
    return bytes(whole)


async def stream_all(
    target: str, key: str, bodies: Sequence[dict[str, Any]], *, flowing: Callable[[], None] = lambda: None
) -> list[Streamed]:
    """Streams them all at once from HOST:PORT, those with messages as chats; calls `flowing` when all have begun."""
    streams = [Streamed() for _ in bodies]
    left = {id(stream) for stream in streams}

    def begun(stream: Streamed) -> None:
        left.discard(id(stream))
        if not left:
            flowing()

    async with asyncio.TaskGroup() as tasks:
        for stream, body in zip(streams, bodies, strict=True):
            tasks.create_task(_stream(target, key, body, stream, begun))
    return streams


async def _stream(
    target: str, key: str, body: dict[str, Any], into: Streamed, begun: Callable[[Streamed], None]
) -> None:
    host, _, port = target.rpartition(":")
    encoded = json.dumps(body).encode()
    path = "chat/completions" if "messages" in body else "completions"
    head = f"POST /v1/{path} HTTP/1.1\r\nhost: {target}\r\nauthorization: Bearer {key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(encoded)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    writer.write(head.encode() + encoded)
    try:
        while data := await reader.read(1 << 16):
            if not into.times:
                begun(into)
            into.times.append(perf_counter())
            into.raw += data
            if data.endswith(_END) or (b"content-length" in into.raw[:1000] and b" 200 " not in into.raw[:20]):
                return
        into.broke = "the connection was closed"
    except OSError as error:
        into.broke = repr(error)
    finally:
        writer.close()
