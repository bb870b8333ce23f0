"""A generation as a server with OpenAI's API is asked for it; what it does not take is refused by name."""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from services.common.errors import MeshError, Reason
from services.inference.checks import invalid
from services.inference.openai_flavours import Flavour
from services.inference.request import ChatMessage, ChatOptions, Generation, Media, Sampling, StructuredOutput, Tool

__all__ = ["Call", "check_possible", "continued", "message_to_openai", "request_of", "tool_to_openai"]

_DEFAULTS: Final = Sampling()
# Where a server has defaults of its own, ours are only kept by saying them.
_ALWAYS: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_FIELDS: Final = (
    *_ALWAYS, "presence_penalty", "frequency_penalty", "max_tokens", "min_tokens", "stop", "stop_token_ids", "seed",
    "ignore_eos", "logit_bias", "logprob_count", "prompt_logprob_count", "bad_words", "allowed_token_ids",
    "keep_special_tokens", "include_stop_string",
)  # fmt: skip  # a table
_SEED_BITS: Final[Mapping[str, int]] = {
    "vllm": (1 << 62) - 1,
    "llama_cpp": (1 << 31) - 1,
    "llama_cpp_python": (1 << 31) - 1,
}
_AUDIO_FORMATS: Final[Mapping[str, str]] = {"audio/wav": "wav", "audio/x-wav": "wav", "audio/mpeg": "mp3"}


# They have had their effect on a prompt that is tokens already.
_OF_WHOLE_PROMPTS: Final = frozenset(
    {
        "messages", "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "add_generation_prompt",
        "continue_final_message", "truncate_prompt_tokens", "truncation_side", "add_special_tokens",
    }
)  # fmt: skip  # a table


class Call(NamedTuple):
    """What is sent where."""

    path: str
    """Below the server's base URL."""
    body: dict[str, Any]


def request_of(generation: Generation, flavour: Flavour, model: str) -> Call:
    """What a server is asked for; `model` is the model's name there.

    Raises:
        MeshError: UNIMPLEMENTED, with the field that it does not take.
    """
    check_possible(generation, flavour)
    body: dict[str, Any] = {"model": model, "stream": True, **_stream_options(flavour)}
    chat = generation.kind == "chat"
    body |= _sampling(generation, flavour, chat=chat)
    if generation.choices > 1:
        body["n"] = generation.choices
    if generation.salt and "cache_salt" in flavour.parameters:
        # A server that knows none shares its cache as it likes: only who asks for a salt is refused.
        body[flavour.parameters["cache_salt"]] = generation.salt
    if generation.prompt_token_limit is not None:
        body[flavour.parameters["prompt_token_limit"]] = generation.prompt_token_limit
        body["truncation_side"] = "left"
    if generation.structured_output is not None:
        body |= _form(generation.structured_output, flavour, chat=chat)
    if chat:
        return Call("/chat/completions", body | _conversation(generation, flavour))
    prompt = generation.prompt
    body["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
    if not generation.add_special_tokens:
        body["add_special_tokens"] = False
    return Call("/completions", body)


def continued(generation: Generation, prompt: Sequence[int], said: Sequence[int], flavour: Flavour, model: str) -> Call:
    """The same for a generation that goes on after `prompt` and the output tokens `said`."""
    call = request_of(generation, flavour, model)
    body = {name: value for name, value in call.body.items() if name not in _OF_WHOLE_PROMPTS}
    body["prompt"] = [*prompt, *said]
    if generation.sampling.max_tokens is not None:
        body["max_tokens"] = generation.sampling.max_tokens - len(said)
    if "min_tokens" in body:
        body["min_tokens"] = max(0, generation.sampling.min_tokens - len(said))
    return Call("/completions", body)


def check_possible(generation: Generation, flavour: Flavour) -> None:
    """Raises MeshError (UNIMPLEMENTED) with the first field that the server does not take."""
    for field, asked in _asked(generation, flavour):
        if asked:
            message = f"{field}: the server behind this worker doesn't take it"
            raise MeshError(Reason.UNIMPLEMENTED, message, field=field)
    open_end = generation.kind != "chat" and generation.sampling.max_tokens is None and not flavour.open_ended
    if open_end:
        message = "is required: the server behind this worker has a bound of its own, which is not known"
        raise invalid("sampling.max_tokens", message, "missing_required_parameter")


def _asked(generation: Generation, flavour: Flavour) -> list[tuple[str, bool]]:
    """Every field that the server may not take, and whether it is asked for."""
    known, sampling, options = flavour.parameters, generation.sampling, generation.chat
    form, forms = generation.structured_output, _forms(generation, flavour)
    vllm = flavour.has_tokenizer
    renders_otherwise = options.generation_prompt == options.continue_final_message or options.continue_final_message
    asked = [
        (f"sampling.{name}", name not in known and getattr(sampling, name) != getattr(_DEFAULTS, name))
        for name in _FIELDS
        if not (vllm and name == "keep_special_tokens")
    ]
    return [
        *asked,
        ("choice_count", generation.choices > 1 and not flavour.choices),
        ("cache_salt", bool(generation.cache_salt) and "cache_salt" not in known),
        ("prompt_token_limit", generation.prompt_token_limit is not None and "prompt_token_limit" not in known),
        ("without_special_tokens", not generation.add_special_tokens and not vllm),
        ("token_ids", generation.kind == "tokens" and not flavour.token_prompts),
        ("echo", generation.echo and generation.kind == "tokens" and not vllm),
        ("structured_output", form is not None and form.kind not in forms),
        ("chat.template_arguments_json", bool(options.template_arguments) and "template_arguments" not in known),
        ("chat.continue_final_message", renders_otherwise and options.continue_final_message and not vllm),
        ("chat.without_generation_prompt", not options.generation_prompt and not vllm),
    ]


def _forms(generation: Generation, flavour: Flavour) -> Any:
    return flavour.chat_forms if generation.kind == "chat" else flavour.text_forms


def _stream_options(flavour: Flavour) -> dict[str, Any]:
    if flavour.token_ids:
        # Which tells how long the prompt is with the first token.
        options = {"include_usage": True, "continuous_usage_stats": True}
        return {"stream_options": options, "return_token_ids": True}
    return {"stream_options": {"include_usage": True}}


def _sampling(generation: Generation, flavour: Flavour, *, chat: bool) -> dict[str, Any]:
    sampling, names = generation.sampling, flavour.parameters
    body: dict[str, Any] = {names[field]: getattr(sampling, field) for field in _ALWAYS if field in names}
    for field in _FIELDS:
        value = getattr(sampling, field)
        if field in names and field not in (*_ALWAYS, "logprob_count") and value != getattr(_DEFAULTS, field):
            body[names[field]] = _plain(field, value, flavour)
    if "max_tokens" not in body and flavour.open_ended:
        body["max_tokens"] = None
    if sampling.keep_special_tokens:
        body["skip_special_tokens"] = False
    if sampling.logprob_count is not None:
        body |= (
            {"logprobs": True, "top_logprobs": sampling.logprob_count} if chat else {"logprobs": sampling.logprob_count}
        )
    return body


def _plain(field: str, value: Any, flavour: Flavour) -> Any:
    if field == "seed":
        return value & _SEED_BITS[flavour.name] if flavour.name in _SEED_BITS else value
    if field == "logit_bias":
        return {str(token_id): bias for token_id, bias in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _form(form: StructuredOutput, flavour: Flavour, *, chat: bool) -> dict[str, Any]:
    match form.kind:
        case "json_object":
            return {"response_format": {"type": "json_object"}}
        case "json_schema":
            schema = json.loads(form.value)
            if flavour.name == "llama_cpp" and not chat:
                return {"json_schema": schema}
            if flavour.name == "llama_cpp_python":
                return {"response_format": {"type": "json_object", "schema": schema}}
            named = {"name": "output", "schema": schema, "strict": True}
            return {"response_format": {"type": "json_schema", "json_schema": named}}
        case "choice":
            return {"structured_outputs": {"choice": list(form.choices)}}
        case _:
            return {"structured_outputs": {form.kind: form.value}}


def _conversation(generation: Generation, flavour: Flavour) -> dict[str, Any]:
    options = generation.chat
    messages = [message_to_openai(each) for each in generation.prompt if isinstance(each, ChatMessage)]
    body: dict[str, Any] = {"messages": messages}
    if options.tools:
        body |= _tools(options)
    if options.template_arguments:
        body[_chat_name(flavour)] = dict(options.template_arguments)
    if not options.generation_prompt:
        body["add_generation_prompt"] = False
    if options.continue_final_message:
        body["continue_final_message"] = True
    return body


def _chat_name(flavour: Flavour) -> str:
    return flavour.parameters["template_arguments"]


def _tools(options: ChatOptions) -> dict[str, Any]:
    choice: Any = options.tool_choice
    if choice == "function":
        choice = {"type": "function", "function": {"name": options.function_name}}
    body = {"tools": list(map(tool_to_openai, options.tools)), "tool_choice": choice}
    return body | {"parallel_tool_calls": False} if options.single_tool_call else body


def tool_to_openai(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters_json:
        function["parameters"] = json.loads(tool.parameters_json)
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def message_to_openai(message: ChatMessage) -> dict[str, Any]:
    """A message as OpenAI's API has it, with thinking as vLLM and others have it."""
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.parts:
        said["content"] = list(map(_part, message.parts))
    if message.name:
        said["name"] = message.name
    if message.reasoning:
        said["reasoning"] = message.reasoning
    if message.tool_call_id:
        said["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        said["content"] = said["content"] or None
        said["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}}
            for call in message.tool_calls
        ]
    return said


def _part(part: str | Media) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    data = base64.b64encode(part.content).decode()
    if part.kind == "image":
        return {"type": "image_url", "image_url": {"url": f"data:{part.mime_type};base64,{data}"}}
    sound = _AUDIO_FORMATS.get(part.mime_type)
    if sound is None:
        raise invalid("chat.messages", f"sound is taken as {' and '.join(sorted(_AUDIO_FORMATS))}")
    return {"type": "input_audio", "input_audio": {"data": data, "format": sound}}
