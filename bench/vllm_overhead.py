"""What VllmEngine costs over the AsyncLLM inside it: `python bench/vllm_overhead.py [--model DIR]`.

One engine process serves both, in turns, with the same prompts; the figures are tokens a second and CPU microseconds of
this process a token.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop

from services.common.errors import MeshError
from services.common.settings_worker import ModelSettings, WorkerSettings
from services.inference.demo_model import make_demo_model
from services.inference.output import Delta, FinishReason, PromptEcho, StopCause, Timings, Usage
from services.inference.request import Generation, Sampling
from services.inference.vllm_engine import VllmEngine


class Counter:
    """A sink that counts tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self.done = asyncio.Event()

    def started(self, prompt_tokens: int, cached_tokens: int, echo: PromptEcho | None = None) -> None:
        """Nothing to count."""

    def delta(self, text: str, token_ids: Sequence[int]) -> None:  # noqa: ARG002
        """Counts."""
        self.tokens += len(token_ids)

    def rich_delta(self, delta: Delta) -> None:
        """Counts."""
        self.tokens += len(delta.token_ids)

    def choice_ended(self, choice: int, reason: FinishReason, stop_cause: StopCause | None) -> None:
        """Nothing to count."""

    def completed(
        self,
        reason: FinishReason,  # noqa: ARG002
        usage: Usage,  # noqa: ARG002
        timings: Timings,  # noqa: ARG002
        stop_cause: StopCause | None = None,  # noqa: ARG002
    ) -> None:
        """The end."""
        self.done.set()

    def failed(self, error: MeshError) -> None:
        """The end of the benchmark too."""
        raise error


async def ours(engine: VllmEngine, name: str, prompt: list[int], tokens: int) -> int:
    """One generation through VllmEngine."""
    sink = Counter()
    sampling = Sampling(temperature=0, max_tokens=tokens, ignore_eos=True)
    await engine.submit(Generation(id=name, model="demo", prompt=prompt, kind="tokens", sampling=sampling), sink)
    await sink.done.wait()
    return sink.tokens


async def bare(llm: Any, name: str, prompt: list[int], tokens: int) -> int:
    """One generation through AsyncLLM, as vLLM's own server uses it."""
    # The engine prepares the environment before vLLM is imported.
    from vllm import SamplingParams, TokensPrompt  # noqa: PLC0415
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    count = 0
    async for output in llm.generate(TokensPrompt(prompt_token_ids=prompt), params, name):
        count += len(output.outputs[0].token_ids)
    return count


async def measure(generate: Callable[[str, list[int]], Awaitable[int]], streams: int, mark: str) -> tuple[float, float]:
    """Tokens a second and CPU microseconds a token of `streams` generations at a time."""
    prompts = [[20 + i, *range(30, 60)] for i in range(streams)]
    begun, cpu = time.perf_counter(), time.process_time()
    counts = await asyncio.gather(*[generate(f"{mark}-{i}", prompt) for i, prompt in enumerate(prompts)])
    total = sum(counts)
    return total / (time.perf_counter() - begun), (time.process_time() - cpu) / total * 1e6


async def compare(model: Path, streams: int, tokens: int, rounds: int) -> None:
    """Prints both, and their ratio."""
    settings = WorkerSettings(
        name="bench",
        listen="127.0.0.1:0",
        metrics="127.0.0.1:0",
        advertise="127.0.0.1:0",
        routers=[],
        model=ModelSettings(name="demo", path=str(model)),
        engine="vllm",
    )
    async with VllmEngine(settings) as engine:
        llm = engine._life.backend.llm
        ways: dict[str, Callable[[str, list[int]], Awaitable[int]]] = {
            "AsyncLLM": lambda name, prompt: bare(llm, name, prompt, tokens),
            "VllmEngine": lambda name, prompt: ours(engine, name, prompt, tokens),
        }
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, generate in ways.items():
                figure = await measure(generate, streams, f"{name}-{turn}")
                # The first turn warms up.
                figures[name] += [figure] if turn else []
        rates = {name: statistics.median(rate for rate, _ in found) for name, found in figures.items()}
        for name, found in figures.items():
            print(
                f"{name:12}{rates[name]:10.0f} tokens/s {statistics.median(cpu for _, cpu in found):8.1f} µs CPU/token"
            )
        print(
            f"VllmEngine / AsyncLLM: {rates['VllmEngine'] / rates['AsyncLLM']:.3f} ({streams} streams, {rounds} rounds)"
        )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a model's folder; default: a small one, made for this")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = given.model or make_demo_model(Path(scratch) / "demo")
        uvloop.run(compare(model, given.streams, given.tokens, given.rounds))


if __name__ == "__main__":
    main()
