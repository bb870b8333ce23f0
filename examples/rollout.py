"""Rollouts for reinforcement learning: a batch of samples with log-probabilities, other weights, the next batch.

    TOKENLOOM_API_KEY=tl-… python examples/rollout.py --edge http://127.0.0.1:8080 --model demo \
        --prompts prompts.txt --weights /checkpoints/step-1 --weights /checkpoints/step-2 > rollouts.jsonl

Each line of the output is one sample: its step, prompt, tokens, and their log-probabilities under the weights that drew
them. The first batch is drawn with the weights that are there, each further one after all workers of the model have
read the next checkpoint. The key needs the admin right, as only operators may change weights.

A worker process that is started again reads the weights that mesh.yaml names. Whoever wants it to have the latest ones
writes each checkpoint to that folder and reloads without a path.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

# More than the mesh has slots for would only wait, and what waits too long is refused.
CONCURRENCY = 64
# As long as a worker may take to finish what it runs and to read a checkpoint, for each worker.
RELOAD_SECONDS = 700.0
GENERATE_SECONDS = 600.0


async def rollouts(client: httpx.AsyncClient, arguments: argparse.Namespace, prompts: Sequence[str]) -> list[Any]:
    """One sample a prompt and seed, in order: what the model said, token by token."""
    room = asyncio.Semaphore(CONCURRENCY)

    async def sample(prompt: str, seed: int) -> dict[str, Any]:
        body = {
            "model": arguments.model,
            "prompt": prompt,
            "seed": seed,
            "temperature": 1.0,
            "max_tokens": arguments.max_tokens,
            "logprobs": 0,
            "return_token_ids": True,
        }
        async with room:
            # Of the classes, this one waits longest for a worker with room.
            headers = {"x-slo-class": "batch"}
            answer = await client.post("/v1/completions", json=body, headers=headers, timeout=GENERATE_SECONDS)
        answer.raise_for_status()
        choice = answer.json()["choices"][0]
        logprobs = choice["logprobs"]["token_logprobs"]
        return {"prompt": prompt, "seed": seed, "token_ids": choice["token_ids"], "logprobs": logprobs}

    return list(await asyncio.gather(*(sample(each, seed) for each in prompts for seed in range(arguments.samples))))


async def reload_weights(client: httpx.AsyncClient, model: str, path: str) -> None:
    """Has every worker of the model read a checkpoint, one after the other; the others go on serving meanwhile."""
    body = {"model": model, "reload_weights": {"path": path}}
    async with client.stream("POST", "/api/v1/workers:roll", json=body, timeout=RELOAD_SECONDS) as answer:
        if answer.is_error:
            await answer.aread()
            answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data:"):
                continue
            told = json.loads(line.removeprefix("data:"))
            if "error" in told:
                raise RuntimeError(f"{told['worker_id']}: {told['error']['message']}")
            sys.stderr.write(f"{told['worker_id']} has {path}, after {told['duration']}\n")


async def main(arguments: argparse.Namespace) -> None:
    """Draws a batch, changes the weights, draws the next one."""
    prompts = arguments.prompts.read_text(encoding="utf-8").splitlines()
    headers = {"authorization": f"Bearer {os.environ['TOKENLOOM_API_KEY']}"}
    async with httpx.AsyncClient(base_url=arguments.edge, headers=headers) as client:
        for step, weights in enumerate([None, *arguments.weights]):
            if weights is not None:
                await reload_weights(client, arguments.model, weights)
            for sample in await rollouts(client, arguments, prompts):
                print(json.dumps({"step": step, **sample}))
            # Here a trainer would take the batch, and write the checkpoint that is loaded next.


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws batches of samples, each under the weights that come next.")
    parser.add_argument("--edge", default="http://127.0.0.1:8080", metavar="URL")
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one a line")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="of each prompt; default: 4")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--weights", action="append", default=[], metavar="FOLDER", help="checkpoints, in order")
    asyncio.run(main(parser.parse_args()))
