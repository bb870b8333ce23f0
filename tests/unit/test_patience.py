"""How long a client is borne that takes nothing, and for how long it is told."""

import asyncio
import time

import pytest

from services.inference.patience import Abandoned, bounded_writes


async def test_a_write_that_takes_too_long_ends_the_block() -> None:
    async def write_for_ever() -> None:
        async with bounded_writes(0.05) as writing:
            writing.since = asyncio.get_running_loop().time()
            await asyncio.sleep(5)

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await write_for_ever()
    assert 0.05 <= time.monotonic() - began < 1


async def test_writes_that_are_taken_in_time_may_go_on_for_as_long_as_they_like() -> None:
    loop = asyncio.get_running_loop()
    async with bounded_writes(0.05) as writing:
        for _ in range(10):
            writing.since = loop.time()
            await asyncio.sleep(0.02)
            writing.since = None


async def test_waiting_for_something_to_write_is_no_write() -> None:
    async with bounded_writes(0.02):
        await asyncio.sleep(0.1)


def test_what_was_given_up_is_told_for_two_seconds() -> None:
    now = 10.0
    abandoned = Abandoned(lambda: now)
    assert abandoned.recent() == []
    abandoned.note("a")
    now = 11.5
    abandoned.note("b")
    assert abandoned.recent() == ["a", "b"]
    now = 12.5
    assert abandoned.recent() == ["b"]
    now = 14.0
    assert abandoned.recent() == []
