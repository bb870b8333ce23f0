"""What clients notice when the router is killed or hangs under load.

    python -m bench.router_loss [--faults 20] [--hang] [--process telemetry]

One whole mesh with four simulated workers and one router. Requests of both lanes keep coming, at a steady rate, without
retries, while the router is killed with SIGKILL again and again; with --hang it is stopped for 3 s and goes on.
Printed for each lane: failed requests and the time to first token while the router was away, beside that of all other
requests; and how long the next router took until it answered, and from then on until it knew every worker.
"""

import argparse
import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc.aio
import openai
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2_grpc

from bench.routing.runs import percentile
from tests.support.mesh import Mesh, running_mesh

_WORKERS: Final = 4
_SIM: Final = "decode_step_ms=10,max_num_seqs=64,max_model_len=4096"
_TOKENS: Final = 16
_HANG_SECONDS: Final = 3.0
_PAUSE_SECONDS: Final = 3.0
# After the next router is there, gateways and the edge come back to it.
_AFTERWARDS_SECONDS: Final = 0.5

Attempt = Callable[[int], Awaitable[float]]
"""Runs one request to its end and returns the seconds to its first token."""


@dataclass(slots=True)
class Lane:
    """The requests of one lane."""

    name: str
    attempt: Attempt
    done: list[tuple[float, float]] = field(default_factory=list)
    """When each was sent, and its time to first token."""
    failed: list[tuple[float, str]] = field(default_factory=list)

    async def send(self, index: int) -> None:
        """One request; whatever becomes of it is noted."""
        began = time.monotonic()
        try:
            self.done.append((began, await self.attempt(index)))
        except (openai.OpenAIError, grpc.aio.AioRpcError) as error:
            self.failed.append((began, repr(error)[:300]))


@dataclass(slots=True)
class Fault:
    """One loss of the router. Times are seconds."""

    began: float
    ended: float = 0.0
    returned: float = 0.0
    """Until the next router answered."""
    known: float = 0.0
    """From then on, until it knew every worker."""


def openai_lane(client: openai.AsyncOpenAI) -> Attempt:
    """A streamed completion by the official SDK."""

    async def attempt(index: int) -> float:
        began, first = time.monotonic(), 0.0
        stream = await client.completions.create(
            model="sim", prompt=f"question {index}", max_tokens=_TOKENS, stream=True, extra_body={"ignore_eos": True}
        )
        async for _ in stream:
            first = first or time.monotonic() - began
        return first

    return attempt


def typed_lane(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> Attempt:
    """Generate over gRPC."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)

    async def attempt(index: int) -> float:
        sampling = pb.SamplingParameters(max_tokens=_TOKENS, ignore_eos=True)
        request = pb.GenerateRequest(model="sim", text=f"question {index}", sampling=sampling)
        began, first = time.monotonic(), 0.0
        async for event in stub.Generate(request, metadata=metadata, timeout=30):
            if not first and event.WhichOneof("event") == "delta":
                first = time.monotonic() - began
        return first

    return attempt


async def _keep_sending(lane: Lane, rate: float, enough: asyncio.Event) -> None:
    index, due = 0, time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        while not enough.is_set():
            index, due = index + 1, due + 1 / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.create_task(lane.send(index))


def _ready_workers(mesh: Mesh) -> float:
    try:
        return mesh.metric("router", "tokenloom_router_workers")
    except OSError:
        return -1.0


async def _until(check: Callable[[], bool], within: float = 30.0) -> float:
    began = time.monotonic()
    while not await asyncio.to_thread(check):
        if time.monotonic() - began > within:
            raise TimeoutError
        await asyncio.sleep(0.005)
    return time.monotonic()


async def _kill(mesh: Mesh, name: str) -> Fault:
    pid = int(mesh.process(name)["pid"])
    fault = Fault(time.monotonic())
    os.kill(pid, signal.SIGKILL)
    if name != "router":
        fault.ended = _AFTERWARDS_SECONDS + await _until(lambda: int(mesh.process(name)["pid"]) != pid)
        return fault
    await _until(lambda: _ready_workers(mesh) < 0)
    answers = await _until(lambda: _ready_workers(mesh) >= 0)
    knows = await _until(lambda: _ready_workers(mesh) == _WORKERS)
    fault.returned, fault.known = answers - fault.began, knows - answers
    fault.ended = knows + _AFTERWARDS_SECONDS
    return fault


async def _hang(mesh: Mesh, name: str) -> Fault:
    pid = int(mesh.process(name)["pid"])
    fault = Fault(time.monotonic())
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(_HANG_SECONDS)
    finally:
        os.kill(pid, signal.SIGCONT)
    fault.ended = time.monotonic() + _AFTERWARDS_SECONDS
    return fault


async def measure(mesh: Mesh, name: str, faults: int, rate: float, *, hang: bool) -> tuple[list[Lane], list[Fault]]:
    """Requests of both lanes, at `rate` a second each, while a process is lost `faults` times."""
    suffered: list[Fault] = []
    async with mesh.async_sdk(timeout=30) as client, grpc.aio.insecure_channel(mesh.edge_target) as edge:
        lanes = [Lane("openai", openai_lane(client)), Lane("typed", typed_lane(edge, mesh.metadata))]
        async with asyncio.TaskGroup() as tasks:
            enough = asyncio.Event()
            for lane in lanes:
                tasks.create_task(_keep_sending(lane, rate, enough))
            for _ in range(faults):
                await asyncio.sleep(_PAUSE_SECONDS)
                suffered.append(await (_hang if hang else _kill)(mesh, name))
            await asyncio.sleep(_PAUSE_SECONDS)
            enough.set()
    return lanes, suffered


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "none"
    p50, p99, longest = (1000 * percentile(values, share) for share in (0.5, 0.99, 1.0))
    return f"p50 {p50:.0f} ms, p99 {p99:.0f} ms, longest {longest:.0f} ms ({len(values)})"


def _report(lane: Lane, faults: Sequence[Fault]) -> None:
    def is_during(at: float) -> bool:
        return any(fault.began <= at <= fault.ended for fault in faults)

    total = len(lane.done) + len(lane.failed)
    # The rule of three: what 95 % confidence leaves when nothing failed.
    bound = f", so less than {3 / max(1, total):.2%} with 95 % confidence" if not lane.failed else ""
    print(f"{lane.name}: {len(lane.failed)} of {total} failed{bound}")
    for _, why in lane.failed[:5]:
        print(f"  {why}")
    print(f"  first token while it was away: {_spread([ttft for at, ttft in lane.done if is_during(at)])}")
    print(f"  first token else:              {_spread([ttft for at, ttft in lane.done if not is_during(at)])}")


def main() -> None:
    """Prints what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--rate", type=float, default=30.0, help="requests a second on each lane")
    parser.add_argument("--hang", action="store_true", help="stop it for 3 s instead of killing it")
    parser.add_argument("--process", choices=["router", "telemetry"], default="router", help="what is lost")
    options = parser.parse_args()
    arguments = ["--engine", "sim", "--workers", str(_WORKERS), "--sim", _SIM]
    with tempfile.TemporaryDirectory() as folder, running_mesh(Path(folder) / "state", *arguments) as mesh:
        lanes, faults = asyncio.run(measure(mesh, options.process, options.faults, options.rate, hang=options.hang))
    print(f"the {options.process} {'hung' if options.hang else 'was killed'} {len(faults)} times")
    if not options.hang and options.process == "router":
        # The launcher waits longer each time before it starts again what does not stay.
        print(f"  until the next one answers:            {_spread([fault.returned for fault in faults])}")
        print(f"  from then on until it knows the fleet: {_spread([fault.known for fault in faults])}")
    for lane in lanes:
        _report(lane, faults)


if __name__ == "__main__":
    main()
