"""POST /v1/responses: the body that is taken."""

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from services.common.errors import MeshError
from services.gateway.decoding import check_schema, decode, invalid, is_given
from services.gateway.schema import Label, SampledRequest, TokenCount
from services.gateway.schema_chat import CallId, FunctionName, Name

__all__ = [
    "CalledItem",
    "FunctionTool",
    "InputImage",
    "Item",
    "Message",
    "NamedFunctionChoice",
    "OutputItem",
    "OutputRefusal",
    "OutputText",
    "ReasoningItem",
    "ResponsesRequest",
    "items_of",
]

_MAX_ITEMS: Final = 10_000
ItemId = Annotated[str, Meta(max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]
AnyList = Annotated[list[Any], Meta(max_length=1024)]


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    pass


class InputText(_Strict, tag="input_text", tag_field="type"):
    """Text."""

    text: str


class InputImage(_Strict, kw_only=True, tag="input_image", tag_field="type"):
    """An image as a data: URL; nothing is ever fetched."""

    image_url: str
    detail: Literal["auto", "low", "high"] | None = None
    file_id: None = None


class LoneText(_Strict):
    """Text, where nothing else may be; see schema_chat.LoneText."""

    text: str
    type: Literal["input_text"]


class OutputText(_Strict, kw_only=True, tag="output_text", tag_field="type"):
    """What the model said before."""

    text: str
    annotations: AnyList = []
    logprobs: Annotated[list[Any], Meta(max_length=1 << 20)] | None = None


class OutputRefusal(_Strict, tag="refusal", tag_field="type"):
    """What the model refused with."""

    refusal: str


Part = InputText | InputImage | OutputText | OutputRefusal


class Message(_Strict, kw_only=True):
    """A message whose type was left out."""

    role: Literal["user", "system", "developer", "assistant"]
    content: str | Annotated[list[Part], Meta(min_length=1, max_length=1024)]
    id: ItemId | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class TypedMessage(Message, kw_only=True, tag="message", tag_field="type"):
    """A message."""


class CalledItem(_Strict, kw_only=True, tag="function_call", tag_field="type"):
    """A call that the model made."""

    call_id: CallId
    name: FunctionName
    arguments: Annotated[str, Meta(max_length=1 << 20)]
    id: ItemId | None = None
    status: Status | None = None


class OutputItem(_Strict, kw_only=True, tag="function_call_output", tag_field="type"):
    """What a function answered."""

    call_id: CallId
    output: str | Annotated[list[LoneText], Meta(min_length=1, max_length=1024)]
    id: ItemId | None = None
    status: Status | None = None


class ReasoningText(_Strict):
    """A piece of thought."""

    text: str
    type: Literal["reasoning_text", "summary_text"]


class ReasoningItem(_Strict, kw_only=True, tag="reasoning", tag_field="type"):
    """What the model thought before."""

    summary: Annotated[list[ReasoningText], Meta(max_length=1024)] = []
    content: Annotated[list[ReasoningText], Meta(max_length=1024)] | None = None
    id: ItemId | None = None
    status: Status | None = None
    encrypted_content: str | None = None


Item = Message | CalledItem | OutputItem | ReasoningItem


class FunctionTool(_Strict, kw_only=True):
    """A function that the model may call."""

    type: Literal["function"]
    name: FunctionName
    parameters: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    strict: bool | None = None
    description: Annotated[str, Meta(max_length=4096)] | None = None


class NamedFunctionChoice(_Strict, kw_only=True):
    """The function that must be called."""

    type: Literal["function"]
    name: FunctionName


class TextFormat(_Strict, kw_only=True):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    schema: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    strict: bool | None = None
    description: Annotated[str, Meta(max_length=4096)] | None = None


class TextConfig(_Strict, kw_only=True):
    """How to write the text."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(_Strict, kw_only=True):
    """How to think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class EventOptions(_Strict, kw_only=True):
    """How to stream."""

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(SampledRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/responses"""

    input: str | Annotated[list[msgspec.Raw], Meta(min_length=1, max_length=_MAX_ITEMS)]
    instructions: str | None = None
    previous_response_id: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    store: bool | None = None
    stream_options: EventOptions | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    max_output_tokens: TokenCount | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    truncation: Literal["disabled"] | None = None
    metadata: Annotated[dict[str, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    background: Literal[False] | None = None
    prompt_cache_key: Name | None = None
    safety_identifier: Label | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Meta(max_length=32)] | None = None
    include_reasoning: bool | None = None

    def check(self) -> None:
        """Refuses what is right field by field and wrong together.

        Raises:
            MeshError: INVALID_REQUEST.
        """
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options: only with stream")
        form = self.text.format if self.text else None
        if form is not None and form.type == "json_schema":
            if not is_given(form.schema) or form.name is None:
                field = "text.format.schema" if form.name else "text.format.name"
                raise invalid(field, f"missing required parameter: {field}", "missing_required_parameter")
            check_schema(form.schema, "text.format.schema")


class _Peek(msgspec.Struct):
    """An item's type; that of a message may be left out."""

    type: str | None = None


_KINDS: Final[dict[str | None, type[Item]]] = {
    None: Message,
    "message": TypedMessage,
    "function_call": CalledItem,
    "function_call_output": OutputItem,
    "reasoning": ReasoningItem,
}


def items_of(raws: list[msgspec.Raw], field: str = "input") -> list[Item]:
    """Decodes items.

    Raises:
        MeshError: INVALID_REQUEST with the item's index in the field.
    """
    return [_item(bytes(raw), f"{field}[{index}]") for index, raw in enumerate(raws)]


def _item(raw: bytes, where: str) -> Item:
    try:
        kind = _KINDS.get(decode(raw, _Peek).type)
        if kind is None:
            raise invalid("type", f"type: expected one of {', '.join(filter(None, _KINDS))}")
        item: Item = decode(raw, kind)
    except MeshError as error:
        if error.field is None:
            raise invalid(where, f"{where}: {error.message.removeprefix('the body: ')}", error.code) from None
        raise invalid(f"{where}.{error.field}", f"{where}.{error.message}", error.code) from None
    return item
