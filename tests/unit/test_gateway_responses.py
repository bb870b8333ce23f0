"""Responses requests as chat requests, and the events of their answers."""

import json
from typing import Any

import pytest

from services.common.errors import MeshError, Reason
from services.gateway.convert_responses import chat_request, input_items
from services.gateway.decoding import decode
from services.gateway.pieces import CallPiece, Ending, Piece
from services.gateway.rendering_responses import ResponsesRenderer
from services.gateway.schema_chat import AssistantMessage, ChatRequest, ToolMessage, UserMessage
from services.gateway.schema_responses import ResponsesRequest

STOPPED = Ending(finish_reason="stop", prompt_tokens=5, cached_tokens=2, output_tokens=3)
CUT = Ending(finish_reason="length", prompt_tokens=5, cached_tokens=2, output_tokens=3)
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"}


def decoded(**fields: object) -> ResponsesRequest:
    body = decode(json.dumps({"model": "m", "input": "hi"} | fields).encode(), ResponsesRequest)
    body.check()
    return body


def asked(**fields: object) -> ChatRequest:
    body = decoded(**fields)
    return chat_request(body, input_items(body))


def test_a_text_is_what_the_user_says() -> None:
    request = asked(instructions="be brief", max_output_tokens=5)
    assert [type(message).__struct_config__.tag for message in request.messages] == ["system", "user"]
    assert request.max_tokens == 5


def test_what_an_assistant_thinks_says_and_calls_in_one_turn_is_one_message() -> None:
    request = asked(
        tools=[TOOL],
        input=[
            {"role": "user", "content": "1+2?"},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "let me see"}]},
            CALL,
            {"type": "function_call_output", "call_id": "c1", "output": "3"},
            {"role": "assistant", "content": "3"},
        ],
    )
    user, said, answered, last = request.messages
    assert isinstance(user, UserMessage)
    assert isinstance(said, AssistantMessage)
    assert (said.reasoning, said.content, said.tool_calls and said.tool_calls[0].id) == ("hm", "let me see", "c1")
    assert isinstance(answered, ToolMessage)
    assert isinstance(last, AssistantMessage)


def test_thoughts_that_nothing_followed_are_left_out() -> None:
    request = asked(input=[{"role": "user", "content": "a"}, {"type": "reasoning", "summary": []}])
    assert len(request.messages) == 1


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"role": "root", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "x"}]}]}, "input[0].content[0].type"),
        ({"input": [CALL | {"extra": 1}]}, "input[0].extra"),
        ({"input": [{"role": "user", "content": "a"}, 7]}, "input[1]"),
        ({"background": True}, "background"),
        ({"conversation": "x"}, "conversation"),
        ({"stream_options": {}}, "stream_options"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_a_bad_field_is_refused_by_name(fields: dict[str, object], field: str) -> None:
    with pytest.raises(MeshError) as caught:
        asked(**fields)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_REQUEST, field)


def test_the_answer_to_a_call_nobody_made_is_refused() -> None:
    with pytest.raises(MeshError) as caught:
        asked(input=[{"type": "function_call_output", "call_id": "c9", "output": "3"}])
    assert caught.value.field == "input"


def renderer(**fields: object) -> ResponsesRenderer:
    return ResponsesRenderer(answer_id="1", created=7, request=decoded(**fields))


def parse(events: bytes) -> list[dict[str, Any]]:
    parsed = []
    for block in events.split(b"\n\n")[:-1]:
        kind, data = block.split(b"\n")
        parsed.append(json.loads(data.removeprefix(b"data: ")))
        assert kind == f"event: {parsed[-1]['type']}".encode()
    return parsed


PIECES: list[str | Piece] = [
    Piece(reasoning="h"),
    Piece(reasoning="m"),
    "Hel",
    "",
    "lo",
    Piece(calls=[CallPiece(index=0, id="c1", name="add")]),
    Piece(calls=[CallPiece(index=0, arguments='{"a":')]),
    Piece(calls=[CallPiece(index=0, arguments="1}"), CallPiece(index=1, id="c2", name="sub", arguments="{}")]),
]


def test_the_events_tell_item_by_item_what_the_object_says_in_the_end() -> None:
    streamed = renderer()
    events = parse(streamed.first() + streamed.pieces(PIECES) + streamed.last(STOPPED))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == ["reasoning", "message", "function_call", "function_call"]
    assert done[1]["content"][0]["text"] == "Hello"
    assert done[2]["arguments"] == '{"a":1}'
    texts = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert texts == ["Hel", "lo"]
    last = events[-1]
    assert (last["type"], last["response"]["status"]) == ("response.completed", "completed")
    assert last["response"]["output"] == done
    assert last["response"]["usage"]["total_tokens"] == 8
    assert renderer().whole(PIECES, STOPPED) == last["response"]


def test_an_answer_that_was_cut_is_incomplete() -> None:
    body = renderer().whole(["Hel"], CUT)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"


def test_an_answer_that_failed_is_never_complete() -> None:
    streamed = renderer()
    streamed.pieces(["Hel"])
    (event,) = parse(streamed.failed(MeshError(Reason.ENGINE_FAILED, "the engine broke")))
    assert (event["type"], event["response"]["status"]) == ("response.failed", "failed")
    assert event["response"]["error"]["message"] == "the engine broke"


def test_text_written_as_it_comes_counts_as_said() -> None:
    streamed = renderer()
    written: list[bytes] = []
    takes = True

    def write(events: bytes) -> bool:
        if takes:
            written.append(events)
        return takes

    writer = streamed.writer(write)
    assert not writer("too early: no item is open")
    streamed.pieces(["a"])
    assert writer("b")
    takes = False
    assert not writer("c")
    events = parse(b"".join(written) + streamed.pieces(["c"]) + streamed.last(STOPPED))
    numbers = [event["sequence_number"] for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "abc"
