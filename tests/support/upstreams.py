"""Engines before servers with OpenAI's API: their settings, and what they are asked."""

import asyncio
from typing import Any

from services.common.settings_worker import ModelSettings, UpstreamSettings, WatchdogSettings, WorkerSettings
from services.inference.openai_engine import OpenAIEngine
from services.inference.request import ChatMessage, Generation, Sampling
from tests.support.sinks import Kept

__all__ = ["generation", "run", "settings_for"]


def settings_for(
    url: str, *, max_queued: int = 64, watchdog: WatchdogSettings | None = None, **upstream: Any
) -> WorkerSettings:
    """Of a worker before the server at `url`, whose model is "demo" there and "here" here."""
    given = {"model": "demo", "probe_seconds": 0.1, **upstream}
    return WorkerSettings(
        name="worker-0",
        listen="127.0.0.1:0",
        metrics="127.0.0.1:0",
        advertise="127.0.0.1:0",
        routers=[],
        model=ModelSettings(name="here"),
        engine="openai",
        upstream=UpstreamSettings(url=f"{url}/v1", **given),
        max_queued=max_queued,
        watchdog=watchdog or WatchdogSettings(),
        start_seconds=30,
    )


def generation(prompt: Any = "Once upon a time", **fields: Any) -> Generation:
    """One whose kind follows from its prompt."""
    kind = "text" if isinstance(prompt, str) else "chat" if isinstance(prompt[0], ChatMessage) else "tokens"
    plain = Sampling(temperature=0, max_tokens=12)
    return Generation(**{"id": "one", "model": "here", "prompt": prompt, "kind": kind, "sampling": plain, **fields})


async def run(engine: OpenAIEngine, asked: Generation) -> Kept:
    """What comes of it. Raises MeshError."""
    kept = Kept()
    await engine.submit(asked, kept)
    async with asyncio.timeout(60):
        await kept.ended.wait()
    if kept.error is not None:
        raise kept.error
    return kept
