"""What several test files share, since an engine takes longer to start than most of its tests take."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest_asyncio

from tests.support.demo_model import demo_model
from tests.support.media_models import IMAGES_AT_MOST, SOUNDS_AT_MOST, audio_model, image_model

if TYPE_CHECKING:
    from services.inference.vllm_engine import VllmEngine


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def seeing_engine() -> "AsyncIterator[VllmEngine]":
    """The demo model, which sees here."""
    async with _engine(image_model, {"image": IMAGES_AT_MOST}) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def hearing_engine() -> "AsyncIterator[VllmEngine]":
    """The demo model, which hears here."""
    async with _engine(audio_model, {"audio": SOUNDS_AT_MOST}) as running:
        yield running


@asynccontextmanager
async def _engine(model: Callable[[], Path], most: dict[str, int]) -> "AsyncIterator[VllmEngine]":
    # They import vLLM, which takes seconds, and most tests here need none of it.
    from services.inference.vllm_engine import VllmEngine  # noqa: PLC0415
    from services.inference.vllm_nursery import prepare_process  # noqa: PLC0415
    from tests.support.engine_process import worker_settings  # noqa: PLC0415

    environment = dict(os.environ)
    # First, since making a model may start threads.
    prepare_process(worker_settings(str(demo_model())))
    limits = {"limit_mm_per_prompt": most, "max_num_seqs": 16}
    settings = worker_settings(str(model()), engine_args=limits, max_queued=100)
    async with VllmEngine(settings) as running:
        yield running
    os.environ.clear()
    os.environ.update(environment)
