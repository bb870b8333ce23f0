"""Responses requests as chat requests: a conversation of items as one of messages."""

import re
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from services.common.errors import MeshError
from services.gateway import schema_chat as chat
from services.gateway.decoding import invalid, is_given
from services.gateway.schema import JsonSchemaFormat, ResponseFormat, SampledRequest
from services.gateway.schema_responses import (
    CalledItem,
    FunctionTool,
    InputImage,
    InputText,
    Item,
    Message,
    NamedFunctionChoice,
    OutputItem,
    OutputText,
    ReasoningItem,
    ResponsesRequest,
    items_of,
)

__all__ = ["chat_request", "in_response_terms", "input_items"]

# Items are not numbered as the messages are that they become.
_NAMES: Final = [
    (re.compile(pattern), theirs)
    for pattern, theirs in (
        (r"^messages\b.*", "input"),
        (r"^max_tokens$", "max_output_tokens"),
        (r"^response_format\b.*", "text.format"),
        (r"^(tools\[\d+\]|tool_choice)\.function\b", r"\1"),
        (r"^logprobs$", "include"),
    )
]


def input_items(request: ResponsesRequest) -> list[Item]:
    """The items of a request's input.

    Raises:
        MeshError: INVALID_REQUEST.
    """
    if isinstance(request.input, str):
        return [Message(role="user", content=request.input)]
    return items_of(request.input)


def chat_request(request: ResponsesRequest, items: Sequence[Item]) -> chat.ChatRequest:
    """The chat request that asks for the same; `items` are the whole conversation, earlier turns included.

    Raises:
        MeshError: INVALID_REQUEST.
    """
    messages: list[chat.Message] = []
    if request.instructions:
        messages.append(chat.SystemMessage(content=request.instructions))
    messages += _messages(items)
    if not messages:
        raise invalid("input", "input: must not be empty", "empty_array")
    wants_scores = request.top_logprobs is not None or "message.output_text.logprobs" in (request.include or ())
    asked = chat.ChatRequest(
        **{name: getattr(request, name) for name in SampledRequest.__struct_fields__},
        messages=messages,
        max_tokens=request.max_output_tokens,
        tools=[_tool(tool) for tool in request.tools or ()] or None,
        tool_choice=_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls if request.tools else None,
        response_format=_format(request),
        reasoning_effort=request.reasoning.effort if request.reasoning else None,
        logprobs=wants_scores or None,
        top_logprobs=request.top_logprobs,
        chat_template_kwargs=request.chat_template_kwargs,
    )
    try:
        asked.check()
    except MeshError as error:
        raise in_response_terms(error) from None
    return asked


def in_response_terms(error: MeshError) -> MeshError:
    """An error of a chat request for a client that sent this API's."""
    return error.renamed(_response_name)


def _response_name(name: str) -> str:
    for pattern, theirs in _NAMES:
        name = pattern.sub(theirs, name)
    return name


def _messages(items: Iterable[Item]) -> list[chat.Message]:
    messages: list[chat.Message] = []
    turn: chat.AssistantMessage | None = None
    for item in items:
        part = _assistant_part(item)
        if part is None:
            turn = None
            messages.append(_other(item))
        elif turn is not None and not (part.content and (turn.content or turn.tool_calls)):
            # What an assistant thinks, says and calls in one turn is one message to a chat template.
            turn.reasoning = (turn.reasoning or "") + (part.reasoning or "") or None
            turn.content = turn.content or part.content
            turn.tool_calls = [*(turn.tool_calls or ()), *(part.tool_calls or ())] or None
        else:
            turn = part
            messages.append(turn)
    return [message for message in messages if not _is_empty(message)]


def _assistant_part(item: Item) -> chat.AssistantMessage | None:
    match item:
        case ReasoningItem():
            thoughts = item.content if item.content is not None else item.summary
            return chat.AssistantMessage(reasoning="".join(thought.text for thought in thoughts) or None)
        case CalledItem():
            function = chat.CalledFunction(name=item.name, arguments=item.arguments)
            return chat.AssistantMessage(tool_calls=[chat.ToolCall(id=item.call_id, function=function)])
        case Message(role="assistant"):
            return chat.AssistantMessage(content=_text(item))
    return None


def _other(item: Item) -> chat.Message:
    if isinstance(item, OutputItem):
        text = item.output if isinstance(item.output, str) else "".join(part.text for part in item.output)
        return chat.ToolMessage(tool_call_id=item.call_id, content=text)
    assert isinstance(item, Message)
    if item.role == "user":
        return chat.UserMessage(content=_user_content(item))
    kind = chat.SystemMessage if item.role == "system" else chat.DeveloperMessage
    return kind(content=_text(item))


def _is_empty(message: chat.Message) -> bool:
    # Thoughts that nothing followed.
    return isinstance(message, chat.AssistantMessage) and message.content is None and not message.tool_calls


def _text(item: Message) -> str:
    if isinstance(item.content, str):
        return item.content
    if any(isinstance(part, InputImage) for part in item.content):
        raise invalid("input", f"input: a message of the role {item.role!r} can't have images")
    return "".join(
        part.text if isinstance(part, InputText | OutputText) else part.refusal
        for part in item.content
        if not isinstance(part, InputImage)
    )


def _user_content(item: Message) -> str | list[chat.TextPart | chat.ImagePart | chat.AudioPart]:
    if isinstance(item.content, str):
        return item.content
    parts: list[chat.TextPart | chat.ImagePart | chat.AudioPart] = []
    for part in item.content:
        if isinstance(part, InputImage):
            parts.append(chat.ImagePart(image_url=chat.ImageUrl(url=part.image_url, detail=part.detail)))
        else:
            text = part.text if isinstance(part, InputText | OutputText) else part.refusal
            parts.append(chat.TextPart(text=text))
    return parts


def _tool(tool: FunctionTool) -> chat.Tool:
    return chat.Tool(
        type="function",
        function=chat.Function(
            name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
        ),
    )


def _choice(choice: object) -> chat.ToolChoice:
    if isinstance(choice, NamedFunctionChoice):
        return chat.NamedTool(type="function", function=chat.NamedFunction(name=choice.name))
    if choice == "auto":
        # The default of this API, where chat's needs tools.
        return None
    assert choice in ("none", "required", None)
    return choice


def _format(request: ResponsesRequest) -> ResponseFormat | None:
    form = request.text.format if request.text else None
    if form is None:
        return None
    schema = None
    if form.type == "json_schema" and form.name is not None and is_given(form.schema):
        schema = JsonSchemaFormat(
            name=form.name, schema=msgspec.Raw(bytes(form.schema)), strict=form.strict, description=form.description
        )
    return ResponseFormat(type=form.type, json_schema=schema)
