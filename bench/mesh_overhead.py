"""The whole mesh beside vLLM's own server, on the same model: tokens a second, CPU a token, time to first token.

    python -m bench.mesh_overhead [--streams 64] [--tokens 256] [--rounds 3] [--beside OTHER_CHECKOUT ...]

Real vLLM on the CPU behind both, with the same engine arguments, and the same client. All are up all the time and take
turns, in an order that is drawn for each. Counted is the CPU of everything outside the engine core: of `vllm serve` its
API server, of the mesh Envoy, gateway, router, telemetry and worker. The engine core itself takes most of this machine,
so tokens a second say how much the rest takes away from it. The last lines are the middle of this mesh's figures over
each other's within a turn, and its bounds.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.processes import code_of, environment, program, wait_for_http
from bench.turns import ratios
from tests.support.demo_model import demo_model
from tests.support.mesh import running_mesh
from tests.support.ports import free_port

_KV_BYTES = 64 << 20
# The engine core, and on some platforms a process of its own for the model.
_CORE = "VLLM::"
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCH_COMPILE_DISABLE": "1",
}
_CONFIG = """\
models: [{{name: sim, path: {model}}}]
pools: [{{name: p, serves: [sim], workers: [{{name: w, engine: vllm}}]}}]
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What is measured."""

    name: str
    pids: tuple[int, ...]
    target: str
    key: str


@dataclass(frozen=True, slots=True)
class Round:
    """One run of the client."""

    tokens_per_second: float
    us_cpu_per_token: float
    first_token_ms: float
    last_first_token_ms: float
    """Of the stream that waited longest."""


@contextmanager
def vllm_serve(folder: Path) -> Iterator[Server]:
    """vLLM's own server, with its engine core in a process of its own, as it is by default."""
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(demo_model()), "--served-model-name", "sim", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--dtype", "float32", "--block-size", "32", "--max-num-seqs", "64"]
    command += ["--kv-cache-memory-bytes", str(_KV_BYTES), "--disable-uvicorn-access-log"]
    command += ["--distributed-executor-backend", "uni"]
    with environment(_ENVIRONMENT), program(command, folder / "vllm.log") as pid:
        wait_for_http(f"http://127.0.0.1:{port}/health", within=180)
        yield Server(name="vllm serve", pids=(pid,), target=f"127.0.0.1:{port}", key="none")


@contextmanager
def mesh(folder: Path, checkout: Path | None = None) -> Iterator[Server]:
    """A mesh of one worker; its code is that of `checkout`, None: this one's."""
    config = folder / "mesh.yaml"
    config.write_text(_CONFIG.format(model=demo_model()))
    with code_of(checkout), running_mesh(folder / "state", "--config", str(config), within=180) as running:
        pids = tuple(int(process["pid"]) for process in running.state["processes"])
        name = checkout.name if checkout else "tokenloom"
        yield Server(name=name, pids=pids, target=running.edge_target, key=running.key)


def cpu_outside_core(server: Server) -> float:
    """User and system seconds of its processes and their children so far, those of the engine core aside."""
    total = 0.0
    for pid in server.pids:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            if not process.name().startswith(_CORE):
                times = process.cpu_times()
                total += times.user + times.system
    return total


def measure(server: Server, streams: int, tokens: int) -> Round:
    """One run."""
    client = [sys.executable, "-m", "bench.sse_client", server.target, server.key, str(streams), str(tokens)]
    before = cpu_outside_core(server)
    ran = subprocess.run(client, check=True, capture_output=True, text=True)
    cpu = cpu_outside_core(server) - before
    result = json.loads(ran.stdout)
    firsts, count = result["first_event_seconds"], streams * tokens
    return Round(count / result["seconds"], 1e6 * cpu / count, 1000 * firsts[len(firsts) // 2], 1000 * firsts[-1])


def compare(servers: Sequence[Server], *, streams: int, tokens: int, rounds: int) -> dict[str, list[Round]]:
    """What each server gives in that many rounds, by its name."""
    for server in servers:
        for _ in range(3):
            measure(server, streams, 32)  # warms connections and code
            time.sleep(1)
    found: dict[str, list[Round]] = {server.name: [] for server in servers}
    for number in range(rounds):
        # At random, but the same each time: who comes before matters.
        for server in random.Random(number).sample(servers, len(servers)):
            found[server.name].append(measure(server, streams, tokens))
    return found


def main() -> None:
    """Starts all of them, lets them take turns, and prints the middle of each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--beside",
        type=Path,
        action="append",
        default=[],
        help="another checkout of this repository, whose mesh is measured, too; more than once: several",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        places = [Path(folder) / str(number) for number in range(2 + len(options.beside))]
        for place in places:
            place.mkdir()
        servers = [stack.enter_context(vllm_serve(places[0])), stack.enter_context(mesh(places[1]))]
        for place, checkout in zip(places[2:], options.beside, strict=True):
            servers.append(stack.enter_context(mesh(place, checkout.resolve())))
        found = compare(servers, streams=options.streams, tokens=options.tokens, rounds=options.rounds)
    for server, rounds in found.items():
        line = {name: round(statistics.median(getattr(one, name) for one in rounds), 1) for name in Round.__slots__}
        print(f"{server:<12}{json.dumps(line)}", flush=True)
    mine = found.pop(servers[1].name)
    for server, rounds in found.items():
        for name in Round.__slots__:
            told = ratios([getattr(one, name) for one in mine], [getattr(one, name) for one in rounds])
            print(f"{name} over that of {server}, median of {len(rounds)} turns and its bounds (95 %): {told}")


if __name__ == "__main__":
    main()
