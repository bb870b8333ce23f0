"""The lean gRPC client: against a real grpc.aio server, through a wire that can be cut, and byte by byte."""

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import grpc
import grpc.aio
import pytest

from services.common.errors import MeshError, Reason
from services.common.http2_client import calling
from services.common.http2_frames import ACK, END_HEADERS, END_STREAM, Code, Kind, frame, header
from services.common.http2_outgoing import send_from
from services.common.outbox import Outbox, OutboxFullError
from services.common.rpc import serve
from services.common.status import error_from_call
from tests.support.ports import free_port
from tests.support.waiting import eventually
from tests.support.wire import wire

PATH = "/test.Bytes/Talk"
Handler = Callable[[AsyncIterator[bytes], Any], AsyncIterator[bytes]]


@asynccontextmanager
async def server(handler: Handler, *, grace_seconds: float = 0.0) -> AsyncIterator[str]:
    """A real gRPC server with one method of plain bytes."""

    def register(server: grpc.aio.Server) -> Sequence[str]:
        methods: dict[str, Any] = {"Talk": grpc.stream_stream_rpc_method_handler(handler)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Bytes", methods),))
        return ["test.Bytes"]

    async with serve("127.0.0.1:0", register, grace_seconds=grace_seconds) as running:
        yield f"127.0.0.1:{running.port}"


async def echo(requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def silence(requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:  # noqa: ARG001
    await asyncio.sleep(60)
    yield b""


async def status_of(ended: Awaitable[None]) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(ended, 5)
    return caught.value.code()


async def test_messages_of_any_size_go_both_ways_in_order() -> None:
    got: list[bytes] = []
    sent = [bytes([number]) * (number * number * 150) for number in range(120)]
    async with server(echo) as target, calling(target, PATH, got.append, connect_seconds=2) as call:
        for message in sent:
            call.send(message)
        call.finish()
        await asyncio.wait_for(call.ended(), 20)
    assert got == sent


async def test_a_message_of_the_limit_comes_and_a_larger_one_ends_the_call() -> None:
    got: list[bytes] = []
    limit = 100_000
    async with (
        server(echo) as target,
        calling(target, PATH, got.append, connect_seconds=2, max_message_bytes=limit) as call,
    ):
        call.send(b"a" * limit)
        await eventually(lambda: len(got) == 1, within=5)
        call.send(b"b" * (limit + 1))
        assert await status_of(call.ended()) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert got == [b"a" * 100_000]


async def test_a_message_that_the_server_finds_too_large_ends_the_call_with_the_servers_word() -> None:
    async with server(echo) as target, calling(target, PATH, print, connect_seconds=2) as call:
        call.send(b"a" * ((4 << 20) + 1))
        assert await status_of(call.ended()) is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_error_comes_with_its_details() -> None:
    async def refuse(requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request
        raise MeshError(Reason.RATE_LIMIT_EXCEEDED, "not so fast: 100 %, é", field="pace", retry_after_seconds=1.5)

    async with server(refuse) as target, calling(target, PATH, print, connect_seconds=2) as call:
        call.finish()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call.ended(), 5)
    assert caught.value.details() == "not so fast: 100 %, é"
    error = error_from_call(caught.value)
    assert (error.reason, error.field, error.retry_after_seconds) == (Reason.RATE_LIMIT_EXCEEDED, "pace", 1.5)


async def test_a_method_that_is_not_there_is_unimplemented() -> None:
    async with server(echo) as target, calling(target, "/test.Bytes/Sing", print, connect_seconds=2) as call:
        assert await status_of(call.ended()) is grpc.StatusCode.UNIMPLEMENTED


async def test_leaving_the_block_cancels_the_call_at_once() -> None:
    over = asyncio.Event()

    async def wait(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        context.add_done_callback(lambda _: over.set())
        async for request in requests:
            yield request

    got: list[bytes] = []
    async with server(wait) as target, calling(target, PATH, got.append, connect_seconds=2) as call:
        call.send(b"a")
        await eventually(lambda: bool(got), within=5)
        call.cancel()
        await asyncio.wait_for(over.wait(), 0.1)
        assert await status_of(call.ended()) is grpc.StatusCode.CANCELLED


async def test_what_taking_a_message_raises_is_raised_by_who_waits_for_the_end() -> None:
    def take(message: bytes) -> None:
        raise ZeroDivisionError(message)

    async with server(echo) as target, calling(target, PATH, take, connect_seconds=2) as call:
        call.send(b"a")
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(call.ended(), 5)


async def test_a_call_goes_on_while_the_server_lets_running_calls_end() -> None:
    got: list[bytes] = []
    ready = asyncio.Event()
    gone = asyncio.Event()

    async def run(target: asyncio.Future[str]) -> None:
        async with server(echo, grace_seconds=5) as address:
            target.set_result(address)
            await ready.wait()
        gone.set()

    target: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(run(target))
    async with calling(await target, PATH, got.append, connect_seconds=2) as call:
        call.send(b"before")
        await eventually(lambda: len(got) == 1, within=5)
        ready.set()
        # The goodbye is on its way; nobody else is let in.
        await asyncio.sleep(0.2)
        call.send(b"after")
        await eventually(lambda: len(got) == 2, within=5)
        assert not gone.is_set()
        call.finish()
        await asyncio.wait_for(call.ended(), 2)
    await asyncio.wait_for(running, 5)


async def test_a_server_that_stops_without_grace_ends_the_call() -> None:
    got: list[bytes] = []
    async with AsyncExitStack() as running:
        target = await running.enter_async_context(server(echo))
        async with calling(target, PATH, got.append, connect_seconds=2) as call:
            call.send(b"a")
            await eventually(lambda: bool(got), within=5)
            waiting = asyncio.create_task(status_of(call.ended()))
            await running.aclose()
            assert await waiting in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


async def test_a_connection_that_is_cut_ends_the_call_at_once() -> None:
    got: list[bytes] = []
    async with (
        server(echo) as target,
        wire(target) as between,
        calling(between.address, PATH, got.append, connect_seconds=2) as call,
    ):
        call.send(b"a")
        await eventually(lambda: bool(got), within=5)
        between.cut()
        async with asyncio.timeout(0.5):
            assert await status_of(call.ended()) is grpc.StatusCode.UNAVAILABLE
        call.send(b"b")


async def test_a_server_that_gives_no_sign_of_life_is_lost() -> None:
    async with (
        server(silence) as target,
        wire(target) as between,
        calling(between.address, PATH, print, connect_seconds=2, silent_seconds=0.1, answer_seconds=0.2) as call,
    ):
        await asyncio.sleep(0.3)
        assert not call.is_over, "its pings were answered"
        between.freeze()
        async with asyncio.timeout(1.5):
            assert await status_of(call.ended()) is grpc.StatusCode.UNAVAILABLE


async def test_a_server_that_does_not_read_holds_up_what_is_sent_and_fills_the_outbox() -> None:
    go = asyncio.Event()

    async def late(requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
        await go.wait()
        async for request in requests:
            yield request[:4]

    def new() -> list[bytes]:
        return []

    got: list[bytes] = []
    async with server(late) as target, calling(target, PATH, got.append, connect_seconds=2) as call:
        outbox = Outbox(new, max_edits=50)
        send_from(outbox, call, lambda messages: messages)
        # As much as the windows take is on its way, and no more than one message beyond is kept by the call.
        put = 0
        while call.has_room:
            outbox.edit().append(put.to_bytes(4, "big") + bytes(500_000))
            put += 1
            await asyncio.sleep(0.005)
            assert put < 100
        with pytest.raises(OutboxFullError):
            _fill(outbox)
        go.set()
        outbox.close()
        await asyncio.wait_for(call.ended(), 10)
    assert got == [*(number.to_bytes(4, "big") for number in range(put)), *[b"more"] * 50]


def _fill(outbox: Outbox[list[bytes]]) -> None:
    for _ in range(51):
        outbox.edit().append(b"more")


async def test_nobody_listens_is_known_at_once() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1), calling(f"127.0.0.1:{free_port()}", PATH, print, connect_seconds=30):
            pass


@asynccontextmanager
async def says(*frames: bytes, greet: bool = True) -> AsyncIterator[str]:
    """A server that says these frames to whoever begins a call."""

    serving: set[asyncio.Task[None]] = set()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readexactly(24)
            if greet:
                writer.write(frame(Kind.SETTINGS, 0, 0) + frame(Kind.SETTINGS, ACK, 0))
            await _headers_of_call(reader)
            writer.write(b"".join(frames))
            await reader.read()
        writer.close()

    def serve_soon(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.create_task(serve_one(reader, writer)))

    listener = await asyncio.start_server(serve_soon, "127.0.0.1", 0)
    async with listener:
        yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    await asyncio.wait_for(asyncio.gather(*serving), 5)


async def _headers_of_call(reader: asyncio.StreamReader) -> None:
    while True:
        head = await reader.readexactly(9)
        await reader.readexactly(int.from_bytes(head[:3], "big"))
        if head[3] == Kind.HEADERS:
            return


async def test_a_server_that_does_not_greet_is_no_server() -> None:
    async with says(greet=False) as target:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2), calling(target, PATH, print, connect_seconds=0.2):
                pass


OK = b"\x88" + header(b"content-type", b"application/grpc")
ANSWER = frame(Kind.HEADERS, END_HEADERS, 1, OK)
DATA = frame(Kind.DATA, 0, 1, b"\0\0\0\0\1a")


def trailers(*named: tuple[bytes, bytes]) -> bytes:
    return frame(Kind.HEADERS, END_HEADERS | END_STREAM, 1, b"".join(header(*each) for each in named))


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ((trailers((b":status", b"503")),), "UNAVAILABLE"),
        ((trailers((b":status", b"401")),), "UNAUTHENTICATED"),
        ((trailers((b":status", b"404")),), "UNIMPLEMENTED"),
        ((trailers((b":status", b"200"), (b"content-type", b"text/html")),), "UNKNOWN"),
        ((frame(Kind.HEADERS, END_HEADERS | END_STREAM, 1, OK + header(b"grpc-status", b"14")),), "UNAVAILABLE"),
        ((ANSWER, DATA, trailers((b"grpc-status", b"8"))), "RESOURCE_EXHAUSTED"),
        ((ANSWER, trailers((b"grpc-status", b"999"))), "UNKNOWN"),
        ((ANSWER, trailers((b"x", b"y" * 300))), "UNKNOWN"),
        ((ANSWER, frame(Kind.DATA, END_STREAM, 1)), "INTERNAL"),
        ((ANSWER, frame(Kind.DATA, 0, 1, b"\1\0\0\0\1a")), "UNIMPLEMENTED"),
        ((ANSWER, frame(Kind.RST_STREAM, 0, 1, struct.pack(">I", Code.REFUSED_STREAM))), "UNAVAILABLE"),
        ((ANSWER, frame(Kind.RST_STREAM, 0, 1, struct.pack(">I", Code.CANCEL))), "CANCELLED"),
        ((ANSWER, frame(Kind.RST_STREAM, 0, 1, struct.pack(">I", Code.ENHANCE_YOUR_CALM))), "RESOURCE_EXHAUSTED"),
        ((ANSWER, frame(Kind.RST_STREAM, 0, 1, struct.pack(">I", Code.PROTOCOL_ERROR))), "INTERNAL"),
        ((frame(Kind.GOAWAY, 0, 0, struct.pack(">II", 0, Code.NO_ERROR)),), "UNAVAILABLE"),
        ((DATA,), "UNAVAILABLE"),
        ((ANSWER, frame(Kind.PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\2")), "UNAVAILABLE"),
        ((ANSWER, frame(Kind.DATA, 0, 3, b"")), "UNAVAILABLE"),
        ((ANSWER, frame(Kind.WINDOW_UPDATE, 0, 1, b"\x7f\xff\xff\xff")), "UNAVAILABLE"),
        ((b"HTTP/1.1 400 Bad Request\r\n\r\n",), "UNAVAILABLE"),
    ],
)  # fmt: skip
async def test_an_end_has_the_code_that_grpc_gives_it(frames: tuple[bytes, ...], code: str) -> None:
    async with says(*frames) as target, calling(target, PATH, lambda _: None, connect_seconds=2) as call:
        assert (await status_of(call.ended())).name == code


async def test_headers_may_come_in_pieces_and_padded_behind_a_hundred() -> None:
    got: list[bytes] = []
    parts = (
        frame(Kind.HEADERS, END_HEADERS, 1, header(b":status", b"103")),
        frame(Kind.HEADERS, 0, 1, OK[:5]),
        frame(Kind.CONTINUATION, END_HEADERS, 1, OK[5:]),
        frame(Kind.DATA, 0x8, 1, b"\3\0\0\0\0\2a" + bytes(3)),
        frame(Kind.PING, 0, 0, b"12345678"),
        frame(Kind.DATA, 0, 1, b"b"),
        trailers((b"grpc-status", b"0")),
    )
    async with says(*parts) as target, calling(target, PATH, got.append, connect_seconds=2) as call:
        await asyncio.wait_for(call.ended(), 2)
    assert got == [b"ab"]
