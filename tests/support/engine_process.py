"""The real engine in the process of a test: a worker's settings, and one generation."""

from typing import Any

import pytest

from services.common.errors import MeshError
from services.common.settings_worker import ModelSettings, WorkerSettings
from services.inference.request import Generation
from services.inference.vllm_engine import VllmEngine
from tests.support.sinks import Kept

__all__ = ["generate", "refusal", "worker_settings"]


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


async def refusal(engine: VllmEngine, generation: Generation) -> MeshError:
    """What submitting it raises."""
    with pytest.raises(MeshError) as caught:
        await engine.submit(generation, Kept())
    return caught.value
