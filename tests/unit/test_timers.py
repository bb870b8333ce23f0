"""Timers that share one of the event loop's, and what holds while a client waits."""

import asyncio
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

import pytest

from services.common.errors import MeshError, Reason
from services.gateway.http import ClientLeftError
from services.gateway.request import Request
from services.gateway.response import Response
from services.gateway.timers import Timers
from services.gateway.waiting import while_connected


async def test_timers_of_one_length_go_off_in_their_order_and_those_that_were_stopped_do_not() -> None:
    timers, gone = Timers(), list[int]()
    stops = [timers.after(0.02, partial(gone.append, number)) for number in range(4)]
    stops[0]()
    stops[2]()
    stops[2]()
    await asyncio.sleep(0.1)
    assert gone == [1, 3]


async def test_a_timer_that_is_set_later_goes_off_later_and_no_sooner_than_it_should() -> None:
    timers, loop, gone = Timers(), asyncio.get_running_loop(), list[float]()
    began = loop.time()
    timers.after(0.05, lambda: gone.append(loop.time()))
    await asyncio.sleep(0.03)
    timers.after(0.05, lambda: gone.append(loop.time()))
    await asyncio.sleep(0.2)
    assert gone[0] - began >= 0.049
    assert gone[1] - began >= 0.079


async def test_a_timer_goes_off_after_all_before_it_were_stopped_and_its_queue_was_empty() -> None:
    timers, gone = Timers(), asyncio.Event()
    timers.after(0.01, gone.set)()
    await asyncio.sleep(0.05)
    assert not gone.is_set()
    timers.after(0.01, gone.set)
    await asyncio.wait_for(gone.wait(), 5)


class Client:
    """One that stays until it leaves."""

    def __init__(self) -> None:
        self.left: Callable[[], None] | None = None
        self.response = Response(self._send, "r")
        watch = {"tokenloom.watch": self._watch}
        self.request = Request({"method": "POST", "path": "/", "headers": [], "extensions": watch}, self._receive)

    def _watch(self, left: Callable[[], None]) -> Callable[[], None]:
        self.left = left
        return lambda: setattr(self, "left", None)

    def leave(self) -> None:
        assert self.left is not None
        self.left()

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        """Takes everything."""

    async def _receive(self) -> MutableMapping[str, Any]:
        raise AssertionError("nobody asks")


async def test_a_block_ends_when_its_client_has_left() -> None:
    client = Client()
    asyncio.get_running_loop().call_soon(client.leave)
    with pytest.raises(ClientLeftError), while_connected(client.request, client.response, 60):
        await asyncio.sleep(60)
    assert client.left is None


async def test_a_block_ends_when_its_time_is_over() -> None:
    client = Client()
    with pytest.raises(MeshError) as caught, while_connected(client.request, client.response, 0.02):
        await asyncio.sleep(60)
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED


async def test_a_cancellation_from_outside_stays_one() -> None:
    client = Client()

    async def wait() -> None:
        with while_connected(client.request, client.response, 60):
            await asyncio.sleep(60)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_client_that_leaves_behind_the_whole_answer_changes_nothing() -> None:
    client = Client()
    with while_connected(client.request, client.response, 60):
        await client.response.send_json(200, {})
        client.leave()
        await asyncio.sleep(0)
