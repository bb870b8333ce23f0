"""Writing to a client out of turn: what happens when it reads too slowly, and when the server fails."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from services.gateway.http import Response


class Server:
    """A server's send(), whose buffers can be full."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.room = asyncio.Event()
        self.room.set()
        self.error: Exception | None = None

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if not self.room.is_set():
            await self.room.wait()
        if self.error is not None:
            raise self.error
        self.sent.append(message.get("body", b""))


async def test_what_is_written_out_of_turn_is_sent_at_once() -> None:
    server = Server()
    assert Response(server.send, "r").write_events(b"a")
    assert server.sent == [b"a"]


async def test_a_write_into_full_buffers_is_finished_by_the_next_send_and_nothing_overtakes_it() -> None:
    server = Server()
    response = Response(server.send, "r")
    server.room.clear()
    assert response.write_events(b"a")
    assert not response.write_events(b"b")
    sending = asyncio.create_task(response.send_events(b"b"))
    await asyncio.sleep(0)
    assert server.sent == []
    server.room.set()
    await asyncio.wait_for(sending, 1)
    assert server.sent == [b"a", b"b"]
    assert response.write_events(b"c")
    assert server.sent == [b"a", b"b", b"c"]


async def test_nothing_is_written_out_of_turn_while_a_send_waits() -> None:
    server = Server()
    response = Response(server.send, "r")
    server.room.clear()
    sending = asyncio.create_task(response.send_events(b"a"))
    await asyncio.sleep(0)
    assert not response.write_events(b"b")
    server.room.set()
    await asyncio.wait_for(sending, 1)
    assert server.sent == [b"a"]


async def test_a_servers_failure_is_raised_where_the_stream_is_read_not_where_it_is_written() -> None:
    server = Server()
    response = Response(server.send, "r")
    server.error = RuntimeError("broken")
    assert not response.write_events(b"a")
    with pytest.raises(RuntimeError, match="broken"):
        await response.send_events(b"b")
