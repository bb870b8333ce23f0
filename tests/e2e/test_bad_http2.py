"""Floods of HTTP/2 over the whole mesh: who sends one loses its connection, and nobody else notices."""

import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Final

from services.common.http2_frames import END_HEADERS, END_STREAM, Code, Kind, frame, settings
from tests.support.bad_inputs import assert_harmless
from tests.support.http2 import Peer
from tests.support.mesh import Mesh

_PATH: Final = "/v1/completions"
_MOST_BYTES: Final = 32 << 20
_MOST_SECONDS: Final = 8.0
Flood = Callable[[Peer], Iterator[bytes]]
"""What a client sends for as long as it may, piece by piece."""


def _streams(after: Callable[[int], bytes]) -> Flood:
    """Streams without end, each followed by what makes one of both sides reset it."""

    def flood(peer: Peer) -> Iterator[bytes]:
        while True:
            stream_id = peer.new_id()
            yield peer.headers(stream_id, _PATH) + after(stream_id)

    return flood


def _frames(make: Callable[[int], bytes]) -> Flood:
    """The same frames without end on one stream that is open."""

    def flood(peer: Peer) -> Iterator[bytes]:
        stream_id = peer.new_id()
        yield peer.headers(stream_id, _PATH)
        while True:
            yield make(stream_id) * 100

    return flood


def _headers(make: Callable[[Peer, int], bytes]) -> Flood:
    """Headers that never end."""

    def flood(peer: Peer) -> Iterator[bytes]:
        stream_id = peer.new_id()
        yield peer.headers(stream_id, _PATH, flags=0)
        for number in count():
            yield frame(Kind.CONTINUATION, 0, stream_id, make(peer, number))

    return flood


def _number(value: int) -> bytes:
    return struct.pack(">I", value)


# Which kind of bad input it is, and how.
FLOODS: list[tuple[int, str, Flood]] = [
    (83, "rapid resets", _streams(lambda one: frame(Kind.RST_STREAM, 0, one, _number(8)))),
    (84, "updates by nothing", _streams(lambda one: frame(Kind.WINDOW_UPDATE, 0, one, _number(0)))),
    (84, "updates that overflow", _streams(lambda one: frame(Kind.WINDOW_UPDATE, 0, one, _number(2**31 - 1)) * 2)),
    (84, "short priorities", _streams(lambda one: frame(Kind.PRIORITY, 0, one, b"x"))),
    (84, "priorities on themselves", _streams(lambda one: frame(Kind.PRIORITY, 0, one, _number(one) + b"\1"))),
    (84, "data after the end", _streams(lambda one: frame(Kind.DATA, END_STREAM, one) + frame(Kind.DATA, 0, one))),
    (84, "continuations", _headers(lambda peer, number: peer.encoded(f"x-{number}", "y" * 1000))),
    (84, "empty continuations", _headers(lambda _, __: b"")),
    (84, "settings", _frames(lambda _: settings({}))),
    (84, "pings", _frames(lambda _: frame(Kind.PING, 0, 0, bytes(8)))),
    (84, "empty data", _frames(lambda one: frame(Kind.DATA, 0, one))),
    (84, "padding alone", _frames(lambda one: frame(Kind.DATA, 0x8, one, b"\0"))),
    (84, "priorities", _frames(lambda one: frame(Kind.PRIORITY, 0, one, bytes(5)))),
    (84, "window updates", _frames(lambda _: frame(Kind.WINDOW_UPDATE, 0, 0, _number(1)))),
]


def _flooded(mesh: Mesh, flood: Flood) -> str:
    """Floods until the edge has enough; what is wrong, if it has not, or if it does not close the connection."""
    with Peer(mesh) as peer:
        sent = 0
        for piece in flood(peer):
            sent += len(piece)
            if sent > _MOST_BYTES:
                return f"{sent} bytes are taken"
            if not peer.send(piece):
                break
            if sent % 16 == 0:
                peer.take(0.0)
        try:
            peer.until_closed(_MOST_SECONDS)
        except TimeoutError as error:
            return str(error)
    return ""


def test_who_floods_a_connection_loses_it_and_harms_nobody(sim_mesh: Mesh) -> None:
    with assert_harmless(sim_mesh) as asked, ThreadPoolExecutor(4) as pool:
        floods = [flood for _, _, flood in FLOODS]
        for (number, name, _), wrong in zip(FLOODS, pool.map(lambda one: _flooded(sim_mesh, one), floods), strict=True):
            if wrong:
                asked.wrong.append(f"{number}: {name}: {wrong}")


def test_headers_that_unpack_to_megabytes_are_refused(sim_mesh: Mesh) -> None:
    # 84: one large header goes into the table once, and every further byte stands for all of it.
    with assert_harmless(sim_mesh), Peer(sim_mesh) as peer:
        stream_id = peer.new_id()
        large = ("x-bomb", "y" * 3000)
        block = peer.block(_PATH) + peer.encoded(*large) + peer.encoded(*large) * 10_000
        assert len(block) < 16_384
        peer.send(frame(Kind.HEADERS, END_HEADERS | END_STREAM, stream_id, block))
        peer.until_over(stream_id, within=5)
        assert stream_id in peer.resets or peer.statuses[stream_id] == 431


def test_more_streams_than_a_connection_may_have_are_refused_and_may_be_tried_again(sim_mesh: Mesh) -> None:
    body = {"model": "sim", "prompt": "hi", "max_tokens": 1}
    with assert_harmless(sim_mesh) as asked, Peer(sim_mesh) as peer:
        asked.may_begin = True
        streams = [peer.ask(_PATH, **body) for _ in range(150)]
        peer.until_over(*streams, within=10)
        # 86: the server has done nothing for them, as the code says, so that any client may send them anew.
        assert set(peer.resets.values()) == {Code.REFUSED_STREAM}
        assert 40 < len(peer.resets) <= 50
        assert {peer.statuses[one] for one in streams if one not in peer.resets} == {200}
        again = [peer.ask(_PATH, **body) for _ in peer.resets]
        peer.until_over(*again, within=10)
        assert {peer.statuses[one] for one in again} == {200}
