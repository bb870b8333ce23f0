"""POST /v1/chat/completions: the body that is taken."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from services.gateway.decoding import check_depth, check_schema, invalid, is_given
from services.gateway.schema import GenerationRequest, Label, TokenCount

__all__ = [
    "AssistantMessage",
    "AudioPart",
    "CallId",
    "CalledFunction",
    "ChatRequest",
    "DeveloperMessage",
    "Function",
    "FunctionName",
    "ImagePart",
    "ImageUrl",
    "LoneText",
    "Message",
    "Name",
    "NamedFunction",
    "NamedTool",
    "RefusalPart",
    "SpokenMessage",
    "SystemMessage",
    "TextPart",
    "Tool",
    "ToolCall",
    "ToolChoice",
    "ToolMessage",
    "UserMessage",
]

FunctionName = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]*\Z")]
CallId = Annotated[str, Meta(min_length=1, max_length=256)]
Name = Annotated[str, Meta(max_length=256)]


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    pass


class TextPart(_Strict, tag="text", tag_field="type"):
    """Text."""

    text: str


class RefusalPart(_Strict, tag="refusal", tag_field="type"):
    """What the assistant refused with."""

    refusal: str


class ImageUrl(_Strict):
    """An image as a data: URL; nothing is ever fetched."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict, tag="image_url", tag_field="type"):
    """An image."""

    image_url: ImageUrl


class InputAudio(_Strict):
    """A piece of sound."""

    data: str
    """Base64."""
    format: Literal["wav", "mp3", "flac", "ogg"]


class AudioPart(_Strict, tag="input_audio", tag_field="type"):
    """A piece of sound."""

    input_audio: InputAudio


class CalledFunction(_Strict):
    """Which function was called, with what."""

    name: FunctionName
    arguments: Annotated[str, Meta(max_length=1 << 20)]


class ToolCall(_Strict):
    """A call that the assistant made."""

    id: CallId
    function: CalledFunction
    type: Literal["function"] = "function"


class LoneText(_Strict):
    """Text, where nothing else may be. As a tag its type could be left out, for want of others to tell it from."""

    text: str
    type: Literal["text"]


Texts = Annotated[list[LoneText], Meta(min_length=1, max_length=1024)]


class SpokenMessage(_Strict, tag_field="role"):
    """A message whose content is text."""

    content: str | Texts
    name: Name | None = None


class SystemMessage(SpokenMessage, tag="system"):
    """What the application says."""


class DeveloperMessage(SpokenMessage, tag="developer"):
    """What the application says."""


class UserMessage(_Strict, tag="user", tag_field="role"):
    """What the user says."""

    content: str | Annotated[list[TextPart | ImagePart | AudioPart], Meta(min_length=1, max_length=1024)]
    name: Name | None = None


class AssistantMessage(_Strict, tag="assistant", tag_field="role"):
    """What the model said before."""

    content: str | Annotated[list[TextPart | RefusalPart], Meta(min_length=1, max_length=1024)] | None = None
    name: Name | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(SpokenMessage, kw_only=True, tag="tool"):
    """What a function answered."""

    tool_call_id: CallId


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class Function(_Strict):
    """A function that the model may call."""

    name: FunctionName
    description: Annotated[str, Meta(max_length=4096)] | None = None
    parameters: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    strict: bool | None = None


class Tool(_Strict):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Strict):
    """The function that must be called."""

    name: FunctionName


class NamedTool(_Strict):
    """The function that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool | None


class ChatRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=10_000)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Meta(max_length=32)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: Annotated[list[Literal["text"]], Meta(max_length=1)] | None = None
    verbosity: Literal["medium"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: Annotated[dict[str, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)] | None = None
    prompt_cache_key: Annotated[str, Meta(max_length=256)] | None = None
    safety_identifier: Label | None = None
    store: Literal[False] | None = None

    def check(self) -> None:
        """Refuses what is right field by field and wrong together.

        Raises:
            MeshError: INVALID_REQUEST.
        """
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            message = "max_completion_tokens: give max_tokens or max_completion_tokens, not both"
            raise invalid("max_completion_tokens", message)
        if self.max_tokens is None:
            self.max_tokens = self.max_completion_tokens
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs: only with logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid("continue_final_message", "continue_final_message: not with add_generation_prompt")
        if self.chat_template_kwargs is not None:
            _check_template_arguments(self.chat_template_kwargs)
        self._check_tools()
        self._check_calls()

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise invalid("tools", "tools: two functions of the same name")
        for index, tool in enumerate(self.tools or ()):
            if is_given(tool.function.parameters):
                check_schema(tool.function.parameters, f"tools[{index}].function.parameters")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise invalid(
                "tool_choice.function.name",
                f"tool_choice.function.name: there is no function {self.tool_choice.function.name!r} among the tools",
            )
        if self.tool_choice in ("required", "auto") and not names:
            raise invalid("tool_choice", f"tool_choice: {self.tool_choice!r} needs tools")
        if self.parallel_tool_calls is not None and not names:
            raise invalid("parallel_tool_calls", "parallel_tool_calls: only with tools")

    def _check_calls(self) -> None:
        made: set[str] = set()
        for index, message in enumerate(self.messages):
            if isinstance(message, AssistantMessage):
                made.update(call.id for call in message.tool_calls or ())
                if message.content is None and not message.tool_calls and not message.refusal:
                    field = f"messages[{index}].content"
                    raise invalid(field, f"{field}: missing, and there are no tool_calls", "invalid_type")
            elif isinstance(message, ToolMessage) and message.tool_call_id not in made:
                field = f"messages[{index}].tool_call_id"
                raise invalid(field, f"{field}: no message before this one made that call")


def _check_template_arguments(arguments: dict[str, Any]) -> None:
    encoded = msgspec.json.encode(arguments)
    if len(encoded) > 4096:
        raise invalid("chat_template_kwargs", "chat_template_kwargs: larger than 4096 bytes", "string_above_max_length")
    for owned in ("chat_template", "tokenize", "messages", "tools", "return_dict", "return_tensors"):
        if owned in arguments:
            raise invalid(f"chat_template_kwargs.{owned}", f"chat_template_kwargs.{owned}: can't be given here")
    check_depth(encoded, "chat_template_kwargs")
