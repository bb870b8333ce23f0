"""What answers look like: every event is JSON in OpenAI's shape, whatever the text."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from services.gateway.pieces import CallPiece, Ending, Piece, Prompt, TokenScore
from services.gateway.rendering import Renderer, Show
from services.gateway.rendering_chat import ChatRenderer
from services.gateway.rendering_completion import CompletionRenderer

ENDING = Ending(finish_reason="stop", prompt_tokens=5, cached_tokens=2, output_tokens=3, reasoning_tokens=1)
AWKWARD = ['"quoted"\n', "\\", "汉字", "🤡", "\x00\x1f", "</script>", "[DONE]", "data: x"]
SCORE = TokenScore(
    token="é", logprob=-0.5, token_id=7, rank=1, alternatives=[TokenScore(token="e", logprob=-1.0, token_id=8, rank=2)]
)
IMPOSSIBLE = TokenScore(token="x", logprob=float("-inf"), token_id=9)


def chat(**show: Any) -> ChatRenderer:
    return ChatRenderer(answer_id="1", created=7, model='m"', show=Show(**show))


def completion(**show: Any) -> CompletionRenderer:
    return CompletionRenderer(answer_id="1", created=7, model='m"', show=Show(**show))


def parse(events: bytes) -> list[dict[str, Any]]:
    parts = events.split(b"\n\n")
    assert parts.pop() == b""
    assert all(part.startswith(b"data: ") and b"\n" not in part for part in parts)
    return [json.loads(part.removeprefix(b"data: ")) for part in parts]


def test_chat_text_travels_unchanged() -> None:
    events = parse(chat().pieces(AWKWARD))
    assert [event["choices"][0]["delta"]["content"] for event in events] == AWKWARD
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert events[0]["model"] == 'm"'


def test_completion_text_travels_unchanged() -> None:
    events = parse(completion().pieces(AWKWARD))
    assert [event["choices"][0]["text"] for event in events] == AWKWARD


@pytest.mark.parametrize("renderer", [chat(), completion()])
def test_text_that_is_empty_is_no_event(renderer: Renderer) -> None:
    assert renderer.pieces(["", ""]) == b""
    assert renderer.pieces([Piece(token_ids=[1])]) == b""
    assert len(parse(renderer.pieces(["", "a", ""]))) == 1


@pytest.mark.parametrize("renderer", [chat(), completion()])
def test_text_written_as_it_comes_looks_like_text_that_waited(renderer: Renderer) -> None:
    written: list[bytes] = []

    def write(events: bytes) -> bool:
        written.append(events)
        return True

    assert renderer.writer(write)("a")
    assert written == [renderer.pieces(["a"])] == [renderer.pieces([Piece(text="a")])]


@pytest.mark.parametrize("make", [chat, completion])
def test_usage_is_an_event_of_its_own_when_asked_for(make: Callable[..., Renderer]) -> None:
    assert make().usage([ENDING]) == b""
    (finish,) = parse(make(usage=True).last(ENDING))
    (usage,) = parse(make(usage=True).usage([ENDING, ENDING]))
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert finish["usage"] is None
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 6,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }


def test_chat_scores_carry_the_alternatives() -> None:
    (event,) = parse(chat(scores=True).pieces([Piece(text="é", scores=[SCORE])]))
    (entry,) = event["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("é", -0.5, [195, 169])
    assert entry["top_logprobs"] == [{"token": "e", "logprob": -1.0, "bytes": [101]}]


def test_an_impossible_token_has_a_logprob_that_json_can_say() -> None:
    (event,) = parse(chat(scores=True).pieces([Piece(scores=[IMPOSSIBLE])]))
    assert event["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


def test_tokens_can_be_named_by_their_ids() -> None:
    (event,) = parse(chat(scores=True, names_as_ids=True).pieces([Piece(scores=[SCORE])]))
    assert event["choices"][0]["logprobs"]["content"][0]["token"] == "token_id:7"


def test_completion_scores_count_text_offsets_through_the_answer() -> None:
    renderer = completion(scores=True)
    first, second = parse(
        renderer.pieces(
            [
                Piece(text="ab", scores=[TokenScore(token="ab", logprob=-1)]),
                Piece(text="c", scores=[TokenScore(token="c", logprob=-2)]),
            ]
        )
    )
    assert first["choices"][0]["logprobs"]["text_offset"] == [0]
    assert second["choices"][0]["logprobs"]["text_offset"] == [2]
    assert second["choices"][0]["logprobs"]["top_logprobs"] == [{"c": -2}]


def test_a_whole_chat_answer_has_message_and_usage() -> None:
    renderer = chat()
    body = renderer.whole(renderer.choices(["h", "i"], None, ENDING), None, [ENDING])
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hi", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] == 8


CALLS = [
    Piece(reasoning="let me "),
    Piece(reasoning="see"),
    Piece(calls=[CallPiece(index=0, id="c0", name="add")]),
    Piece(calls=[CallPiece(index=0, arguments='{"a"')]),
    Piece(calls=[CallPiece(index=1, id="c1", name="sub", arguments="{}"), CallPiece(index=0, arguments=": 1}")]),
]


def test_streamed_calls_put_together_are_the_whole_ones() -> None:
    ending = Ending(finish_reason="tool_calls", prompt_tokens=1, cached_tokens=0, output_tokens=9)
    (choice,) = chat().choices(CALLS, None, ending)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning"] == choice["message"]["reasoning_content"] == "let me see"
    assert [(call["id"], call["function"]) for call in choice["message"]["tool_calls"]] == [
        ("c0", {"name": "add", "arguments": '{"a": 1}'}),
        ("c1", {"name": "sub", "arguments": "{}"}),
    ]
    deltas = [event["choices"][0]["delta"] for event in parse(chat().pieces(CALLS))]
    arguments = {0: "", 1: ""}
    for delta in deltas:
        for call in delta.get("tool_calls", ()):
            arguments[call["index"]] += call["function"]["arguments"]
    assert arguments == {0: '{"a": 1}', 1: "{}"}
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "let me see"


def test_thoughts_can_be_left_out() -> None:
    assert parse(chat(reasoning=False).pieces(CALLS[:2])) == []
    (choice,) = chat(reasoning=False).choices(CALLS[:2], None, ENDING)
    assert "reasoning" not in choice["message"]


@pytest.mark.parametrize("make", [chat, completion])
def test_each_of_several_choices_has_its_own_end(make: Callable[..., Renderer]) -> None:
    renderer = make(choices=2, first_index=0)
    pieces: list[str | Piece] = [
        "a",
        Piece(text="b", choice=1),
        Piece(choice=1, finish_reason="stop", stop="END"),
        Piece(choice=0, finish_reason="length"),
    ]
    events = [event["choices"][0] for event in parse(renderer.pieces(pieces))]
    ends = {event["index"]: event["finish_reason"] for event in events if event["finish_reason"]}
    assert ends == {0: "length", 1: "stop"}
    assert renderer.last(ENDING) == b""
    whole = renderer.choices(pieces, None, ENDING)
    assert [(choice["index"], choice["finish_reason"], choice.get("stop_reason")) for choice in whole] == [
        (0, "length", None),
        (1, "stop", "END"),
    ]


def test_an_echoed_prompt_comes_first_with_its_scores() -> None:
    prompt = Prompt(text="a b", token_ids=[1, 2], scores=[TokenScore(token=" b", logprob=-3, token_id=2)])
    renderer = completion(echo=True, scores=True)
    (choice,) = renderer.choices([Piece(text="c", scores=[TokenScore(token="c", logprob=-2)])], prompt, ENDING)
    assert choice["text"] == "a bc"
    assert choice["logprobs"]["tokens"] == ["a", " b", "c"]
    assert choice["logprobs"]["token_logprobs"] == [None, -3, -2]
    assert choice["logprobs"]["top_logprobs"][0] is None
    (event,) = parse(completion(echo=True).first(prompt))
    assert event["choices"][0]["text"] == "a b"


def test_prompt_scores_are_by_token_id() -> None:
    renderer = chat()
    body = renderer.whole([], Prompt(scores=[SCORE]), [ENDING])
    assert body["prompt_logprobs"] == [
        None,
        {
            "7": {"logprob": -0.5, "rank": 1, "decoded_token": "é"},
            "8": {"logprob": -1.0, "rank": 2, "decoded_token": "e"},
        },
    ]


@pytest.mark.parametrize("make", [chat, completion])
def test_tokens_are_shown_when_asked_for(make: Callable[..., Renderer]) -> None:
    (event,) = parse(make(token_ids=True).pieces([Piece(text="a", token_ids=[5, 6])]))
    assert event["choices"][0]["token_ids"] == [5, 6]
    (choice,) = make(token_ids=True).choices([Piece(text="a", token_ids=[5, 6])], Prompt(token_ids=[1]), ENDING)
    assert choice["token_ids"] == [5, 6]


def test_a_completions_stream_begins_with_the_prompts_tokens_when_they_are_asked_for() -> None:
    (event,) = parse(completion(token_ids=True).first(Prompt(text="a", token_ids=[1, 2])))
    choice = event["choices"][0]
    assert (choice["text"], choice["token_ids"], choice["prompt_token_ids"]) == ("", [], [1, 2])
