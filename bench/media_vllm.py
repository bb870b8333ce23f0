"""Whether answers about pictures and sounds are those of `vllm serve`, in 2 minutes: `pytest bench/media_vllm.py`.

vLLM's server reads sounds with soundfile, which is to be installed for that: `pip install soundfile`.
"""

import asyncio
import base64
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.inference.request import Generation
from services.inference.vllm_engine import VllmEngine
from services.inference.vllm_nursery import prepare_process
from tests.support.demo_model import demo_model
from tests.support.engine_process import generate, worker_settings
from tests.support.media_models import audio_model, image_model
from tests.support.pictures import QUESTION, about, about_sounds, picture, sound
from tests.support.vllm_server import vllm_server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(240),
    # What they import and how is not ours; everything else is still an error.
    *(pytest.mark.filterwarnings(f"ignore:::{package}") for package in ("torch", "vllm", "transformers", "importlib")),
]


@pytest.mark.parametrize("count", [1, 2])
async def test_answer_and_usage_about_pictures_are_those_of_vllms_own_server(tmp_path: Path, count: int) -> None:
    pictures = [picture(seed) for seed in range(count)]
    urls = [f"data:image/png;base64,{base64.b64encode(each).decode()}" for each in pictures]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    await _compare(tmp_path, image_model, about("ours", *pictures), parts)


@pytest.mark.skipif(find_spec("soundfile") is None, reason="vLLM's server reads sounds with soundfile")
@pytest.mark.parametrize("sounds", [[sound(1)], [sound(2, seconds=3, channels=2), sound(3, seconds=29.5)]])
async def test_answer_and_usage_about_sounds_are_those_of_vllms_own_server(tmp_path: Path, sounds: list[bytes]) -> None:
    encoded = [base64.b64encode(each).decode() for each in sounds]
    parts = [{"type": "input_audio", "input_audio": {"data": each, "format": "wav"}} for each in encoded]
    await _compare(tmp_path, audio_model, about_sounds("ours", *sounds), parts)


async def _compare(folder: Path, make: Callable[[], Path], generation: Generation, parts: list[dict[str, Any]]) -> None:
    with _environment_kept():
        # First, since making a model may start threads.
        prepare_process(worker_settings(str(demo_model())))
        model = make()
    with vllm_server(folder, model=model) as server:
        with _environment_kept():
            async with VllmEngine(worker_settings(str(model), engine_args={"max_num_seqs": 8})) as engine:
                ours = await generate(engine, generation)
        await asyncio.to_thread(server.wait, within=200)
        theirs = await _theirs(server.url, parts)
    assert ours.usage is not None
    assert theirs["usage"]["prompt_tokens"] == ours.usage.prompt
    assert theirs["choices"][0]["token_ids"] == ours.token_ids


@contextmanager
def _environment_kept() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


async def _theirs(url: str, parts: list[dict[str, Any]]) -> Any:
    content = [{"type": "text", "text": "Look:"}, *parts, {"type": "text", "text": QUESTION}]
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 24,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    async with httpx.AsyncClient(timeout=100) as client:
        return (await client.post(f"{url}/v1/chat/completions", json=body)).json()
