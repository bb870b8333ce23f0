"""A process with a VllmEngine in it, for tests that kill it: `python -m tests.support.engine_process MODEL [OTLP]`.

It generates once with the traceparent that a line on standard input gives, prints one JSON line, and goes on living.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

import psutil
import uvloop

from services.common import tracing
from services.common.errors import MeshError
from services.common.settings import ModelSettings, WorkerSettings
from services.inference.engine import FinishReason, Generation, Sampling, Timings, TokenLogprobs, Usage
from services.inference.vllm_engine import VllmEngine

__all__ = ["Kept", "generate", "worker_settings"]


class Kept:
    """A sink that keeps everything, in order."""

    def __init__(self) -> None:
        self.starts: list[tuple[int, int]] = []
        self.text = ""
        self.text_after: dict[int, str] = {}
        """The text that had come with the first so many tokens; a delta can bring several."""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.reason: FinishReason | None = None
        self.usage: Usage | None = None
        self.timings: Timings | None = None
        self.error: MeshError | None = None
        self.ended = asyncio.Event()

    def started(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Keeps it."""
        self.starts.append((prompt_tokens, cached_tokens))

    def delta(self, text: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> None:
        """Keeps it."""
        self.text += text
        self.token_ids += token_ids
        self.text_after[len(self.token_ids)] = self.text
        self.logprobs += logprobs

    def completed(self, reason: FinishReason, usage: Usage, timings: Timings) -> None:
        """Keeps it."""
        self.reason, self.usage, self.timings = reason, usage, timings
        self.ended.set()

    def failed(self, error: MeshError) -> None:
        """Keeps it."""
        self.error = error
        self.ended.set()


def worker_settings(model: str, **others: Any) -> WorkerSettings:
    """The settings of a worker with vLLM on a model's folder."""
    return WorkerSettings(
        name="vllm-test",
        listen="127.0.0.1:0",
        metrics="127.0.0.1:0",
        advertise="127.0.0.1:0",
        routers=[],
        model=ModelSettings(name="demo", path=model),
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
    with tracing.provider("inference", endpoint=endpoint):
        uvloop.run(_live(model, endpoint))


if __name__ == "__main__":
    _main()
