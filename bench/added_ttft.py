"""Time to first token that each lane adds over a call straight to the worker.

    python -m bench.added_ttft [--requests 500]

One whole mesh with one simulated worker; direct, typed-lane and OpenAI-lane requests take turns, one at a time, over
connections that are open already. Prints p50 and p99 of each, and what the lanes add at the p50, in milliseconds.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc.aio
import httpx
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2_grpc

from tests.support.mesh import Mesh, running_mesh

Attempt = Callable[[int], Awaitable[float]]
"""Runs one request to its end and returns the seconds to its first token."""
SIM = "prefill_tokens_per_second=1000000000,decode_step_ms=1,decode_step_ms_per_sequence=0"


def typed(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> Attempt:
    """Generate over a gRPC channel, until the first delta."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)

    async def attempt(index: int) -> float:
        sampling = pb.SamplingParameters(max_tokens=2, ignore_eos=True)
        request = pb.GenerateRequest(model="sim", text=f"question {index}", sampling=sampling)
        began, first = time.perf_counter(), 0.0
        async for event in stub.Generate(request, metadata=metadata, timeout=10):
            if not first and event.WhichOneof("event") == "delta":
                first = time.perf_counter() - began
        return first

    return attempt


def openai(client: httpx.AsyncClient, mesh: Mesh) -> Attempt:
    """A streamed completion, until the first event."""

    async def attempt(index: int) -> float:
        body = {"model": "sim", "prompt": f"question {index}", "max_tokens": 2, "stream": True, "ignore_eos": True}
        began, first = time.perf_counter(), 0.0
        async with client.stream("POST", f"{mesh.edge}/v1/completions", json=body, headers=mesh.headers) as response:
            async for _ in response.aiter_raw():
                first = first or time.perf_counter() - began
        return first

    return attempt


async def measure(mesh: Mesh, requests: int) -> dict[str, list[float]]:
    """Seconds of each attempt, by lane."""
    worker = f"127.0.0.1:{mesh.process('worker-0')['ports']['grpc']}"
    seconds: dict[str, list[float]] = {"direct": [], "typed": [], "openai": []}
    async with (
        grpc.aio.insecure_channel(worker) as direct,
        grpc.aio.insecure_channel(mesh.edge_target) as edge,
        httpx.AsyncClient(timeout=10) as client,
    ):
        lanes = {"direct": typed(direct, ()), "typed": typed(edge, mesh.metadata), "openai": openai(client, mesh)}
        for index in range(requests + 20):
            for lane, attempt in lanes.items():
                took = await attempt(index)
                if index >= 20:
                    seconds[lane].append(took)
    return seconds


def main() -> None:
    """Prints one JSON object a lane."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_mesh(Path(folder) / "state", "--engine", "sim", "--workers", "1", "--sim", SIM) as mesh,
    ):
        seconds = asyncio.run(measure(mesh, options.requests))
    base = sorted(seconds["direct"])[len(seconds["direct"]) // 2]
    for lane, values in seconds.items():
        values.sort()
        p50, p99 = values[len(values) // 2], values[int(len(values) * 0.99)]
        line = {
            "p50_ms": round(1000 * p50, 2),
            "p99_ms": round(1000 * p99, 2),
            "added_p50_ms": round(1000 * (p50 - base), 2),
        }
        print(lane, json.dumps(line))


if __name__ == "__main__":
    main()
