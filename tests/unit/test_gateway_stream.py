"""The buffer between a worker's session and a client's reader."""

import asyncio

import pytest

from services.common.errors import MeshError, Reason
from services.gateway.stream import Ending, Stream, WorkerLostError

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
