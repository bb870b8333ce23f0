"""What answers look like: every event is JSON in OpenAI's shape, whatever the text."""

import json

import pytest

from services.gateway.rendering import ChatRenderer, CompletionRenderer, Renderer
from services.gateway.stream import Ending, TokenScore

ENDING = Ending(finish_reason="stop", prompt_tokens=5, cached_tokens=2, output_tokens=3)
AWKWARD = ['"quoted"\n', "\\", "汉字", "🤡", "\x00\x1f", "</script>", "[DONE]", "data: x"]


def chat(*, include_usage: bool = False) -> ChatRenderer:
    return ChatRenderer(answer_id="1", created=7, model='m"', include_usage=include_usage)


def completion(*, include_usage: bool = False) -> CompletionRenderer:
    return CompletionRenderer(answer_id="1", created=7, model='m"', include_usage=include_usage)


def parse(events: bytes) -> list[dict[str, object]]:
    parts = events.split(b"\n\n")
    assert parts.pop() == b""
    assert all(part.startswith(b"data: ") and b"\n" not in part for part in parts)
    return [json.loads(part.removeprefix(b"data: ")) for part in parts]


def test_chat_deltas_carry_any_text_unchanged() -> None:
    events = parse(chat().deltas(AWKWARD))
    assert [event["choices"][0]["delta"]["content"] for event in events] == AWKWARD  # type: ignore[index]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert events[0]["model"] == 'm"'


def test_completion_deltas_carry_any_text_unchanged() -> None:
    events = parse(completion().deltas(AWKWARD))
    assert [event["choices"][0]["text"] for event in events] == AWKWARD  # type: ignore[index]


@pytest.mark.parametrize("renderer", [chat(), completion()])
def test_a_delta_without_text_is_no_event(renderer: Renderer) -> None:
    assert renderer.deltas([""]) == b""
    assert renderer.deltas(["", ""]) == b""
    assert len(parse(renderer.deltas(["", "a", ""]))) == 1


@pytest.mark.parametrize("renderer", [chat(), completion()])
def test_one_delta_looks_like_one_of_several(renderer: Renderer) -> None:
    assert renderer.deltas(["a"]) + renderer.deltas(["b"]) == renderer.deltas(["a", "b"])


@pytest.mark.parametrize("make", [chat, completion])
def test_usage_is_an_event_of_its_own_when_asked_for(make: type[ChatRenderer] | type[CompletionRenderer]) -> None:
    assert len(parse(make(include_usage=False).last(ENDING))) == 1  # type: ignore[call-arg]
    finish, usage = parse(make(include_usage=True).last(ENDING))  # type: ignore[call-arg]
    assert finish["choices"][0]["finish_reason"] == "stop"  # type: ignore[index]
    assert finish["usage"] is None
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_chat_scores_carry_the_alternatives() -> None:
    scores = [TokenScore(token="é", logprob=-0.5, alternatives=[TokenScore(token="e", logprob=-1.0)])]
    (event,) = parse(chat().scored("é", scores))
    (entry,) = event["choices"][0]["logprobs"]["content"]  # type: ignore[index]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("é", -0.5, [195, 169])
    assert entry["top_logprobs"] == [{"token": "e", "logprob": -1.0, "bytes": [101]}]


def test_completion_scores_count_text_offsets_through_the_answer() -> None:
    renderer = completion()
    first = parse(renderer.scored("ab", [TokenScore(token="ab", logprob=-1)]))[0]
    second = parse(renderer.scored("c", [TokenScore(token="c", logprob=-2)]))[0]
    assert first["choices"][0]["logprobs"]["text_offset"] == [0]  # type: ignore[index]
    assert second["choices"][0]["logprobs"]["text_offset"] == [2]  # type: ignore[index]


def test_a_whole_chat_answer_has_message_and_usage() -> None:
    body = chat().whole("hi", [], ENDING)
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hi", "refusal": None}
    assert body["usage"]["total_tokens"] == 8
