"""The OpenAI request bodies that the gateway takes, and their strict decoding.

Of a repeated key the last value counts. A field that is not listed here is refused by name, never ignored.
"""

import re
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from services.common.errors import MeshError, Reason

__all__ = ["ChatMessage", "ChatRequest", "CompletionRequest", "GenerationRequest", "StreamOptions", "decode"]

_INT64: Final = 2**63 - 1
Bias = Annotated[float, Meta(ge=-100, le=100)]
Stop = Annotated[str, Meta(min_length=1, max_length=256)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How to stream."""

    include_usage: bool = False


class GenerationRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What chat and legacy completions have in common. null means the default everywhere."""

    model: Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f]*$")]
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=1024)] | None = None
    seed: Annotated[int, Meta(ge=-_INT64 - 1, le=_INT64)] | None = None
    ignore_eos: bool = False
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None
    metadata: Annotated[dict[str, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)] | None = None


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Meta(min_length=1, max_length=1024)]
    name: Annotated[str, Meta(max_length=256)] | None = None

    @property
    def text(self) -> str:
        """The whole content; parts follow each other without anything between."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """The form of the answer: plain text is the only one so far."""

    type: Literal["text"]


class ChatRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    store: Literal[False] | None = None


class CompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions"""

    prompt: Any | UnsetType = UNSET
    """A text, a list of token ids, or a list with one text; see `prompt_of`."""
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None


R = TypeVar("R", bound=GenerationRequest)
_DECODERS: Final[dict[type, msgspec.json.Decoder[Any]]] = {
    shape: msgspec.json.Decoder(shape) for shape in (ChatRequest, CompletionRequest)
}
_PATH: Final = re.compile(r" - at `(?:key in )?\$?\.?(?P<path>[^`]*)`$")
_MISSING: Final = re.compile(r"^Object missing required field `(?P<name>[^`]*)`")
_UNKNOWN: Final = re.compile(r"^Object contains unknown field `(?P<name>[^`]*)`")
_CODES: Final = (
    (re.compile(r"^Expected `(?:int|float|decimal)` (?:>=|>|<=|<) "), "out_of_range"),
    (re.compile(r"^Expected `array` of length >= "), "empty_array"),
    (re.compile(r"^Expected `array` of length <= "), "array_above_max_length"),
    (re.compile(r"^Expected `str` of length <= "), "string_above_max_length"),
    (re.compile(r"^Expected .* got "), "invalid_type"),
    (re.compile(r"^Invalid enum value"), "invalid_value"),
)


def decode(body: bytes, shape: type[R]) -> R:
    """Decodes a request body strictly.

    Raises:
        MeshError: INVALID_REQUEST with the field at fault and OpenAI's code.
    """
    try:
        request: R = _DECODERS[shape].decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise MeshError(Reason.INVALID_REQUEST, f"the body is not valid JSON: {error}", code="invalid_json") from None
    _check_together(request)
    return request


def _invalid(message: str) -> MeshError:
    at = _PATH.search(message)
    path = at["path"] if at else ""
    what = message[: at.start()] if at else message
    if missing := _MISSING.search(what):
        field = f"{path}.{missing['name']}" if path else missing["name"]
        return _error(field, f"missing required parameter: {field}", "missing_required_parameter")
    if unknown := _UNKNOWN.search(what):
        field = f"{path}.{unknown['name']}" if path else unknown["name"]
        return _error(field, f"unknown parameter: {field}", "unknown_parameter")
    code = next((code for pattern, code in _CODES if pattern.search(what)), "invalid_value")
    if code == "out_of_range":
        code = _range_code(what)
    return _error(path or None, f"{path or 'the body'}: {what[0].lower()}{what[1:]}", code)


def _range_code(what: str) -> str:
    kind = "integer" if "`int`" in what else "decimal"
    return f"{kind}_below_min_value" if ">" in what else f"{kind}_above_max_value"


def _error(field: str | None, message: str, code: str) -> MeshError:
    return MeshError(Reason.INVALID_REQUEST, message, field=field, code=code)


def _check_together(request: GenerationRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise _error("stream_options", "stream_options: only with stream", "invalid_value")
    if isinstance(request, ChatRequest):
        if request.max_tokens is not None and request.max_completion_tokens is not None:
            message = "max_completion_tokens: give max_tokens or max_completion_tokens, not both"
            raise _error("max_completion_tokens", message, "invalid_value")
        if request.top_logprobs is not None and not request.logprobs:
            raise _error("top_logprobs", "top_logprobs: only with logprobs", "invalid_value")
