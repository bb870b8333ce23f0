"""vLLM's own chat server over an engine of ours. Import it once the engine has started: it imports vLLM."""

import json
from contextlib import contextmanager
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.renderers.online_renderer import OnlineRenderer

from services.common.settings_worker import ModelSettings
from services.inference.request import ChatMessage, Generation
from services.inference.vllm_conversation import tool_to_openai
from services.inference.vllm_engine import VllmEngine
from services.inference.vllm_parsing import Parsing
from tests.support.said import Said

__all__ = ["Stock", "parsing_of"]


class Stock:
    """vLLM's own chat server, over the same engine."""

    def __init__(self, engine: VllmEngine) -> None:
        self._llm = engine._life.backend.llm
        parsers: dict[str, Any] = {
            "enable_auto_tools": True,
            "tool_parser": "hermes",
            "reasoning_parser": "deepseek_r1",
        }
        common: dict[str, Any] = {
            "request_logger": None,
            "chat_template": None,
            "chat_template_content_format": "auto",
        }
        renderer = self._renderer = OnlineRenderer(self._llm.model_config, self._llm.renderer, **common, **parsers)
        models = OpenAIServingModels(self._llm, [BaseModelPath(name="demo", model_path="demo")])
        self._chat = OpenAIServingChat(self._llm, models, "assistant", online_renderer=renderer, **common, **parsers)

    async def ask(self, generation: Generation, *, stream: bool) -> tuple[Said, str, int]:
        """What it says to the same request, why it ended, and how many tokens were thinking."""
        body = self._body(generation) | {"stream": stream}
        with self._checking_forms():
            request = ChatCompletionRequest.model_validate(body)
            answer: Any = await self._chat.create_chat_completion(request)
            if stream:
                return await self._streamed(answer)
        assert hasattr(answer, "choices"), answer
        message, said = answer.choices[0].message, Said()
        calls = [
            (index, call.id, call.function.name, call.function.arguments)
            for index, call in enumerate(message.tool_calls)
        ]
        said.add(message.content or "", message.reasoning or "", calls)
        return said, answer.choices[0].finish_reason, answer.usage.completion_tokens_details.reasoning_tokens

    async def rendered(self, body: dict[str, Any]) -> list[int]:
        """The tokens of the prompt that it makes of a request."""
        _, (prompt,) = await self._renderer.render_chat(ChatCompletionRequest.model_validate(body))
        return list(prompt["prompt_token_ids"])

    @contextmanager
    def _checking_forms(self) -> Any:
        # We check them beforehand, elsewhere.
        processor = self._llm.input_processor
        processor.structured_outputs_config = self._llm.vllm_config.structured_outputs_config
        try:
            yield
        finally:
            processor.structured_outputs_config = None

    @staticmethod
    def _body(generation: Generation) -> dict[str, Any]:
        options, form = generation.chat, generation.structured_output
        choice: Any = options.tool_choice
        if choice == "function":
            choice = {"type": "function", "function": {"name": options.function_name}}
        body: dict[str, Any] = {
            "model": "demo",
            "messages": [_message(message) for message in generation.prompt],
            "temperature": 0,
            "max_tokens": generation.sampling.max_tokens,
            "stop": list(generation.sampling.stop),
            "parallel_tool_calls": not options.single_tool_call,
            "chat_template_kwargs": dict(options.template_arguments),
            "stream_options": None,
        }
        if options.tools:
            body |= {"tools": [tool_to_openai(tool) for tool in options.tools], "tool_choice": choice}
        if form is not None:
            body["structured_outputs"] = {"grammar": form.value}
        return body

    @staticmethod
    async def _streamed(answer: Any) -> tuple[Said, str, int]:
        said, reason = Said(), ""
        assert hasattr(answer, "__aiter__"), answer
        async for line in answer:
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    delta = choice["delta"]
                    calls = [
                        (
                            call["index"],
                            call.get("id") or "",
                            call["function"].get("name") or "",
                            call["function"].get("arguments") or "",
                        )
                        for call in delta.get("tool_calls") or ()
                    ]
                    said.add(delta.get("content") or "", delta.get("reasoning") or "", calls)
                    reason = choice.get("finish_reason") or reason
        return said, reason, -1


def parsing_of(engine: VllmEngine, **model: Any) -> Parsing:
    """The parsers of these settings, for the engine's model."""
    return Parsing(ModelSettings(name="demo", **model), engine._life.backend.llm)


def _message(message: Any) -> dict[str, Any]:
    assert isinstance(message, ChatMessage)
    return {"role": message.role, "content": message.content}
