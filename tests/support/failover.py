"""Many streams at once, while workers are killed."""

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, Final

import openai

from tests.support.mesh import Mesh
from tests.support.waiting import eventually, wait_until

__all__ = ["POISON", "Strike", "said"]

POISON: Final = "arsenic"
"""What the engines of the large mesh die of."""

_SECOND_KILL_SECONDS = 0.02


class Strike:
    """A signal for those workers of a mesh that have most to do at that moment, each one shortly after the other."""

    def __init__(self, mesh: Mesh, count: int, by: signal.Signals = signal.SIGKILL) -> None:
        self._mesh = mesh
        self._count = count
        self._by = by
        self.pids: dict[str, int] = {}
        """Whom it hit, by name."""

    async def __call__(self) -> None:
        """Sends them the signal."""
        leases = await asyncio.to_thread(self._mesh.metric_by, "worker", "router", "tokenloom_router_worker_leases")
        busiest = sorted(leases, key=leases.__getitem__, reverse=True)[: self._count]
        assert leases[busiest[0]] > 0
        self.pids = {name: int(self._mesh.process(name)["pid"]) for name in busiest}
        for number, pid in enumerate(self.pids.values()):
            await asyncio.sleep(_SECOND_KILL_SECONDS if number else 0)
            os.kill(pid, self._by)

    def wait_until_replaced(self, within: float = 20) -> None:
        """Returns when others run in place of those that were killed, and the router knows all workers of the mesh."""
        process, workers = self._mesh.process, [entry["name"] for entry in self._mesh.state["processes"]]
        count = sum(name.startswith("worker-") for name in workers)
        wait_until(lambda: all(process(name)["pid"] != pid for name, pid in self.pids.items()), within=within)
        wait_until(lambda: self._mesh.metric("router", "tokenloom_router_workers") == count, within=within)


async def said(
    mesh: Mesh,
    model: str,
    prompts: Sequence[str],
    *,
    tokens: int,
    strike: Strike | None = None,
    more: Sequence[Mapping[str, Any]] = ({},),
) -> dict[str, tuple[str, int]]:
    """What a stream of each prompt says, and its output tokens by the usage.

    `strike` falls once all streams flow. `more` has further fields of the bodies, by turns.
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
        if strike is not None:
            await eventually(lambda: len(flowing) == len(prompts), within=20)
            await strike()
    return texts
