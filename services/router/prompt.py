"""Reads, from the body of a client's request, what the scheduler needs of it."""

import zlib
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec
from google.protobuf.message import DecodeError
from tokenloom.inference.v1 import generation_pb2, inference_pb2

from services.common.errors import MeshError, Reason
from services.common.rpc import MAX_MESSAGE_BYTES

__all__ = ["GrpcBody", "JsonBody", "Wanted"]

_BYTES_PER_TOKEN: Final = 4
_TOKENS_PER_MESSAGE: Final = 4
_PREFIX_BYTES: Final = 5
_PACKAGE: Final = "/tokenloom.inference.v1.InferenceService/"
_WINDOW_BITS: Final = {"gzip": 31, "deflate": 15}


class Wanted(NamedTuple):
    """What a body asks for."""

    model: str | None
    """None: any."""
    prompt_tokens: int = 0
    exact: bool = False
    max_output_tokens: int = 0
    occupies_slot: bool = True


class GrpcBody:
    """A gRPC request body that comes in pieces: a five-byte prefix, then one message of InferenceService."""

    def __init__(self, path: str, encoding: str) -> None:
        """`path` names the method.

        Raises:
            MeshError: UNIMPLEMENTED, there is no such method.
        """
        parse = _METHODS.get(path.removeprefix(_PACKAGE)) if path.startswith(_PACKAGE) else None
        if parse is None:
            raise MeshError(Reason.UNIMPLEMENTED, "there is no such method")
        self._parse = parse
        self._encoding = encoding

    @property
    def needed(self) -> bool:
        """Whether the body has to be seen at all."""
        return self._parse is not _any_worker

    def wanted(self, body: bytearray, *, ended: bool) -> Wanted | None:
        """What is asked for; None while the message is not complete.

        Raises:
            MeshError: the body is not one message of this method, or too large.
        """
        if len(body) < _PREFIX_BYTES:
            return _incomplete(ended)
        size = int.from_bytes(body[1:_PREFIX_BYTES], "big")
        if size > MAX_MESSAGE_BYTES:
            raise _too_large()
        if len(body) < _PREFIX_BYTES + size:
            return _incomplete(ended)
        message = bytes(memoryview(body)[_PREFIX_BYTES : _PREFIX_BYTES + size])
        try:
            return self._parse(self._plain(message, body[0]))
        except DecodeError as error:
            raise MeshError(Reason.INVALID_REQUEST, "the message can't be decoded") from error

    def _plain(self, message: bytes, compressed: int) -> bytes:
        if compressed == 0:
            return message
        bits = _WINDOW_BITS.get(self._encoding)
        if compressed != 1 or bits is None:
            raise MeshError(Reason.UNIMPLEMENTED, "this compression is not supported")
        inflate = zlib.decompressobj(bits)
        try:
            plain = inflate.decompress(message, MAX_MESSAGE_BYTES + 1)
        except zlib.error as error:
            raise MeshError(Reason.INVALID_REQUEST, "the message can't be decompressed") from error
        if len(plain) > MAX_MESSAGE_BYTES:
            raise _too_large()
        return plain


class JsonBody:
    """A JSON request body in OpenAI's shape, for gateways that use the picker in front of OpenAI servers."""

    needed: Final = True

    def wanted(self, body: bytearray, *, ended: bool) -> Wanted | None:
        """What is asked for; None while the body is not complete.

        Raises:
            MeshError: the body is not JSON with a model.
        """
        if not ended:
            return None
        try:
            shape = msgspec.json.decode(body, type=_OpenAiRequest)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            field = "model" if isinstance(error, msgspec.ValidationError) else None
            message = "the body must be a JSON object with a model"
            raise MeshError(Reason.INVALID_REQUEST, message, field=field) from error
        size = sum(len(memoryview(part)) for part in (shape.messages, shape.prompt, shape.input))
        limit = shape.max_completion_tokens or shape.max_tokens
        return Wanted(
            model=shape.model,
            prompt_tokens=size // _BYTES_PER_TOKEN,
            max_output_tokens=limit if isinstance(limit, int) and 0 < limit < 1 << 32 else 0,
        )


class _OpenAiRequest(msgspec.Struct):
    model: str
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    # Whatever else they are is for the server to refuse.
    max_tokens: Any = None
    max_completion_tokens: Any = None


def _incomplete(ended: bool) -> Wanted | None:
    if ended:
        raise MeshError(Reason.INVALID_REQUEST, "the body ends before its message does")
    return None


def _too_large() -> MeshError:
    return MeshError(Reason.REQUEST_TOO_LARGE, f"the message has more than {MAX_MESSAGE_BYTES} bytes")


def _generate(data: bytes) -> Wanted:
    message = generation_pb2.GenerateRequest.FromString(data)
    emitted = len(message.emitted_token_ids)
    kind = message.WhichOneof("prompt")
    if kind == "token_ids":
        tokens = len(message.token_ids.ids)
    elif kind == "chat":
        tokens = _chat_tokens(message.chat)
    else:
        tokens = len(message.text) // _BYTES_PER_TOKEN + 1
    return Wanted(
        model=message.model,
        prompt_tokens=tokens + emitted,
        exact=kind == "token_ids",
        max_output_tokens=max(1, message.sampling.max_tokens - emitted) if message.sampling.max_tokens else 0,
    )


def _chat_tokens(chat: generation_pb2.ChatPrompt) -> int:
    size = sum(len(message.content) for message in chat.messages)
    return size // _BYTES_PER_TOKEN + _TOKENS_PER_MESSAGE * len(chat.messages)


def _embed(data: bytes) -> Wanted:
    message = inference_pb2.EmbedRequest.FromString(data)
    size = sum(len(text) for text in message.texts)
    return Wanted(model=message.model, prompt_tokens=size // _BYTES_PER_TOKEN + len(message.texts), max_output_tokens=1)


def _tokenize(data: bytes) -> Wanted:
    return Wanted(model=inference_pb2.TokenizeRequest.FromString(data).model, occupies_slot=False)


def _any_worker(data: bytes) -> Wanted:
    del data
    return Wanted(model=None, occupies_slot=False)


_METHODS: Final[dict[str, Callable[[bytes], Wanted]]] = {
    "Generate": _generate,
    "Embed": _embed,
    "Tokenize": _tokenize,
    "ListModels": _any_worker,
}
