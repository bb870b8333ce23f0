"""The official SDK for Python: `python -m tests.clients.python_openai`, with whatever version is installed there."""

import json
import time
from typing import Any, Literal

import openai
from pydantic import BaseModel

from tests.clients.loop import (
    CHAT,
    NAMED,
    QUESTION,
    THINKING,
    WEATHER,
    Attempts,
    Target,
    WeatherArguments,
    refusal,
    serve,
)

LONG: dict[str, Any] = {"max_tokens": 1900, "extra_body": {"ignore_eos": True}}


class Weather(BaseModel):
    """What is asked for."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def client(target: Target, **options: Any) -> Any:
    """Any: the programs run with several versions, whose types differ."""
    return openai.OpenAI(**{"base_url": target.base_url, "api_key": target.key, "max_retries": 0, **options})


def ask(target: Target, **fields: Any) -> Any:
    body = {"model": "demo", "messages": CHAT, "max_tokens": 12, "temperature": 0, **fields}
    return client(target).chat.completions.create(**body)


def chat(target: Target) -> Any:
    answer = ask(target)
    choice = answer.choices[0]
    usage = [answer.usage.prompt_tokens, answer.usage.completion_tokens]
    return {"text": choice.message.content, "finish": choice.finish_reason, "usage": usage}


def stream(target: Target) -> Any:
    chunks = list(ask(target, stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    pieces = [choice.delta.content for choice in choices if choice.delta.content]
    usage = chunks[-1].usage
    return {
        "pieces": pieces,
        "finish": choices[-1].finish_reason,
        "usage": [usage.prompt_tokens, usage.completion_tokens],
    }


def tools(target: Target) -> Any:
    with client(target).chat.completions.stream(
        model="demo", messages=CHAT, max_tokens=80, temperature=0, tools=[WEATHER], tool_choice=NAMED
    ) as running:
        kinds = {event.type for event in running}
        message = running.get_final_completion().choices[0].message
    call = message.tool_calls[0]
    said = {"role": "assistant", "content": message.content, "tool_calls": [call.to_dict()]}
    for parsed in ("parsed_arguments", "index"):
        said["tool_calls"][0]["function"].pop(parsed, None)
        said["tool_calls"][0].pop(parsed, None)
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
    after = ask(target, messages=[*CHAT, said, result], tools=[WEATHER], tool_choice="none")
    return {
        "name": call.function.name,
        "arguments": json.loads(call.function.arguments),
        "streamed": "tool_calls.function.arguments.delta" in kinds,
        "after": after.choices[0].message.content,
    }


def structured(target: Target) -> Any:
    answer = client(target).chat.completions.parse(
        model="demo", messages=CHAT, max_tokens=80, temperature=0, response_format=Weather
    )
    return answer.choices[0].message.parsed.model_dump()


def embeddings(target: Target) -> Any:
    answer = client(target).embeddings.create(model="demo-embed", input=["one", "two two", "three"])
    return {"vectors": [entry.embedding for entry in answer.data]}


def _error(target: Target, **fields: Any) -> Any:
    key = fields.pop("api_key", target.key)
    return refusal(lambda: ask(Target(target.url, key, key), **fields))


def bad_key(target: Target) -> Any:
    return _error(target, api_key="tl-nobody")


def unknown_model(target: Target) -> Any:
    return _error(target, model="nothing")


def bad_field(target: Target) -> Any:
    return _error(target, temperature=7)


def too_long(target: Target) -> Any:
    return _error(target, messages=[{"role": "user", "content": "word " * 5000}])


def stream_error(target: Target) -> Any:
    return _error(target, stream=True, top_p=3)


def busy(target: Target) -> Any:
    held = client(target, api_key=target.limited_key).chat.completions.create(
        model="demo", messages=CHAT, stream=True, **LONG
    )
    next(iter(held))
    attempts = Attempts(held.close)
    options = {"api_key": target.limited_key, "max_retries": 4, "http_client": attempts_client(attempts)}
    client(target, **options).completions.create(model="demo", prompt="Hi", max_tokens=2)
    return attempts.saw()


def outage(target: Target) -> Any:
    attempts = Attempts()
    answer = client(target, max_retries=20, http_client=attempts_client(attempts)).completions.create(
        model="demo", prompt="Hi", max_tokens=2
    )
    return {**attempts.saw(), "text": answer.choices[0].text}


def attempts_client(attempts: Attempts) -> Any:
    """An HTTP client of the kind that this version takes."""
    hooks = {"event_hooks": {"response": [attempts._note]}}
    return openai.DefaultHttpxClient(**hooks)  # type: ignore[arg-type]


def cancel(target: Target) -> Any:
    started = time.monotonic()
    running = ask(target, stream=True, **LONG)
    pieces = [next(running) for _ in range(5)]
    running.close()
    return {"pieces": len(pieces), "seconds": time.monotonic() - started}


def responses(target: Target) -> Any:
    api = client(target).responses
    fields: dict[str, Any] = {"model": "demo", "max_output_tokens": 12, "temperature": 0}
    first = api.create(input=QUESTION, **fields)
    text, final, kinds = "", None, []
    for event in api.create(input=QUESTION, stream=True, **fields):
        kinds.append(event.type)
        if event.type == "response.output_text.delta":
            text += event.delta
        if event.type in ("response.completed", "response.incomplete"):
            final = event.response
    assert final is not None
    second = api.create(input="And tomorrow?", previous_response_id=first.id, **fields)
    tool = {"type": "function", "name": "get_weather", "parameters": WeatherArguments}
    called = api.create(
        input=QUESTION,
        **{**fields, "max_output_tokens": 80},
        tools=[tool],
        tool_choice={"type": "function", "name": "get_weather"},
    ).output[0]
    result = {"type": "function_call_output", "call_id": called.call_id, "output": "Sunny."}
    after = api.create(input=[{"role": "user", "content": QUESTION}, called.to_dict(), result], **fields)
    parsed = api.parse(input=QUESTION, **{**fields, "max_output_tokens": 80}, text_format=Weather)
    return {
        "text": first.output_text,
        "streamed": text,
        "final": final.output_text,
        "first_event": kinds[0],
        "input_tokens": [first.usage.input_tokens, second.usage.input_tokens],
        "arguments": json.loads(called.arguments),
        "after": after.output_text,
        "parsed": parsed.output_parsed.model_dump(),
    }


def batch(target: Target) -> Any:
    body = {"model": "demo", "messages": CHAT, "max_tokens": 12, "temperature": 0}
    url = "/v1/chat/completions"
    lines = [json.dumps({"custom_id": f"line-{i}", "method": "POST", "url": url, "body": body}) for i in range(3)]
    api = client(target)
    file = api.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    made = api.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")
    until = time.monotonic() + 30
    while made.status not in ("completed", "failed", "expired", "cancelled") and time.monotonic() < until:
        time.sleep(0.1)
        made = api.batches.retrieve(made.id)
    answers = [json.loads(line) for line in api.files.content(made.output_file_id).text.splitlines()]
    return {
        "status": made.status,
        "counts": made.request_counts.to_dict(),
        "ids": sorted(answer["custom_id"] for answer in answers),
        "texts": [answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers],
        "deleted": api.files.delete(file.id).deleted,
    }


def logprobs(target: Target) -> Any:
    entries = ask(target, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    return {
        "text": "".join(entry.token for entry in entries),
        "logprobs": [entry.logprob for entry in entries],
        "alternatives": [len(entry.top_logprobs) for entry in entries],
    }


def several_choices(target: Target) -> Any:
    return {"texts": [choice.message.content for choice in ask(target, n=3, temperature=1).choices]}


def several_prompts(target: Target) -> Any:
    answer = client(target).completions.create(model="demo", prompt=["One", "Two"], max_tokens=5, temperature=0)
    return {"texts": [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]}


def reasoning(target: Target) -> Any:
    message = ask(target, max_tokens=100, extra_body=THINKING).choices[0].message
    chunks = ask(target, max_tokens=100, extra_body=THINKING, stream=True)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    return {
        "reasoning": message.reasoning_content,
        "content": message.content,
        "streamed": "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas),
    }


def models(target: Target) -> Any:
    return {
        "ids": [model.id for model in client(target).models.list()],
        "one": client(target).models.retrieve("demo").id,
    }


if __name__ == "__main__":
    functions = (chat, stream, tools, structured, embeddings, bad_key, unknown_model, bad_field, too_long, stream_error)
    more = (busy, outage, cancel, responses, batch, logprobs, several_choices, several_prompts, reasoning, models)
    serve({function.__name__: function for function in (*functions, *more)})
