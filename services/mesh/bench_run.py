"""What `tokenloom bench` does."""

import asyncio
import contextlib
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from itertools import islice
from typing import Final

from services.common.config import ConfigError
from services.common.errors import MeshError, Reason
from services.mesh.bench_client import Client, openai_client, typed_client
from services.mesh.bench_load import MOST_AT_A_TIME, Load, Result, Shape, prompts_of, random_prompts, run
from services.mesh.bench_report import Objective, as_json, as_text
from services.mesh.bench_sample import Prompt
from services.mesh.edge_client import KEY_VARIABLE, Door, ask_gateway, door_of

__all__ = ["run_bench"]

_DEFAULT_CONCURRENCY: Final = 8


def run_bench(arguments: Namespace) -> int:
    """Runs the load and prints the report, also when it is interrupted; 1 where no request was answered."""
    load, prompts = _load_of(arguments), _prompts_of(arguments)
    door = _door_of(arguments)
    model = arguments.model or _first_model(door)
    result = Result()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(_client(arguments, door, model, load), prompts, load, result, arguments))
    report = as_json(result, Objective(arguments.ttft, arguments.tpot))
    if arguments.json:
        print(json.dumps({"model": model, **report}, indent=2))
    else:
        print(f"model       {model}")
        for line in as_text(report):
            print(line)
    return 0 if report["requests"]["ok"] else 1


async def _run(
    opening: AbstractAsyncContextManager[Client],
    prompts: Iterator[Prompt],
    load: Load,
    result: Result,
    arguments: Namespace,
) -> None:
    async with opening as client:
        for prompt in islice(prompts, arguments.warm_up):
            if (error := (await client.ask(prompt)).error) is not None:
                sys.stderr.write(f"tokenloom: a request to warm up failed: {error}\n")
        await run(client, prompts, load, result)


def _load_of(arguments: Namespace) -> Load:

    if arguments.rate is not None and arguments.concurrency is not None:
        raise ConfigError("--rate, --concurrency: requests come at a rate, or so many at a time: give one of them")
    concurrency = None if arguments.rate is not None else arguments.concurrency or _DEFAULT_CONCURRENCY
    return Load(requests=arguments.requests, seconds=arguments.duration, concurrency=concurrency, rate=arguments.rate)


def _prompts_of(arguments: Namespace) -> Iterator[Prompt]:

    shape = Shape(
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        spread=arguments.spread,
        shared_prefix_tokens=arguments.shared_prefix_tokens,
    )
    if arguments.prompts is not None:
        return prompts_of(arguments.prompts, shape)
    return random_prompts(shape, arguments.seed)


def _client(arguments: Namespace, door: Door, model: str, load: Load) -> AbstractAsyncContextManager[Client]:

    same = {"model": model, "ignore_eos": arguments.ignore_eos, "timeout": arguments.timeout}
    if arguments.api == "tokenloom":
        return typed_client(door, concurrency=load.concurrency or MOST_AT_A_TIME, **same)
    return openai_client(door, endpoint=arguments.endpoint, **same)


def _door_of(arguments: Namespace) -> Door:
    if arguments.edge is None:
        return door_of(arguments)
    # Other servers may want no key.
    return Door(arguments.edge.rstrip("/").removesuffix("/v1"), os.environ.get(KEY_VARIABLE, ""))


def _first_model(door: Door) -> str:
    listed = ask_gateway(door, "/v1/models")
    try:
        return str(listed["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise MeshError(Reason.MODEL_NOT_FOUND, f"{door.url} lists no model: name one with --model") from error
