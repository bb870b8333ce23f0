"""The simulated engine behind an OpenAI-compatible HTTP server, for routers that speak nothing else.

    python -m bench.peers.sim_openai PORT NAME=VALUE,...

It serves streamed chat completions as far as a benchmark needs them. The engine is the one of simulated workers; its
settings are those of `SimSettings`, as `tokenloom up --sim` takes them.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any, Final

import uvloop

from services.common.errors import MeshError
from services.inference.output import Delta, FinishReason, PromptEcho, StopCause, Timings, Usage
from services.inference.request import ChatMessage, Generation, Sampling
from services.inference.sim_engine import SimEngine
from services.mesh.config_file import parse_sim

_MODEL: Final = "sim"
_MOST_QUEUED: Final = 100_000
_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_MODELS: Final = {"object": "list", "data": [{"id": _MODEL, "object": "model", "owned_by": "bench"}]}
# What routers ask before they send anything.
_INFO: Final = {"model_path": _MODEL, "model_id": _MODEL, "served_model_name": _MODEL, "status": "ready"}


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class _Stream:
    """One answer on its way to a client: the engine's sink."""

    def __init__(self, writer: asyncio.StreamWriter, name: str) -> None:
        self._writer = writer
        self._name = name
        self.ended = asyncio.get_running_loop().create_future()

    def started(self, prompt_tokens: int, cached_tokens: int, echo: PromptEcho | None = None) -> None:
        """The first token comes with it."""
        del prompt_tokens, cached_tokens, echo
        self._write(_HEAD)

    def delta(self, text: str, token_ids: Sequence[int]) -> None:
        """One token."""
        del token_ids
        self._event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})

    def rich_delta(self, delta: Delta) -> None:
        """Never: nobody asks for more than text."""
        raise NotImplementedError

    def choice_ended(self, choice: int, reason: FinishReason, stop_cause: StopCause | None) -> None:
        """Never: there is one choice."""
        raise NotImplementedError

    def completed(
        self, reason: FinishReason, usage: Usage, timings: Timings, stop_cause: StopCause | None = None
    ) -> None:
        """The end, with the usage."""
        del timings, stop_cause
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason.value}]})
        counts = {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.output,
            "total_tokens": usage.prompt + usage.output,
            "prompt_tokens_details": {"cached_tokens": usage.cached},
        }
        self._event({"choices": [], "usage": counts})
        self._write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        self._end()

    def failed(self, error: MeshError) -> None:
        """Before anything was written: the benchmark's engines don't fail later."""
        if not self._writer.is_closing():
            _answer(self._writer, {"error": {"message": error.message}}, b"503 Service Unavailable")
        self._end()

    def _event(self, more: dict[str, Any]) -> None:
        body = {"id": self._name, "object": "chat.completion.chunk", "created": 1, "model": _MODEL, **more}
        self._write(_chunk(b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"))

    def _write(self, data: bytes) -> None:
        if self._writer.is_closing():
            # Nobody reads any more.
            self._end()
        else:
            self._writer.write(data)

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def _answer(writer: asyncio.StreamWriter, body: object, status: bytes = b"200 OK") -> None:
    encoded = json.dumps(body).encode()
    head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(encoded))
    writer.write(head + encoded)


class Server:
    """Connections of a router to one engine."""

    def __init__(self, engine: SimEngine) -> None:
        self._engine = engine
        self._count = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request after the other."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode("latin-1").lower().split("\r\n")
                length = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), 0)
                body = await reader.readexactly(length)
                method, path, _ = lines[0].split(" ")
                if (method, path) == ("post", "/v1/chat/completions"):
                    await self._complete(json.loads(body), writer)
                elif (method, path) == ("post", "/v1/chat/completions/render"):
                    # As vLLM's own server tells a router the tokens of a conversation.
                    tokens = await self._engine.tokenize(_messages(json.loads(body)))
                    _answer(
                        writer, {"request_id": "render", "token_ids": tokens, "sampling_params": {}, "model": _MODEL}
                    )
                elif method == "post":
                    _answer(writer, {"error": {"message": "not served"}}, b"404 Not Found")
                else:
                    _answer(writer, _MODELS if path.endswith("/models") else _INFO)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self._count += 1
        name = f"chatcmpl-{self._count}"
        messages = _messages(body)
        sampling = Sampling(max_tokens=body.get("max_tokens"), ignore_eos=body.get("ignore_eos", False))
        stream = _Stream(writer, name)
        try:
            await self._engine.submit(
                Generation(id=name, model=_MODEL, prompt=messages, kind="chat", sampling=sampling), stream
            )
            await stream.ended
        except MeshError as error:
            stream.failed(error)
        finally:
            self._engine.abort(name)


def _messages(body: dict[str, Any]) -> list[ChatMessage]:
    return [ChatMessage(role=each["role"], content=each["content"]) for each in body["messages"]]


async def main(port: int, sim: str) -> None:
    """Serves until killed."""
    async with SimEngine(parse_sim(sim), _MODEL, _MOST_QUEUED) as engine:
        server = await asyncio.start_server(Server(engine).serve, "127.0.0.1", port, limit=1 << 20)
        async with server:
            await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2]))
