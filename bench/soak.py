"""Hours of the same load, and what it leaves behind: `python -m bench.soak --minutes 60 [--kill-every 300]`.

A whole mesh with Envoy. Requests of both lanes keep coming at a steady rate, with prompts of their own, streamed and
not; of every 20 clients one hangs up in the middle of the answer. With `--kill-every` a worker is killed (SIGKILL) that
often. Every ten seconds each process is looked at. Printed are the requests that failed, and for each process that was
there from half of the time on until the end what memory it gained an hour (least squares over its own pages), its
open files and threads then and in the end. `--csv` keeps every look.
"""

import argparse
import asyncio
import csv
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import grpc.aio
import httpx
import openai
import psutil
import uvloop
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2_grpc

from bench.failover import mesh_of, served_model
from tests.support.mesh import Mesh

_MOST_MB_AN_HOUR: Final = 1.0
_LEAST_SERVED: Final = 0.9999
_LOOK_SECONDS: Final = 10.0
_HANG_UP_EVERY: Final = 40
_ANSWER_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Look:
    """One process at one time."""

    seconds: float
    """Since the beginning."""
    name: str
    pid: int
    megabytes: float
    """Pages of its own."""
    files: int
    threads: int


@dataclass(frozen=True, slots=True)
class Growth:
    """What one process gained."""

    name: str
    first: Look
    last: Look
    megabytes_an_hour: float

    def line(self) -> str:
        """As it is printed."""
        told = f"{self.name:<14} {self.first.megabytes:7.1f} -> {self.last.megabytes:7.1f} MB, "
        told += f"{self.megabytes_an_hour:+6.2f} MB/h, files {self.first.files} -> {self.last.files}, "
        return told + f"threads {self.first.threads} -> {self.last.threads}"


def growths(looks: Sequence[Look], *, after: float) -> Iterator[Growth]:
    """What each process gained that was there at `after` (seconds) and at the end."""
    last = max((look.seconds for look in looks), default=0.0)
    for name, pid in dict.fromkeys((look.name, look.pid) for look in looks):
        its = [look for look in looks if (look.name, look.pid) == (name, pid) and look.seconds >= after]
        if len(its) > 2 and its[0].seconds < after + 2 * _LOOK_SECONDS and its[-1].seconds > last - 2 * _LOOK_SECONDS:
            fit = statistics.linear_regression([look.seconds for look in its], [look.megabytes for look in its])
            yield Growth(name, its[0], its[-1], fit.slope * 3600)


class Load:
    """The requests, and what became of them."""

    def __init__(self, mesh: Mesh, model: str, client: openai.AsyncOpenAI, edge: grpc.aio.Channel, tokens: int) -> None:
        self._client = client
        self._stub = inference_pb2_grpc.InferenceServiceStub(edge)
        self._metadata = mesh.metadata
        self._model = model
        self._tokens = tokens
        self._draw = random.Random(1)
        self.sent: Counter[str] = Counter()
        """By lane."""
        self.failed: list[tuple[str, str]] = []
        """Lane, and why."""
        self.left = 0
        """Clients that hung up."""

    async def send(self, number: int) -> None:
        """One request to its end, or to where its client hangs up."""
        words = (f"word{self._draw.randrange(5000)}" for _ in range(self._draw.randint(5, 200)))
        prompt, leaves = f"{number}: {' '.join(words)}", number % _HANG_UP_EVERY < 2
        lane = "typed" if number % 2 else "openai"
        self.sent[lane] += 1
        try:
            if lane == "typed":
                await self._typed(prompt, leaves=leaves)
            elif number % 4 == 0 or leaves:
                await self._streamed(prompt, leaves=leaves)
            else:
                await self._client.completions.create(**self._asked(prompt))
        except (openai.OpenAIError, httpx.HTTPError, grpc.aio.AioRpcError) as error:
            self.failed.append((lane, repr(error)[:200]))
        self.left += leaves

    def _asked(self, prompt: str) -> dict[str, Any]:
        sampling = {"max_tokens": self._tokens, "extra_body": {"ignore_eos": True}}
        return {"model": self._model, "prompt": prompt, **sampling}

    async def _streamed(self, prompt: str, *, leaves: bool) -> None:
        reason = None
        async with await self._client.completions.create(**self._asked(prompt), stream=True) as stream:
            async for chunk in stream:
                if leaves:
                    return
                reason = chunk.choices[0].finish_reason or reason
        if reason != "length":
            raise openai.OpenAIError(f"a stream ended with {reason}")

    async def _typed(self, prompt: str, *, leaves: bool) -> None:
        sampling = pb.SamplingParameters(max_tokens=self._tokens, ignore_eos=True)
        request = pb.GenerateRequest(model=self._model, text=prompt, sampling=sampling)
        call = self._stub.Generate(request, metadata=self._metadata, timeout=_ANSWER_SECONDS)
        async for event in call:
            if leaves and event.HasField("delta"):
                call.cancel()
                return


async def keep_sending(load: Load, rate: float, ends: float) -> None:
    """`rate` requests a second, whatever becomes of them, until `ends` (time.monotonic())."""
    due, number = time.monotonic(), 0
    async with asyncio.TaskGroup() as tasks:
        while due < ends:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            number, due = number + 1, due + 1 / rate
            tasks.create_task(load.send(number))


def look_at(mesh: Mesh, seconds: float) -> Iterator[Look]:
    """Every process that is there now, with the engines that workers have started."""
    for entry in mesh.state["processes"]:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(entry["pid"])
            engines = [(f"{entry['name']}/engine", child) for child in process.children(recursive=True)]
            for name, each in [(entry["name"], process), *engines]:
                megabytes = each.memory_full_info().uss / 2**20
                yield Look(seconds, name, each.pid, megabytes, each.num_fds(), each.num_threads())


async def keep_looking(mesh: Mesh, began: float, ends: float) -> list[Look]:
    """Looks at every process until `ends`."""
    looks: list[Look] = []
    while time.monotonic() < ends:
        looks += await asyncio.to_thread(lambda: list(look_at(mesh, time.monotonic() - began)))
        await asyncio.sleep(_LOOK_SECONDS)
    return looks


async def keep_killing(mesh: Mesh, every: float, workers: int, ends: float) -> int:
    """Kills one worker after the other; the last one long enough before `ends` to be back by then."""
    killed = 0
    while time.monotonic() + 2 * every < ends:
        await asyncio.sleep(every)
        os.kill(int(mesh.process(f"worker-{killed % workers}")["pid"]), signal.SIGKILL)
        killed += 1
    return killed


async def measure(mesh: Mesh, options: argparse.Namespace) -> bool:
    """Prints what was found; true when it is as promised."""
    began = time.monotonic()
    ends = began + 60 * options.minutes
    model = await asyncio.to_thread(served_model, mesh)
    async with (
        mesh.async_sdk(timeout=_ANSWER_SECONDS) as client,
        grpc.aio.insecure_channel(mesh.edge_target) as edge,
        asyncio.TaskGroup() as tasks,
    ):
        load = Load(mesh, model, client, edge, options.tokens)
        tasks.create_task(keep_sending(load, options.rate, ends))
        looking = tasks.create_task(keep_looking(mesh, began, ends))
        every = options.kill_every or float("inf")
        killing = tasks.create_task(keep_killing(mesh, every, options.workers, ends))
    looks = looking.result()
    if options.csv is not None:
        _keep(looks, options.csv)
    found = list(growths(looks, after=(ends - began) / 2))
    return _report(load, found, killing.result())


def _keep(looks: Sequence[Look], path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, fieldnames=list(Look.__dataclass_fields__))
        rows.writeheader()
        rows.writerows(asdict(look) for look in looks)


def _report(load: Load, found: Sequence[Growth], killed: int) -> bool:
    kept = True
    print(f"{killed} workers killed; clients that hung up: {load.left}")
    for lane in ("openai", "typed"):
        sent, failed = load.sent[lane], [why for where, why in load.failed if where == lane]
        # Nobody holds a typed stream for its client when its worker is killed.
        kept &= len(failed) <= (1 - _LEAST_SERVED) * sent or (lane == "typed" and killed > 0)
        print(f"{lane}: {len(failed)} of {sent} failed")
        for why, times in Counter(failed).most_common(5):
            print(f"  {times} x {why}")
    for growth in found:
        kept &= growth.megabytes_an_hour <= _MOST_MB_AN_HOUR
        print(growth.line())
    return kept


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=40.0, help="requests a second, half of them on each lane")
    parser.add_argument("--engine", choices=("sim", "vllm"), default="sim")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--kill-every", type=float, help="seconds; none is killed without it")
    parser.add_argument("--csv", type=Path, help="where every look is written to")
    options = parser.parse_args()
    with mesh_of(options.engine, options.workers, decode_step_ms=10) as mesh:
        kept = uvloop.run(measure(mesh, options))
    sys.exit(not kept)


if __name__ == "__main__":
    main()
