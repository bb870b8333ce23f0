"""Many streams at once, while workers are killed."""

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, Final

import openai

from tests.support.mesh import Mesh
from tests.support.waiting import eventually

__all__ = ["POISON", "said"]

POISON: Final = "arsenic"
"""What the engines of the large mesh die of."""

_SECOND_KILL_SECONDS = 0.02


async def said(
    mesh: Mesh,
    model: str,
    prompts: Sequence[str],
    *,
    tokens: int,
    kill: Sequence[str] = (),
    by: signal.Signals = signal.SIGKILL,
    more: Sequence[Mapping[str, Any]] = ({},),
) -> dict[str, tuple[str, int]]:
    """What a stream of each prompt says, and its output tokens by the usage.

    `kill` names workers that are killed once all streams flow, each one shortly after the one before. `more` has
    further fields of the bodies, by turns.
    """
    flowing: set[str] = set()
    texts: dict[str, tuple[str, int]] = {}

    async def stream(client: openai.AsyncOpenAI, prompt: str, fields: Mapping[str, Any]) -> None:
        events = await client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, **fields},
        )
        parts, count = [], 0
        async for event in events:
            flowing.add(prompt)
            parts += [choice.text for choice in event.choices]
            count = event.usage.completion_tokens if event.usage else count
        texts[prompt] = "".join(parts), count

    async with mesh.async_sdk() as client, asyncio.TaskGroup() as tasks:
        for prompt, fields in zip(prompts, cycle(more), strict=False):
            tasks.create_task(stream(client, prompt, fields))
        if kill:
            await eventually(lambda: len(flowing) == len(prompts), within=20)
        for number, name in enumerate(kill):
            await asyncio.sleep(_SECOND_KILL_SECONDS if number else 0)
            os.kill(int(mesh.process(name)["pid"]), by)
    return texts
