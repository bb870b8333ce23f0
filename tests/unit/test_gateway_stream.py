"""The buffer between a worker's session and a client's reader."""

import asyncio

import pytest

from services.common.errors import MeshError, Reason
from services.gateway.pieces import CallPiece, Ending, Move, Piece, left_lately
from services.gateway.stream import Stream, WorkerLostError

ENDING = Ending(finish_reason="stop", prompt_tokens=1, cached_tokens=0, output_tokens=2)


async def test_a_slow_reader_takes_several_deltas_at_once() -> None:
    stream = Stream()
    stream.push("a", [1])
    stream.push("b", [2, 3])
    assert await stream.take() == ["a", "b"]
    assert stream.token_ids == [1, 2, 3]


async def test_a_waiting_reader_is_woken_by_a_delta() -> None:
    stream = Stream()
    taking = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    stream.push("a", [1])
    assert await asyncio.wait_for(taking, 1) == ["a"]


async def test_what_came_before_an_error_is_taken_first() -> None:
    stream = Stream()
    stream.push("a", [1])
    stream.fail(WorkerLostError("w"))
    assert await stream.take() == ["a"]
    with pytest.raises(WorkerLostError):
        await stream.take()


async def test_a_recovered_stream_goes_on() -> None:
    stream = Stream()
    stream.fail(WorkerLostError("w"))
    stream.recover()
    stream.push("b", [2])
    stream.end(ENDING)
    assert await stream.take() == ["b"]
    assert await stream.take() == []


async def test_a_complete_stream_does_not_fail_any_more() -> None:
    stream = Stream()
    stream.end(ENDING)
    stream.fail(WorkerLostError("w"))
    assert await stream.take() == []


async def test_the_first_error_is_the_one_told() -> None:
    stream = Stream()
    stream.fail(MeshError(Reason.ENGINE_FAILED, "first"))
    stream.fail(WorkerLostError("second"))
    with pytest.raises(MeshError, match="first"):
        await stream.take()


async def test_a_reader_that_was_cancelled_loses_nothing() -> None:
    stream = Stream()
    taking = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    taking.cancel()
    await asyncio.wait([taking])
    stream.push("a", [1])
    assert await stream.take() == ["a"]


async def test_pieces_and_text_keep_their_order() -> None:
    stream = Stream()
    written: list[str] = []
    stream.writer = lambda text: not written.append(text)  # type: ignore[func-returns-value]
    call = Piece(reasoning="hm", token_ids=[2])
    stream.push_one("a", 1)
    stream.push_piece(call)
    stream.push_one("b", 3)
    assert written == ["a"]
    assert await stream.take() == [call, "b"]
    assert stream.token_ids == [1, 2, 3]


async def test_only_the_first_choice_counts_for_a_resume() -> None:
    stream = Stream()
    stream.push_piece(Piece(text="a", token_ids=[1]))
    stream.push_piece(Piece(text="b", token_ids=[2], choice=1))
    assert stream.token_ids == [1]


async def test_a_whole_output_is_taken_when_it_is_complete() -> None:
    stream = Stream()
    taking = asyncio.create_task(stream.take_whole())
    await asyncio.sleep(0)
    stream.push("a", [1])
    await asyncio.sleep(0)
    assert not taking.done()
    stream.push("b", [2])
    stream.end(ENDING)
    assert await asyncio.wait_for(taking, 1) == ["a", "b"]


async def test_a_restarted_stream_has_forgotten_what_came_before() -> None:
    stream = Stream()
    stream.push("a", [1])
    stream.fail(WorkerLostError("w"))
    stream.restart()
    stream.push("b", [2])
    stream.end(ENDING)
    assert await stream.take_whole() == ["b"]
    assert stream.token_ids == [2]


async def test_a_stream_that_keeps_ids_gives_each_piece_its_tokens() -> None:
    stream = Stream(keep_ids=True)
    stream.push_one("a", 1)
    stream.push("bc", [2, 3])
    assert await stream.take() == [Piece(text="a", token_ids=(1,)), Piece(text="bc", token_ids=[2, 3])]
    assert stream.token_ids == [1, 2, 3]


LACKING = [
    ("text without its tokens", [("a", [])], True),
    ("thoughts without their tokens", [Piece(reasoning="hm")], True),
    ("a call without its tokens", [Piece(calls=[CallPiece(index=0, name="f")])], True),
    ("text after its tokens", [("", [1]), ("a", [])], False),
    ("text with its tokens", [("a", [1])], False),
    ("an end alone", [Piece(finish_reason="stop")], False),
    ("another choice", [Piece(text="a", choice=1)], False),
]


@pytest.mark.parametrize(("given", "lacks"), [each[1:] for each in LACKING], ids=[each[0] for each in LACKING])
@pytest.mark.parametrize("is_written", [False, True], ids=["taken", "written"])
async def test_output_whose_tokens_nobody_knows_can_not_go_on(
    given: list[Piece | tuple[str, list[int]]], lacks: bool, is_written: bool
) -> None:
    stream = Stream()
    if is_written:
        stream.writer = lambda _: True
    for each in given:
        if isinstance(each, Piece):
            stream.push_piece(each)
        else:
            stream.push(*each)
    assert stream.lacks_ids is lacks
    stream.restart()
    assert not stream.lacks_ids


def test_a_worker_that_was_left_long_ago_may_be_gone_back_to() -> None:
    left = [Move(worker=name, at_seconds=at, emitted_tokens=1, cause="") for name, at in (("a", 2.0), ("b", 6.5))]
    assert left_lately(left, 6.6) == ["a", "b"]
    assert left_lately(left, 8.0) == ["b"]
    assert left_lately(left, 60.0) == []
