"""Whether answers about pictures are those of `vllm serve`: `python -m pytest bench/media_vllm.py`, about a minute."""

import asyncio
import base64
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.inference.vllm_engine import VllmEngine, prepare_process
from tests.support.engine_process import generate, worker_settings
from tests.support.media_models import image_model
from tests.support.pictures import QUESTION, about, picture
from tests.support.vllm_server import vllm_server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(240),
    # What they import and how is not ours; everything else is still an error.
    *(pytest.mark.filterwarnings(f"ignore:::{package}") for package in ("torch", "vllm", "transformers", "importlib")),
]


@pytest.mark.parametrize("count", [1, 2])
async def test_answer_and_usage_are_those_of_vllms_own_server(tmp_path: Path, count: int) -> None:
    pictures = [picture(seed) for seed in range(count)]
    environment = dict(os.environ)
    with vllm_server(tmp_path, model=image_model()) as server:
        settings = worker_settings(str(image_model()), engine_args={"max_num_seqs": 8})
        prepare_process(settings)
        async with VllmEngine(settings) as engine:
            ours = await generate(engine, about("ours", *pictures))
        os.environ.clear()
        os.environ.update(environment)
        await asyncio.to_thread(server.wait, within=200)
        theirs = await _theirs(server.url, pictures)
    assert ours.usage is not None
    assert theirs["usage"]["prompt_tokens"] == ours.usage.prompt
    assert theirs["choices"][0]["token_ids"] == ours.token_ids


async def _theirs(url: str, pictures: list[bytes]) -> Any:
    urls = [f"data:image/png;base64,{base64.b64encode(each).decode()}" for each in pictures]
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [{"type": "text", "text": "Look:"}, *content, {"type": "text", "text": QUESTION}]
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
