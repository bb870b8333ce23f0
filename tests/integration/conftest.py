"""What several test files share, since an engine takes longer to start than most of its tests take."""

import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest_asyncio

from tests.support.demo_model import demo_model
from tests.support.media_models import IMAGES_AT_MOST, image_model

if TYPE_CHECKING:
    from services.inference.vllm_engine import VllmEngine


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def seeing_engine() -> "AsyncIterator[VllmEngine]":
    """The demo model, which sees here."""
    # They import vLLM, which takes seconds, and most tests here need none of it.
    from services.inference.vllm_engine import VllmEngine, prepare_process  # noqa: PLC0415
    from tests.support.engine_process import worker_settings  # noqa: PLC0415

    environment = dict(os.environ)
    # First, since making a model may start threads.
    prepare_process(worker_settings(str(demo_model())))
    limits = {"limit_mm_per_prompt": {"image": IMAGES_AT_MOST}, "max_num_seqs": 16}
    settings = worker_settings(str(image_model()), engine_args=limits, max_queued=100)
    async with VllmEngine(settings) as running:
        yield running
    os.environ.clear()
    os.environ.update(environment)
