"""HTTP/2 spoken frame by frame on a socket, well and badly."""

import json
import socket
import struct
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Final

from hpack import Decoder, Encoder

from services.common.http2_frames import ACK, END_HEADERS, END_STREAM, PREFACE, Kind, Setting, frame, settings
from tests.support.mesh import Mesh

__all__ = ["Frame", "Peer"]

_SECONDS: Final = 10.0
Frame = tuple[int, int, int, bytes]
"""Kind, flags, stream, payload."""


class Peer:
    """One connection to the edge. What it reads it notes: how streams and the connection ended."""

    def __init__(self, mesh: Mesh, *, window: int | None = None) -> None:
        """`window`: how much of each answer is taken, in bytes; None: as much as comes."""
        host, _, port = mesh.edge_target.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=_SECONDS)
        self._key = mesh.key
        self._encoder = Encoder()
        self._decoder = Decoder()
        self._rest = b""
        self._takes_all = window is None
        self._next_id = 1
        self.resets: dict[int, int] = {}
        """Streams that were reset, and their codes."""
        self.statuses: dict[int, int] = {}
        """The answers' statuses, by stream."""
        self.bodies: dict[int, bytes] = {}
        """What came of answers, by stream."""
        self.ended: set[int] = set()
        """Streams whose answers are complete."""
        self.goaway: int | None = None
        """The code with which the edge said goodbye."""
        self.is_closed = False
        """Whether the edge has closed the connection."""
        wanted = {} if window is None else {Setting.INITIAL_WINDOW_SIZE: window}
        self.send(PREFACE, settings(wanted))
        if self._takes_all:
            self.send(_update(0, 1 << 30))

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.socket.close()

    def send(self, *frames: bytes) -> bool:
        """Sends frames; False once the edge takes no more."""
        try:
            self.socket.sendall(b"".join(frames))
        except TimeoutError:
            raise
        except OSError:
            self.is_closed = True
        return not self.is_closed

    def new_id(self) -> int:
        """The id of the next stream."""
        self._next_id += 2
        return self._next_id - 2

    def block(self, path: str, **more: str) -> bytes:
        """The header block of a POST with the mesh's key."""
        named = {
            ":method": "POST",
            ":scheme": "http",
            ":authority": "edge",
            ":path": path,
            "content-type": "application/json",
            "authorization": f"Bearer {self._key}",
            **{name.replace("_", "-"): value for name, value in more.items()},
        }
        return self._encoder.encode(named.items())

    def encoded(self, name: str, value: str) -> bytes:
        """One more header for a block."""
        return self._encoder.encode([(name, value)])

    def headers(self, stream_id: int, path: str, *, flags: int = END_HEADERS, **more: str) -> bytes:
        """The frame that begins a POST with the mesh's key."""
        return frame(Kind.HEADERS, flags, stream_id, self.block(path, **more))

    def ask(self, path: str, **body: object) -> int:
        """Sends a whole request; returns its stream."""
        stream_id = self.new_id()
        self.send(self.headers(stream_id, path), frame(Kind.DATA, END_STREAM, stream_id, json.dumps(body).encode()))
        return stream_id

    def read(self, seconds: float = 0.0) -> Iterator[Frame]:
        """The frames that come in that time, noted already; an end of the connection ends them."""
        deadline = time.monotonic() + seconds
        while not self.is_closed:
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                received = self.socket.recv(1 << 16)
            except TimeoutError:
                break
            except OSError:
                received = b""
            finally:
                self.socket.settimeout(_SECONDS)
            self.is_closed = not received
            self._rest += received
            yield from self._frames()

    def take(self, seconds: float) -> None:
        """Notes what comes in that time."""
        for _ in self.read(seconds):
            pass

    def until_closed(self, within: float) -> int | None:
        """Reads until the edge closes the connection; returns the code of its goodbye. Raises TimeoutError."""
        self.take(within)
        if not self.is_closed:
            raise TimeoutError(f"not closed within {within:g} s")
        return self.goaway

    def until_over(self, *stream_ids: int, within: float) -> None:
        """Reads until these streams are complete or reset. Raises TimeoutError."""
        deadline = time.monotonic() + within
        while not set(stream_ids) <= self.ended | self.resets.keys():
            if self.is_closed or time.monotonic() > deadline:
                raise TimeoutError(f"streams are not over within {within:g} s")
            self.take(0.02)

    def _frames(self) -> Iterator[Frame]:
        while len(self._rest) >= 9 and len(self._rest) >= 9 + (size := int.from_bytes(self._rest[:3], "big")):
            kind, flags = self._rest[3], self._rest[4]
            stream_id = int.from_bytes(self._rest[5:9], "big")
            payload, self._rest = self._rest[9 : 9 + size], self._rest[9 + size :]
            self._note(kind, flags, stream_id, payload)
            yield kind, flags, stream_id, payload

    def _note(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == Kind.SETTINGS and not flags & ACK:
            self.send(frame(Kind.SETTINGS, ACK, 0))
        elif kind == Kind.PING and not flags & ACK:
            self.send(frame(Kind.PING, ACK, 0, payload))
        elif kind == Kind.HEADERS:
            for name, value in self._decoder.decode(payload, raw=True):
                if name == b":status":
                    self.statuses[stream_id] = int(value)
        elif kind == Kind.DATA:
            self.bodies[stream_id] = self.bodies.get(stream_id, b"") + payload
            if self._takes_all and payload and not flags & END_STREAM:
                self.send(_update(stream_id, len(payload)))
        elif kind == Kind.RST_STREAM:
            self.resets[stream_id] = int.from_bytes(payload, "big")
        elif kind == Kind.GOAWAY:
            self.goaway = int.from_bytes(payload[4:8], "big")
        if kind in (Kind.HEADERS, Kind.DATA) and flags & END_STREAM:
            self.ended.add(stream_id)


def _update(stream_id: int, more: int) -> bytes:
    return frame(Kind.WINDOW_UPDATE, 0, stream_id, struct.pack(">I", more))
