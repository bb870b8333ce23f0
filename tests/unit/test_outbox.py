"""The one writer of a stream."""

import asyncio
from collections.abc import Callable

import pytest

from services.common.outbox import Outbox, OutboxFullError


def new_outbox(max_edits: int = 100) -> "Outbox[list[str]]":
    new: Callable[[], list[str]] = list
    return Outbox(new, max_edits=max_edits)


async def test_what_is_added_in_one_turn_goes_out_together() -> None:
    outbox = new_outbox()
    outbox.edit().append("a")
    outbox.edit().append("b")
    outbox.close()
    assert [message async for message in outbox.messages()] == [["a", "b"]]


async def test_what_comes_while_a_message_is_written_goes_out_next() -> None:
    outbox = new_outbox()
    messages = outbox.messages()
    outbox.edit().append("a")
    assert await anext(messages) == ["a"]
    outbox.edit().append("b")
    outbox.edit().append("c")
    assert await anext(messages) == ["b", "c"]


async def test_a_reader_waits_until_there_is_something() -> None:
    outbox = new_outbox()
    reading = asyncio.ensure_future(anext(outbox.messages()))
    await asyncio.sleep(0)
    assert not reading.done()
    outbox.edit().append("a")
    assert await reading == ["a"]


async def test_closing_an_empty_outbox_ends_its_messages() -> None:
    outbox = new_outbox()
    reading = asyncio.ensure_future(anext(outbox.messages(), None))
    await asyncio.sleep(0)
    outbox.close()
    assert await reading is None


async def test_what_is_left_at_closing_still_goes_out() -> None:
    outbox = new_outbox()
    messages = outbox.messages()
    outbox.edit().append("a")
    assert await anext(messages) == ["a"]
    outbox.edit().append("b")
    outbox.close()
    assert await anext(messages) == ["b"]
    assert await anext(messages, None) is None


async def test_a_peer_that_does_not_read_is_noticed() -> None:
    outbox = new_outbox(max_edits=3)
    for _ in range(3):
        outbox.edit()
    with pytest.raises(OutboxFullError):
        outbox.edit()
    await anext(outbox.messages())
    outbox.edit()


async def test_large_additions_fill_it_sooner_but_one_always_fits() -> None:
    outbox = new_outbox(max_edits=10)
    outbox.edit(50)
    with pytest.raises(OutboxFullError):
        outbox.edit()
    await anext(outbox.messages())
    outbox.edit(6)
    with pytest.raises(OutboxFullError):
        outbox.edit(6)
