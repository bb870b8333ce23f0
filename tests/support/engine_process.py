"""A process with a VllmEngine in it, for tests that kill it: `python -m tests.support.engine_process MODEL [OTLP]`.

It generates once with the traceparent that a line on standard input gives, prints one JSON line, and goes on living.
"""

import asyncio
import json
import sys
from typing import Any

import psutil
import uvloop

from services.common import tracing
from services.common.settings import ModelSettings, WorkerSettings
from services.inference.engine import Generation, Sampling
from services.inference.vllm_engine import VllmEngine, prepare_process
from tests.support.sinks import Kept

__all__ = ["generate", "worker_settings"]


def worker_settings(model: str, *, model_settings: ModelSettings | None = None, **others: Any) -> WorkerSettings:
    """The settings of a worker with vLLM on a model's folder, or with a model of other settings."""
    return WorkerSettings(
        name="vllm-test",
        listen="127.0.0.1:0",
        metrics="127.0.0.1:0",
        advertise="127.0.0.1:0",
        routers=[],
        model=model_settings or ModelSettings(name="demo", path=model),
        engine="vllm",
        **others,
    )


async def generate(engine: VllmEngine, generation: Generation) -> Kept:
    """Submits a generation and waits for its end."""
    sink = Kept()
    await engine.submit(generation, sink)
    await sink.ended.wait()
    return sink


async def _live(model: str, endpoint: str | None) -> None:
    async with VllmEngine(worker_settings(model, otlp_endpoint=endpoint)) as engine:
        traceparent = await asyncio.to_thread(sys.stdin.readline)
        sampling = Sampling(temperature=0, max_tokens=5, ignore_eos=True)
        generation = Generation(
            id="g", model="demo", prompt="Hello", kind="text", sampling=sampling, traceparent=traceparent.strip()
        )
        sink = await generate(engine, generation)
        children = [child.pid for child in psutil.Process().children(recursive=True)]
        sys.stdout.write(json.dumps({"tokens": len(sink.token_ids), "children": children}) + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.readline)


def _main() -> None:
    model, endpoint = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    prepare_process(worker_settings(model))
    with tracing.provider("inference", endpoint=endpoint):
        uvloop.run(_live(model, endpoint))


if __name__ == "__main__":
    _main()
