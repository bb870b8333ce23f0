"""Writing to a client out of turn: what happens when it reads too slowly, and when the server fails."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from services.common.errors import MeshError, Reason
from services.gateway.http import ClientLeftError
from services.gateway.request import Request
from services.gateway.response import Response


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


@pytest.mark.parametrize("begun", ["out of turn", "in turn"])
async def test_a_client_that_takes_nothing_for_too_long_is_cut_off(begun: str) -> None:
    server, cut = Server(), asyncio.Event()
    response = Response(server.send, "r", client_seconds=0.05, abort=cut.set)
    server.room.clear()
    if begun == "out of turn":
        assert response.write_events(b"a")
    with pytest.raises(ClientLeftError):
        await asyncio.wait_for(response.send_events(b"b"), 1)
    assert cut.is_set()
    assert server.sent == []


async def test_a_body_that_comes_too_slowly_for_its_size_is_not_waited_for() -> None:
    async def drip() -> MutableMapping[str, Any]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b" ", "more_body": True}

    headers = [(b"content-type", b"application/json")]
    request = Request({"method": "POST", "path": "/", "headers": headers}, drip, client_seconds=0.1)
    with pytest.raises(MeshError) as caught:
        await asyncio.wait_for(request.json_body(1000), 1)
    assert caught.value.reason is Reason.REQUEST_TIMEOUT


async def test_a_body_may_take_as_long_as_its_size_needs() -> None:
    sent = 0

    async def come() -> MutableMapping[str, Any]:
        nonlocal sent
        await asyncio.sleep(0.02)
        sent += 1
        return {"type": "http.request", "body": bytes(1000), "more_body": sent < 10}

    headers = [(b"content-type", b"application/json")]
    request = Request({"method": "POST", "path": "/", "headers": headers}, come, client_seconds=0.1)
    assert len(await request.json_body(100_000)) == 10_000
