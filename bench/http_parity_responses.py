"""Whether /v1/responses answers as `vllm serve` does: what http_parity.py asks of it, and what may differ.

Compared are the output's items, usage, status, what the answer repeats of the request, and of streams the types of the
events in their order, what their pieces add up to, and the object at the end; of refusals the status and, where vLLM
names one, the field. Conversations that the server remembers go through two turns.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final

import httpx

from bench.http_parity_cases import NOWHERE

__all__ = ["OTHERWISE", "PATH", "UNSERVED", "compare", "requests"]

Body = dict[str, Any]
PATH: Final = "/v1/responses"
_SLACK: Final = 5e-4
_PARAMETERS: Final = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
_TOOL: Final = {"type": "function", "name": "get_weather", "parameters": _PARAMETERS}
_CALL: Final = {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": '{"city": "Rome"}'}
_OUTPUT: Final = {"type": "function_call_output", "call_id": "call_1", "output": "Sunny."}
_USER: Final = {"role": "user", "content": "How is the weather?"}
_SCHEMA: Final = {"format": {"type": "json_schema", "name": "weather", "schema": _PARAMETERS}}
_THINKING: Final = {
    "chat_template_kwargs": {"thinking": True},
    "structured_outputs": {"grammar": '%llguidance {}\nstart: "Rain, perhaps." </think> "Fine."\n'},
    "max_output_tokens": 60,
}
_CALLING: Final = {
    "tools": [_TOOL],
    "structured_outputs": {
        "grammar": '%llguidance {}\nstart: <tool_call> "{\\"name\\": \\"get_weather\\", '
        '\\"arguments\\": {\\"city\\": \\"Rome\\"}}" </tool_call>\n'
    },
    "max_output_tokens": 80,
    "skip_special_tokens": False,
}
_GOOD: Final[list[Body]] = [
    {},
    {"max_output_tokens": 1},
    {"max_output_tokens": 40, "ignore_eos": True},
    {"max_output_tokens": ...},
    {"instructions": "Be brief."},
    {"input": [_USER]},
    {"input": [{**_USER, "type": "message"}]},
    {"input": [{"role": "system", "content": "Be brief."}, _USER]},
    {"input": [{"role": "developer", "content": "Be brief."}, _USER]},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "How"}]}]},
    {"input": [_USER, {"role": "assistant", "content": "Fine."}, _USER]},
    {"input": [_USER, _CALL, _OUTPUT]},
    {"tools": [_TOOL]},
    {"tools": [_TOOL], "tool_choice": "none"},
    {"tools": [_TOOL], "tool_choice": "auto", "parallel_tool_calls": True},
    _CALLING,
    {"temperature": 0.7, "seed": 3},
    {"temperature": 1, "seed": 3, "top_p": 0.5, "top_k": 9, "min_p": 0.1},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"logit_bias": {"100": 100}},
    {"stop": ["e"], "max_output_tokens": 60},
    {"stop": "e", "include_stop_str_in_output": True, "max_output_tokens": 60},
    {"stop_token_ids": list(range(3, 60)), "max_output_tokens": 60},
    {"text": {"format": {"type": "text"}}},
    {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 40},
    {"text": _SCHEMA, "max_output_tokens": 60},
    {"structured_outputs": {"regex": "[0-9]{3}-(yes|no)"}},
    _THINKING,
    {**_THINKING, "include_reasoning": False},
    {"reasoning": {"effort": "low"}},
    {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    {"metadata": {"a": "b"}},
    {"truncation": "disabled"},
    {"user": "somebody"},
    {"service_tier": "auto"},
    {"store": False},
    {"cache_salt": "salt"},
    {"prompt_cache_key": "key"},
    {"background": False},
]
_BAD: Final[list[Body]] = [
    {"model": "nothing"},
    {"input": ...},
    {"input": 5},
    {"input": "word " * 5000},
    {"input": [{"role": "nobody", "content": "How"}]},
    *({"temperature": value} for value in (-0.1, "hot")),
    *({"top_p": value} for value in (0, 1.1, "x")),
    *({"max_output_tokens": value} for value in (0, -1, "x")),
    {"presence_penalty": 2.5},
    {"frequency_penalty": -2.5},
    {"stop": [""]},
    {"previous_response_id": "resp_unknown"},
    {"tools": "x"},
    {"tools": [{"type": "function"}]},
    {"tool_choice": "required"},
    {"tools": [_TOOL], "tool_choice": {"type": "function", "name": "other"}},
    {"text": {"format": {"type": "nothing"}}},
    {"text": _SCHEMA, "structured_outputs": {"regex": "a"}},
    {"structured_outputs": {"regex": "(unclosed"}},
    {"include": ["nothing"]},
]
_REPEATED: Final = (
    "object", "status", "error", "incomplete_details", "instructions", "model", "parallel_tool_calls", "temperature",
    "previous_response_id", "top_p", "truncation", "background",
)  # fmt: skip  # a table
_OWN: Final = ("id", "call_id", "status")
_WHERE_ASKED: Final = {"max_output_tokens": "max_output_tokens", "metadata": "metadata", "tool_choice": "tools"}
"""What vLLM repeats otherwise than it was asked, by what has to be asked for it to be compared."""
UNSERVED: Final[dict[str, str]] = {
    **NOWHERE,
    "media_io_kwargs": "the model's, since it opens what a decoder may take",
    "mm_processor_kwargs": "the model's, since it opens what a decoder may take",
    "max_tool_calls": "of tools that a server runs itself, and none is",
    "prompt": "of templates that are kept at OpenAI",
    "enable_response_messages": "of vLLM's debugging",
    "previous_input_messages": "of vLLM's debugging",
}
"""vLLM's fields that are refused by name, and why."""
OTHERWISE: Final[list[str]] = [
    "an answer that is cut short ends with response.incomplete, and its last item is incomplete, as OpenAI's are",
    "what was not asked for is repeated as OpenAI does: no max_output_tokens, metadata {}, tool_choice auto",
    "top_logprobs has OpenAI's bounds, where vLLM takes any number",
    "calls are part of what is remembered of a conversation, where vLLM forgets them",
    "pieces of streams have log-probabilities also where a token adds no text",
    "the object at the end of a stream has the log-probabilities of its text, too",
]
"""What else differs on purpose."""


@dataclass(slots=True)
class _Answer:
    """What came of a request."""

    status: int = 200
    error: Body = field(default_factory=dict)
    final: Body = field(default_factory=dict)
    """The response object."""
    events: list[str] = field(default_factory=list)
    """Their types in their order, those of pieces that follow each other once."""
    pieces: dict[str, str] = field(default_factory=dict)
    """What the pieces of an item add up to."""
    scores: list[Any] = field(default_factory=list)
    """The log-probabilities of a stream's pieces, those of tokens that add no text aside."""


async def _ask(client: httpx.AsyncClient, body: Body) -> _Answer:
    try:
        response = await client.post(PATH, json=body, timeout=60)
    except httpx.RemoteProtocolError:
        # vLLM's way to tell of an error once a stream has begun.
        return _Answer(400, {"message": "broken off"})
    if response.status_code != 200:
        said = response.json()
        return _Answer(response.status_code, said.get("error", said))
    if not body.get("stream"):
        return _Answer(final=response.json())
    lines = (line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: "))
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    if [event.get("sequence_number") for event in events] != list(range(len(events))):
        return _Answer(final={"status": "its events are not numbered one after the other"})
    answer = _Answer(final=events[-1].get("response", {}), events=[kind for kind, _ in groupby(map(_kind, events))])
    for event in events:
        if event["type"].endswith(".delta"):
            place = f"{event['type']} {event['output_index']} {event.get('content_index', 0)}"
            answer.pieces[place] = answer.pieces.get(place, "") + event["delta"]
            answer.scores += [score for score in event.get("logprobs") or () if score["token"]]
    return answer


def _kind(event: Body) -> str:
    of = event.get("item") or event.get("part") or {}
    kind = "response.completed" if event["type"] == "response.incomplete" else event["type"]
    return " ".join(filter(None, (kind, of.get("type"))))


def differences(body: Body, ours: _Answer, theirs: _Answer) -> list[str]:
    """What is not the same."""
    if ours.status != theirs.status:
        return [f"status: ours {ours.status} {ours.error}, theirs {theirs.status} {theirs.error}"]
    if ours.status != 200:
        return _other_field(ours.error, theirs.error)
    asked = [name for name, what in _WHERE_ASKED.items() if body.get(what)]
    pairs: dict[str, tuple[object, object]] = {
        **{name: (ours.final.get(name), theirs.final.get(name)) for name in (*_REPEATED, *asked)},
        "usage": (_usage(ours.final), _usage(theirs.final)),
        "events": (ours.events, theirs.events),
        "pieces": (ours.pieces, theirs.pieces),
    }
    found = [f"{name}: {mine!r}, not {other!r}" for name, (mine, other) in pairs.items() if mine != other]
    for name, mine, other in (("output", _items(ours), _items(theirs)), ("scores", ours.scores, theirs.scores)):
        if not _same(mine, other):
            found.append(f"{name}: {mine}, not {other}")
    return found


_NAMES: Final = {"input_tokens": "input", "max_tokens": "max_output_tokens", "response_id": "previous_response_id"}
"""What fields are called in vLLM's refusals, and what here."""


def _other_field(ours: Body, theirs: Body) -> list[str]:
    named, mine = theirs.get("param"), str(ours.get("param"))
    if named is None:
        return []
    name = str(named).removeprefix("body.").partition(".")[0]
    name = _NAMES.get(name, name)
    return [] if mine.startswith(name) or name.startswith(mine) else [f"field: ours {ours}, theirs {theirs}"]


def _usage(final: Body) -> list[Any]:
    usage = final.get("usage") or {}
    names = ("input_tokens", "output_tokens", "total_tokens")
    details = (usage.get("input_tokens_details") or {}).get("cached_tokens")
    thoughts = (usage.get("output_tokens_details") or {}).get("reasoning_tokens")
    return [*(usage.get(name) for name in names), details, thoughts]


def _items(answer: _Answer) -> list[Body]:
    """The output without ids, and of a stream without what its pieces have told."""
    items = [
        {name: value for name, value in item.items() if name not in _OWN} for item in answer.final.get("output", ())
    ]
    for item in items:
        if answer.events and item["type"] == "message":
            item["content"] = [{**part, "logprobs": None} for part in item["content"]]
    return items


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return abs(ours - theirs) < _SLACK
    if isinstance(ours, dict) and isinstance(theirs, dict):
        # What one has empty, the other may leave out.
        return all(_same(ours.get(name) or None, theirs.get(name) or None) for name in {*ours, *theirs})
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return bool(ours == theirs)


def requests() -> Iterable[tuple[Body, bool]]:
    """The requests, and whether each is a good one; good ones twice, once as a stream."""
    base = {"model": "demo", "input": "How is the weather?", "max_output_tokens": 12, "temperature": 0}
    for changes in _GOOD:
        body = {name: value for name, value in {**base, **changes}.items() if value is not ...}
        yield body, True
        yield {**body, "stream": True}, True
    for changes in _BAD:
        yield {name: value for name, value in {**base, **changes}.items() if value is not ...}, False


async def compare(ours: httpx.AsyncClient, theirs: httpx.AsyncClient) -> int:
    """Prints what differs; returns how many requests do."""
    count = bad = 0
    for number, (body, is_good) in enumerate(requests()):
        # A prefix that only one of them has cached would be a difference in usage.
        salted = {"cache_salt": f"responses-{number}", **body} if is_good else body
        mine, other = await _ask(ours, salted), await _ask(theirs, salted)
        found = differences(body, mine, other)
        if not found and (mine.status == 200) != is_good:
            found = [f"both say {mine.status}: {mine.error}"]
        count, bad = count + 1, bad + _told(body, found)
    for name, turns in _CONVERSATIONS.items():
        bad += _told({"conversation": name}, await _conversation(turns, ours, theirs))
        count += 1
    print(f"{PATH}: {count} requests, {bad} differ", flush=True)
    return bad


_CONVERSATIONS: Final[Mapping[str, list[Body]]] = {
    "two turns": [{"input": "How is the weather?"}, {"input": "And then?"}],
    "instructions are of one turn": [{"input": "How?", "instructions": "Be brief."}, {"input": "And then?"}],
    "a stream between": [{"input": "How?", "stream": True}, {"input": "And then?", "stream": True}],
}


async def _conversation(turns: list[Body], ours: httpx.AsyncClient, theirs: httpx.AsyncClient) -> list[str]:
    previous: list[str | None] = [None, None]
    for number, turn in enumerate(turns):
        answers = []
        for index, client in enumerate((ours, theirs)):
            linked = {"previous_response_id": previous[index]} if previous[index] else {}
            base = {"model": "demo", "max_output_tokens": 12, "temperature": 0, "store": True}
            answers.append(
                await _ask(client, {**base, **turn, **linked, "cache_salt": f"turn-{number}-{turns[0]}"[:90]})
            )
            previous[index] = answers[-1].final.get("id")
            answers[-1].final.pop("previous_response_id", None)
        if found := differences(turn, *answers):
            return [f"turn {number}: {line}" for line in found]
        if answers[0].status != 200:
            return [f"turn {number}: both say {answers[0].error}"]
        kept = [await client.get(f"{PATH}/{id_}") for client, id_ in zip((ours, theirs), previous, strict=True)]
        told = [_Answer(answer.status_code, final=answer.json()) for answer in kept]
        for each in told:
            each.final.pop("previous_response_id", None)
        if found := differences(turn, *told):
            return [f"turn {number}, asked for again: {line}" for line in found]
    return []


def _told(body: Body, found: list[str]) -> bool:
    if found:
        print(f"{PATH} {json.dumps(body)[:300]}\n  " + "\n  ".join(text[:700] for text in found), flush=True)
    return bool(found)
