"""What a model writes in a chat, told apart into thinking, answer and function calls, by vLLM's own parsers.

They are what `vllm serve` uses, and are fed as it feeds them, but a token at a time: so how far a parser is depends on
the tokens alone, and a generation that goes on elsewhere goes on exactly there.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.tool_parsers.structural_tag_registry import get_model_structural_tag
from vllm.tool_parsers.tool_strict_level import ToolStrictLevel
from vllm.utils.mistral import is_mistral_tokenizer, is_mistral_tool_parser

from services.common.config import ConfigError
from services.common.errors import MeshError, Reason
from services.common.settings_worker import ModelSettings
from services.inference.engine import Capability
from services.inference.output import Delta, ToolCallDelta
from services.inference.request import ChatMessage, Generation, StructuredOutput
from services.inference.vllm_conversation import tool_to_openai
from services.inference.vllm_params import Plan
from services.inference.vllm_replay import Replay

__all__ = ["Parsing", "Reader", "Reading"]

_LARK_TOKEN: Final = re.compile(r"<[^<>\s]+>")
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
        grammar = self._strict_grammar(request)
        if grammar is None:
            field = f"chat.tools[{strict[0]}].strict"
            raise MeshError(Reason.INVALID_REQUEST, f"{field}: {_NOT_STRICT}", field=field)
        return StructuredOutput(kind="grammar", value=grammar)

    def _strict_grammar(self, request: Any) -> str | None:
        """Any text, in which what begins like a call is one that fits; None where it can't be said."""
        if self._tag_model is None:
            return None
        tag = get_model_structural_tag(
            model=self._tag_model,
            tools=request.tools,
            tool_choice="auto",
            reasoning=False,
            strict_level=ToolStrictLevel.AUTO,
        )
        said = tag.format.model_dump() if tag is not None else {}
        return None if said.get("type") != "triggered_tags" else _lark(said, self._tokenizer)

    def _make(self, request: Any, template_arguments: dict[str, object]) -> Any:
        return self._parser(
            self._tokenizer,
            request.tools,
            chat_template_kwargs=template_arguments,
            model_config=self._model_config,
        )

    def reader(self, reading: "Reading", plan: Plan) -> "Reader":
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

    def reader(self, plan: Plan) -> "Reader":
        """What reads one choice."""
        return self._parsing.reader(self, plan)


@dataclass(slots=True)
class _Piece:
    """What some tokens brought."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCallDelta] | None = None

    def add(self, message: Any, *, is_single: bool) -> None:
        """Takes in what vLLM's parser says of one more token."""
        if message is None:
            return
        self.text += message.content or ""
        self.reasoning += message.reasoning or ""
        for call in message.tool_calls or ():
            if not (is_single and call.index):
                self._add_call(call)

    def _add_call(self, call: Any) -> None:
        function = call.function
        name, arguments = (function.name, function.arguments) if function is not None else (None, None)
        new = ToolCallDelta(index=call.index, id=call.id or "", name=name or "", arguments_json=arguments or "")
        if self.calls is None:
            self.calls = []
        last = self.calls[-1] if self.calls else None
        if last is not None and last.index == new.index and not new.id and not new.name:
            self.calls[-1] = replace(last, arguments_json=last.arguments_json + new.arguments_json)
        else:
            self.calls.append(new)


class Reader:
    """Reads one choice of an output. Its text is made here too, a token at a time."""

    def __init__(self, parser: Any, reading: Reading, plan: Plan, tokenizer: Any) -> None:
        """Goes through the emitted tokens of `plan`; the client has all that they brought."""
        self._parser = parser
        self._reading = reading
        self._prompt = list(plan.prompt_token_ids)
        self._replay = Replay(tokenizer, replace(plan, emitted_token_ids=()))
        self._token_ids: list[int] = []
        self._calls = False
        self.feed(plan.emitted_token_ids, None)

    @property
    def stop_string(self) -> str | None:
        """What ended the output, if that was a stop string."""
        return self._replay.stop_string

    @property
    def reasoning_tokens(self) -> int:
        """How many tokens so far were thinking, as vLLM counts them."""
        counted: int = self._parser.count_reasoning_tokens(tuple(self._token_ids))
        return counted

    def feed(self, token_ids: Sequence[int], reason: str | None) -> tuple[Delta, str | None]:
        """What new tokens bring, and why the output ended, if it did: vLLM's reasons, and "tool_calls"."""
        piece, taken = _Piece(), len(self._token_ids)
        for index, token_id in enumerate(token_ids):
            last = index + 1 == len(token_ids)
            ended = self._step([token_id], reason if last else None, piece)
            if ended is not None:
                return self._delta(piece, taken), self._reason(ended)
        if not token_ids and reason is not None:
            reason = self._step([], reason, piece)
        return self._delta(piece, taken), None if reason is None else self._reason(reason)

    def _step(self, token_ids: list[int], reason: str | None, piece: _Piece) -> str | None:
        text, counted, reason = self._replay.feed(token_ids, reason)
        self._token_ids += counted
        message = self._parser.parse_delta(
            text, list(counted), self._reading.request, self._prompt, finished=reason is not None
        )
        if message is not None and message.tool_calls:
            self._calls = True
        piece.add(message, is_single=self._reading.is_single)
        return reason

    def _delta(self, piece: _Piece, taken: int) -> Delta:
        return Delta(
            text=piece.text,
            reasoning=piece.reasoning,
            tool_calls=piece.calls or (),
            token_ids=self._token_ids[taken:],
        )

    def _reason(self, reason: str) -> str:
        # As vLLM's server streams it: a function that had to be called is no news.
        return "tool_calls" if reason == "stop" and self._calls and not self._reading.is_named else reason


def _lark(said: Mapping[str, Any], tokenizer: Any) -> str | None:
    """xgrammar's triggered tags in llguidance's notation; None where they hold more than text and JSON."""
    # What is one token must be said to be one, and only then can it not be a part of any text.
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    if any(trigger not in added or not _LARK_TOKEN.fullmatch(trigger) for trigger in said["triggers"]):
        return None
    cut = re.compile("(" + "|".join(map(re.escape, filter(_LARK_TOKEN.fullmatch, added))) + ")")

    def literal(text: str) -> str:
        pieces = enumerate(cut.split(text))
        return " ".join(piece if index % 2 else json.dumps(piece) for index, piece in pieces if piece)

    rules = []
    for tag in said["tags"]:
        content = tag["content"]
        if (content["type"], content.get("style")) != ("json_schema", "json"):
            return None
        schema = {} if content["json_schema"] is True else content["json_schema"]
        rules.append(f"TEXT {literal(tag['begin'])} %json {json.dumps(schema)} {literal(tag['end'])}")
    names = [f"call_{index}" for index in range(len(rules))]
    lines = ["%llguidance {}", f"start: ({' | '.join(names)})* TEXT", "TEXT: /(.|\\n)*/"]
    return "\n".join([*lines, *(f"{name}: {rule}" for name, rule in zip(names, rules, strict=True))]) + "\n"


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
