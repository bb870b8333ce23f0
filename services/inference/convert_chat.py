"""Conversations of the protos as the engine's: messages, parts, functions to call, and how to render them."""

import re
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from tokenloom.inference.v1 import generation_pb2 as pb

from services.common.errors import MeshError, Reason
from services.inference.checks import check_count, check_text, invalid, json_object
from services.inference.engine import Capability, EngineCard
from services.inference.request import ChatMessage, ChatOptions, Media, Tool, ToolCall

__all__ = ["MAX_SCHEMA_BYTES", "chat_from_proto"]

_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})
_MAX_MESSAGES: Final = 10_000
_MAX_NAME_CHARACTERS: Final = 256
_MAX_PARTS: Final = 1024
_MAX_MEDIA: Final = 16
# Of all of them together: as base64 in JSON that is the 4 MiB that a request may have.
_MAX_MEDIA_BYTES: Final = 3 << 20
_MAX_TOOLS: Final = 128
_MAX_DESCRIPTION_CHARACTERS: Final = 4096
_MAX_TEMPLATE_ARGUMENTS_BYTES: Final = 4 << 10
MAX_SCHEMA_BYTES: Final = 64 << 10
"""Of a JSON Schema or a grammar."""

_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
# They have fields of their own, or would change what is rendered rather than how.
_NOT_FOR_CLIENTS: Final = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "messages",
        "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs",
        "tools", "truncation", "max_length",
    }
)  # fmt: skip  # a table

_Choice = Literal["auto", "none", "required", "function"]
_CHOICES: Final[Mapping[int, _Choice]] = {
    pb.TOOL_CHOICE_MODE_UNSPECIFIED: "auto",
    pb.TOOL_CHOICE_MODE_AUTO: "auto",
    pb.TOOL_CHOICE_MODE_NONE: "none",
    pb.TOOL_CHOICE_MODE_REQUIRED: "required",
    pb.TOOL_CHOICE_MODE_FUNCTION: "function",
}


def chat_from_proto(chat: pb.ChatPrompt, card: EngineCard) -> tuple[list[ChatMessage], ChatOptions]:
    """A conversation, and how to render it.

    Raises:
        MeshError: INVALID_REQUEST with the field at fault; UNIMPLEMENTED for what the model can't do.
    """
    messages = _messages(chat, card)
    tools = _tools(chat, card)
    choice, function_name = _tool_choice(chat, tools)
    if chat.continue_final_message and messages[-1].role != "assistant":
        raise invalid("chat.continue_final_message", "the last message must be the assistant's")
    return messages, ChatOptions(
        tools=tools,
        tool_choice=choice,
        function_name=function_name,
        single_tool_call=chat.single_tool_call,
        template_arguments=_template_arguments(chat.template_arguments_json),
        generation_prompt=not (chat.without_generation_prompt or chat.continue_final_message),
        continue_final_message=chat.continue_final_message,
    )


def _messages(chat: pb.ChatPrompt, card: EngineCard) -> list[ChatMessage]:
    if not chat.messages:
        raise invalid("chat.messages", "at least one message", "empty_array")
    check_count("chat.messages", chat.messages, _MAX_MESSAGES, "messages")
    called: set[str] = set()
    messages = [_message(f"chat.messages[{index}]", each, card, called) for index, each in enumerate(chat.messages)]
    _check_media([part for message in messages for part in message.parts if isinstance(part, Media)])
    return messages


def _check_media(media: Sequence[Media]) -> None:
    if len(media) > _MAX_MEDIA:
        raise invalid("chat.messages", f"at most {_MAX_MEDIA} images and sounds", "array_above_max_length")
    size = sum(len(each.content) for each in media)
    if size > _MAX_MEDIA_BYTES:
        message = f"at most {_MAX_MEDIA_BYTES} bytes in all images and sounds, got {size}"
        raise invalid("chat.messages", message, "string_above_max_length")


def _message(field: str, message: pb.ChatMessage, card: EngineCard, called: set[str]) -> ChatMessage:
    """`called` are the ids of the calls so far, to which this message's are added."""
    if message.role not in _ROLES:
        raise invalid(f"{field}.role", f"one of {', '.join(sorted(_ROLES))}")
    check_text(f"{field}.name", message.name, _MAX_NAME_CHARACTERS)
    if message.parts and message.content:
        raise invalid(f"{field}.parts", "not together with content")
    if message.reasoning and message.role != "assistant":
        raise invalid(f"{field}.reasoning", "only the assistant's messages have it")
    tool_calls = _tool_calls(field, message)
    called.update(call.id for call in tool_calls)
    _check_answer(f"{field}.tool_call_id", message, called)
    return ChatMessage(
        role=message.role,
        content=message.content,
        name=message.name,
        parts=_parts(f"{field}.parts", message.parts, card),
        tool_calls=tool_calls,
        tool_call_id=message.tool_call_id,
        reasoning=message.reasoning,
    )


def _tool_calls(field: str, message: pb.ChatMessage) -> tuple[ToolCall, ...]:
    if message.tool_calls and message.role != "assistant":
        raise invalid(f"{field}.tool_calls", "only the assistant's messages have them")
    check_count(f"{field}.tool_calls", message.tool_calls, _MAX_TOOLS, "calls")
    calls = []
    for index, call in enumerate(message.tool_calls):
        each = f"{field}.tool_calls[{index}]"
        check_text(f"{each}.id", call.id, _MAX_NAME_CHARACTERS, least=1)
        _check_tool_name(f"{each}.name", call.name)
        json_object(f"{each}.arguments_json", call.arguments_json or "{}", MAX_SCHEMA_BYTES)
        calls.append(ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json or "{}"))
    return tuple(calls)


def _check_answer(field: str, message: pb.ChatMessage, called: set[str]) -> None:
    if not message.tool_call_id:
        return
    if message.role != "tool":
        raise invalid(field, 'only "tool" messages have it')
    check_text(field, message.tool_call_id, _MAX_NAME_CHARACTERS)
    if message.tool_call_id not in called:
        raise invalid(field, "no message before it has a call of this id")


def _parts(field: str, parts: Sequence[pb.ContentPart], card: EngineCard) -> tuple[str | Media, ...]:
    check_count(field, parts, _MAX_PARTS, "parts")
    return tuple(_part(f"{field}[{index}]", part, card) for index, part in enumerate(parts))


def _part(field: str, part: pb.ContentPart, card: EngineCard) -> str | Media:
    match part.WhichOneof("content"):
        case "text":
            return part.text
        case "image":
            return _media(f"{field}.image", part.image, "image", Capability.IMAGES, card)
        case "audio":
            return _media(f"{field}.audio", part.audio, "audio", Capability.AUDIO, card)
        case _:
            raise invalid(field, "one of text, image and audio is required", "missing_required_parameter")


def _media(field: str, media: pb.Media, kind: Literal["image", "audio"], needs: Capability, card: EngineCard) -> Media:
    if needs not in card.capabilities:
        raise MeshError(Reason.UNIMPLEMENTED, f"{field}: the model {card.model!r} takes no {kind}", field=field)
    check_text(f"{field}.mime_type", media.mime_type, _MAX_NAME_CHARACTERS)
    if not media.mime_type.startswith(f"{kind}/"):
        raise invalid(f"{field}.mime_type", f'must begin with "{kind}/"')
    if not media.content:
        raise invalid(f"{field}.content", "must not be empty")
    if len(media.content) > _MAX_MEDIA_BYTES:
        raise invalid(f"{field}.content", f"at most {_MAX_MEDIA_BYTES} bytes", "string_above_max_length")
    return Media(kind=kind, mime_type=media.mime_type, content=media.content)


def _tools(chat: pb.ChatPrompt, card: EngineCard) -> tuple[Tool, ...]:
    wanted = chat.tool_choice.mode != pb.TOOL_CHOICE_MODE_NONE
    if chat.tools and wanted and Capability.TOOLS not in card.capabilities:
        message = f"chat.tools: nothing reads calls of functions here: {card.model!r} has no setting tool_call_parser"
        raise MeshError(Reason.UNIMPLEMENTED, message, field="chat.tools")
    check_count("chat.tools", chat.tools, _MAX_TOOLS, "functions")
    names: set[str] = set()
    for index, tool in enumerate(chat.tools):
        field = f"chat.tools[{index}]"
        _check_tool_name(f"{field}.name", tool.name)
        if tool.name in names:
            raise invalid(f"{field}.name", f"{tool.name} is there twice")
        names.add(tool.name)
        check_text(f"{field}.description", tool.description, _MAX_DESCRIPTION_CHARACTERS)
        if tool.parameters_json:
            json_object(f"{field}.parameters_json", tool.parameters_json, MAX_SCHEMA_BYTES)
    return tuple(
        Tool(name=tool.name, description=tool.description, parameters_json=tool.parameters_json, strict=tool.strict)
        for tool in chat.tools
    )


def _check_tool_name(field: str, name: str) -> None:
    if not _TOOL_NAME.fullmatch(name):
        raise invalid(field, 'one to 64 letters, digits, "_" and "-"')


def _tool_choice(chat: pb.ChatPrompt, tools: Sequence[Tool]) -> tuple[_Choice, str]:
    choice = _CHOICES.get(chat.tool_choice.mode)
    if choice is None:
        raise invalid("chat.tool_choice.mode", "must be one of ToolChoiceMode")
    name = chat.tool_choice.function_name
    if choice != "function":
        if name:
            raise invalid("chat.tool_choice.function_name", "only with TOOL_CHOICE_MODE_FUNCTION")
        if choice == "required" and not tools:
            raise invalid("chat.tool_choice.mode", "there are no tools to call")
    elif name not in {tool.name for tool in tools}:
        raise invalid("chat.tool_choice.function_name", "must be the name of one of the tools")
    return choice, name


def _template_arguments(text: str) -> Mapping[str, object]:
    if not text:
        return {}
    field = "chat.template_arguments_json"
    arguments = json_object(field, text, _MAX_TEMPLATE_ARGUMENTS_BYTES)
    for name in arguments:
        if name in _NOT_FOR_CLIENTS or not _IDENTIFIER.fullmatch(name):
            raise invalid(field, f"{name[:64]!r} can't be given")
    return arguments
