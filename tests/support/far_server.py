"""A small HTTP server that answers as servers with OpenAI's API do, byte for byte as a test says."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answer", "FarServer", "far_server", "plain", "streamed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is answered to every question of a path."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: Sequence[bytes] = ()
    """The body, each piece on its own."""
    breaks_off: bool = False
    """It hangs up before the body's end."""
    is_silent: bool = False
    """Nothing comes after the last piece, until the client hangs up."""


def plain(body: Any, status: int = 200, **headers: str) -> Answer:
    """A whole answer in JSON."""
    return Answer(status=status, headers=headers, pieces=[json.dumps(body).encode()])


def streamed(*events: Any, done: bool = True, **options: Any) -> Answer:
    """Server-sent events: bytes as they are, anything else in JSON."""
    pieces = [each if isinstance(each, bytes) else b"data: " + json.dumps(each).encode() + b"\n\n" for each in events]
    return Answer(pieces=[*pieces, b"data: [DONE]\n\n"] if done else pieces, **options)


@dataclass(slots=True)
class FarServer:
    """What it answers, and what it was asked."""

    answers: dict[str, "Answer | Callable[[dict[str, Any]], Answer]"]
    """By path; some depend on what is asked."""
    url: str = ""
    asked: list[tuple[str, dict[str, Any], Mapping[str, str]]] = field(default_factory=list)
    """Path, body and headers."""
    hung_up: int = 0
    """How often a client left before the end."""

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """What was asked of a path."""
        return [body for there, body, _ in self.asked if there == path]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers on one connection until somebody leaves."""
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            self.hung_up += 1
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        except asyncio.IncompleteReadError:
            return False
        path = head[0].split(" ")[1]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(content or b"{}")
        self.asked.append((path, body, headers))
        found = self.answers.get(path) or plain({"detail": "Not Found"}, 404)
        answer = found if isinstance(found, Answer) else found(body)
        lines = {"transfer-encoding": "chunked", **answer.headers}
        head = [f"HTTP/1.1 {answer.status} x", *(f"{name.replace('_', '-')}: {value}" for name, value in lines.items())]
        writer.write("\r\n".join([*head, "", ""]).encode())
        for piece in answer.pieces:
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
            await asyncio.sleep(0)
        if answer.is_silent:
            self.hung_up += not await reader.read(1)
        if answer.breaks_off or answer.is_silent:
            return False
        writer.write(b"0\r\n\r\n")
        return True


@asynccontextmanager
async def far_server(answers: "dict[str, Answer | Callable[[dict[str, Any]], Answer]]") -> AsyncIterator[FarServer]:
    """One that serves; its answers may be changed while it does."""
    far = FarServer(answers)
    serving: set[asyncio.Task[None]] = set()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(far.serve(reader, writer))
        serving.add(task)
        task.add_done_callback(serving.discard)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    far.url = "http://{}:{}".format(*server.sockets[0].getsockname())
    try:
        yield far
    finally:
        server.close()
        for task in serving:
            task.cancel()
        if serving:
            await asyncio.wait(serving)
