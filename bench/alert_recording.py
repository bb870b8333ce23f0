"""Records what Prometheus sees of a mesh to which things happen, for the tests of the alerts.

    python -m bench.alert_recording [--output deploy/observability/recorded.yaml]

Simulated engines on two cards of a stub NVML library; the mesh, the load, what happens and the Prometheus that scrapes
are real. The run takes a little more than four minutes; a second of it stands for fifteen in the tests, so that alerts
which wait for minutes are told of within seconds: quantiles and ratios stay what they were, rates become a fifteenth.
"""

import argparse
import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import httpx
import yaml

from tests.support.mesh import Mesh, running_mesh
from tests.support.nvml.stub import L40, Card, NvmlStub
from tests.support.prometheus import Prometheus, running_prometheus
from tests.support.vocabulary import FOLDER, asked_by_rules

_CONFIG: Final = """
models: [{name: sim}]
pools:
  - name: default
    serves: [sim]
    workers:
      - {name: worker-0, engine: sim, gpu: 0, sim: {decode_step_ms: 20, max_num_seqs: 4}}
      - {name: worker-1, engine: sim, gpu: 1, sim: {decode_step_ms: 20, max_num_seqs: 4}}
"""
_SECOND_STANDS_FOR: Final = 15
_OUTPUT: Final = FOLDER / "recorded.yaml"
_FIRST, _SECOND = replace(L40, uuid="GPU-0"), replace(L40, uuid="GPU-1")
_TOTAL: Final = 45 << 30
_HW_THERMAL_SLOWDOWN: Final = 0x40
_GPU_IS_LOST: Final = 15
_CALM_CLIENTS: Final = 3
_MANY_CLIENTS: Final = 80


@dataclass(frozen=True, slots=True)
class _Stage:
    mesh: Mesh
    stub: NvmlStub


@asynccontextmanager
async def _calm(_: _Stage) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def _hot(stage: _Stage) -> AsyncIterator[None]:
    """The first card is hot and slows itself down."""
    async with _cards(stage, replace(_FIRST, temperature=92, clock_reasons=_HW_THERMAL_SLOWDOWN), _SECOND):
        yield


@asynccontextmanager
async def _full(stage: _Stage) -> AsyncIterator[None]:
    """The second card's memory is nearly full."""
    async with _cards(stage, _FIRST, replace(_SECOND, memory_used=int(0.95 * _TOTAL))):
        yield


@asynccontextmanager
async def _lost_card(stage: _Stage) -> AsyncIterator[None]:
    async with _cards(stage, _FIRST, replace(_SECOND, error=_GPU_IS_LOST)):
        yield


@asynccontextmanager
async def _cards(stage: _Stage, *cards: Card) -> AsyncIterator[None]:
    stage.stub.show(cards)
    try:
        yield
    finally:
        stage.stub.show((_FIRST, _SECOND))


@asynccontextmanager
async def _crowded(stage: _Stage) -> AsyncIterator[None]:
    """Ten times as many clients as there is room for."""
    async with _clients(stage.mesh, _MANY_CLIENTS, pause=0):
        yield


@asynccontextmanager
async def _lost_worker(stage: _Stage) -> AsyncIterator[None]:
    """The second worker stands still."""
    pid = stage.mesh.process("worker-1")["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# What happens, for how many seconds; rates look back for 20 s, and some alerts wait for as many.
_PHASES: Final[tuple[tuple[str, Callable[[_Stage], Any], int], ...]] = (
    ("calm", _calm, 40),
    ("a card is hot", _hot, 16),
    ("calm after the hot card", _calm, 16),
    ("a card's memory is nearly full", _full, 32),
    ("calm after the full card", _calm, 10),
    ("a card is lost", _lost_card, 8),
    ("calm after the lost card", _calm, 10),
    ("a queue builds up", _crowded, 50),
    ("calm after the queue", _calm, 45),
    ("a worker stands still", _lost_worker, 12),
    ("calm after the worker", _calm, 35),
)


def main() -> None:
    """Runs and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=_OUTPUT)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stub = NvmlStub(folder)
        stub.show((_FIRST, _SECOND))
        os.environ.update(stub.environment)
        (folder / "mesh.yaml").write_text(_CONFIG)
        mesh = stack.enter_context(running_mesh(folder / "state", "--config", str(folder / "mesh.yaml")))
        targets = json.loads((mesh.state_dir / "targets.json").read_text())
        prometheus = stack.enter_context(running_prometheus(folder, targets, scrape_interval="1s"))
        began = time.time()
        phases = asyncio.run(_run(_Stage(mesh, stub)))
        recording = {
            "step": f"{_SECOND_STANDS_FOR}s",
            "phases": phases,
            "series": _series(prometheus, began, sum(phase["steps"] for phase in phases)),
        }
    text = yaml.safe_dump(recording, sort_keys=False, width=1 << 20)
    options.output.write_text(f"# Written by python -m bench.alert_recording; see there.\n{text}")
    print(f"{len(recording['series'])} series, {len(text) >> 10} KiB")


async def _run(stage: _Stage) -> list[dict[str, Any]]:
    phases = []
    async with _clients(stage.mesh, _CALM_CLIENTS, pause=0.3):
        for name, happening, seconds in _PHASES:
            print(name, flush=True)
            async with happening(stage):
                await asyncio.sleep(seconds)
            phases.append({"name": name, "steps": seconds})
    return phases


@asynccontextmanager
async def _clients(mesh: Mesh, count: int, *, pause: float) -> AsyncIterator[None]:
    """So many clients who ask one question after the other until the block is left."""
    body = {"model": "sim", "prompt": "hello", "max_tokens": 40, "ignore_eos": True, "stream": True}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=mesh.edge, headers=mesh.headers, timeout=60, limits=limits) as client:

        async def ask() -> None:
            while True:
                answer = await client.post("/v1/completions", json=body)
                answer.raise_for_status()
                await asyncio.sleep(pause)

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(ask()) for _ in range(count)]
            yield
            for task in running:
                task.cancel()


def _series(prometheus: Prometheus, began: float, seconds: int) -> list[dict[str, str]]:
    """What the rules ask of, in the notation of promtool's tests."""
    names = "|".join(sorted({*asked_by_rules(), "up"}))
    found = prometheus.get(
        "query_range", query=f'{{__name__=~"{names}"}}', start=began, end=began + seconds - 1, step=1
    )
    series = [
        {"series": _name(one["metric"]), "values": _values(dict(one["values"]), began, seconds)}
        for one in found["result"]
    ]
    return sorted(series, key=lambda one: one["series"])


def _name(labels: dict[str, str]) -> str:
    # The port of a process is another one each time.
    kept = {name: value for name, value in labels.items() if name not in ("__name__", "instance")}
    return labels["__name__"] + "{" + ",".join(f"{name}={json.dumps(kept[name])}" for name in sorted(kept)) + "}"


def _values(found: dict[float, str], began: float, seconds: int) -> str:
    """One word for each run of the same value."""
    words: list[str] = []
    each = ((found.get(round(began + second, 3)) or "_") for second in range(seconds))
    for value, run in groupby(each):
        more = sum(1 for _ in run) - 1
        gone = value == "_" and bool(words)
        if gone:
            words.append("stale")
            more -= 1
        if more >= 0:
            words.append(f"{_short(value)}x{more}" if more else _short(value))
    return " ".join(words)


def _short(value: str) -> str:
    return value if value == "_" else f"{float(value):.6g}"


if __name__ == "__main__":
    main()
