"""LangChain: `python -m tests.clients.langchain_client`."""

import time
from typing import Any, Literal

from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

from tests.clients.loop import QUESTION, WEATHER, Attempts, Target, refusal, serve


class Weather(BaseModel):
    """What is asked for."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def model(target: Target, **options: Any) -> ChatOpenAI:
    options = {"model": "demo", "max_tokens": 12, "temperature": 0, "max_retries": 0, **options}
    return ChatOpenAI(base_url=target.base_url, **{"api_key": target.key, **options})


def chat(target: Target) -> Any:
    return _said(model(target).invoke(QUESTION))


def stream(target: Target) -> Any:
    pieces, whole = [], AIMessageChunk(content="")
    for chunk in model(target, stream_usage=True).stream(QUESTION):
        pieces.append(str(chunk.content))
        whole += chunk
    return {**_said(whole), "pieces": [piece for piece in pieces if piece]}


def _said(message: Any) -> dict[str, Any]:
    usage = message.usage_metadata
    return {
        "text": message.text,
        "finish": message.response_metadata["finish_reason"],
        "usage": [usage["input_tokens"], usage["output_tokens"]],
    }


def tools(target: Target) -> Any:
    bound = model(target, max_tokens=80).bind_tools([WEATHER], tool_choice="get_weather")
    whole, pieces = AIMessageChunk(content=""), 0
    for chunk in bound.stream(QUESTION):
        pieces += bool(chunk.tool_call_chunks)
        whole += chunk
    call = whole.tool_calls[0]
    result = ToolMessage(content="Sunny.", tool_call_id=call["id"])
    after = model(target).bind_tools([WEATHER], tool_choice="none").invoke([HumanMessage(QUESTION), whole, result])
    return {"name": call["name"], "arguments": call["args"], "streamed": pieces > 1, "after": after.text}


def structured(target: Target) -> Any:
    return model(target, max_tokens=80).with_structured_output(Weather).invoke(QUESTION).model_dump()


def embeddings(target: Target) -> Any:
    # Else texts are sent as token ids of a model of OpenAI's, which has another vocabulary.
    embedder = OpenAIEmbeddings(
        model="demo-embed", base_url=target.base_url, api_key=target.key, check_embedding_ctx_length=False
    )
    return {"vectors": embedder.embed_documents(["one", "two two", "three"])}


def _error(target: Target, text: str = QUESTION, *, streamed: bool = False, **options: Any) -> Any:
    def asked() -> None:
        asking = model(target, **options)
        _ = list(asking.stream(text)) if streamed else asking.invoke(text)

    return refusal(asked)


def bad_key(target: Target) -> Any:
    return _error(target, api_key="tl-nobody")


def unknown_model(target: Target) -> Any:
    return _error(target, model="nothing")


def bad_field(target: Target) -> Any:
    return _error(target, temperature=7)


def too_long(target: Target) -> Any:
    return _error(target, "word " * 5000)


def stream_error(target: Target) -> Any:
    return _error(target, streamed=True, top_p=3)


def _long(target: Target, **options: Any) -> Any:
    return model(target, max_tokens=1900, extra_body={"ignore_eos": True}, **options).stream(QUESTION)


def busy(target: Target) -> Any:
    held = _long(target, api_key=target.limited_key)
    next(held)
    attempts = Attempts(held.close)
    options = {"api_key": target.limited_key, "max_retries": 4, "http_client": attempts.client()}
    model(target, **options).invoke(QUESTION)
    return attempts.saw()


def outage(target: Target) -> Any:
    attempts = Attempts()
    answer = model(target, max_retries=20, http_client=attempts.client()).invoke(QUESTION)
    return {**attempts.saw(), "text": answer.text}


def cancel(target: Target) -> Any:
    started, running = time.monotonic(), _long(target)
    pieces = [next(running) for _ in range(5)]
    running.close()
    return {"pieces": len(pieces), "seconds": time.monotonic() - started}


def responses(target: Target) -> Any:
    options: dict[str, Any] = {"use_responses_api": True}
    asking = model(target, **options)
    first = asking.invoke(QUESTION)
    whole = AIMessageChunk(content="")
    streamed = ""
    for chunk in asking.stream(QUESTION):
        streamed += chunk.text
        whole += chunk
    second = model(target, **options).invoke("And tomorrow?", previous_response_id=first.response_metadata["id"])
    longer = model(target, **options, max_tokens=80)
    called = longer.bind_tools([WEATHER], tool_choice="get_weather").invoke(QUESTION)
    call = called.tool_calls[0]
    after = asking.invoke([HumanMessage(QUESTION), called, ToolMessage(content="Sunny.", tool_call_id=call["id"])])
    return {
        "text": first.text,
        "streamed": streamed,
        "final": whole.text,
        "input_tokens": [message.usage_metadata["input_tokens"] for message in (first, second)],
        "arguments": call["args"],
        "after": after.text,
        "parsed": longer.with_structured_output(Weather).invoke(QUESTION).model_dump(),
    }


def logprobs(target: Target) -> Any:
    content = model(target, logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]["content"]
    return {
        "text": "".join(entry["token"] for entry in content),
        "logprobs": [entry["logprob"] for entry in content],
        "alternatives": [len(entry["top_logprobs"]) for entry in content],
    }


def several_choices(target: Target) -> Any:
    answer = model(target, n=3, temperature=1).generate([[HumanMessage(QUESTION)]])
    return {"texts": [generation.text for generation in answer.generations[0]]}


def several_prompts(target: Target) -> Any:
    options: dict[str, Any] = {"max_tokens": 5, "temperature": 0, "max_retries": 0}
    legacy = OpenAI(model="demo", base_url=target.base_url, api_key=target.key, **options)
    return {"texts": [entry[0].text for entry in legacy.generate(["One", "Two"]).generations]}


if __name__ == "__main__":
    functions = (chat, stream, tools, structured, embeddings, bad_key, unknown_model, bad_field, too_long, stream_error)
    more = (busy, outage, cancel, responses, logprobs, several_choices, several_prompts)
    serve({function.__name__: function for function in (*functions, *more)})
