"""LlamaIndex: `python -m tests.clients.llamaindex_client`."""

import gc
import time
from typing import Any, Literal

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

from tests.clients.loop import NAMED, QUESTION, Attempts, Target, refusal, serve

ASKED = [ChatMessage(role="user", content=QUESTION)]


class Weather(BaseModel):
    """What is asked for."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def get_weather(city: Literal["Paris", "Rome"], days: Literal[1, 2, 3]) -> str:
    """The weather somewhere."""
    return f"Sunny in {city} for {days} days."


TOOL = FunctionTool.from_defaults(get_weather)


def model(target: Target, **options: Any) -> OpenAILike:
    options = {"model": "demo", "max_tokens": 12, "temperature": 0, "max_retries": 0, **options}
    known = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 2048}
    return OpenAILike(api_base=target.base_url, **{"api_key": target.key, **known, **options})


def chat(target: Target) -> Any:
    answer = model(target).chat(ASKED)
    return {"text": answer.message.content, "finish": answer.raw.choices[0].finish_reason, "usage": _usage(answer.raw)}


def _usage(raw: Any) -> list[int]:
    return [raw.usage.prompt_tokens, raw.usage.completion_tokens]


def stream(target: Target) -> Any:
    options = {"additional_kwargs": {"stream_options": {"include_usage": True}}}
    chunks = list(model(target, **options).stream_chat(ASKED))
    finishes = [chunk.raw.choices[0].finish_reason for chunk in chunks if chunk.raw.choices]
    pieces = [chunk.delta for chunk in chunks if chunk.delta]
    return {"pieces": pieces, "finish": finishes[-1], "usage": _usage(chunks[-1].raw)}


def tools(target: Target) -> Any:
    asking = model(target, max_tokens=80)
    answers = list(asking.stream_chat_with_tools([TOOL], user_msg=QUESTION, tool_choice=NAMED))
    call = asking.get_tool_calls_from_response(answers[-1])[0]
    output = TOOL.call(**call.tool_kwargs)
    result = ChatMessage(role="tool", content=output.content, additional_kwargs={"tool_call_id": call.tool_id})
    after = model(target).chat([*ASKED, answers[-1].message, result])
    return {
        "name": call.tool_name,
        "arguments": call.tool_kwargs,
        "streamed": len(answers) > 1,
        "after": after.message.content,
    }


def structured(target: Target) -> Any:
    asking = model(target, max_tokens=80, should_use_structured_outputs=True)
    return asking.structured_predict(Weather, PromptTemplate(QUESTION)).model_dump()


def embeddings(target: Target) -> Any:
    embedder = OpenAILikeEmbedding(model_name="demo-embed", api_base=target.base_url, api_key=target.key, max_retries=0)
    return {"vectors": embedder.get_text_embedding_batch(["one", "two two", "three"])}


def _error(target: Target, text: str = QUESTION, *, streamed: bool = False, **options: Any) -> Any:
    said = [ChatMessage(role="user", content=text)]

    def asked() -> None:
        asking = model(target, **options)
        _ = list(asking.stream_chat(said)) if streamed else asking.chat(said)

    return refusal(asked)


def bad_key(target: Target) -> Any:
    return _error(target, api_key="tl-nobody")


def unknown_model(target: Target) -> Any:
    return _error(target, model="nothing")


def bad_field(target: Target) -> Any:
    # The library itself bounds the temperature.
    return _error(target, additional_kwargs={"temperature": 7})


def too_long(target: Target) -> Any:
    return _error(target, "word " * 5000)


def stream_error(target: Target) -> Any:
    return _error(target, streamed=True, additional_kwargs={"top_p": 3})


def _long(target: Target, **options: Any) -> Any:
    ignoring = {"additional_kwargs": {"extra_body": {"ignore_eos": True}}}
    return model(target, max_tokens=1900, **ignoring, **options).stream_chat(ASKED)


def _leave(running: list[Any]) -> None:
    """Ends the streams. The library's own notes on one hold on to its connection until they are collected."""
    while running:
        running.pop().close()
    gc.collect()


def busy(target: Target) -> Any:
    held = [_long(target, api_key=target.limited_key)]
    next(held[0])
    attempts = Attempts(lambda: _leave(held))
    options = {"api_key": target.limited_key, "max_retries": 4, "http_client": attempts.client()}
    model(target, **options).chat(ASKED)
    return attempts.saw()


def outage(target: Target) -> Any:
    attempts = Attempts()
    answer = model(target, max_retries=20, http_client=attempts.client()).chat(ASKED)
    return {**attempts.saw(), "text": answer.message.content}


def cancel(target: Target) -> Any:
    started, running = time.monotonic(), [_long(target)]
    pieces = [next(running[0]) for _ in range(5)]
    _leave(running)
    return {"pieces": len(pieces), "seconds": time.monotonic() - started}


def logprobs(target: Target) -> Any:
    answer = model(target, logprobs=True, top_logprobs=2).chat(ASKED)
    content = answer.raw.choices[0].logprobs.content
    return {
        "text": "".join(entry.token for entry in content),
        "logprobs": [entry.logprob for entry in content],
        "alternatives": [len(entry) for entry in answer.logprobs or ()],
    }


if __name__ == "__main__":
    functions = (chat, stream, tools, structured, embeddings, bad_key, unknown_model, bad_field, too_long, stream_error)
    serve({function.__name__: function for function in (*functions, busy, outage, cancel, logprobs)})
