"""Reads, from the body of a client's request, what the scheduler needs of it."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from google.protobuf.message import DecodeError
from tokenloom.inference.v1 import generation_pb2, inference_pb2

from services.common.errors import MeshError, Reason
from services.common.prefix import salt_of, text_block_hashes
from services.common.prompt_prefix import prompt_hashes
from services.common.rpc import MAX_MESSAGE_BYTES

__all__ = ["GrpcBody", "JsonBody", "Wanted"]

_BYTES_PER_TOKEN: Final = 4
_TOKENS_PER_MESSAGE: Final = 4
_PREFIX_BYTES: Final = 5
_PACKAGE: Final = "/tokenloom.inference.v1.InferenceService/"
_WINDOW_BITS: Final = {"gzip": 31, "deflate": 15}
# A picture is a few hundred to a thousand tokens for most models; only the worker knows.
_TOKENS_PER_MEDIUM: Final = 512
_MOST_HASHED_BYTES: Final = 128 << 10
_GENERATE: Final = frozenset({"generate"})
_EMBED: Final = frozenset({"embed"})
_SCORE: Final = frozenset({"score"})
_NEEDED_BY_PART: Final = {"image": "images", "audio": "audio"}


class Wanted(NamedTuple):
    """What a body asks for."""

    model: str | None
    """None: any."""
    prompt_tokens: int = 0
    exact: bool = False
    max_output_tokens: int = 0
    prompt_token_ids: Sequence[int] = ()
    prefix_hashes: Sequence[int] = ()
    needs: frozenset[str] = frozenset()
    occupies_slot: bool = True


class GrpcBody:
    """A gRPC request body that comes in pieces: a five-byte prefix, then one message of InferenceService."""

    def __init__(self, path: str, encoding: str) -> None:
        """`path` names the method.

        Raises:
            MeshError: UNIMPLEMENTED, there is no such method.
        """
        method = _METHODS.get(path.removeprefix(_PACKAGE)) if path.startswith(_PACKAGE) else None
        if method is None:
            raise MeshError(Reason.UNIMPLEMENTED, "there is no such method")
        self._type, self._wanted = method
        self._encoding = encoding

    @property
    def needed(self) -> bool:
        """Whether the body has to be seen at all."""
        return self._wanted is not _any_worker

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
        return self._wanted(self._message(body, size))

    def rewritten(self, body: bytearray, model: str, output_limit: int) -> bytes:
        """The complete body, asking for that model and for so many tokens of output at most; 0: as many as it did."""
        size = int.from_bytes(body[1:_PREFIX_BYTES], "big")
        message = self._message(body, size)
        message.model = model
        if output_limit and isinstance(message, generation_pb2.GenerateRequest):
            asked = message.sampling.max_tokens
            message.sampling.max_tokens = min(asked, output_limit) if asked else output_limit
        data: bytes = message.SerializeToString()
        return b"\0" + len(data).to_bytes(4, "big") + data + bytes(body[_PREFIX_BYTES + size :])

    def _message(self, body: bytearray, size: int) -> Any:
        message = bytes(memoryview(body)[_PREFIX_BYTES : _PREFIX_BYTES + size])
        try:
            return self._type.FromString(self._plain(message, body[0]))
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

    def __init__(self, path: str) -> None:
        """`path` is what is asked for, `/v1/embeddings` for example."""
        self._path = path.partition("?")[0]

    def wanted(self, body: bytearray, *, ended: bool) -> Wanted | None:
        """What is asked for; None while the body is not complete.

        Raises:
            MeshError: the body is not JSON with a model.
        """
        if not ended:
            return None
        try:
            shape = msgspec.json.decode(body, type=_OpenAiRequest)
            prompt = "".join(str(part, "utf-8") for part in (shape.messages, shape.prompt, shape.input))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            field = "model" if isinstance(error, msgspec.ValidationError) else None
            message = "the body must be a JSON object with a model"
            raise MeshError(Reason.INVALID_REQUEST, message, field=field) from error
        if self._path.endswith(("/tokenize", "/detokenize")):
            return Wanted(model=shape.model, occupies_slot=False)
        embeds = self._path.endswith("/embeddings")
        return Wanted(
            model=shape.model,
            prompt_tokens=len(prompt) // _BYTES_PER_TOKEN,
            max_output_tokens=1 if embeds else shape.limit,
            # As it is written: one that goes on begins with the same bytes.
            prefix_hashes=()
            if embeds
            else text_block_hashes(prompt[:_MOST_HASHED_BYTES], salt=salt_of(shape.model, "")),
            needs=_EMBED if embeds else _GENERATE,
        )

    def rewritten(self, body: bytearray, model: str, output_limit: int) -> bytes:
        """The complete body, asking for that model and for so many tokens of output at most; 0: as many as it did."""
        asked = msgspec.json.decode(body, type=dict[str, Any])
        asked["model"] = model
        if output_limit and not self._path.endswith(("/embeddings", "/tokenize", "/detokenize")):
            name = "max_completion_tokens" if "max_completion_tokens" in asked else "max_tokens"
            limit = asked.get(name)
            asked[name] = min(limit, output_limit) if isinstance(limit, int) else output_limit
        return msgspec.json.encode(asked)


class _OpenAiRequest(msgspec.Struct):
    model: str
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    # Whatever else they are is for the server to refuse.
    max_tokens: Any = None
    max_completion_tokens: Any = None

    @property
    def limit(self) -> int:
        """Most tokens of output; 0: not limited."""
        limit = self.max_completion_tokens or self.max_tokens
        return limit if isinstance(limit, int) and 0 < limit < 1 << 32 else 0


def _incomplete(ended: bool) -> Wanted | None:
    if ended:
        raise MeshError(Reason.INVALID_REQUEST, "the body ends before its message does")
    return None


def _too_large() -> MeshError:
    return MeshError(Reason.REQUEST_TOO_LARGE, f"the message has more than {MAX_MESSAGE_BYTES} bytes")


def _generate(message: generation_pb2.GenerateRequest) -> Wanted:
    emitted = message.emitted_token_ids
    kind = message.WhichOneof("prompt")
    token_ids: tuple[int, ...] = ()
    if kind == "token_ids":
        token_ids = (*message.token_ids.ids, *emitted)
        tokens = len(token_ids)
    elif kind == "chat":
        tokens = _chat_tokens(message.chat) + len(emitted)
    else:
        tokens = len(message.text) // _BYTES_PER_TOKEN + 1 + len(emitted)
    limit = message.sampling.max_tokens
    return Wanted(
        model=message.model,
        prompt_tokens=_at_most(tokens, message),
        exact=kind == "token_ids",
        max_output_tokens=max(1, limit - len(emitted)) if limit else 0,
        prompt_token_ids=token_ids,
        prefix_hashes=prompt_hashes(message),
        needs=_GENERATE | _needed_by_parts(message.chat) if kind == "chat" else _GENERATE,
    )


def _needed_by_parts(chat: generation_pb2.ChatPrompt) -> frozenset[str]:
    kinds = {part.WhichOneof("content") for message in chat.messages for part in message.parts}
    return frozenset(_NEEDED_BY_PART[kind] for kind in kinds if kind in _NEEDED_BY_PART)


def _at_most(tokens: int, message: Any) -> int:
    return min(tokens, message.prompt_token_limit) if message.HasField("prompt_token_limit") else tokens


def _chat_tokens(chat: generation_pb2.ChatPrompt) -> int:
    size, media = len(chat.template_arguments_json), 0
    for tool in chat.tools:
        size += len(tool.name) + len(tool.description) + len(tool.parameters_json)
    for message in chat.messages:
        size += len(message.content) + len(message.reasoning)
        size += sum(len(call.name) + len(call.arguments_json) for call in message.tool_calls)
        size += sum(len(part.text) for part in message.parts)
        media += sum(not part.HasField("text") for part in message.parts)
    return size // _BYTES_PER_TOKEN + _TOKENS_PER_MESSAGE * len(chat.messages) + _TOKENS_PER_MEDIUM * media


def _embed(message: inference_pb2.EmbedRequest) -> Wanted:
    size = sum(len(text) for text in message.texts)
    tokens = size // _BYTES_PER_TOKEN + len(message.texts) + sum(len(one.ids) for one in message.token_ids)
    return Wanted(model=message.model, prompt_tokens=tokens, max_output_tokens=1, needs=_EMBED)


def _score(message: inference_pb2.ScoreRequest) -> Wanted:
    # The query is read with each of the texts.
    size = sum(len(text) for text in message.texts) + len(message.query) * len(message.texts)
    tokens = size // _BYTES_PER_TOKEN + len(message.texts)
    return Wanted(model=message.model, prompt_tokens=tokens, max_output_tokens=1, needs=_SCORE)


def _uses_tokenizer(message: inference_pb2.TokenizeRequest | inference_pb2.DetokenizeRequest) -> Wanted:
    return Wanted(model=message.model, occupies_slot=False)


def _any_worker(message: inference_pb2.ListModelsRequest) -> Wanted:
    del message
    return Wanted(model=None, occupies_slot=False)


_METHODS: Final[dict[str, tuple[type[Any], Callable[[Any], Wanted]]]] = {
    "Generate": (generation_pb2.GenerateRequest, _generate),
    "Embed": (inference_pb2.EmbedRequest, _embed),
    "Score": (inference_pb2.ScoreRequest, _score),
    "Tokenize": (inference_pb2.TokenizeRequest, _uses_tokenizer),
    "Detokenize": (inference_pb2.DetokenizeRequest, _uses_tokenizer),
    "ListModels": (inference_pb2.ListModelsRequest, _any_worker),
}
