"""What clients see when an engine is lost under their streams, for tokenloom and for what peers' routers do.

    python -m bench.peers.lost [--hang SECONDS] [--smg PATH] [--sglang-router PATH] [--litellm PATH] [--repetitions 5]

Four equal simulated engines, 64 chats at once. When all of them flow, one engine is killed (SIGKILL), or, with
`--hang`, stopped for that long. Nothing is started again meanwhile; each repetition begins with everything new. All get
the same client, bodies and engines; those of the others are behind HTTP servers. Envoy alone is one of the others.
Nobody asks for a temperature, as most clients don't; what simulated engines say does not depend on it. Counted are the
answers that are whole, those that say the same as without the fault, and those that were cut although they seem whole;
measured is the longest gap of each stream that ended well.
"""

import argparse
import asyncio
import os
import random
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop

from bench.failover_client import Said, Streamed, stream_all
from bench.peers.contenders import MODEL, PEERS, Contender, Target, envoy, litellm, peer, tokenloom
from bench.routing.engine import EngineSpec
from bench.routing.runs import percentile

_SAID: Final = "the mesh keeps every stream alive when an engine is lost"
_ENGINES: Final = 4
_STREAMS: Final = 64
_WITHIN_SECONDS: Final = 60.0
_HEAD: Final = (
    f"{'router':<28}{'whole':>10}{'the same':>10}{'cut, seem whole':>17}{'gap p50 s':>11}{'p99 s':>8}{'longest s':>11}"
)


@dataclass(slots=True)
class Outcome:
    """Of all repetitions of one contender."""

    streams: int = 0
    whole: int = 0
    same: int = 0
    untrue: int = 0
    gaps: list[float] = field(default_factory=list)
    errors: set[str] = field(default_factory=set)

    def add(self, heard: Sequence[Streamed], undisturbed: Sequence[Said]) -> None:
        """One repetition."""
        for stream, before in zip(heard, undisturbed, strict=True):
            now = stream.said()
            same = (now.text, now.finish_reason) == (before.text, before.finish_reason)
            self.streams += 1
            self.whole += now.error is None
            self.same += same and now.error is None
            self.untrue += now.error is None and not same
            if now.error is None:
                self.gaps.append(stream.longest_gap)
            else:
                self.errors.add(now.error[:160])

    def line(self, name: str) -> str:
        """A row of the table."""
        counts = f"{self.whole:>6}/{self.streams}{self.same:>6}/{self.streams}{self.untrue:>17}"
        gaps = [percentile(self.gaps, share) for share in (0.5, 0.99, 1.0)] if self.gaps else [float("nan")] * 3
        return f"{name:<28}{counts}{gaps[0]:>11.3f}{gaps[1]:>8.3f}{gaps[2]:>11.3f}"


def bodies() -> list[dict[str, Any]]:
    """The chats, alike for everybody."""
    draw, words = random.Random(1), _SAID.split()
    return [
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": " ".join(draw.choices(words, k=draw.randint(4, 60)))}],
            "max_tokens": 150 - number % 7,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for number in range(_STREAMS)
    ]


async def repetition(target: Target, outcome: Outcome, draw: random.Random, hang: float | None) -> None:
    """The chats undisturbed, and again while an engine is lost."""
    asked = bodies()
    # The first makes connections and caches.
    for _ in range(2):
        undisturbed = [stream.said() for stream in await stream_all(target.host, target.key, asked)]
    if errors := {said.error for said in undisturbed if said.error}:
        raise RuntimeError(f"without a fault: {sorted(errors)[:3]}")
    async with asyncio.TaskGroup() as tasks:
        flowing = asyncio.Event()
        tasks.create_task(_lose(draw.choice(target.engines), flowing, draw.uniform(0, 0.5), hang))
        async with asyncio.timeout(_WITHIN_SECONDS):
            heard = await stream_all(target.host, target.key, asked, flowing=flowing.set)
    outcome.add(heard, undisturbed)


async def _lose(pid: int, flowing: asyncio.Event, after: float, hang: float | None) -> None:
    await flowing.wait()
    await asyncio.sleep(after)
    if hang is None:
        os.kill(pid, signal.SIGKILL)
        return
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(hang)
    finally:
        os.kill(pid, signal.SIGCONT)


def measure(contender: Contender, repetitions: int, hang: float | None) -> Outcome:
    """All repetitions."""
    specs = [EngineSpec(name=f"engine-{number}") for number in range(_ENGINES)]
    outcome, draw = Outcome(), random.Random(1)
    for _ in range(repetitions):
        with (
            tempfile.TemporaryDirectory() as folder,
            contender(Path(folder), specs) as target,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(repetition(target, outcome, draw, hang))
    return outcome


def _contenders(programs: Mapping[str, str | None]) -> dict[str, Contender]:
    found: dict[str, Contender] = {"tokenloom": tokenloom, "Envoy, round robin": envoy}
    for name, path in programs.items():
        if path is not None and name == "litellm":
            found[name] = litellm(path)
        elif path is not None:
            found[f"{name} cache_aware"] = peer(path, PEERS[name]["cache_aware"])
    return found


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (*PEERS, "litellm"):
        parser.add_argument(f"--{name}", help=f"path of the program {name}")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--hang", type=float, metavar="SECONDS", help="stop an engine for that long, do not kill it")
    options = parser.parse_args()
    contenders = _contenders({name: getattr(options, name.replace("-", "_")) for name in (*PEERS, "litellm")})
    print(_HEAD)
    for label, contender in contenders.items():
        outcome = measure(contender, options.repetitions, options.hang)
        print(outcome.line(label), flush=True)
        for error in sorted(outcome.errors)[:3]:
            print(f"  {error}", flush=True)


if __name__ == "__main__":
    main()
