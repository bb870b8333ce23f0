"""What generations leave behind that clients give up: `python -m bench.cancelled [--generations 1000] [--streams 32]`.

A real worker process with vLLM on the demo model, on a CPU. Clients hang up in turn before any token, after one and
after 50 of them. Looked at are the time from the last hang-up until the engine has nothing to do and holds nothing, the
memory that worker and engine gain over many rounds of it, and whether a generation says afterwards what it said before.
`--complete` has the same generations end by themselves, to compare with: caches and allocators grow for a while anyway.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import psutil
import uvloop
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2_grpc

from services.common import rpc
from tests.support.demo_model import demo_model
from tests.support.workers import WorkerProcess, worker_config, worker_process

_CUTS = (0, 1, 50)
_TOKENS = 1500
_IDLE = ("requests_running", "requests_waiting", "kv_usage_ratio", "pending_prefill_tokens")
_IDLE_SECONDS = 2.0
# A generation, of the worker and of the engine. vLLM's engine goes on growing a little however generations end.
_MOST_BYTES = (1024, 4096)


@dataclass(frozen=True, slots=True)
class Round:
    """What some generations left."""

    seconds: float
    idle_after: float
    held: tuple[int, int]
    """Bytes of the worker, and of its engine."""


async def measure(generations: int, streams: int, rounds: int, *, complete: bool) -> bool:
    """Prints what was found; true when it is as promised."""
    model = {"name": "demo", "path": str(demo_model())}
    config = worker_config("vllm-0", engine="vllm", model=model, engine_args={"max_num_seqs": streams})
    with tempfile.TemporaryDirectory() as folder:
        async with (
            worker_process(config, Path(folder), within=180) as worker,
            rpc.channel(worker.address) as channel,
            httpx.AsyncClient(base_url=f"http://{worker.metrics}") as metrics,
        ):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            before = await _said(stub)
            found = [
                await _round(stub, metrics, worker, generations, streams, complete=complete) for _ in range(rounds)
            ]
            after = await _said(stub)
    how = "completed" if complete else "cancelled"
    for each in found:
        print(
            f"{generations} {how} in {each.seconds:.1f} s, idle {each.idle_after * 1000:.0f} ms after the last; held: "
            f"worker {each.held[0] / 2**20:.1f} MiB, engine {each.held[1] / 2**20:.1f} MiB"
        )
    last = found[len(found) // 2 :]
    grown = [
        (end - begin) / generations / (len(last) - 1) for begin, end in zip(last[0].held, last[-1].held, strict=True)
    ]
    print(
        f"over the last {len(last)} rounds {grown[0]:.0f} bytes a generation more in the worker and {grown[1]:.0f} in "
        f"the engine, which says afterwards {'the same' if before == after else 'something else'}"
    )
    small = all(gained < most for gained, most in zip(grown, _MOST_BYTES, strict=True))
    return before == after and small and max(each.idle_after for each in found) < _IDLE_SECONDS


async def _round(
    stub: Any, metrics: httpx.AsyncClient, worker: WorkerProcess, generations: int, streams: int, *, complete: bool
) -> Round:
    numbers, begun = count(), time.monotonic()

    async def client() -> None:
        while (number := next(numbers)) < generations:
            await (_finish if complete else _give_up)(stub, number)

    await asyncio.gather(*(client() for _ in range(streams)))
    ended = time.monotonic()
    async with asyncio.timeout(60):
        while not await _is_idle(metrics):  # noqa: ASYNC110  # it is another process
            await asyncio.sleep(0.01)
    return Round(ended - begun, time.monotonic() - ended, _held_bytes(worker.process.pid))


async def _give_up(stub: Any, number: int) -> None:
    sampling = pb.SamplingParameters(temperature=0, max_tokens=_TOKENS, ignore_eos=True)
    call = stub.Generate(pb.GenerateRequest(model="demo", text=f"Story number {number}: ", sampling=sampling))
    cut, tokens = _CUTS[number % len(_CUTS)], 0
    async for event in call:
        tokens += len(event.delta.token_ids)
        # What has started has no token yet.
        if tokens >= cut:
            break
    call.cancel()
    if cut and tokens < cut:
        raise AssertionError(f"generation {number} ended by itself after {tokens} tokens")


async def _finish(stub: Any, number: int) -> None:
    # A generation can't have no token.
    sampling = pb.SamplingParameters(temperature=0, max_tokens=max(1, _CUTS[number % len(_CUTS)]), ignore_eos=True)
    async for _ in stub.Generate(pb.GenerateRequest(model="demo", text=f"Story number {number}: ", sampling=sampling)):
        pass


async def _is_idle(metrics: httpx.AsyncClient) -> bool:
    text = (await metrics.get("/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("tokenloom_inference_"))
    return all(float(values[f"tokenloom_inference_{name}"]) == 0 for name in _IDLE)


async def _said(stub: Any) -> list[int]:
    sampling = pb.SamplingParameters(temperature=0, max_tokens=64, ignore_eos=True)
    tokens: list[int] = []
    async for event in stub.Generate(pb.GenerateRequest(model="demo", text="Once upon a time", sampling=sampling)):
        tokens += event.delta.token_ids
    return tokens


def _held_bytes(pid: int) -> tuple[int, int]:
    engines = psutil.Process(pid).children(recursive=True)
    # Shared pages would be counted in each.
    return psutil.Process(pid).memory_full_info().uss, sum(engine.memory_full_info().uss for engine in engines)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument(
        "--rounds", type=int, default=20, help="the first half fills caches, and the others measure growth"
    )
    parser.add_argument("--complete", action="store_true", help="hang up on nobody")
    given = parser.parse_args()
    try:
        kept = uvloop.run(measure(given.generations, given.streams, given.rounds, complete=given.complete))
    except grpc.aio.AioRpcError as error:
        sys.exit(f"a generation failed: {error.code().name}: {error.details()}")
    sys.exit(not kept)


if __name__ == "__main__":
    main()
