"""Clients that a load is sent with: OpenAI's API over HTTP, or the mesh's own over gRPC."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from itertools import cycle
from typing import Any, Final, Protocol

import grpc.aio
import httpx
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2_grpc

from services.common.errors import MeshError, Reason
from services.common.status import error_from_call
from services.mesh.bench_sample import Prompt, Sample
from services.mesh.edge_client import Door

__all__ = ["Client", "openai_client", "typed_client"]

_CONNECT_SECONDS: Final = 10.0
# Servers take so many calls over one connection, as Envoy does by default.
_CALLS_A_CHANNEL: Final = 64
_MOST_CHANNELS: Final = 64
_PATHS: Final = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class Client(Protocol):
    """Sends requests for output that is streamed."""

    async def ask(self, prompt: Prompt) -> Sample:
        """One request, to its end. Whatever goes wrong is told in the sample."""


def openai_client(
    door: Door, *, model: str, endpoint: str, ignore_eos: bool, timeout: float
) -> AbstractAsyncContextManager["OpenAIClient"]:
    """A client of OpenAI's API. `endpoint`: "chat" or "completions". `timeout` of a request in seconds."""
    return _opened_openai(door, OpenAIBody(model=model, endpoint=endpoint, ignore_eos=ignore_eos), timeout)


@asynccontextmanager
async def _opened_openai(door: Door, body: "OpenAIBody", timeout: float) -> AsyncIterator["OpenAIClient"]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    times = httpx.Timeout(timeout, connect=_CONNECT_SECONDS)
    headers = door.headers if door.key else {}
    async with httpx.AsyncClient(base_url=door.url, headers=headers, timeout=times, limits=limits) as http:
        yield OpenAIClient(http, body, timeout)


class OpenAIBody:
    """What each request of OpenAI's API says."""

    def __init__(self, *, model: str, endpoint: str, ignore_eos: bool) -> None:
        self.path = _PATHS[endpoint]
        self._is_chat = endpoint == "chat"
        self._same: dict[str, Any] = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            # Not OpenAI's own, but known to vLLM and to the mesh.
            **({"ignore_eos": True} if ignore_eos else {}),
        }

    def of(self, prompt: Prompt) -> dict[str, Any]:
        """The body of one request."""
        if self._is_chat:
            asked: dict[str, Any] = {"messages": [{"role": "user", "content": prompt.text}]}
        else:
            asked = {"prompt": prompt.text}
        return {**self._same, **asked, "max_tokens": prompt.max_tokens}


class OpenAIClient:
    """Streams from OpenAI's API."""

    def __init__(self, http: httpx.AsyncClient, body: OpenAIBody, timeout: float) -> None:
        self._http = http
        self._body = body
        self._timeout = timeout

    async def ask(self, prompt: Prompt) -> Sample:
        """One request, to its end."""
        sample = Sample(time.perf_counter())
        try:
            async with asyncio.timeout(self._timeout):
                await self._stream(prompt, sample)
        except TimeoutError:
            sample.error = "timeout"
        except httpx.HTTPError as error:
            sample.error = type(error).__name__
        sample.ended = time.perf_counter()
        return sample

    async def _stream(self, prompt: Prompt, sample: Sample) -> None:
        async with self._http.stream("POST", self._body.path, json=self._body.of(prompt)) as answer:
            if answer.status_code != httpx.codes.OK:
                sample.error = _code_of(answer.status_code, await answer.aread())
                return
            rest = b""
            async for data in answer.aiter_bytes():
                *events, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
                now = time.perf_counter()
                for event in events:
                    if _take(event, sample, now):
                        return
        sample.error = sample.error or "incomplete"


def _take(event: bytes, sample: Sample, now: float) -> bool:
    """Takes in one event; True for the last one."""
    data = b"".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
    if data == b"[DONE]":
        return True
    if not data:
        return False
    said = json.loads(data)
    if error := said.get("error"):
        sample.error = str(error.get("code") or error.get("type") or "error")
        return True
    for choice in said.get("choices", ()):
        part = choice.get("delta") or choice
        if any(part.get(name) for name in ("content", "text", "reasoning", "reasoning_content", "tool_calls")):
            sample.heard(now)
            # Until the usage says better.
            sample.output_tokens += 1
    if usage := said.get("usage"):
        sample.prompt_tokens = usage.get("prompt_tokens", 0)
        sample.output_tokens = usage.get("completion_tokens", sample.output_tokens)
        sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return False


def _code_of(status: int, body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error.get("code") or error.get("type") or status)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"HTTP {status}"


@asynccontextmanager
async def typed_client(
    door: Door, *, model: str, ignore_eos: bool, timeout: float, concurrency: int
) -> AsyncIterator["TypedClient"]:
    """A client of the mesh's own API, with connections enough for `concurrency` requests at a time."""
    count = min(_MOST_CHANNELS, -(-concurrency // _CALLS_A_CHANNEL))
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(door.async_channel(number)) for number in range(count)]
        yield TypedClient(channels, door, model=model, ignore_eos=ignore_eos, timeout=timeout)


class TypedClient:
    """Streams from InferenceService."""

    def __init__(
        self, channels: list[grpc.aio.Channel], door: Door, *, model: str, ignore_eos: bool, timeout: float
    ) -> None:
        stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in channels]
        self._next: Callable[[], inference_pb2_grpc.InferenceServiceAsyncStub] = cycle(stubs).__next__
        self._metadata = door.metadata if door.key else ()
        self._model = model
        self._ignore_eos = ignore_eos
        self._timeout = timeout

    async def ask(self, prompt: Prompt) -> Sample:
        """One request, to its end."""
        sampling = pb.SamplingParameters(max_tokens=prompt.max_tokens, temperature=0, ignore_eos=self._ignore_eos)
        request = pb.GenerateRequest(model=self._model, text=prompt.text, sampling=sampling)
        sample = Sample(time.perf_counter())
        try:
            async for answer in self._next().Generate(request, metadata=self._metadata, timeout=self._timeout):
                self._take(answer, sample)
        except grpc.aio.AioRpcError as error:
            sample.error = _reason_of(error)
        sample.ended = time.perf_counter()
        return sample

    def _take(self, answer: pb.GenerateResponse, sample: Sample) -> None:
        if answer.HasField("delta"):
            sample.heard(time.perf_counter())
            sample.output_tokens += len(answer.delta.token_ids)
        elif answer.HasField("completed"):
            usage = answer.completed.usage
            sample.prompt_tokens = usage.prompt_token_count
            sample.cached_tokens = usage.cached_token_count
            sample.output_tokens = usage.output_token_count


def _reason_of(error: grpc.aio.AioRpcError) -> str:
    told: MeshError = error_from_call(error)
    return error.code().name if told.reason is Reason.INTERNAL else told.reason.value
