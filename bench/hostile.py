"""What hostile clients cost: requests over a key's limit, and keys that are nearly right.

    python -m bench.hostile [--seconds 3] [--connections 8] [--samples 10000]

One whole mesh with two simulated workers. First a key of three requests a minute is used without a pause on so many
connections: prints how many requests a second of CPU is refused by the gateway, and by gateway and edge together, and
the p50 and p99 of an admitted client's requests for one token before and meanwhile. Then wrong keys are sent in turn,
half of which differ from a real one in their last character alone: prints the p-value (Mann-Whitney) that both kinds
are refused alike; below 0.01 something tells.
"""

import argparse
import json
import random
import socket
import tempfile
import threading
import time
from http.client import HTTPResponse
from pathlib import Path

import psutil

from tests.support.commands import tokenloom
from tests.support.mesh import Mesh, running_mesh
from tests.support.statistics import mann_whitney

SIM = "decode_step_ms=1,max_num_seqs=64"


def request(mesh: Mesh, key: str) -> bytes:
    """A completion of one token, as it is sent."""
    body = json.dumps({"model": "sim", "prompt": "hi", "max_tokens": 1}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {mesh.edge_target}\r\nauthorization: Bearer {key}\r\n"
    return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def connect(mesh: Mesh) -> socket.socket:
    """A connection to the edge."""
    host, _, port = mesh.edge_target.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def ask(connection: socket.socket, sent: bytes) -> tuple[int, float]:
    """The status of the answer, and after how many seconds it was there."""
    began = time.perf_counter()
    connection.sendall(sent)
    with HTTPResponse(connection) as response:
        response.begin()
        response.read()
        return response.status, time.perf_counter() - began


def admitted(mesh: Mesh, seconds: float) -> list[float]:
    """How long an admitted client's requests take, one after another, in milliseconds, sorted."""
    took, until = [], time.monotonic() + seconds
    with connect(mesh) as connection:
        while time.monotonic() < until:
            status, spent = ask(connection, request(mesh, mesh.key))
            if status != 200:
                raise RuntimeError(f"an admitted request was answered with {status}")
            took.append(1000 * spent)
    return sorted(took)


def new_key(mesh: Mesh, *options: str) -> str:
    """A key that works."""
    key = str(json.loads(tokenloom(mesh, "keys", "create", "--name", "hammer", "--json", *options).stdout)["key"])
    time.sleep(1)
    return key


def rejects(mesh: Mesh, seconds: float, connections: int) -> None:
    """Hammers, and prints what that costs."""
    key = new_key(mesh, "--rpm", "3")
    processes = {name: psutil.Process(mesh.process(name)["pid"]) for name in ("gateway", "envoy")}
    alone = admitted(mesh, seconds)
    counts = [0] * connections
    until = time.monotonic() + seconds

    def hammer(number: int) -> None:
        with connect(mesh) as connection:
            while time.monotonic() < until:
                counts[number] += ask(connection, request(mesh, key))[0] == 429

    used = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    used = {name: sum(process.cpu_times()[:2]) - used[name] for name, process in processes.items()}
    refused = sum(counts)
    print(f"refused: {refused} in {seconds:g} s")
    print(f"refused a second of the gateway's CPU: {refused / used['gateway']:.0f}")
    print(f"refused a second of gateway's and edge's CPU: {refused / sum(used.values()):.0f}")
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    beside = admitted(mesh, seconds)
    for thread in threads:
        thread.join()
    for name, took in (("alone", alone), ("beside it", beside)):
        print(f"admitted, {name}: p50 {took[len(took) // 2]:.2f} ms, p99 {took[int(len(took) * 0.99)]:.2f} ms")


def timing(mesh: Mesh, samples: int) -> None:
    """Sends wrong keys, and prints whether the time tells one kind from the other."""
    real = new_key(mesh)
    wrong = {"nearly": real[:-1] + ("a" if real[-1] != "a" else "b"), "nothing": "z" * len(real)}
    took: dict[str, list[float]] = {kind: [] for kind in wrong}
    order = random.Random(76).sample(list(wrong) * (samples // 2), k=samples // 2 * 2)
    with connect(mesh) as connection:
        for kind in order:
            status, spent = ask(connection, request(mesh, wrong[kind]))
            if status != 401:
                raise RuntimeError(f"a wrong key was answered with {status}")
            took[kind].append(spent)
    print(f"wrong keys, {samples} samples: p = {mann_whitney(took['nearly'], took['nothing']):.3f}")


def main() -> None:
    """Starts a mesh and measures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--samples", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        with running_mesh(state, "--engine", "sim", "--workers", "2", "--sim", SIM) as mesh:
            rejects(mesh, arguments.seconds, arguments.connections)
            timing(mesh, arguments.samples)


if __name__ == "__main__":
    main()
