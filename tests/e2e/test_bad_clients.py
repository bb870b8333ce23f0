"""Clients that stand still, over the whole mesh: each is given up in time, what it asked for is stopped, others go on.

The mesh bears with them for two seconds here, and for thirty where nothing else is said.
"""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
from tokenloom.inference.v1 import generation_pb2 as pb

from services.common.http2_frames import END_STREAM, PREFACE, Kind, frame
from tests.support.bad_inputs import Asked, assert_harmless
from tests.support.http2 import Peer
from tests.support.mesh import Mesh, running_mesh
from tests.support.waiting import wait_until

_SECONDS: Final = 2.0
# Until the generation of a client that takes nothing is stopped: buffers fill up first.
_GIVEN_UP_SECONDS: Final = 8.0
_GENERATE: Final = "/tokenloom.inference.v1.InferenceService/Generate"
_LONG: Final = {"model": "sim", "prompt": "hi", "max_tokens": 60_000, "ignore_eos": True, "stream": True, "logprobs": 5}
_CONFIG: Final = """
models: [{name: sim}]
pools:
  - name: default
    serves: [sim]
    workers:
      - {name: worker-0, engine: sim, sim: &sim {decode_step_ms: 2, max_num_seqs: 128, max_model_len: 65536}}
      - {name: worker-1, engine: sim, sim: *sim}
edge: {client_timeout_seconds: 2}
"""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("impatient")
    config = folder / "mesh.yaml"
    config.write_text(_CONFIG)
    with running_mesh(folder / "state", "--config", str(config)) as running:
        yield running


def _connect(mesh: Mesh, *, receive_bytes: int | None = None) -> socket.socket:
    host, _, port = mesh.edge_target.rpartition(":")
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(10)
    connection.connect((host, int(port)))
    return connection


def _head(mesh: Mesh, path: str, length: int) -> bytes:
    lines = (
        f"POST {path} HTTP/1.1",
        "host: edge",
        f"authorization: Bearer {mesh.key}",
        "content-type: application/json",
        f"content-length: {length}",
    )
    return "\r\n".join([*lines, "", ""]).encode()


def _dripped(connection: socket.socket, drip: bytes) -> tuple[float, bytes]:
    """Sends a byte now and then until the edge has enough; after how many seconds, and what it said."""
    began, received = time.monotonic(), b""
    connection.settimeout(0.25)
    while time.monotonic() < began + 10:
        try:
            if drip:
                connection.sendall(drip)
            more = connection.recv(1 << 16)
        except TimeoutError:
            continue
        except OSError:
            break
        if not more:
            break
        received += more
    connection.close()
    return time.monotonic() - began, received


# Which kind of bad input it is, how a connection begins, what comes a byte at a time, and what is said at last.
DRIPS: list[tuple[int, bytes, bytes, bytes]] = [
    (65, b"GET /v1/models HTTP/1.1\r\nhost: edge\r\nx-a: ", b"a", b"HTTP/1.1 408"),
    (65, b"", b"G", b""),
    (97, b"", b"", b""),
    (97, PREFACE[:10], b"", b""),
    (97, PREFACE, b"", b""),
]


def test_who_says_too_little_is_not_kept_and_harms_nobody(mesh: Mesh) -> None:
    with assert_harmless(mesh) as asked, ThreadPoolExecutor(250) as pool:
        drips = DRIPS * 50
        connections = [_connect(mesh) for _ in drips]
        for connection, (_, begin, _, _) in zip(connections, drips, strict=True):
            connection.sendall(begin)
        for (number, begin, _, says), (seconds, said) in zip(
            drips, pool.map(lambda one, row: _dripped(one, row[2]), connections, drips), strict=True
        ):
            if seconds > 2 * _SECONDS + 1 or not said.startswith(says):
                asked.wrong.append(f"{number}: {begin!r}: {seconds:.1f} s, {said[:100]!r}")


def test_a_body_that_comes_too_slowly_is_refused(mesh: Mesh) -> None:
    # 66
    with assert_harmless(mesh), _connect(mesh) as connection:
        connection.sendall(_head(mesh, "/v1/completions", 1000))
        seconds, said = _dripped(connection, b" ")
        assert said.startswith(b"HTTP/1.1 408")
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
        assert _SECONDS <= seconds < 2 * _SECONDS + 1


def _running(mesh: Mesh) -> float:
    return sum(mesh.metric(f"worker-{index}", "tokenloom_inference_requests_running") for index in range(2))


def _leases(mesh: Mesh) -> float:
    return mesh.metric("router", "tokenloom_router_leases")


def _are_stopped(mesh: Mesh, running: int, asked: Asked) -> None:
    """Waits until generations run, and until they don't; nobody holds a worker then."""
    asked.may_begin = True
    bystander = 1
    wait_until(lambda: _running(mesh) >= running, within=5)
    wait_until(lambda: _running(mesh) <= bystander and _leases(mesh) <= bystander, within=_GIVEN_UP_SECONDS)


def test_a_stream_that_is_not_read_is_stopped(mesh: Mesh) -> None:
    # 66
    with assert_harmless(mesh) as asked, _connect(mesh, receive_bytes=4096) as connection:
        body = json.dumps(_LONG).encode()
        connection.sendall(_head(mesh, "/v1/completions", len(body)) + body)
        _are_stopped(mesh, 1, asked)


def test_a_stream_whose_window_stays_closed_is_stopped(mesh: Mesh) -> None:
    # 85
    with assert_harmless(mesh) as asked, Peer(mesh, window=0) as peer:
        peer.ask("/v1/completions", **_LONG)
        with ThreadPoolExecutor(1) as pool:
            # It answers pings all the while: its connection is well.
            answering = pool.submit(peer.take, _GIVEN_UP_SECONDS / 2)
            _are_stopped(mesh, 1, asked)
            answering.result()


def test_an_answer_that_is_complete_does_not_wait_for_its_client_for_ever(mesh: Mesh) -> None:
    # 85
    with assert_harmless(mesh) as asked, Peer(mesh, window=100) as peer:
        asked.may_begin = True
        stream_id = peer.ask("/v1/completions", **{**_LONG, "max_tokens": 20})
        peer.until_over(stream_id, within=2 * _SECONDS + 1)
        assert stream_id in peer.resets


def _generate(peer: Peer, **changed: Any) -> int:
    """Begins a typed call; returns its stream."""
    sampling = pb.SamplingParameters(max_tokens=60_000, ignore_eos=True, logprob_count=5)
    message = pb.GenerateRequest(**{"model": "sim", "text": "hi", "sampling": sampling, **changed}).SerializeToString()
    stream_id = peer.new_id()
    peer.send(
        peer.headers(stream_id, _GENERATE, content_type="application/grpc", te="trailers"),
        frame(Kind.DATA, END_STREAM, stream_id, struct.pack(">BI", 0, len(message)) + message),
    )
    return stream_id


def test_typed_clients_that_never_read_lose_their_streams_and_hold_no_worker(mesh: Mesh) -> None:
    # 95
    with assert_harmless(mesh) as asked, ExitStack() as peers, ThreadPoolExecutor(2) as pool:
        connected = [peers.enter_context(Peer(mesh, window=1000)) for _ in range(2)]
        streams = [(peer, [_generate(peer) for _ in range(90)]) for peer in connected]
        over = [pool.submit(peer.until_over, *ids, within=3 * _GIVEN_UP_SECONDS) for peer, ids in streams]
        wait_until(lambda: _running(mesh) > 100, within=5)
        for each in over:
            each.result()
        asked.may_begin = True
        # The edge has reset them all: those that ran, and none is left over in the router.
        assert all(set(ids) <= peer.resets.keys() for peer, ids in streams)
        wait_until(lambda: _leases(mesh) <= 1, within=2)


_READER: Final = """
import sys
from pathlib import Path
from tests.support.http2 import Peer
from tests.support.mesh import Mesh

with Peer(Mesh(state_dir=Path(sys.argv[1]))) as peer:
    peer.ask("/v1/completions", model="sim", prompt="hi", max_tokens=60_000, ignore_eos=True, stream=True)
    peer.take(0.5)
    print("reads", flush=True)
    peer.take(60.0)
"""


def test_the_generation_of_a_client_that_hangs_is_stopped(mesh: Mesh) -> None:
    # 96: its kernel still answers, it does not.
    with (
        assert_harmless(mesh) as asked,
        subprocess.Popen(
            [sys.executable, "-c", _READER, str(mesh.state_dir)], stdout=subprocess.PIPE, text=True
        ) as client,
    ):
        assert client.stdout is not None
        assert client.stdout.readline() == "reads\n"
        os.kill(client.pid, signal.SIGSTOP)
        try:
            _are_stopped(mesh, 1, asked)
        finally:
            client.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/net/tcp")
def test_the_kernel_looks_after_clients_that_say_nothing(mesh: Mesh) -> None:
    # 96: a machine that is gone sends no FIN; only a probe finds out.
    with _connect(mesh) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: edge\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        local = f"{int(mesh.edge_target.rpartition(':')[2]):04X}"
        remote = f"{connection.getsockname()[1]:04X}"
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        timers = [line[5] for line in lines if (line[1][-4:], line[2][-4:]) == (local, remote)]
        kind, _, ticks = timers[0].partition(":")
        # The keep-alive timer, in hundredths of a second.
        assert (int(kind), int(ticks, 16) <= 100) == (2, True)
