"""A server with OpenAI's API over HTTP: what is asked and answered, within bounds, and its errors as ours."""

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import msgspec

from services.common.config import ConfigError
from services.common.errors import MeshError, Reason
from services.common.settings_worker import UpstreamSettings
from services.inference.openai_answer import ChunkError
from services.inference.output import EngineLostError

__all__ = ["KEY_REFUSED", "Refused", "Upstream", "UpstreamLostError", "error_of", "key_of"]

# Of an answer that is no stream; embeddings of 256 inputs are the largest.
_MAX_ANSWER_BYTES: Final = 64 << 20
# Of one event of a stream.
_MAX_EVENT_BYTES: Final = 4 << 20
_MAX_ERROR_BYTES: Final = 64 << 10
_MAX_MESSAGE_CHARACTERS: Final = 500
_MAX_RETRY_SECONDS: Final = 60.0
_RETRY_SECONDS: Final = 1.0
_TOO_LONG: Final = re.compile(
    r"(maximum|requested|exceeds?|larger).{0,40}context|context.{0,40}(exceed|length|window)|prompt is too long"
    r"|max_model_len",
    re.IGNORECASE,
)
_EVENT: Final = b"data:"
_DONE: Final = b"[DONE]"


KEY_REFUSED: Final = "the server behind this worker refuses the worker's key"
"""What is told where it is the operator who has to do something."""


class UpstreamLostError(EngineLostError):
    """The server can't be reached, or broke off."""

    def __init__(self, message: str = "the server behind this worker does not answer") -> None:
        super().__init__(message)


class Refused(msgspec.Struct):
    """An answer that is an error; servers put it inside `error`, or tell of it directly."""

    error: ChunkError | str | None = None
    message: str | None = None
    detail: Any = None
    param: str | None = None
    code: int | str | None = None

    def plain(self) -> ChunkError:
        """The error itself."""
        if isinstance(self.error, ChunkError):
            return self.error
        detail = self.detail if isinstance(self.detail, str) else ""
        message = self.error or self.message or detail
        return ChunkError(message=message, param=self.param, code=self.code)


def key_of(settings: UpstreamSettings, environment: Mapping[str, str]) -> str | None:
    """The server's key.

    Raises:
        ConfigError: the environment has none.
    """
    if settings.api_key_variable is None:
        return None
    key = environment.get(settings.api_key_variable)
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(f"upstream.api_key_variable: the environment has no key in {settings.api_key_variable}")
    return key


class Upstream:
    """Asks one server, and nobody else: redirects are errors. Close it."""

    def __init__(self, settings: UpstreamSettings, key: str | None, *, connections: int) -> None:
        """`connections`: most that are open at the same time."""
        self._base = settings.url.rstrip("/")
        parts = urlsplit(self._base)
        self._root = self._base.removesuffix("/v1") if parts.path.endswith("/v1") else self._base
        # What is packed could be unpacked to any size.
        headers = {"accept-encoding": "identity", "user-agent": "tokenloom"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        seconds = settings.timeout_seconds
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(seconds, connect=settings.connect_seconds),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            follow_redirects=False,
            # A proxy of the environment would be asked instead.
            trust_env=False,
        )

    async def close(self) -> None:
        """Closes its connections."""
        await self._client.aclose()

    async def get(self, path: str, *, seconds: float, at_root: bool = False) -> bytes:
        """The answer to a question without a body, which may take so long. Raises MeshError."""
        request = self._client.build_request("GET", self._url(path, at_root=at_root), timeout=seconds)
        return await self._whole(request)

    async def post(self, path: str, body: Mapping[str, Any], *, at_root: bool = False) -> bytes:
        """The whole answer to a question. Raises MeshError."""
        return await self._whole(self._request(path, body, at_root=at_root))

    @asynccontextmanager
    async def stream(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> AsyncIterator[AsyncIterator[list[bytes]]]:
        """The events of an answer, those that came together at once; leaving the block ends the request there.

        Raises:
            MeshError: it is refused; UpstreamLostError, the server broke off.
        """
        request = self._request(path, body)
        request.headers.update(headers)
        response = await self._send(request)
        try:
            yield _events(response)
        finally:
            await response.aclose()

    def _request(self, path: str, body: Mapping[str, Any], *, at_root: bool = False) -> httpx.Request:
        content = msgspec.json.encode(body)
        return self._client.build_request(
            "POST", self._url(path, at_root=at_root), content=content, headers={"content-type": "application/json"}
        )

    def _url(self, path: str, *, at_root: bool) -> str:
        return f"{self._root if at_root else self._base}{path}"

    async def _whole(self, request: httpx.Request) -> bytes:
        response = await self._send(request)
        try:
            return await _bounded(response, _MAX_ANSWER_BYTES)
        finally:
            await response.aclose()

    async def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            response = await self._client.send(request, stream=True)
        except httpx.PoolTimeout as error:
            raise _busy() from error
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            # The request never came there, so it is no reason.
            raise _away() from error
        except httpx.TransportError as error:
            raise UpstreamLostError from error
        if response.status_code == httpx.codes.OK:
            return response
        try:
            raise await _refusal(response)
        finally:
            await response.aclose()


async def _bounded(response: httpx.Response, most: int) -> bytes:
    body = bytearray()
    try:
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > most:
                raise MeshError(Reason.ENGINE_FAILED, "the server behind this worker answers with too much")
    except httpx.TransportError as error:
        raise UpstreamLostError from error
    return bytes(body)


async def _events(response: httpx.Response) -> AsyncIterator[list[bytes]]:
    """Raises UpstreamLostError: the stream ended without its mark."""
    rest = b""
    try:
        async for piece in response.aiter_raw():
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > _MAX_EVENT_BYTES:
                raise MeshError(Reason.ENGINE_FAILED, "the server behind this worker sends an event that is too large")
            events = [line[len(_EVENT) :].strip() for line in lines if line.startswith(_EVENT)]
            is_done = _DONE in events
            if events := [event for event in events if event and event != _DONE]:
                yield events
            if is_done:
                return
    except httpx.TransportError as error:
        raise UpstreamLostError from error
    raise UpstreamLostError("the server behind this worker broke off")


async def _refusal(response: httpx.Response) -> MeshError:
    body = await _bounded(response, _MAX_ERROR_BYTES)
    try:
        told = msgspec.json.decode(body, type=Refused).plain()
    except msgspec.DecodeError:
        told = ChunkError()
    return error_of(response.status_code, told, retry_after=response.headers.get("retry-after", ""))


def error_of(status: int, told: ChunkError, *, retry_after: str = "") -> MeshError:
    """What a client is told of an answer with this HTTP status."""
    match status:
        case 400 | 422:
            error = _invalid(told)
        case 401 | 403:
            # The key is the operator's, not the client's, who must not hear that theirs is wrong.
            error = MeshError(Reason.ENGINE_FAILED, KEY_REFUSED)
        case 404:
            error = _missing(told)
        case 413:
            error = MeshError(Reason.REQUEST_TOO_LARGE, "the server behind this worker doesn't take so large a request")
        case 429:
            error = _busy(retry_after)
        case 501:
            error = MeshError(Reason.UNIMPLEMENTED, _message(told) or "the server behind this worker can't do that")
        case 503:
            error = _away(retry_after)
        case _:
            error = MeshError(Reason.ENGINE_FAILED, f"the server behind this worker failed (HTTP {status})")
    return error


def _invalid(told: ChunkError) -> MeshError:
    message = _message(told) or "the server behind this worker refuses the request"
    if told.code == "context_length_exceeded" or _TOO_LONG.search(message):
        return MeshError(Reason.CONTEXT_LENGTH_EXCEEDED, message, field=told.param)
    field = told.param.removeprefix("body.") if told.param else None
    return MeshError(Reason.INVALID_REQUEST, message, field=field)


def _missing(told: ChunkError) -> MeshError:
    if told.param == "model" or told.code == "model_not_found" or "model" in told.message.lower():
        return MeshError(Reason.MODEL_NOT_FOUND, _message(told), field="model")
    return MeshError(Reason.UNIMPLEMENTED, "the server behind this worker can't do that")


def _busy(retry_after: str = "") -> MeshError:
    message = "the server behind this worker has no room"
    return MeshError(Reason.NO_CAPACITY, message, retry_after_seconds=_seconds(retry_after))


def _away(retry_after: str = "") -> MeshError:
    message = "the server behind this worker takes nothing"
    return MeshError(Reason.NO_READY_WORKER, message, retry_after_seconds=_seconds(retry_after))


def _message(told: ChunkError) -> str:
    return told.message[:_MAX_MESSAGE_CHARACTERS]


def _seconds(retry_after: str) -> float:
    return min(_MAX_RETRY_SECONDS, float(retry_after)) if retry_after.isdecimal() else _RETRY_SECONDS
