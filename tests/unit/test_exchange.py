"""HTTP as the gateway speaks it: what comes of whole requests, pipelined ones, odd ones, and answers that go wrong."""

import asyncio
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from services.gateway.http import Receive, Send
from services.gateway.server import serve_http

POST = b"POST /%b?a=1 HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nbody"


class Application:
    """Answers by path."""

    def __init__(self) -> None:
        self.held: list[Callable[[], None]] = []
        self.holds = False

    def when_noted(self, call: Callable[[], None]) -> None:
        """Calls back at once, or when somebody says so."""
        if self.holds:
            self.held.append(call)
        else:
            call()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        path, body, message = scope["path"], b"", await receive()
        while message["more_body"]:
            body += message["body"]
            message = await receive()
        body += message["body"]
        if path == "/silent":
            return
        if path == "/broken":
            raise ValueError("broken")
        headers = [(b"x-method", scope["method"].encode())]
        if path == "/injected":
            headers.append((b"x-text", b"a\r\nx-more: b"))
        if path != "/events":
            headers.append((b"content-length", b"9" if path == "/longer" else b"%d" % len(body)))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if path == "/cut":
            raise ValueError("cut")
        for part in (body[:2], body[2:]) if path == "/events" else ():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"" if path == "/events" else body})


@asynccontextmanager
async def connected(app: Application) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with serve_http(app, "127.0.0.1:0", short_cuts=(), when_noted=app.when_noted, drain_seconds=1) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(10):
            yield reader, writer
        writer.close()


async def answer_of(reader: asyncio.StreamReader, *, has_body: bool = True) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    if b"chunked" in head:
        return head, await reader.readuntil(b"0\r\n\r\n")
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head, await reader.readexactly(length if has_body else 0)


async def test_whole_requests_are_answered_one_after_another_on_one_connection() -> None:
    async with connected(Application()) as (reader, writer):
        for _ in range(3):
            writer.write(POST % b"whole")
            head, body = await answer_of(reader)
            assert head.startswith(b"HTTP/1.1 200 OK\r\nx-method: POST\r\n")
            assert body == b"body"


async def test_an_answer_of_unknown_length_comes_in_chunks() -> None:
    async with connected(Application()) as (reader, writer):
        writer.write(POST % b"events")
        assert (await answer_of(reader))[1] == b"2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n"


async def test_a_request_that_comes_in_pieces_is_answered_like_one_that_comes_whole() -> None:
    async with connected(Application()) as (reader, writer):
        for part in (POST % b"whole")[:20], (POST % b"whole")[20:-2], b"dy":
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.02)
        assert (await answer_of(reader))[1] == b"body"


async def test_requests_that_come_together_are_answered_in_their_order() -> None:
    async with connected(Application()) as (reader, writer):
        writer.write(POST % b"events" + POST % b"whole" + POST % b"events")
        bodies = [(await answer_of(reader))[1] for _ in range(3)]
        assert bodies == [b"2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n", b"body", b"2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n"]


async def test_the_answer_to_head_has_no_body() -> None:
    async with connected(Application()) as (reader, writer):
        writer.write(b"HEAD /whole HTTP/1.1\r\nhost: x\r\n\r\n" + POST % b"whole")
        assert b"x-method: HEAD" in (await answer_of(reader, has_body=False))[0]
        assert (await answer_of(reader))[1] == b"body"


async def test_a_connection_that_is_not_kept_is_closed_behind_its_answer() -> None:
    async with connected(Application()) as (reader, writer):
        writer.write((POST % b"whole").replace(b"host: x", b"connection: close"))
        assert (await answer_of(reader))[1] == b"body"
        assert await reader.read() == b""


@pytest.mark.parametrize("path", [b"silent", b"broken", b"injected"])
async def test_a_request_without_an_answer_gets_a_500_and_the_connection_ends(path: bytes) -> None:
    async with connected(Application()) as (reader, writer):
        writer.write(POST % path)
        head, body = await answer_of(reader)
        assert head.startswith(b"HTTP/1.1 500 ")
        assert body == b"Internal Server Error"
        assert await reader.read() == b""


@pytest.mark.parametrize("path", [b"cut", b"longer"])
async def test_an_answer_that_ends_early_does_not_look_finished(path: bytes) -> None:
    async with connected(Application()) as (reader, writer):
        writer.write(POST % path)
        assert not (await reader.read()).endswith(b"body")


async def test_the_end_of_an_answer_waits_until_the_request_is_noted_and_so_does_the_next_request() -> None:
    app = Application()
    app.holds = True
    async with connected(app) as (reader, writer):
        writer.write(POST % b"events" + POST % b"whole")
        assert await reader.readuntil(b"dy\r\n")
        await asyncio.sleep(0.05)
        assert len(app.held) == 1
        app.holds = False
        app.held.pop()()
        assert await reader.readexactly(5) == b"0\r\n\r\n"
        assert (await answer_of(reader))[1] == b"body"


async def test_an_answer_whose_end_waits_is_ended_although_the_server_stops() -> None:
    app = Application()
    app.holds = True
    async with serve_http(app, "127.0.0.1:0", short_cuts=(), when_noted=app.when_noted, drain_seconds=5) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(POST % b"whole")
        while not app.held:
            await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_later(0.2, app.held.pop())
    assert (await answer_of(reader))[1] == b"body"
    assert await reader.read() == b""
    writer.close()
