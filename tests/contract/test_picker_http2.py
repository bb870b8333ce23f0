"""The edge's picker on the wire: the test speaks HTTP/2 byte by byte, well and badly."""

import asyncio
import struct
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from hpack import Decoder, Encoder
from tokenloom.inference.v1 import generation_pb2

from services.common.http2_frames import ACK, END_HEADERS, END_STREAM, PREFACE, Code, Kind, frame
from services.router.app import RunningRouter
from tests.support.ext_proc import BUFFERED, body_message, framed
from tests.support.router import running_router, worker_link
from tests.support.waiting import eventually

PATH = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
SETTINGS = frame(Kind.SETTINGS, 0, 0)
HELLO = framed(generation_pb2.GenerateRequest(model="demo", text="hello"))
Frame = tuple[int, int, int, bytes]


class Peer:
    """The other end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self.encoder = Encoder()
        self.decoder = Decoder()

    def send(self, *frames: bytes) -> None:
        """Sends frames."""
        self.writer.write(b"".join(frames))

    def headers(self, stream_id: int, flags: int = END_HEADERS, **more: str) -> bytes:
        """The frame that begins a call."""
        named = [(":method", "POST"), (":scheme", "http"), (":path", PATH), ("content-type", "application/grpc")]
        named = [(key, more.pop(key[1:], value)) for key, value in named]
        named += [(key.replace("_", "-"), value) for key, value in more.items()]
        return frame(Kind.HEADERS, flags, stream_id, self.encoder.encode(named))

    async def frame(self) -> Frame:
        """The next frame."""
        async with asyncio.timeout(5):
            head = await self._reader.readexactly(9)
            payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
        return head[3], head[4], int.from_bytes(head[5:], "big"), payload

    async def next(self, kind: Kind) -> Frame:
        """The next frame of a kind."""
        while (got := await self.frame())[0] != kind:
            pass
        return got

    async def said(self) -> Any:
        """The next ProcessingResponse."""
        _, _, _, payload = await self.next(Kind.DATA)
        return ext_proc.ProcessingResponse.FromString(payload[5:])

    async def answer(self) -> Any:
        """The next one that is more than a plea for patience."""
        while (said := await self.said()).WhichOneof("response") is None:
            pass
        return said

    async def broken(self) -> int:
        """The code with which the server ends the connection."""
        _, _, _, payload = await self.next(Kind.GOAWAY)
        async with asyncio.timeout(5):
            assert await self._reader.read() == b""
        return int.from_bytes(payload[4:8], "big")


@asynccontextmanager
async def peer(router: RunningRouter, *, greet: bool = True) -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", router.picker_port)
    try:
        connected = Peer(reader, writer)
        if greet:
            connected.send(PREFACE, SETTINGS)
        yield connected
    finally:
        writer.close()


@asynccontextmanager
async def picking(**settings: Any) -> AsyncIterator[tuple[RunningRouter, Peer]]:
    """A router with one worker, and a peer of its picker."""
    async with (
        running_router(picker="127.0.0.1:0", **settings) as (router, to_router),
        worker_link(router, to_router),
        peer(router) as connected,
    ):
        yield router, connected


def shown(body: bytes = HELLO) -> bytes:
    """A call's first message, framed: the body alone, with headers as attributes."""
    return framed(body_message("Generate", body, mode=BUFFERED))


def leases(router: RunningRouter) -> int:
    return sum(len(worker.leases) for worker in router.fleet.workers)


async def test_a_pick_in_pieces_padded_with_priority_and_continuation() -> None:
    async with picking() as (router, envoy):
        message = shown()
        block = envoy.headers(1)[9:]
        first = b"\x02" + struct.pack(">IB", 0, 16) + block[:5] + b"\0\0"
        envoy.send(frame(Kind.HEADERS, 0x28, 1, first), frame(Kind.CONTINUATION, END_HEADERS, 1, block[5:]))
        envoy.send(frame(Kind.PRIORITY, 0, 1, bytes(5)), frame(Kind.PING, 0, 0, b"12345678"))
        envoy.send(frame(Kind.DATA, 0x8, 1, b"\x03" + message[:7] + bytes(3)))
        for byte in message[7:]:
            envoy.send(frame(Kind.DATA, 0, 1, bytes((byte,))))
        assert (await envoy.next(Kind.PING))[3] == b"12345678"
        answer = await envoy.answer()
        assert answer.dynamic_metadata["envoy.lb"]["x-gateway-destination-endpoint"] == "127.0.0.1:5001"
        assert leases(router) == 1


@pytest.mark.parametrize("how", ["reset", "end", "gone"])
async def test_however_a_call_ends_its_lease_is_free(how: str) -> None:
    async with picking() as (router, envoy):
        envoy.send(envoy.headers(1), frame(Kind.DATA, 0, 1, shown()))
        await envoy.answer()
        assert leases(router) == 1
        if how == "reset":
            envoy.send(frame(Kind.RST_STREAM, 0, 1, struct.pack(">I", 8)))
        elif how == "end":
            envoy.send(frame(Kind.DATA, END_STREAM, 1))
            _, flags, _, block = await envoy.next(Kind.HEADERS)
            assert flags & END_STREAM
            assert dict(envoy.decoder.decode(block, raw=True)) == {b"grpc-status": b"0"}
        else:
            envoy.writer.transport.abort()
        await eventually(lambda: leases(router) == 0, within=5)


async def test_a_thousand_calls_share_a_connection_and_take_turns() -> None:
    async with picking(max_waiting=2000) as (router, envoy):
        for stream_id in range(1, 2001, 2):
            envoy.send(envoy.headers(stream_id), frame(Kind.DATA, 0, stream_id, shown()))
        # Those that would wait too long are refused; the others have a worker, or stand in the line.
        await eventually(lambda: router.admission.waiting_count + leases(router) > 0, within=5)
        envoy.send(frame(Kind.PING, 0, 0, b"12345678"))
        await envoy.next(Kind.PING)
        envoy.writer.close()
        await eventually(lambda: router.admission.waiting_count + leases(router) == 0, within=5)


async def test_health_is_answered_before_a_crowd_that_is_told_to_wait_and_gets_its_answers_in_order() -> None:
    async with picking() as (router, envoy), peer(router) as other:
        calls = range(1, 1001, 2)
        blocks = [envoy.headers(stream) + frame(Kind.DATA, 0, stream, shown()) for stream in calls]
        envoy.send(frame(Kind.WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 24)), *blocks)
        other.send(other.headers(1, path="/grpc.health.v1.Health/Check"), frame(Kind.DATA, END_STREAM, 1, bytes(5)))
        _, _, _, payload = await other.next(Kind.DATA)
        assert payload[5:] == b"\x08\x01"
        picked: list[int] = []
        patient: set[int] = set()
        # Those for whom there is no room are told to wait, too.
        while {*picked, *patient} != {*calls}:
            _, _, stream, payload = await envoy.next(Kind.DATA)
            if ext_proc.ProcessingResponse.FromString(payload[5:]).WhichOneof("response") is None:
                patient.add(stream)
            else:
                picked.append(stream)
        assert picked == sorted(picked)
        assert patient


async def test_a_request_that_waits_is_said_to_wait() -> None:
    async with picking() as (router, envoy):
        for stream_id in range(1, 201, 2):
            envoy.send(envoy.headers(stream_id), frame(Kind.DATA, 0, stream_id, shown()))
        await eventually(lambda: router.admission.waiting_count > 0, within=5)
        while (answer := await envoy.said()).WhichOneof("response") is not None:
            pass
        assert answer.override_message_timeout.seconds >= 60


async def test_answers_wait_for_the_peers_windows() -> None:
    async with picking() as (_, envoy):
        # SETTINGS_INITIAL_WINDOW_SIZE of 10 bytes.
        envoy.send(frame(Kind.SETTINGS, 0, 0, struct.pack(">HI", 4, 10)))
        envoy.send(envoy.headers(1), frame(Kind.DATA, 0, 1, shown()))
        part = (await envoy.next(Kind.DATA))[3]
        assert len(part) == 10
        envoy.send(frame(Kind.WINDOW_UPDATE, 0, 1, struct.pack(">I", 20)))
        part += (await envoy.next(Kind.DATA))[3]
        assert len(part) == 30
        envoy.send(frame(Kind.SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 20)))
        part += (await envoy.next(Kind.DATA))[3]
        assert ext_proc.ProcessingResponse.FromString(part[5:]).HasField("request_body")


async def test_windows_are_opened_again() -> None:
    async with picking() as (_, envoy):
        envoy.send(envoy.headers(1))
        body = framed(generation_pb2.GenerateRequest(model="demo", text="x" * 3_000_000))
        message, sent, window = shown(body), 0, 1 << 20
        while sent < len(message):
            while window < 16_384:
                _, _, stream_id, payload = await envoy.next(Kind.WINDOW_UPDATE)
                window += int.from_bytes(payload, "big") if stream_id == 1 else 0
            envoy.send(frame(Kind.DATA, 0, 1, message[sent : sent + 16_384]))
            sent, window = sent + 16_384, window - 16_384
        assert (await envoy.answer()).HasField("request_body")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(b"\0" + (17 << 20).to_bytes(4, "big"), 413, id="too large"),
        pytest.param(b"\1" + (3).to_bytes(4, "big") + b"abc", 400, id="compressed"),
        pytest.param(b"\0" + (3).to_bytes(4, "big") + b"\xff\xff\xff", 400, id="no message"),
        pytest.param(framed(ext_proc.ProcessingRequest()), 400, id="an empty message"),
    ],
)
async def test_what_is_no_message_is_refused_and_the_next_call_is_answered(data: bytes, status: int) -> None:
    async with picking() as (_, envoy):
        envoy.send(envoy.headers(1), frame(Kind.DATA, 0, 1, data))
        assert (await envoy.answer()).immediate_response.status.code == status
        envoy.send(envoy.headers(3), frame(Kind.DATA, 0, 3, shown()))
        assert (await envoy.answer()).HasField("request_body")


async def test_another_method_is_unimplemented() -> None:
    async with picking() as (_, envoy):
        envoy.send(envoy.headers(1, path="/nothing"))
        await envoy.next(Kind.HEADERS)
        _, flags, _, block = await envoy.next(Kind.HEADERS)
        assert flags & END_STREAM
        assert b"12" in block


async def test_the_deadline_of_the_call_is_kept() -> None:
    async with picking() as (router, envoy):
        envoy.send(envoy.headers(1, grpc_timeout="50m"), frame(Kind.DATA, 0, 1, shown()))
        await envoy.answer()
        assert (await envoy.next(Kind.HEADERS))[3].endswith(b"4")
        assert leases(router) == 0


BROKEN: list[tuple[str, list[bytes], Code]] = [
    ("a frame that is too large", [struct.pack(">BHBBI", 1, 0, 0, 0, 1)], Code.FRAME_SIZE_ERROR),
    ("data of no stream", [frame(Kind.DATA, 0, 0, b"x")], Code.PROTOCOL_ERROR),
    ("data of an idle stream", [frame(Kind.DATA, 0, 5, b"x")], Code.PROTOCOL_ERROR),
    ("a reset of an idle stream", [frame(Kind.RST_STREAM, 0, 5, bytes(4))], Code.PROTOCOL_ERROR),
    ("a short reset", [frame(Kind.RST_STREAM, 0, 1, b"x")], Code.FRAME_SIZE_ERROR),
    ("a server's stream", [frame(Kind.HEADERS, END_HEADERS, 2, b"\x83")], Code.PROTOCOL_ERROR),
    ("broken headers", [frame(Kind.HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff")], Code.COMPRESSION_ERROR),
    ("more padding than payload", [frame(Kind.HEADERS, 0xC, 1, b"\x09abc")], Code.PROTOCOL_ERROR),
    (
        "headers that do not end",
        [frame(Kind.HEADERS, 0, 1, b"\x83"), frame(Kind.PING, 0, 0, bytes(8))],
        Code.PROTOCOL_ERROR,
    ),
    ("a continuation of nothing", [frame(Kind.CONTINUATION, 0, 1, b"x")], Code.PROTOCOL_ERROR),
    (
        "headers without end",
        [frame(Kind.HEADERS, 0, 1, b"\x83"), *[frame(Kind.CONTINUATION, 0, 1, bytes(9000))] * 2],
        Code.ENHANCE_YOUR_CALM,
    ),
    (
        "continuations of nothing",
        [frame(Kind.HEADERS, 0, 1, b"\x83"), frame(Kind.CONTINUATION, 0, 1)],
        Code.ENHANCE_YOUR_CALM,
    ),
    ("a push", [frame(Kind.PUSH_PROMISE, 0, 1, bytes(8))], Code.PROTOCOL_ERROR),
    ("a ping of another form", [frame(Kind.PING, 0, 0, b"x")], Code.FRAME_SIZE_ERROR),
    ("settings that end early", [frame(Kind.SETTINGS, 0, 0, b"xyz")], Code.FRAME_SIZE_ERROR),
    ("settings of a stream", [frame(Kind.SETTINGS, 0, 1)], Code.PROTOCOL_ERROR),
    ("settings in an acknowledgement", [frame(Kind.SETTINGS, ACK, 0, bytes(6))], Code.PROTOCOL_ERROR),
    (
        "a window that is too large",
        [frame(Kind.SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 31))],
        Code.FLOW_CONTROL_ERROR,
    ),
    ("frames that are too small", [frame(Kind.SETTINGS, 0, 0, struct.pack(">HI", 5, 1))], Code.PROTOCOL_ERROR),
    ("a window update by nothing", [frame(Kind.WINDOW_UPDATE, 0, 0, bytes(4))], Code.PROTOCOL_ERROR),
    ("a short window update", [frame(Kind.WINDOW_UPDATE, 0, 0, b"x")], Code.FRAME_SIZE_ERROR),
    (
        "a window that overflows",
        [frame(Kind.WINDOW_UPDATE, 0, 0, struct.pack(">I", (1 << 31) - 1))],
        Code.FLOW_CONTROL_ERROR,
    ),
]


@pytest.mark.parametrize(("frames", "code"), [pytest.param(*row[1:], id=row[0]) for row in BROKEN])
async def test_a_peer_that_breaks_the_protocol_is_told_so_and_harms_no_other(frames: list[bytes], code: Code) -> None:
    async with picking() as (router, well), peer(router) as badly:
        badly.send(*frames)
        assert await badly.broken() == code
        well.send(well.headers(1), frame(Kind.DATA, 0, 1, shown()))
        assert (await well.answer()).HasField("request_body")


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.1\r\n\r\n", PREFACE + frame(Kind.PING, 0, 0, bytes(8))])
async def test_who_does_not_greet_as_it_should_be_is_told_so(greeting: bytes) -> None:
    async with picking() as (router, _), peer(router, greet=False) as badly:
        badly.send(greeting)
        assert await badly.broken() == Code.PROTOCOL_ERROR


async def test_a_router_that_stops_ends_calls_and_says_goodbye() -> None:
    async with AsyncExitStack() as after, AsyncExitStack() as router_lives:
        router, to_router = await router_lives.enter_async_context(running_router(picker="127.0.0.1:0"))
        envoy = await after.enter_async_context(peer(router))
        await router_lives.enter_async_context(worker_link(router, to_router))
        envoy.send(envoy.headers(1), frame(Kind.DATA, 0, 1, shown()))
        await envoy.answer()
        began = time.monotonic()
        await router_lives.aclose()
        assert time.monotonic() - began < 0.5
        # With OK, Envoy goes on without the picker.
        assert (await envoy.next(Kind.HEADERS))[3].endswith(b"0")
        assert await envoy.broken() == Code.NO_ERROR
