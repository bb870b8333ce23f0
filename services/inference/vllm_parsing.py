"""How a model's output in a chat is read: by which of vLLM's own parsers, and what it is held to so that they can.

What reads it then, token by token, is in vllm_reader.py.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.mistral import is_mistral_tokenizer, is_mistral_tool_parser

from services.common.config import ConfigError
from services.common.errors import MeshError, Reason
from services.common.settings_worker import ModelSettings
from services.inference.engine import Capability
from services.inference.request import ChatMessage, Generation, StructuredOutput
from services.inference.vllm_conversation import tool_to_openai
from services.inference.vllm_params import Plan
from services.inference.vllm_reader import Reader
from services.inference.vllm_strict_calls import strict_grammar

__all__ = ["Parsing", "Reading"]

_NOT_STRICT: Final = "can't be held to its schema with this model while the model may choose; leave strict out"


class Parsing:
    """The parsers of one model."""

    def __init__(self, settings: ModelSettings, llm: Any) -> None:
        """`llm` is vLLM's.

        Raises:
            ConfigError: vLLM has no parser of that name, or it can't be used with the model.
        """
        tools, reasoning = settings.tool_call_parser, settings.reasoning_parser
        _check_known("tool_call_parser", tools, ToolParserManager.list_registered())
        _check_known("reasoning_parser", reasoning, ReasoningParserManager.list_registered())
        self._tokenizer = llm.renderer.get_tokenizer()
        self._model_config = llm.model_config
        try:
            self._parser: Any = ParserManager.get_parser(
                tool_parser_name=tools,
                reasoning_parser_name=reasoning,
                enable_auto_tools=tools is not None,
                model_name=llm.model_config.model,
                is_harmony=llm.model_config.hf_config.model_type == "gpt_oss",
                tokenizer=self._tokenizer,
            )
        except TypeError as error:
            raise ConfigError(
                f"model.tool_call_parser {tools!r} and model.reasoning_parser {reasoning!r}: {error}"
            ) from error
        tool_parser = self._parser.tool_parser_cls
        self._tag_model: str | None = tool_parser.structural_tag_model if tool_parser is not None else None
        # Such parsers read markup of calls even where there are no tools.
        self._reads_all = bool(reasoning) or self._parser(self._tokenizer)._engine_based

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What a model can do for having them."""
        tools = {Capability.TOOLS} if self._parser.tool_parser_cls is not None else set()
        return frozenset(tools | ({Capability.REASONING} if self.has_reasoning else set()))

    @property
    def has_reasoning(self) -> bool:
        """Whether thinking is told from the answer."""
        return self._parser.reasoning_parser_cls is not None

    def reading(self, generation: Generation) -> "Reading | None":
        """How the output of a generation is to be read; None where it is text and no more.

        Raises:
            MeshError: INVALID_REQUEST, a function can't be called as it is asked for.
        """
        chat = generation.chat
        if generation.kind != "chat" or not (chat.tools or self._reads_all):
            return None
        request = _request(generation)
        arguments = dict(chat.template_arguments)
        parser = self._make(request, arguments)
        if self._adjusts(request):
            try:
                request = parser.adjust_request(request=request)
            except ValueError as error:
                raise MeshError(Reason.INVALID_REQUEST, f"chat.tools: {error}", field="chat.tools") from error
        return Reading(self, generation, request, arguments, form=self._form(generation, request))

    def _adjusts(self, request: Any) -> bool:
        # As vLLM's renderer decides it.
        parser, tool_parser = self._parser, self._parser.tool_parser_cls
        grammatical = (
            tool_parser is not None
            and is_mistral_tool_parser(tool_parser)
            and is_mistral_tokenizer(self._tokenizer)
            and self._tokenizer.supports_grammar
        )
        return bool(
            parser.always_adjust_request
            or parser.reasoning_parser_cls is not None
            or request.tool_choice != "none"
            or grammatical
        )

    def _form(self, generation: Generation, request: Any) -> StructuredOutput | None:
        form = _form_of(request)
        if form is not None or generation.structured_output is not None:
            return form
        chat = generation.chat
        strict = [index for index, tool in enumerate(chat.tools) if tool.strict]
        if not strict or chat.tool_choice != "auto":
            return None
        grammar = strict_grammar(self._tag_model, request.tools, self._tokenizer)
        if grammar is None:
            field = f"chat.tools[{strict[0]}].strict"
            raise MeshError(Reason.INVALID_REQUEST, f"{field}: {_NOT_STRICT}", field=field)
        return StructuredOutput(kind="grammar", value=grammar)

    def _make(self, request: Any, template_arguments: dict[str, object]) -> Any:
        return self._parser(
            self._tokenizer,
            request.tools,
            chat_template_kwargs=template_arguments,
            model_config=self._model_config,
        )

    def reader(self, reading: "Reading", plan: Plan) -> Reader:
        """What reads one choice of the output, from where the tokens emitted so far have got it to."""
        return Reader(self._make(reading.request, reading.template_arguments), reading, plan, self._tokenizer)


class Reading:
    """How the output of one generation is read."""

    def __init__(
        self,
        parsing: Parsing,
        generation: Generation,
        request: Any,
        template_arguments: dict[str, object],
        *,
        form: StructuredOutput | None,
    ) -> None:
        self._parsing = parsing
        self.request = request
        """vLLM's ChatCompletionRequest."""
        self.template_arguments = template_arguments
        self.form = form
        """What the output has to be held to for the calls; None: nothing beyond what was asked for."""
        self.is_named = generation.chat.tool_choice == "function"
        self.is_single = generation.chat.single_tool_call
        self._has_form = form is not None or generation.structured_output is not None

    def apply(self, generation: Generation) -> Generation:
        """The generation with what reading it needs."""
        # A call that must be made leaves no room for another form, as in vLLM.
        form = self.form or generation.structured_output
        keep = generation.sampling.keep_special_tokens or not self.request.skip_special_tokens
        sampling = replace(generation.sampling, keep_special_tokens=keep)
        return replace(generation, structured_output=form, sampling=sampling)

    def engine_arguments(self, prompt: Sequence[int]) -> dict[str, Any]:
        """What vLLM's engine is told, so that a form begins after the thinking."""
        parser = self._parsing._make(self.request, self.template_arguments)
        if not self._has_form or parser.reasoning_parser is None:
            return {}
        return {
            "reasoning_ended": self.request.resolve_reasoning_ended(parser, list(prompt)),
            "reasoning_parser_kwargs": {"chat_template_kwargs": self.template_arguments},
        }

    def reader(self, plan: Plan) -> Reader:
        """What reads one choice."""
        return self._parsing.reader(self, plan)


def _check_known(key: str, name: str | None, known: Iterable[str]) -> None:
    if name is not None and name not in known:
        raise ConfigError(f"model.{key}: vLLM has no {name!r}; it has {', '.join(known)}")


def _request(generation: Generation) -> Any:
    """What vLLM's parsers read of a request."""
    chat = generation.chat
    choice: Any = chat.tool_choice
    if choice == "function":
        choice = {"type": "function", "function": {"name": chat.function_name}}
    said: dict[str, Any] = {
        "messages": list(_calls_so_far(generation.prompt)),
        "stream": True,
        "chat_template_kwargs": dict(chat.template_arguments),
        "parallel_tool_calls": not chat.single_tool_call,
        "skip_special_tokens": not generation.sampling.keep_special_tokens,
    }
    if chat.tools:
        said |= {"tools": [tool_to_openai(tool) for tool in chat.tools], "tool_choice": choice}
    return ChatCompletionRequest.model_validate(said)


def _calls_so_far(prompt: Any) -> Iterable[dict[str, Any]]:
    # Some parsers number calls through a conversation.
    for message in prompt:
        if isinstance(message, ChatMessage) and message.tool_calls:
            calls = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}}
                for call in message.tool_calls
            ]
            yield {"role": "assistant", "tool_calls": calls}


def _form_of(request: Any) -> StructuredOutput | None:
    """What vLLM's parsers want the output held to."""
    params = request.structured_outputs
    if params is None:
        return None
    kinds: dict[str, Literal["json_schema", "regex", "grammar"]] = {
        "json": "json_schema", "regex": "regex", "grammar": "grammar",
    }  # fmt: skip  # a table
    for name, kind in kinds.items():
        if (value := getattr(params, name)) is not None:
            return StructuredOutput(kind=kind, value=value if isinstance(value, str) else json.dumps(value))
    message = "this model's parser wants what the worker can't hold an output to"
    raise MeshError(Reason.UNIMPLEMENTED, f"chat.tool_choice: {message}", field="chat.tool_choice")
