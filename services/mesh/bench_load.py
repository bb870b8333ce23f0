"""A load: which requests, when, and what became of them."""

import asyncio
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Final

import msgspec

from services.common.config import ConfigError
from services.mesh.bench_client import Client
from services.mesh.bench_sample import Prompt, Sample

__all__ = ["MOST_AT_A_TIME", "Load", "Result", "Shape", "prompts_of", "random_prompts", "run"]

MOST_AT_A_TIME: Final = 4096
"""So many requests of a load that comes at a rate may be under way; the others are not sent, and counted."""
_WORDS: Final = (
    *("time", "river", "stone", "light", "cloud", "green", "seven", "market"),
    *("engine", "paper", "winter", "road", "sound", "table", "north", "metal"),
)
_MOST_PROMPTS: Final = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What made-up requests are like. Prompt lengths are in words, which are about a token each."""

    prompt_tokens: int
    output_tokens: int
    spread: float = 0.0
    """Lengths are drawn from (1 ± spread) times these."""
    shared_prefix_tokens: int = 0
    """How much all prompts begin with, beside their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How many requests, and when."""

    requests: int
    seconds: float | None = None
    """None is sent after so long."""
    concurrency: int | None = None
    """So many at a time, each followed by the next one."""
    rate: float | None = None
    """So many a second, at random moments, whatever is answered."""
    seed: int = 0
    """Of these moments."""


@dataclass(slots=True)
class Result:
    """What is known so far."""

    samples: list[Sample] = field(default_factory=list)
    not_sent: int = 0
    """Requests whose turn came while too many were under way."""
    began: float = 0.0
    seconds: float = 0.0


def random_prompts(shape: Shape, seed: int) -> Iterator[Prompt]:
    """Requests of a shape without end, the same for the same seed. They begin alike as far as they share a prefix."""
    source = random.Random(seed)  # noqa: S311  # nothing secret about a load
    shared = _words(source, shape.shared_prefix_tokens)
    number = 0
    while True:
        number += 1
        own = _words(source, max(0, _drawn(source, shape.prompt_tokens, shape.spread) - 1))
        text = " ".join(part for part in (shared, str(source.randrange(10**6)), own) if part)
        yield Prompt(text, _drawn(source, shape.output_tokens, shape.spread))


def prompts_of(path: Path, shape: Shape) -> Iterator[Prompt]:
    """The requests of a file again and again: JSON lines, each a text or {"prompt": …, "max_tokens": …}.

    Raises:
        ConfigError: a line can't be used, or there is none.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"--prompts: can't read {path}: {error.strerror}") from error
    prompts = [_prompt_of(path, number, line, shape) for number, line in enumerate(lines, 1) if line.strip()]
    if not 1 <= len(prompts) <= _MOST_PROMPTS:
        raise ConfigError(f"--prompts: expected 1 to {_MOST_PROMPTS} lines in {path}, got {len(prompts)}")
    return cycle(prompts)


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str
    max_tokens: int | None = None


def _prompt_of(path: Path, number: int, line: bytes, shape: Shape) -> Prompt:
    try:
        said = msgspec.json.decode(line, type=str | _Line)
    except msgspec.DecodeError as error:
        raise ConfigError(f"--prompts: line {number} of {path}: {error}") from error
    if isinstance(said, str):
        return Prompt(said, shape.output_tokens)
    return Prompt(said.prompt, said.max_tokens or shape.output_tokens)


async def run(client: Client, prompts: Iterable[Prompt], load: Load, result: Result) -> None:
    """Sends a load and notes what became of it in `result`, which is true at any time, also when this is cancelled."""
    result.began = time.perf_counter()
    limited = islice(prompts, load.requests)
    try:
        async with asyncio.TaskGroup() as tasks:
            if load.rate is not None:
                await _send_at_rate(tasks, client, limited, load, result)
            else:
                for _ in range(min(load.concurrency or 1, load.requests)):
                    tasks.create_task(_send_in_turn(client, limited, load, result))
    finally:
        result.seconds = time.perf_counter() - result.began


async def _send_in_turn(client: Client, prompts: Iterator[Prompt], load: Load, result: Result) -> None:
    for prompt in prompts:
        if _is_over(load, result):
            return
        result.samples.append(await client.ask(prompt))


async def _send_at_rate(
    tasks: asyncio.TaskGroup, client: Client, prompts: Iterator[Prompt], load: Load, result: Result
) -> None:
    assert load.rate is not None
    source = random.Random(f"arrivals {load.seed}")  # noqa: S311  # nothing secret about a load
    under_way = asyncio.Semaphore(MOST_AT_A_TIME)
    due = result.began

    async def one(prompt: Prompt) -> None:
        try:
            result.samples.append(await client.ask(prompt))
        finally:
            under_way.release()

    for prompt in prompts:
        # By the moments that were drawn, not by when the one before was sent: a late one is no reason to send fewer.
        due += source.expovariate(load.rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        if _is_over(load, result):
            return
        if under_way.locked():
            result.not_sent += 1
            continue
        await under_way.acquire()
        tasks.create_task(one(prompt))


def _is_over(load: Load, result: Result) -> bool:
    return load.seconds is not None and time.perf_counter() - result.began >= load.seconds


def _words(source: random.Random, count: int) -> str:
    return " ".join(source.choices(_WORDS, k=count))


def _drawn(source: random.Random, length: int, spread: float) -> int:
    return max(1, round(length * source.uniform(1 - spread, 1 + spread)))
