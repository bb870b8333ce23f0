"""Streams whose workers are killed beside the same streams undisturbed: `python -m bench.failover`.

A whole mesh with Envoy. In each repetition all streams run at once, one worker is killed (SIGKILL) while they do, and
with `--second-kill` another one up to 50 ms later (`--apart`), while what was on the first is being moved; the launcher
starts them again before the next repetition. Counted are the streams that end with [DONE], those that are the same to
the last token as without the fault, and those with exactly the same usage; measured is the longest gap that each
stream's client sees.

    python -m bench.failover --workers 4 --second-kill
    python -m bench.failover --engine vllm --workers 2 --tokens 400

Real vLLM computes what is batched together together, so that a token may turn out otherwise where two are about as
likely: how many streams differ between two undisturbed runs is told, too.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvloop

from bench.failover_client import Said, Streamed, stream_all
from tests.support.demo_model import demo_model
from tests.support.mesh import Mesh, running_mesh
from tests.support.waiting import wait_until

_SAID = "the small mesh keeps every stream alive when one of its workers is lost and nobody sees more than a pause"
_BACK_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Round:
    """What one repetition brought."""

    streams: int
    complete: int
    identical: int
    exact: int
    gaps: list[float]
    """The longest of each stream, in seconds, sorted."""
    errors: list[str]

    def line(self) -> str:
        """As it is printed."""
        told = f"complete {self.complete}/{self.streams}, identical {self.identical}, usage exact {self.exact}, "
        told += (
            f"longest gap p50 {1000 * quantile(self.gaps, 0.5):.0f} ms, p99 {1000 * quantile(self.gaps, 0.99):.0f} ms"
        )
        return told + "".join(f"\n    {error}" for error in sorted(set(self.errors))[:3])


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def bodies(options: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """The requests; each other one is told its tokens, since those without go another way through the gateway."""
    draw, words = random.Random(options.seed), _SAID.split()
    return [
        {
            "model": model,
            "prompt": " ".join(draw.choice(words) for _ in range(draw.randint(4, 60))),
            "max_tokens": options.tokens - number % 7,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "return_token_ids": number % 2 == 0,
        }
        for number in range(options.streams)
    ]


def compared(streams: Sequence[Streamed], undisturbed: Sequence[Said]) -> Round:
    """What came of the streams."""
    said = [stream.said() for stream in streams]
    pairs = list(zip(said, undisturbed, strict=True))
    return Round(
        streams=len(streams),
        complete=sum(one.error is None for one in said),
        identical=sum((one.text, one.token_ids) == (other.text, other.token_ids) for one, other in pairs),
        exact=sum((one.usage, one.finish_reason) == (other.usage, other.finish_reason) for one, other in pairs),
        gaps=sorted(stream.longest_gap for stream in streams),
        errors=[one.error for one in said if one.error is not None],
    )


class Killer:
    """Kills workers of a mesh, and waits for them to be back."""

    def __init__(self, mesh: Mesh, draw: random.Random, workers: int, *, twice: bool, apart: float) -> None:
        self._mesh = mesh
        self._draw = draw
        self._names = [f"worker-{number}" for number in range(workers)]
        self._twice = twice
        self._apart = apart
        self._killed: dict[str, int] = {}

    async def strike(self, within: float) -> None:
        """Kills one, or two, at a moment of the next seconds."""
        chosen = self._draw.sample(self._names, 1 + self._twice)
        self._killed = {name: int(self._mesh.process(name)["pid"]) for name in chosen}
        await asyncio.sleep(self._draw.uniform(0, within))
        for number, pid in enumerate(self._killed.values()):
            if number:
                await asyncio.sleep(self._draw.uniform(0, self._apart))
            os.kill(pid, signal.SIGKILL)

    def wait_until_back(self) -> None:
        """Returns when the router has all of them again."""
        wait_until(self._are_back, within=_BACK_SECONDS)

    def _are_back(self) -> bool:
        if any(self._mesh.process(name)["pid"] == pid for name, pid in self._killed.items()):
            return False
        answer = httpx.get(f"{self._mesh.edge}/api/v1/workers", headers=self._mesh.headers, timeout=10)
        states = [entry["load"].get("state") for entry in answer.json()["workers"]]
        return states == ["WORKER_STATE_READY"] * len(self._names)


async def disturbed(mesh: Mesh, asked: Sequence[dict[str, Any]], killer: Killer, within: float) -> list[Streamed]:
    """The streams, with kills after all of them have begun."""
    async with asyncio.TaskGroup() as tasks:
        all_flow = asyncio.Event()

        async def strike() -> None:
            await all_flow.wait()
            await killer.strike(within)

        tasks.create_task(strike())
        return await stream_all(mesh.edge_target, mesh.key, asked, flowing=all_flow.set)


@contextmanager
def mesh_of(engine: str, workers: int, *, decode_step_ms: int) -> Iterator[Mesh]:
    """A whole mesh whose workers have one kind of engine: "vllm" with the demo model, or "sim" of that speed."""
    sim = ("--sim", f"decode_step_ms={decode_step_ms},max_num_seqs=64,max_model_len=4096")
    of_engine = sim if engine == "sim" else ("--model", str(demo_model()))
    arguments = ("--engine", engine, "--workers", str(workers), *of_engine)
    with tempfile.TemporaryDirectory() as folder, running_mesh(Path(folder) / "state", *arguments, within=180) as mesh:
        yield mesh


def served_model(mesh: Mesh) -> str:
    """The name of the mesh's model."""
    models = httpx.get(f"{mesh.edge}/v1/models", headers=mesh.headers).raise_for_status().json()
    return str(models["data"][0]["id"])


async def measure(mesh: Mesh, options: argparse.Namespace) -> bool:
    """Prints every repetition and the sum; true when all is as promised."""
    asked = bodies(options, await asyncio.to_thread(served_model, mesh))
    draw = random.Random(options.seed)
    killer = Killer(mesh, draw, options.workers, twice=options.second_kill, apart=options.apart)
    # The first makes connections and caches.
    for _ in range(2):
        plain = await stream_all(mesh.edge_target, mesh.key, asked)
    undisturbed = [stream.said() for stream in plain]
    again = compared(await stream_all(mesh.edge_target, mesh.key, asked), undisturbed)
    print(f"undisturbed: {again.line()}", flush=True)
    rounds = []
    for number in range(options.repetitions):
        rounds.append(compared(await disturbed(mesh, asked, killer, options.within), undisturbed))
        print(f"{number + 1:>3}: {rounds[-1].line()}", flush=True)
        await asyncio.to_thread(killer.wait_until_back)
    gaps = sorted(gap for each in rounds for gap in each.gaps)
    streams, complete, identical, exact = (
        sum(getattr(each, name) for each in rounds) for name in ("streams", "complete", "identical", "exact")
    )
    p50, p99, most = (1000 * quantile(gaps, share) for share in (0.5, 0.99, 1.0))
    print(f"all: complete {complete}/{streams}, identical {identical}, usage exact {exact}, ", end="")
    print(f"longest gap p50 {p50:.0f} ms, p99 {p99:.0f} ms, max {most:.0f} ms")
    return bool(streams == complete == identical == exact)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("sim", "vllm"), default="sim")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--second-kill", action="store_true")
    parser.add_argument("--apart", type=float, default=0.05, help="most seconds between both kills")
    parser.add_argument("--within", type=float, default=0.5, help="seconds after the beginning in which kills fall")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with mesh_of(options.engine, options.workers, decode_step_ms=20) as mesh:
        same = uvloop.run(measure(mesh, options))
    sys.exit(not same)


if __name__ == "__main__":
    main()
