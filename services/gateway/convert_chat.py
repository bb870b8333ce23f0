"""Chat requests as the mesh's own generate requests."""

import base64
import binascii
import re
from typing import Any, Final

import msgspec
from tokenloom.inference.v1 import generation_pb2 as pb

from services.gateway.convert import from_common
from services.gateway.decoding import invalid, is_given
from services.gateway.schema_chat import (
    AssistantMessage,
    AudioPart,
    ChatRequest,
    ImagePart,
    LoneText,
    Message,
    NamedTool,
    RefusalPart,
    TextPart,
    Tool,
    ToolMessage,
)

__all__ = ["from_chat"]

_DATA_URL: Final = re.compile(r"^data:(?P<type>image/[a-z0-9.+-]{1,64});base64,(?P<data>[A-Za-z0-9+/=]+)$")
_AUDIO_TYPES: Final = {"wav": "audio/wav", "mp3": "audio/mpeg", "flac": "audio/flac", "ogg": "audio/ogg"}
_CHOICES: Final = {
    None: pb.TOOL_CHOICE_MODE_UNSPECIFIED,
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "none": pb.TOOL_CHOICE_MODE_NONE,
    "required": pb.TOOL_CHOICE_MODE_REQUIRED,
}


def from_chat(request: ChatRequest) -> list[pb.GenerateRequest]:
    """A chat request: one generation.

    Raises:
        MeshError: INVALID_REQUEST.
    """
    generate = from_common(request)
    chat = generate.chat
    for index, message in enumerate(request.messages):
        _add_message(chat.messages.add(role=message.__struct_config__.tag), message, f"messages[{index}]")
    for tool in request.tools or ():
        chat.tools.append(_tool(tool))
    _set_tool_choice(chat, request)
    if arguments := _template_arguments(request):
        chat.template_arguments_json = msgspec.json.encode(arguments).decode()
    chat.without_generation_prompt = request.add_generation_prompt is False
    chat.continue_final_message = bool(request.continue_final_message)
    if request.logprobs:
        generate.sampling.logprob_count = request.top_logprobs or 0
    return [generate]


def _add_message(to: pb.ChatMessage, message: Message, field: str) -> None:
    to.name = message.name or ""
    if isinstance(message.content, list):
        # How they follow each other is for the model's template to say.
        for index, part in enumerate(message.content):
            _add_part(to.parts.add(), part, f"{field}.content[{index}]")
    else:
        to.content = message.content or ""
    if isinstance(message, ToolMessage):
        to.tool_call_id = message.tool_call_id
    if isinstance(message, AssistantMessage):
        if not to.parts:
            to.content = to.content or message.refusal or ""
        to.reasoning = message.reasoning or message.reasoning_content or ""
        for call in message.tool_calls or ():
            to.tool_calls.add(id=call.id, name=call.function.name, arguments_json=call.function.arguments)


def _add_part(to: pb.ContentPart, part: TextPart | LoneText | RefusalPart | ImagePart | AudioPart, field: str) -> None:
    match part:
        case TextPart() | LoneText():
            to.text = part.text
        case RefusalPart():
            to.text = part.refusal
        case ImagePart():
            found = _DATA_URL.fullmatch(part.image_url.url)
            if found is None:
                where = f"{field}.image_url.url"
                message = f"{where}: expected data:image/…;base64,…; addresses are not fetched"
                raise invalid(where, message, "invalid_image_url")
            content = _decoded(found["data"], f"{field}.image_url.url")
            to.image.CopyFrom(pb.Media(mime_type=found["type"], content=content))
        case AudioPart():
            audio = part.input_audio
            content = _decoded(audio.data, f"{field}.input_audio.data")
            to.audio.CopyFrom(pb.Media(mime_type=_AUDIO_TYPES[audio.format], content=content))


def _decoded(data: str, field: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise invalid(field, f"{field}: not valid base64") from None


def _tool(tool: Tool) -> pb.Tool:
    function = tool.function
    parameters = bytes(function.parameters).decode() if is_given(function.parameters) else ""
    return pb.Tool(
        name=function.name,
        description=function.description or "",
        parameters_json=parameters,
        strict=bool(function.strict),
    )


def _set_tool_choice(chat: pb.ChatPrompt, request: ChatRequest) -> None:
    choice = request.tool_choice
    if isinstance(choice, NamedTool):
        chat.tool_choice.mode = pb.TOOL_CHOICE_MODE_FUNCTION
        chat.tool_choice.function_name = choice.function.name
    elif choice is not None:
        chat.tool_choice.mode = _CHOICES[choice]
    chat.single_tool_call = request.parallel_tool_calls is False


def _template_arguments(request: ChatRequest) -> dict[str, Any]:
    arguments = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        # As vLLM translates it: templates know one or the other.
        arguments.setdefault("reasoning_effort", request.reasoning_effort)
        arguments.setdefault("enable_thinking", request.reasoning_effort != "none")
    return arguments
