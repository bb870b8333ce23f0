"""Where the time to first token goes on both lanes, stage by stage: read off the packets between the processes.

    sudo python -m bench.lane_stages [--requests 300]

One whole mesh with one simulated worker; requests of both lanes and requests straight to the worker take turns, one at
a time. A stage ends when its process has sent the packet that the next one waits for. Prints the p50 of each stage in
microseconds. Packets are stamped by the kernel and read afterwards, so that looking on costs the mesh nothing; that
needs the right to read them (root, or CAP_NET_RAW), and Linux.
"""

import argparse
import asyncio
import itertools
import json
import socket
import statistics
import struct
import tempfile
import time
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple

import grpc.aio
import httpx

from bench.added_ttft import SIM, openai, typed
from tests.support.mesh import Mesh, running_mesh

_EVERY_PROTOCOL: Final = 3
_STAMPED: Final = 35
_BUFFER_BYTES: Final = 256 << 20
_BUFFER: Final = 33
_OUTGOING: Final = 4
_ETHERNET_BYTES: Final = 14
_WARM_UP: Final = 50
# Shorter ones are window updates and pings.
_LEAST_BYTES: Final = 30

_Hop = tuple[str, str, str]
"""A stage's name, and who sends the packet that ends it to whom; "" is whoever is no server."""
_LANES: Final[dict[str, tuple[_Hop, ...]]] = {
    "direct": (("client", "", "worker"), ("worker", "worker", "")),
    "typed": (
        ("client", "", "edge"),
        # Who calls it remembers; twice a second it asks the gateway first.
        ("edge: ask for a worker", "", "picker"),
        ("router: pick", "picker", ""),
        ("edge: forward", "", "worker"),
        ("worker", "worker", ""),
        ("edge: answer", "edge", ""),
    ),
    "openai": (
        ("client", "", "edge"),
        ("edge: route", "", "gateway"),
        ("gateway: check, ask for a worker", "", "picker"),
        ("router: pick", "picker", ""),
        ("gateway: submit", "", "worker"),
        ("worker", "worker", ""),
        ("gateway: first event", "gateway", ""),
        ("edge: answer", "edge", ""),
    ),
}


class Packet(NamedTuple):
    """One packet with data in it."""

    at: float
    """In seconds since the epoch."""
    sender: str
    receiver: str


class Attempt(NamedTuple):
    """One request."""

    lane: str
    began: float
    ttft: float


def _listener() -> socket.socket:
    sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_EVERY_PROTOCOL))
    sniffer.bind(("lo", 0))
    sniffer.setblocking(False)
    # SO_RCVBUFFORCE and SO_TIMESTAMPNS, which Python does not name.
    sniffer.setsockopt(socket.SOL_SOCKET, _BUFFER, _BUFFER_BYTES)
    sniffer.setsockopt(socket.SOL_SOCKET, _STAMPED, 1)
    return sniffer


def _packets(sniffer: socket.socket, servers: Mapping[int, str]) -> Iterator[Packet]:
    while True:
        try:
            data, ancillary, _, address = sniffer.recvmsg(1 << 16, 128)
        except BlockingIOError:
            return
        if address[2] != _OUTGOING or not ancillary:
            continue
        seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
        ip = data[_ETHERNET_BYTES:]
        tcp = ip[(ip[0] & 15) * 4 :]
        sender, receiver = struct.unpack(">HH", tcp[:4])
        size = int.from_bytes(ip[2:4], "big") - (ip[0] & 15) * 4 - (tcp[12] >> 4) * 4
        if size >= _LEAST_BYTES:
            yield Packet(seconds + nanoseconds / 1e9, servers.get(sender, ""), servers.get(receiver, ""))


def _servers(mesh: Mesh) -> dict[int, str]:
    ports = {name: mesh.process(name)["ports"] for name in ("envoy", "gateway", "router", "worker-0")}
    return {
        ports["envoy"]["http"]: "edge",
        ports["gateway"]["http"]: "gateway",
        ports["router"]["grpc"]: "router",
        ports["router"]["picker"]: "picker",
        ports["worker-0"]["grpc"]: "worker",
    }


async def _attempts(mesh: Mesh, requests: int) -> list[Attempt]:
    worker = f"127.0.0.1:{mesh.process('worker-0')['ports']['grpc']}"
    done: list[Attempt] = []
    async with (
        grpc.aio.insecure_channel(worker) as direct,
        grpc.aio.insecure_channel(mesh.edge_target) as edge,
        httpx.AsyncClient(timeout=10) as client,
    ):
        lanes = {"direct": typed(direct, ()), "typed": typed(edge, mesh.metadata), "openai": openai(client, mesh)}
        for index in range(_WARM_UP + requests):
            for lane, attempt in lanes.items():
                began = time.time()
                ttft = await attempt(index)
                if index >= _WARM_UP:
                    done.append(Attempt(lane, began, ttft))
    return done


def _stages(attempt: Attempt, packets: Sequence[Packet], times: Sequence[float]) -> dict[str, float] | None:
    """Seconds of each stage; None where a packet is missing, or was taken for another one's."""
    last, found = attempt.began, {}
    mine = itertools.islice(packets, bisect(times, attempt.began), bisect(times, attempt.began + attempt.ttft))
    for name, sender, receiver in _LANES[attempt.lane]:
        packet = next((one for one in mine if (one.sender, one.receiver) == (sender, receiver)), None)
        if packet is None:
            return None
        found[name], last = packet.at - last, packet.at
    found["client: first token"] = attempt.began + attempt.ttft - last
    return found


def main() -> None:
    """Prints one JSON object a lane."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_mesh(Path(folder) / "state", "--engine", "sim", "--workers", "1", "--sim", SIM) as mesh,
        closing(_listener()) as sniffer,
    ):
        attempts = asyncio.run(_attempts(mesh, options.requests))
        packets = list(_packets(sniffer, _servers(mesh)))
    times = [packet.at for packet in packets]
    for lane in _LANES:
        ours = [one for one in attempts if one.lane == lane]
        stages = [found for found in (_stages(one, packets, times) for one in ours) if found is not None]
        if 2 * len(stages) < len(ours):
            raise SystemExit(f"{lane}: of most requests a packet was not seen")
        p50 = {name: round(1e6 * statistics.median(one[name] for one in stages)) for name in stages[0]}
        ttft = round(1e6 * statistics.median(one.ttft for one in ours))
        print(lane, json.dumps({"ttft": ttft, **p50}))


if __name__ == "__main__":
    main()
